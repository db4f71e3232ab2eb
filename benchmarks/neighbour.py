"""Decode beside one busy process: what is kept of the throughput, ours and llama.cpp's. Threads that wait for each
other lose more than their share of the processors; what is fair is the share that the neighbour leaves.

    python benchmarks/neighbour.py MODEL [--peer FOLDER --gguf FILE] [--rounds 5] [--out FILE]

The neighbour spins on one core (no memory traffic). Of T threads and a spinner on T cores, T / (T + 1) of the
processors is left if the system divides them evenly, (T - 1/2) / T if the spinner keeps to one core."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cases import Bench, circumstances, model_arguments, sample_of
from rounds import Sample, take_turns

NEW = 33


@contextmanager
def spinning() -> Iterator[None]:
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def disturbed(run: Callable[[], Sample]) -> Callable[[], Sample]:
    def turn() -> Sample:
        with spinning():
            return run()

    return turn


def main() -> None:
    args = model_arguments(__doc__, rounds=5).parse_args()
    bench = Bench("Decode beside a busy process", args, max_model_len=128, max_num_seqs=1)
    prompts = bench.ours.prompts(1, 1)
    runs: dict[str, Callable[[], Sample]] = {
        "ciuic": lambda: sample_of(bench.ours.run(prompts, NEW), "decode", 1),
    }
    if (peer := bench.peer) is not None:
        runs["llama.cpp"] = lambda: peer.decode(NEW - 1)
    runs["ciuic"]()
    turns = {
        f"{name}{how}": (disturbed(run) if how else run) for name, run in runs.items() for how in ("", ", disturbed")
    }
    found = take_turns(turns, args.rounds, args.threads, [bench.ours.pid])
    fair = args.threads / (args.threads + 1)
    for name in runs:
        alone, beside = found.median(name), found.median(f"{name}, disturbed")
        kept = found.ratio(f"{name}, disturbed", name)
        bench.report.line(
            f"{name:12} alone {alone:8.2f} tok/s   beside a busy process {beside:8.2f} tok/s   keeps {kept:.0%} "
            f"(an even share of the processors: {fair:.0%})"
        )
    bench.report.line(circumstances(found))
    bench.close()


if __name__ == "__main__":
    main()
