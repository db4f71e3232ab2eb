"""Prefill of 512 tokens beside llama.cpp, the wall and the processor's int8 peak.

    python benchmarks/prefill.py MODEL [--peer FOLDER --gguf FILE] [--tokens 512] [--rounds 5] [--out FILE]

Two ceilings are printed. The peak is that of the fastest int8 instruction (AMX where there is one). The wall counts
that 512 tokens touch every expert, each by a few dozen rows only: reading their weights takes longer than multiplying
them, so at the wall the peak is not reached, and the line says which share of the peak the wall allows."""

from __future__ import annotations

from cases import Bench, circumstances, line, model_arguments, sample_of, wall_share
from rounds import Sample, Turn, against
from wall import prefill_wall


def main() -> None:
    parser = model_arguments(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    tokens: int = args.tokens
    settings = {"max_model_len": tokens + 64, "max_num_seqs": 1, "prefill_chunk": tokens}
    bench = Bench(f"Prefill, {tokens} tokens", args, **settings)
    prompts = bench.ours.prompts(1, tokens)

    def ours() -> Sample:
        return sample_of(bench.ours.run(prompts, 1), "prefill", 1)

    found = bench.take_turns({"ciuic": ours}, {"llama.cpp": lambda peer: peer.prefill(tokens)})
    wall = prefill_wall(bench.spec, bench.format, tokens)
    int8 = bench.format != "bfloat16"

    def peak(turn: Turn) -> float:
        return turn.limits.int8_peak if int8 else turn.limits.bf16_peak

    of_peak = found.median("ciuic", lambda turn: turn.sample.rate / tokens * wall.ops / peak(turn))
    allowed = found.median("ciuic", lambda turn: wall.ops / wall.seconds(turn.limits) / peak(turn))
    of_vnni = found.median("ciuic", lambda turn: turn.sample.rate / tokens * wall.ops / (turn.limits.vnni_int8 or 1))
    bench.report.line(line(f"prefill {bench.format}, {tokens} tokens", found, wall, tokens))
    kind = "int8" if int8 else "bf16"
    bench.report.line(f"of the {kind} peak: {against(of_peak, 0.65, '%')}; the wall allows {allowed:.1%}")
    if int8:
        bench.report.line(f"of the int8 peak of vector instructions (VNNI): {of_vnni:.1%}")
    bench.report.line(f"of the wall: {wall_share(found, wall, tokens):.1%}")
    if bench.peer is not None:
        bench.report.line(f"against llama.cpp: {against(found.ratio('ciuic', 'llama.cpp'), 5.5, 'x')}")
    bench.report.line(circumstances(found))
    bench.close()


if __name__ == "__main__":
    main()
