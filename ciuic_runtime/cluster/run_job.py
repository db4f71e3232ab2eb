"""The driver of a job, started by Ray on the head: opens the model over the cluster's nodes, does what the job says,
and begins again after failures. Prints how far it is, and at its end one line for whoever follows; knows no submission.

python -m ciuic_runtime.cluster.run_job [--address HOST:PORT] [--insecure]    with the job in CIUIC_JOB"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ciuic_runtime.bench import bench
from ciuic_runtime.cluster.job import Bench, Generate, Job, Serve, parse_job, prompt_ids, settings_of
from ciuic_runtime.cluster.prompts import Results, read_prompts
from ciuic_runtime.cluster.submit import JOB, RESULT
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.setup import what_counts
from ciuic_runtime.report import bench_report
from ciuic_runtime.schedulers.workload import Workload
from ciuic_runtime.server.config import default_name
from ciuic_runtime.server.serve import listening, serve
from ciuic_runtime.show import bench_summary, plan_line

BATCH = 256  # prompts at once with the engine, which runs as many of them as fit
PAUSE, LONGEST_PAUSE = 5.0, 60.0  # s before the first restart, doubled for each further one: nodes may come back
PROGRESS_SECONDS = 2.0


@dataclass
class Driver:
    job: Job
    address: str
    insecure: bool = False
    restarts: int = 0  # so far
    lost: list[str] = field(default_factory=list)  # what each restart was for

    def run(self) -> dict[str, Any]:
        """What the job came to; raises CiuicError when there are no restarts left."""
        task = self.job.task
        if isinstance(task, Generate):
            return self._generate(task)
        if isinstance(task, Serve):
            return self._with_model(lambda llm: _serve(llm, self.job, task), serving=True, kv_tokens=task.kv_tokens)
        return self._with_model(lambda llm: _bench(llm, task), workload=task.work)

    def _generate(self, task: Generate) -> dict[str, Any]:
        begin, prompts, ids = time.perf_counter(), read_prompts(task.prompts), prompt_ids(self.job, task)
        results = Results(task.output, prompts)
        work = Workload(max(map(len, ids)), task.params.max_tokens, min(len(ids), self.job.max_num_seqs or len(ids), 8))
        if kept := len(results.lines):
            _say(f"{kept} of {len(prompts)} prompts are in {task.output} already")
        if results.left:
            self._with_model(lambda llm: _complete(llm, task, ids, results), workload=work)
        results.put_in_order()
        return {
            "output": str(task.output), "prompts": len(prompts), "finished": len(results.lines), "kept": kept,
            "new_tokens": results.new_tokens, "seconds": time.perf_counter() - begin,
        }  # fmt: skip

    def _with_model(self, work: Callable[[LLM], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """Opens the model and works with it, again after failures that another try may not have."""
        while True:
            opened = False
            try:
                with self._open(settings) as llm:
                    opened = True
                    _say(plan_line(llm.schedule))
                    return work(llm)
            except CiuicError as error:
                once_fitted = isinstance(error, OutOfMemory) and (opened or self.restarts)  # before a node was lost
                if (isinstance(error, InvalidInput) and not once_fitted) or self.restarts >= self.job.restarts:
                    raise
                self.restarts += 1
                self.lost.append(why(error))
                pause = min(LONGEST_PAUSE, PAUSE * 2 ** (self.restarts - 1))
                _say(f"{self.lost[-1]}; restart {self.restarts} of {self.job.restarts} in {pause:.0f} s")
            time.sleep(pause)

    def _open(self, settings: dict[str, Any]) -> LLM:
        hw = DeviceManager.from_ray(self.address, insecure=self.insecure, progress=_say)
        job = self.job
        if self.restarts:
            job = left_of(job, hw.topology)
        return LLM(
            job.model, devices=hw, executor="ray", address=self.address, insecure=self.insecure,
            **{**settings_of(job), **settings},
        )  # fmt: skip


def left_of(job: Job, topology: Topology) -> Job:
    """With the rules and budgets that count for nodes that are there."""
    rules, memory = what_counts(job.placement, job.memory, topology)
    return replace(job, placement=rules, memory=memory)


def why(error: BaseException) -> str:
    """The error, and the loss that it came of where it does not say so itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StageLost) and seen is not error:
            return f"{seen}; then: {error}"
        seen = seen.__cause__ or seen.__context__
    return str(error)


def node(error: BaseException) -> str | None:
    """That was lost, as the schedule calls it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, StageLost):
        seen = seen.__cause__ or seen.__context__
    return seen.node or None if isinstance(seen, StageLost) else None


# Generate


def _complete(llm: LLM, task: Generate, ids: Sequence[Sequence[int]], results: Results) -> dict[str, Any]:
    begin = said = time.perf_counter()
    before = results.new_tokens
    while batch := results.left[:BATCH]:
        for _, output in llm.stream([ids[i] for i in batch], task.params):
            if output.finish_reason:
                results.add(batch[output.index], output)
                now = time.perf_counter()
                if now - said > PROGRESS_SECONDS or len(results.lines) == len(ids):
                    said, rate = now, (results.new_tokens - before) / (now - begin)
                    _say(f"{len(results.lines)} of {len(ids)} prompts, {rate:.3g} new tokens/s")
    return {}


# Serve and bench


def _serve(llm: LLM, job: Job, task: Serve) -> dict[str, Any]:
    config = replace(task.config, model_name=task.config.model_name or default_name(job.model))
    urls: list[str] = []
    with listening(config) as address:
        serve(llm, config, address, urls.append)
    return {"url": urls[0] if urls else None}


def _bench(llm: LLM, task: Bench) -> dict[str, Any]:
    found = bench(llm, task.work, task.rounds, progress=_say)
    print(bench_summary(llm, found), flush=True)
    return bench_report(llm, found)


# The process


def main(arguments: Sequence[str]) -> int:
    """The exit code. Whatever happens, the last line says what came of it."""
    parser = ArgumentParser()
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "auto"))
    parser.add_argument("--insecure", action="store_true")
    options = parser.parse_args(arguments)
    _show_warnings()
    driver: Driver | None = None
    try:
        document = json.loads(os.environ[JOB])
        job = parse_job(document["text"], document["file"], begun=True)
        driver = Driver(job, options.address, options.insecure)
        result = driver.run()
    except CiuicError as error:
        return _failed(driver, error, why(error), error.exit_code)
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except Exception as error:
        traceback.print_exc()
        return _failed(driver, error, f"{type(error).__name__}: {error}", 1)
    _report({"result": result, "restarts": driver.restarts, "lost": driver.lost})
    return 0


def _failed(driver: Driver | None, error: Exception, message: str, code: int) -> int:
    _say(message)
    restarts, lost = (driver.restarts, driver.lost) if driver else (0, [])
    found = {"type": type(error).__name__, "message": message, "node": node(error)}
    _report({"error": found, "exit_code": code, "restarts": restarts, "lost": lost})
    return code


def _report(document: dict[str, Any]) -> None:
    print(RESULT + json.dumps(document), flush=True)


def _say(what: str) -> None:
    print(f"ciuic: {what}", flush=True)


def _show_warnings() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("ciuic: %(message)s"))
    log = logging.getLogger("ciuic")
    log.handlers[:], log.propagate = [handler], False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
