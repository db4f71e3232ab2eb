"""Decode of one sequence, at empty context and at context 1024, beside llama.cpp and the wall.

    python benchmarks/decode.py MODEL [--peer FOLDER --gguf FILE] [--rounds 7] [--out FILE]

With a bf16 model (`make_model.py bf16`), which has no peer here, the wall alone is the measure (goal 88 %)."""

from __future__ import annotations

from cases import Bench, circumstances, line, model_arguments, sample_of, wall_share
from rounds import Sample, against
from wall import decode_wall

NEW = 33  # the first comes from the prompt's pass, so 32 steps
LONG = 1024
GOALS = {"int4": 0.85, "int8": 0.85, "bfloat16": 0.88}


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("--peer-at-context", action="store_true", help="llama.cpp at context 1024 too: minutes a round")
    args = parser.parse_args()
    bench = Bench("Decode, one sequence", args, max_model_len=LONG + 64, max_num_seqs=1)
    short, long = (bench.ours.prompts(1, n, seed=n) for n in (1, LONG))

    def ours(prompts: list[list[int]]) -> Sample:
        return sample_of(bench.ours.run(prompts, NEW), "decode", 1)

    rivals = {"llama.cpp": lambda p: p.decode(NEW - 1)}
    if args.peer_at_context:
        rivals["llama.cpp at 1024"] = lambda p: p.decode(NEW - 1, context=LONG)
    found = bench.take_turns({"ciuic": lambda: ours(short), "ciuic at 1024": lambda: ours(long)}, rivals)
    wall = decode_wall(bench.spec, bench.format, context=NEW / 2)
    wall_at_long = decode_wall(bench.spec, bench.format, context=LONG + NEW / 2)
    report = bench.report
    report.line(line(f"decode {bench.format}, empty context", found, wall, 1))
    report.line(
        line(f"decode {bench.format}, context {LONG}", found, wall_at_long, 1, "ciuic at 1024", "llama.cpp at 1024")
    )
    report.line(f"of the wall: {against(wall_share(found, wall, 1), GOALS[bench.format], '%')}")
    loss = 1 - found.ratio("ciuic at 1024", "ciuic")
    report.line(f"lost at context {LONG}: {against(loss, 0.08, '%', at_most=True)}")
    if bench.peer is not None:
        report.line(f"against llama.cpp: {against(found.ratio('ciuic', 'llama.cpp'), 1.8, 'x')}")
    report.line(f"new tokens that differ from all others: {found.fact('ciuic', 'distinct_tokens'):.0%}")
    report.line(circumstances(found))
    bench.close()


if __name__ == "__main__":
    main()
