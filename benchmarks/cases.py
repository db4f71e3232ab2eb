"""What the benchmarks of a model's speed share: the case of a step beside the wall and the peer, and its line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from ours import Ours, Run
from peer import Peer, add_peer_arguments, peer_from
from process import cpu_seconds
from rounds import Measured, Report, Sample, common_arguments, note, take_turns
from wall import Wall

from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.spec import ModelSpec

MOST_IDLE_CPU = 0.02  # of a core, by our process while a rival runs: more, and we would be the rival's noisy neighbour


def model_arguments(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    parser = common_arguments(description, rounds)
    parser.add_argument("model", type=Path, help="folder written by make_model.py, packed or bf16")
    add_peer_arguments(parser)
    return parser


class Bench:
    """One program's run: the model in its process, the peer if there is one, the report."""

    def __init__(self, title: str, args: argparse.Namespace, **settings: int) -> None:
        self.args = args
        self.spec: ModelSpec = read_config(args.model)
        self.format = self.spec.packed or self.spec.default_dtype
        self.peer: Peer | None = peer_from(args)
        self.report = Report(title, args.out)
        self.ours = Ours(args.model, threads=args.threads, **settings)
        note(f"loaded in {self.ours.ready['load_s']:.0f} s")

    def take_turns(
        self, ours: Mapping[str, Callable[[], Sample]], theirs: Mapping[str, Callable[[Peer], Sample]]
    ) -> Measured:
        """Cases of ours, after one run each that does not count, and the peer's, if there is one."""
        turns = dict(ours)
        for run in ours.values():
            run()
        if (peer := self.peer) is not None:
            for name, case in theirs.items():
                turns[name] = self._while_we_sleep(lambda case=case: case(peer))  # type: ignore[misc]
        return take_turns(turns, self.args.rounds, self.args.threads, [self.ours.pid])

    def _while_we_sleep(self, run: Callable[[], Sample]) -> Callable[[], Sample]:
        def turn() -> Sample:
            before = cpu_seconds(self.ours.pid)
            sample = run()
            used = cpu_seconds(self.ours.pid) - before
            if used > MOST_IDLE_CPU * sample.facts["seconds"]:
                note(f"while llama.cpp ran, our process should have slept: it used {used:.1f} s of processor time")
            return sample

        return turn

    def close(self) -> None:
        self.ours.close()
        self.report.save()


def sample_of(run: Run, phase: str, sequences: int) -> Sample:
    return Sample(run.rate(phase, sequences), {"distinct_tokens": run.distinct_tokens()})


def wall_share(found: Measured, wall: Wall, tokens: int, case: str = "ciuic") -> float:
    """Median over rounds of rate / rate at the wall of that turn's own limits; `tokens` in one pass over the wall."""
    return found.median(case, lambda turn: turn.sample.rate * wall.seconds(turn.limits) / tokens)


def line(name: str, found: Measured, wall: Wall, tokens: int, case: str = "ciuic", rival: str = "llama.cpp") -> str:
    rate = found.median(case)
    seconds = tokens / rate
    text = (
        f"{name:30} {rate:8.2f} tok/s  {seconds * 1e3:8.2f} ms  {wall.nbytes / seconds / 1e9:5.1f} GB/s  "
        f"{wall.ops / seconds / 1e12:5.2f} TOP/s  {wall_share(found, wall, tokens, case):6.1%} of the wall"
    )
    if rival in found.rounds[0]:
        text += f"   {rival} {found.median(rival):8.2f} tok/s  {found.ratio(case, rival):5.2f}x"
    return text


def circumstances(found: Measured) -> str:
    """How far the figures can be trusted, for the end of a table."""
    spreads = ", ".join(f"{case} {found.spread(case):.0%}" for case in found.rounds[0])
    return f"{found}; machine: {found.limits}; spread: {spreads}"
