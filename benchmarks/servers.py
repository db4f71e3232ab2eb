"""The two servers under load: `ciuic serve` and llama.cpp's `llama-server`, started as programs with the same number of
sequences and the same context for each. Knows their options; what is asked of them, it does not.

llama-server is built as `peer.py --help` says, with -DLLAMA_BUILD_SERVER=ON and the target llama-server."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load import HOST, MODEL, Server
from tokenizers import Tokenizer, decoders, models

LONGEST_START = 600.0  # s


@dataclass(frozen=True)
class Shape:
    """What a server must hold."""

    sequences: int
    context: int  # tokens of each
    threads: int


def ciuic_serve(model: Path, shape: Shape, port: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ciuic")), "serve", str(model), "--host", HOST, "--port", str(port),
        "--model-name", MODEL, "--max-num-seqs", str(shape.sequences), "--context", str(shape.context),
        "--threads", str(shape.threads),
    ]  # fmt: skip


def llama_server(program: Path, gguf: Path, shape: Shape, port: int) -> list[str]:
    """As many slots; the context that is given is that of all slots together. Flash attention on, weights repacked, the
    file read into memory rather than mapped; idle slots keep what they computed and are not copied aside."""
    return [
        str(program), "-m", str(gguf), "--alias", MODEL, "--host", HOST, "--port", str(port),
        "-t", str(shape.threads), "-np", str(shape.sequences), "-c", str(shape.sequences * shape.context),
        "-fa", "on", "-lm", "none", "-b", "2048", "-ub", "512", "--cache-ram", "0", "--fit", "off", "--no-ui",
        "-lv", "1",
    ]  # fmt: skip


@contextmanager
def started(command: list[str], port: int, asks: str = "/health") -> Iterator[Server]:
    """The server, ready when it answers what is asked; it is stopped and waited for at the end, so that its processor
    time is known to be ours."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_ready(child, port, asks)
            yield Server(port, child.pid)
        except BaseException:
            log.seek(0)
            print("".join(log.readlines()[-20:]), file=sys.stderr)
            raise
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_until_ready(child: subprocess.Popen[bytes], port: int, asks: str) -> None:
    end = time.monotonic() + LONGEST_START
    while time.monotonic() < end:
        if child.poll() is not None:
            raise SystemExit(f"the server ended with code {child.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}{asks}", timeout=5):
                return
        except OSError:  # not listening yet, or still loading (503)
            time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {LONGEST_START:.0f} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def with_tokenizer(model: Path, vocab_size: int, folder: Path) -> Path:
    """The model as it is, if it has a tokenizer; else links to its files in `folder`, beside one that names tokens as
    `make_model.py` does in the peer's file: a server turns ids into text."""
    if model.is_file() or (model / "tokenizer.json").exists():
        return model
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.absolute())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    names += [f"token{i}" for i in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
