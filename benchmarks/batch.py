"""Decode of 16 sequences at once beside llama.cpp (llama-batched-bench, all sequences in one batch) and the wall.

    python benchmarks/batch.py MODEL [--peer FOLDER --gguf FILE] [--sequences 16] [--rounds 7] [--out FILE]

How many experts a step reads decides its wall: counted for the model by `routing.py`, here taken as if tokens chose at
random, which holds as long as the sequences' tokens differ (their share is printed)."""

from __future__ import annotations

from cases import Bench, circumstances, line, model_arguments, sample_of, wall_share
from rounds import Sample, against
from wall import decode_wall, expected_distinct

PROMPT, NEW = 16, 33


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    args = parser.parse_args()
    count = args.sequences
    bench = Bench(f"Decode, {count} sequences at once", args, max_model_len=128, max_num_seqs=count)
    prompts = bench.ours.prompts(count, PROMPT)

    def ours() -> Sample:
        return sample_of(bench.ours.run(prompts, NEW), "decode", count)

    found = bench.take_turns({"ciuic": ours}, {"llama.cpp": lambda peer: peer.batch(count, PROMPT, NEW - 1)})
    wall = decode_wall(bench.spec, bench.format, count, PROMPT + NEW / 2)
    bench.report.line(line(f"decode {bench.format}, batch {count}", found, wall, count))
    bench.report.line(f"of the wall: {against(wall_share(found, wall, count), 0.80, '%')}")
    if bench.peer is not None:
        bench.report.line(f"against llama.cpp: {against(found.ratio('ciuic', 'llama.cpp'), 3.0, 'x')}")
    if bench.spec.moe is not None:
        touched = expected_distinct(bench.spec, count)
        bench.report.line(
            f"experts read per layer: {touched:.1f} of {bench.spec.moe.num_experts}, if chosen at random; "
            f"new tokens that differ from all others: {found.fact('ciuic', 'distinct_tokens'):.0%}"
        )
    bench.report.line(circumstances(found))
    bench.close()


if __name__ == "__main__":
    main()
