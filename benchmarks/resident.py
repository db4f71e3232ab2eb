"""What slots cost where everything fits: a packed model whose pages lie in slots of the memory hierarchy, beside the
same as plain tensors. Both processes live throughout, which takes twice the model's memory.

    python benchmarks/resident.py MODEL [--rounds 30] [--out FILE]

A virtual machine's memory may be by turns half as fast, for seconds. So they take short turns, in pairs, with a look at
the memory before, between and after: a pair counts if the three are within 5 % of each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ours import Ours
from rounds import Report, against, common_arguments

import ciuic_runtime as ciuic
from ciuic_runtime.devices.bandwidth import memory_rate

TURNS = {"decode": (1, 13), "prefill": (256, 1)}  # phase -> tokens of the prompt, new ones
MOST_COST, MOST_CHANGE = 0.02, 0.05
PATIENCE = 2  # times as many pairs as are to count
LOOKS = 3

Turn = Callable[[int], float]  # number of the pair -> tokens/s


@dataclass(frozen=True, slots=True)
class Pair:
    in_slots: float  # tokens/s
    plain: float
    memory: tuple[float, ...]  # bytes/s

    @property
    def counts(self) -> bool:
        return max(self.memory) <= min(self.memory) * (1 + MOST_CHANGE)

    @property
    def cost(self) -> float:
        return 1 - self.in_slots / self.plain


def main() -> None:
    parser = common_arguments(__doc__, rounds=30)
    parser.add_argument("model", type=Path, help="folder written by `make_model.py packed`")
    args = parser.parse_args()
    report = Report("Slots where everything fits", args.out)
    cpu, *others = ciuic.DeviceManager(path=None).get_devices("CPU")
    if others or memory_rate(cpu, args.threads) is None:
        raise SystemExit("this needs a machine with one memory, a quarter of which is free to be looked at")
    start = partial(Ours, args.model, threads=args.threads, max_model_len=1024, max_num_seqs=1)
    with start(paged=True) as slots, start(paged=False) as plain:
        for phase in TURNS:
            turns = (partial(_turn, ours, phase) for ours in (slots, plain))
            pairs = _pairs(*turns, lambda: _look(cpu, args.threads), args.rounds)
            report.line(_line(phase, [p for p in pairs if p.counts], len(pairs)))
            report.line(_line(f"{phase}, void ones too", pairs, len(pairs)))
    report.save()


def _pairs(slots: Turn, plain: Turn, look: Callable[[], float], wanted: int) -> list[Pair]:
    """Until so many count; who goes first alternates."""
    done: list[Pair] = []
    for turn in (slots, plain):
        turn(-1)
    before = look()
    while sum(p.counts for p in done) < wanted and len(done) < PATIENCE * wanted:
        first, second = (slots, plain) if len(done) % 2 else (plain, slots)
        one, between, other, after = first(len(done)), look(), second(len(done)), look()
        rates = (one, other) if first is slots else (other, one)
        done.append(Pair(*rates, (before, between, after)))
        before = after
    return done


def _turn(ours: Ours, phase: str, number: int) -> float:
    prompt, new = TURNS[phase]
    return ours.run(ours.prompts(1, prompt, seed=number), new).rate(phase, 1)


def _look(cpu: ciuic.DeviceSpec, threads: int) -> float:
    return statistics.median(memory_rate(cpu, threads) or 0.0 for _ in range(LOOKS))


def _line(name: str, pairs: list[Pair], tried: int) -> str:
    if not pairs:
        return f"{name}: none of {tried} pairs counts"
    costs = [p.cost for p in pairs]
    low, _, high = statistics.quantiles(costs, n=4) if len(costs) > 1 else costs * 3
    return (
        f"{name:23} in slots {statistics.median(p.in_slots for p in pairs):7.2f} tok/s   "
        f"plain {statistics.median(p.plain for p in pairs):7.2f} tok/s   "
        f"slots cost {against(statistics.median(costs), MOST_COST, '%', at_most=True)}, half of them {low:.1%} to "
        f"{high:.1%}; {len(pairs)} of {tried} pairs"
    )


if __name__ == "__main__":
    main()
