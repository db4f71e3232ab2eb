"""Peak resident memory, read from outside the process (VmHWM): ours after prefill, decode and a batch, as a multiple of
the packed weights; llama.cpp's beside it.

    python benchmarks/memory.py MODEL [--peer FOLDER --gguf FILE] [--out FILE]"""

from __future__ import annotations

from cases import Bench, model_arguments
from rounds import against
from wall import packed_nbytes


def main() -> None:
    args = model_arguments(__doc__, rounds=1).parse_args()
    bench = Bench("Peak memory", args, max_model_len=1024 + 64, max_num_seqs=16)
    weights = packed_nbytes(bench.spec, bench.format)
    bench.report.line(f"weights {bench.format:34} {weights / 1e9:6.2f} GB")
    for count, prompt, new in ((0, 0, 0), (1, 512, 32), (1, 1024, 32), (16, 16, 32)):
        name = f"{count} x ({prompt} + {new}) tokens" if count else "loaded"
        if count:
            bench.ours.run(bench.ours.prompts(count, prompt), new)
        seen = bench.ours.memory()
        bench.report.line(
            f"ciuic, {name:35} peak {seen.peak / 1e9:6.2f} GB  {seen.peak / weights:5.3f} x weights   now "
            f"{seen.resident / 1e9:.2f} ({seen.anonymous / 1e9:.2f} anonymous, {seen.huge / 1e9:.2f} in huge pages)"
        )
    bench.report.line(f"peak: {against(bench.ours.memory().peak / weights, 1.1, ' x weights', at_most=True)}")
    bench.ours.close()
    if bench.peer is not None:
        size = bench.peer.gguf.stat().st_size
        for name, mapped in (("file read into memory", False), ("file mapped, its default", True)):
            peak = bench.peer.peak_memory(mapped)
            bench.report.line(f"llama.cpp, {name:31} peak {peak / 1e9:6.2f} GB  {peak / size:5.3f} x file")
    bench.report.save()


if __name__ == "__main__":
    main()
