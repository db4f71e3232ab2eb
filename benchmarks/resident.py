"""What slots cost where everything fits: a packed model whose pages lie in slots of the memory hierarchy, beside the
same as plain tensors. Both processes live throughout and take turns, which takes twice the model's memory.

    python benchmarks/resident.py MODEL [--rounds 7] [--out FILE]"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cases import circumstances, sample_of
from ours import Ours
from rounds import Report, Sample, against, common_arguments, take_turns

PROMPTS = {"decode": (1, 65), "prefill": (512, 1)}  # phase -> tokens of the prompt, new ones
MOST_COST = 0.02


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("model", type=Path, help="folder written by `make_model.py packed`")
    args = parser.parse_args()
    report = Report("Slots where everything fits", args.out)
    start = partial(Ours, args.model, threads=args.threads, max_model_len=1024, max_num_seqs=1)
    with start(paged=True) as slots, start(paged=False) as plain:
        rivals = {
            f"{name}, {phase}": partial(_turn, ours, phase)
            for phase in PROMPTS
            for name, ours in (("slots", slots), ("plain", plain))
        }
        for run in rivals.values():
            run()
        found = take_turns(rivals, args.rounds, args.threads, [slots.pid, plain.pid])
    for phase in PROMPTS:
        in_slots, beside = f"slots, {phase}", f"plain, {phase}"
        cost = 1 - found.ratio(in_slots, beside)
        report.line(
            f"{phase:8} in slots {found.median(in_slots):8.2f} tok/s   plain {found.median(beside):8.2f} tok/s   "
            f"slots cost {against(cost, MOST_COST, '%', at_most=True)}"
        )
    report.line(circumstances(found))
    report.save()


def _turn(ours: Ours, phase: str) -> Sample:
    prompt, new = PROMPTS[phase]
    return sample_of(ours.run(ours.prompts(1, prompt), new), phase, 1)


if __name__ == "__main__":
    main()
