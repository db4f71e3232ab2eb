"""The peer: llama.cpp's own benchmark programs, run on the same machine and read by their JSON.

Building it (outside this checkout; its source is vendored in a package of the registry, version 0.3.36):

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -G Ninja -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF \\
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF \\
        -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF .
    ninja -C build llama-bench llama-batched-bench

Where the processor has AMX, that build aborts with this model: stacks of matrices are put into AMX buffers and are then
not multiplied from there, and gcc 12 leaves out the stores of the tile configuration. Two lines mend it: in
ggml/src/ggml-cpu/amx/amx.cpp, `supports_op` must return false unless `ggml_n_dims(op->src[0]) == 2`; in mmq.cpp beside
it, `__asm__ volatile("" : : "r"(&tc) : "memory");` goes before `_tile_loadconfig(&tc)`. Or build without AMX
(-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8). Try both and measure against the faster.

Then give the benchmarks `--peer build/bin` and `--gguf FILE` (written by `make_model.py gguf`). Alone:

    python benchmarks/peer.py --peer build/bin --gguf FILE      decode, context 1024, batch 16, prefill, memory"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limited import MemoryLimit
from process import Finished, run_watched
from rounds import Measured, Report, Sample, common_arguments, take_turns


@dataclass(frozen=True)
class Peer:
    """`folder` holds llama-bench and llama-batched-bench. Flash attention on, weights repacked, the file read into
    memory rather than mapped (else both the file and its repacked copy count)."""

    folder: Path
    gguf: Path
    threads: int

    def decode(self, tokens: int = 32, context: int = 0, repeats: int = 3) -> Sample:
        return self._bench("-p", "0", "-n", str(tokens), "-d", str(context), "-r", str(repeats))

    def prefill(self, tokens: int = 512, repeats: int = 2) -> Sample:
        return self._bench("-p", str(tokens), "-n", "0", "-r", str(repeats))

    def batch(self, sequences: int = 16, prompt: int = 16, tokens: int = 32) -> Sample:
        size = sequences * (prompt + tokens)
        done = run_watched(
            [str(self.folder / "llama-batched-bench"), "-m", str(self.gguf), "-t", str(self.threads), "-fa", "on",
             "-lm", "none", "-c", str(size), "-b", "2048", "-ub", "512", "-npp", str(prompt), "-ntg", str(tokens),
             "-npl", str(sequences), "--output-format", "jsonl"]
        )  # fmt: skip
        [row] = _rows(done)
        return Sample(row["speed_tg"], {"peak": done.peak, "seconds": done.seconds})

    def limited(self, limit: MemoryLimit, tokens: int, prompt: int, repeats: int) -> tuple[float, float]:
        """Decode and prefill rates with the file mapped, under a limit smaller than the file. The first repeat finds
        nothing in memory and does not count."""
        program = str(self.folder / "llama-bench")
        fixed = ["-m", str(self.gguf), "-t", str(self.threads), "-fa", "on", "-lm", "mmap", "-o", "jsonl"]
        _forget(self.gguf)  # what others have left in the page cache would not count against the limit
        # Not repacked: a repacked copy would stand in memory beside the mapped file.
        rates = []
        for options in (["-p", "0", "-n", str(tokens)], ["-p", str(prompt), "-n", "0"]):
            done = run_watched(limit.command([program, *fixed, *options, "-r", str(repeats + 1), "--repack", "0"]))
            [row] = _rows(done)
            rates.append(statistics.median(row["samples_ts"][1:]))
        return rates[0], rates[1]

    def peak_memory(self, mapped: bool) -> int:
        """Bytes, of a short run; mapped: the file and the repacked copy of its weights both count while in memory."""
        return self._run("-p", "512", "-n", "8", "-r", "1", mode="mmap" if mapped else "none").peak

    def _bench(self, *options: str) -> Sample:
        done = self._run(*options)
        [row] = _rows(done)
        return Sample(statistics.median(row["samples_ts"]), {"peak": done.peak, "seconds": done.seconds})

    def _run(self, *options: str, mode: str = "none") -> Finished:
        program = str(self.folder / "llama-bench")
        fixed = ["-m", str(self.gguf), "-t", str(self.threads), "-fa", "on", "-lm", mode, "-o", "jsonl"]
        return run_watched([program, *fixed, *options])


def _forget(file: Path) -> None:
    """Drops the file's pages from the page cache."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _rows(done: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    folder, file = os.environ.get("CIUIC_PEER"), os.environ.get("CIUIC_PEER_GGUF")
    parser.add_argument("--peer", type=Path, default=folder, help="folder with llama-bench (CIUIC_PEER)")
    parser.add_argument("--gguf", type=Path, default=file, help="the peer's model (CIUIC_PEER_GGUF)")


def peer_from(args: argparse.Namespace) -> Peer | None:
    """None where no peer was given: ours is then measured against the wall only."""
    if args.peer is None or args.gguf is None:
        return None
    if not (args.peer / "llama-bench").exists():
        raise SystemExit(f"no llama-bench in {args.peer}; `peer.py --help` says how to build it")
    return Peer(args.peer.absolute(), args.gguf, args.threads)


def main() -> None:
    parser = common_arguments(__doc__, rounds=3)
    add_peer_arguments(parser)
    args = parser.parse_args()
    peer = peer_from(args)
    if peer is None:
        raise SystemExit("give --peer and --gguf")
    report = Report("llama.cpp alone", args.out)
    cases = {
        "decode, batch 1, empty context": peer.decode,
        "decode, batch 1, context 1024": lambda: peer.decode(context=1024),
        "decode, batch 16": peer.batch,
        "prefill, 512 tokens": peer.prefill,
    }
    for name, run in cases.items():
        found: Measured = take_turns({"llama.cpp": run}, args.rounds, args.threads)
        report.line(
            f"{name:34} {found.median('llama.cpp'):8.2f} tok/s  spread {found.spread('llama.cpp'):.0%}  "
            f"peak {found.fact('llama.cpp', 'peak') / 1e9:.2f} GB  {found}; {found.limits}"
        )
    report.save()


if __name__ == "__main__":
    main()
