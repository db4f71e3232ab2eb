"""Job files with mistakes are refused, with the line, before anything is sent; jobs from a shell are launched, seen,
stopped, and fail with an exit code and a reason."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from raylets import put_back, wait_until

import ciuic_runtime
from ciuic_runtime.cluster.job import Bench, Generate, Serve, check_job, parse_job, read_job
from ciuic_runtime.cluster.prompts import Results, read_prompts
from ciuic_runtime.cluster.run_job import Driver, left_of, why
from ciuic_runtime.cluster.submit import JobState, run
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.request import RequestOutput
from ciuic_runtime.model import Model
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.schedulers.placement import Placement

EXAMPLE = Path(__file__).parents[2] / "examples" / "job.toml"
TWO_NODES = """
[[put]]
pattern = "*"
on = "node1/cpu"

[[put]]
pattern = "layers.0-1"
on = "node0/cpu"

[[put]]
pattern = "embedding"
on = "node0/cpu"
"""


@pytest.fixture
def write(tmp_path: Path, tiny_v3: Path) -> Callable[..., Path]:
    """A job file beside three prompts and the model."""
    (tmp_path / "model").symlink_to(tiny_v3)
    (tmp_path / "p.txt").write_text("one\n\ntwo\r\nthree\n")

    def job(text: str, **files: str) -> Path:
        for name, content in files.items():
            (tmp_path / name.replace("_", ".")).write_text(content)
        (tmp_path / "job.toml").write_text(text)
        return tmp_path / "job.toml"

    return job


GENERATE = 'model = "model"\n[generate]\nprompts = "p.txt"\noutput = "out.jsonl"\n'


def test_a_job_file_says_everything(write: Callable[..., Path], tmp_path: Path) -> None:
    text = 'restarts = 3\nthreads = 1\nname = "all of it"\nformat = "bf16"\ngoal = "throughput"\ncontext = 256\n'
    text += (
        "stages = 2\n"
        + GENERATE
        + 'max_tokens = 9\ntemperature = 1\nseed = 5\nstop = "."\n[memory]\n"node1/cpu" = "1GiB"\n'
        + TWO_NODES
    )
    job = read_job(write(text))
    assert (job.name, job.kind, job.format, job.goal, job.restarts) == (
        "all of it",
        "generate",
        "bf16",
        "throughput",
        3,
    )
    assert (job.context, job.stages, job.threads, job.memory) == (256, 2, 1, {"node1/cpu": 1 << 30})
    assert job.model == (tmp_path / "model").resolve()
    assert isinstance(job.task, Generate)
    assert (job.task.prompts, job.task.output) == (tmp_path / "p.txt", tmp_path / "out.jsonl")
    assert job.task.params == ciuic_runtime.SamplingParams(max_tokens=9, temperature=1.0, seed=5, stop=(".",))
    assert job.placement
    assert [rule.on for rule in job.placement.rules] == [("node1/cpu",), ("node0/cpu",), ("node0/cpu",)]


def test_serve_and_bench_are_jobs_too(write: Callable[..., Path]) -> None:
    serve = read_job(
        write('model = "model"\n[serve]\nport = 0\nhost = "0.0.0.0"\napi_key_file = "k.txt"\n', k_txt="a\nb\n")
    )
    assert isinstance(serve.task, Serve)
    assert serve.task.config.api_keys == ("a", "b")
    bench = read_job(write('model = "model"\nkind = "bench"\n'))
    assert isinstance(bench.task, Bench)
    assert (bench.name, bench.task.rounds, bench.task.work) == ("job", 3, ciuic_runtime.Workload())


def test_placement_may_be_a_file(write: Callable[..., Path]) -> None:
    job = read_job(write('placement = "r.toml"\n' + GENERATE, r_toml='[[put]]\npattern = "*"\non = "cpu"\n'))
    assert job.placement == Placement().put("*", on="cpu")


HERE = "line 5: [generate] "
MISTAKES = {
    "no TOML": ("model = ", "job.toml is not TOML: Invalid value"),
    "no model": ('[generate]\nprompts = "p.txt"\n', "model is missing; allowed: the path of a checkpoint"),
    "model not there": ('\nmodel = "nowhere"\n[bench]\n', "line 2: no model at "),
    "nothing to do": ('model = "model"\n', "nothing is said to be done; write a table [generate], [serve] or [bench]"),
    "two kinds": (GENERATE + "[bench]\n", HERE + "and [bench] are two kinds of job"),
    "kind and table": ('kind = "bench"\n' + GENERATE, "line 1: kind is 'bench', but there is a table [generate]"),
    "strange kind": ('kind = "train"\n' + GENERATE, 'line 1: kind is \'train\'; allowed: "generate" or'),
    "table of no kind": (GENERATE + "[generates]\n", "line 5: unknown key 'generates', did you mean generate?"),
    "near miss": (GENERATE + "max_token = 5\n", HERE + "unknown key 'max_token', did you mean max_tokens?"),
    "near miss at the top": ("stage = 2\n" + GENERATE, "line 1: unknown key 'stage', did you mean stages?"),
    "in the wrong table": (GENERATE + "stages = 2\n", "[generate] unknown key 'stages'; it belongs to the top"),
    "of another kind": (GENERATE + "rounds = 2\n", HERE + "unknown key 'rounds'; it belongs to [bench]"),
    "out of range": (GENERATE + "max_tokens = 0\n", HERE + "max_tokens is 0; allowed: a whole number"),
    "no number": (GENERATE + 'temperature = "hot"\n', HERE + "temperature is 'hot'; allowed: a number from 0 to 100"),
    "NaN": (GENERATE + "top_p = nan\n", HERE + "top_p is nan; allowed: a number above 0 up to 1"),
    "no flag": (GENERATE + "ignore_eos = 1\n", HERE + "ignore_eos is 1; allowed: true or false"),
    "a flag as a number": ("stages = true\n" + GENERATE, "line 1: stages is True; allowed: a whole number of stages"),
    "seed": (GENERATE + "seed = -1\n", HERE + "seed is -1; allowed: a whole number"),
    "stop": (GENERATE + 'stop = [""]\n', HERE + "stop is ['']; allowed: a text, or a list of them"),
    "format": ('format = "int5"\n' + GENERATE, "line 1: format is 'int5'; allowed: \"auto\" or"),
    "goal": ('goal = "fast"\n' + GENERATE, "line 1: goal is 'fast'; allowed: \"latency\" or"),
    "cache policy": ('cache_policy = "lifo"\n' + GENERATE, "line 1: cache_policy is 'lifo'; allowed"),
    "restarts": ("restarts = -1\n" + GENERATE, "line 1: restarts is -1; allowed: a whole number"),
    "no prompts": ('model = "model"\n[generate]\noutput = "o.jsonl"\n', "line 2: prompts is missing; allowed"),
    "no output": ('model = "model"\n[generate]\nprompts = "p.txt"\n', "line 2: output is missing; allowed"),
    "prompts not there": (GENERATE.replace("p.txt", "q.txt"), "line 3: [generate] no prompts file "),
    "prompts of what kind": (GENERATE.replace("p.txt", "p.csv"), "line 3: [generate] prompts is 'p.csv'; allowed"),
    "no prompt in it": (GENERATE.replace("p.txt", "e.txt"), "e.txt has none; write one on each line"),
    "no JSON in it": (GENERATE.replace("p.txt", "b.jsonl"), "b.jsonl, line 2 is not JSON"),
    "output no jsonl": (GENERATE.replace("out.jsonl", "out.txt"), "line 4: [generate] output is 'out.txt'; allowed"),
    "output nowhere": (GENERATE.replace("out.j", "no/out.j"), "line 4: [generate] cannot write "),
    "output is there": (GENERATE.replace("out.j", "b.j"), "b.jsonl is there already; write resume = true"),
    "chat without text": (GENERATE.replace("p.txt", "i.jsonl") + "chat = true\n", HERE + "chat is for prompts of text"),
    "rules twice": ('placement = "e.txt"\n' + GENERATE + TWO_NODES, "line 1: placement names a file and [[put]]"),
    "rules without a file": ('placement = "none.toml"\n' + GENERATE, "line 1: cannot read placement "),
    "a wrong rule in a file": ('placement = "r.toml"\n' + GENERATE, "line 1: placement "),
    "rule's near miss": (GENERATE + '[[put]]\npatern = "*"\n', "line 5: rule 1: unknown key 'patern', did you mean"),
    "rule without on": (GENERATE + TWO_NODES + '[[put]]\npattern = "*"\n', "line 17: rule 4: on is missing"),
    "rule's pattern": (GENERATE + '[[put]]\npattern = "a..b"\non = "cpu"\n', "rule 1: placement pattern 'a..b'"),
    "rules as a text": ('put = "cpu"\n' + GENERATE, "line 1: put is 'cpu'; rules are [[put]] tables"),
    "memory": (GENERATE + '[memory]\n"node0/cpu" = "lots"\n', "line 6: [memory] node0/cpu: 'lots' is not a size"),
    "memory as a text": ('memory = "cpu=1GiB"\n' + GENERATE, "line 1: memory is 'cpu=1GiB'; write [memory]"),
    "a table as a number": ('model = "model"\nbench = 3\n', "line 2: bench is 3; it is a table, [bench]"),
    "port": ('model = "model"\n[serve]\nport = 70000\n', "line 3: [serve] port is 70000; allowed"),
    "open to all": ('model = "model"\n[serve]\nhost = "0.0.0.0"\n', "line 3: [serve] host 0.0.0.0 can be reached from"),
    "no key file": ('model = "model"\n[serve]\napi_key_file = "none"\n', "line 3: [serve] cannot read the keys in "),
    "no key in it": ('model = "model"\n[serve]\napi_key_file = "e.txt"\n', "line 3: [serve] "),
    "rounds": ('model = "model"\n[bench]\nrounds = 0\n', "line 3: [bench] rounds is 0; allowed"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(mistake: str, write: Callable[..., Path], tmp_path: Path) -> None:
    text, expected = MISTAKES[mistake]
    path = write(
        text, e_txt="\n", b_jsonl='{"prompt": "a"}\n{"prompt": \n', i_jsonl='{"prompt": [1]}\n', r_toml="put = 1\n"
    )
    with pytest.raises(InvalidInput) as found:
        read_job(path)
    message = str(found.value)
    assert message.startswith(f"job {path}")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('"text"', "has no prompt"), ('{"text": "a"}', "has no prompt"), ('{"prompt": ""}', "prompt is ''"),
        ('{"prompt": [1, true]}', "prompt is [1, True]"), ('{"prompt": "a", "id": 1}', "unknown key 'id'"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n' + line)
    with pytest.raises(InvalidInput, match=r"p\.jsonl, line 3") as found:
        read_prompts(tmp_path / "p.jsonl")
    assert expected in str(found.value)


def test_prompts_that_the_model_cannot_take_are_refused_before_anything_is_sent(write: Callable[..., Path]) -> None:
    with pytest.raises(
        InvalidInput, match=r"prompt 3 of .*p\.txt has 5 tokens, and max_tokens is 128; the context holds 130"
    ):
        check_job(write("context = 130\n" + GENERATE, p_txt="a\nb\nthree\n"))
    with pytest.raises(InvalidInput, match=r"prompt 1 of .*q\.jsonl has token id 320; .* has 0 to 319"):
        check_job(write(GENERATE.replace("p.txt", "q.jsonl"), q_jsonl='{"prompt": [5, 320]}'))


def test_the_example_is_a_job(tmp_path: Path, tiny_v3: Path) -> None:
    (tmp_path / "job_prompts.txt").write_bytes(EXAMPLE.with_name("job_prompts.txt").read_bytes())
    job = parse_job(EXAMPLE.read_text().replace("/models/deepseek-int4", str(tiny_v3)), tmp_path / "job.toml")
    assert (job.kind, job.restarts) == ("generate", 3)


def output(index: int) -> RequestOutput:
    return RequestOutput(index, (1, 2), (3,), f"text {index}", "length", 7, 0.1, 0.2)


def test_results_survive_and_end_in_order(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", ["a", "b", (1, 2)]
    results = Results(path, prompts)
    results.add(2, output(2))
    results.add(0, output(0))
    with open(path, "a") as file:
        file.write('{"index": 1, "prom')  # killed here
    again = Results(path, prompts)
    assert again.left == [1]
    again.add(1, output(1))
    again.put_in_order()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["index"], line["prompt"], line["text"]) for line in lines] == [
        (0, "a", "text 0"), (1, "b", "text 1"), (2, [1, 2], "text 2"),
    ]  # fmt: skip
    assert Results(path, ["a", "another", (1, 2)]).left == [1], "a line for another prompt is none"


@pytest.mark.parametrize(
    ("failures", "restarts", "ends"),
    [
        ([StageLost(1, "node1", "it died"), None], 1, {"done": True}),
        ([OutOfMemory("too large"), StageLost(0, "node0", "it died"), None], 2, {"done": True}),
        ([StageLost(1, "node1", "it died")] * 2, 1, "stage 1 on node1 was lost: it died"),
        ([InvalidInput("wrong")], 5, "wrong"),
        ([CiuicError("stage 0 on node0 failed")], 0, "stage 0 on node0 failed"),
    ],
)
def test_failures_are_met_with_restarts_as_far_as_there_are_any(
    failures: list[CiuicError | None],
    restarts: int,
    ends: Any,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ciuic_runtime.cluster.run_job.PAUSE", 0.0)
    monkeypatch.setattr("ciuic_runtime.cluster.run_job.plan_line", lambda schedule: "")
    driver, left = Driver(read_job(write(f"restarts = {restarts}\n" + GENERATE)), "auto"), list(failures)
    monkeypatch.setattr(driver, "_open", lambda settings: contextlib.nullcontext(SimpleNamespace(schedule=None)))

    def work(llm: Any) -> dict[str, Any]:
        if error := left.pop(0):
            raise error
        return {"done": True}

    if isinstance(ends, dict):
        assert driver._with_model(work) == ends
        assert driver.restarts == restarts == len(driver.lost)
    else:
        with pytest.raises(CiuicError, match=ends):
            driver._with_model(work)


def test_the_reason_names_the_loss_that_it_came_of() -> None:
    error = OutOfMemory("the model needs 5 GiB")
    error.__context__ = StageLost(1, "node1", "it died")
    assert why(error) == "stage 1 on node1 was lost: it died; then: the model needs 5 GiB"
    assert why(InvalidInput("wrong")) == "wrong"


class SaidJobs:
    """A cluster whose only job ends as is said."""

    def __init__(
        self, status: str, exit_code: int | None = None, said: dict[str, Any] | None = None, message: str = ""
    ):
        self.end, self.said, self.stopped = JobState("id", "", "", status, exit_code, 0.0, 1.0, message), said, False

    def follow(self, id: str, show: Callable[[str], None]) -> JobState:
        if self.end.status == "RUNNING":
            raise KeyboardInterrupt
        return self.end

    def stop(self, id: str) -> JobState:
        self.stopped = True
        return self.end

    def outcome(self, id: str) -> dict[str, Any] | None:
        return self.said


LOST = {"error": {"type": "OutOfMemory", "message": "no room", "node": "node1"}, "exit_code": 2}


@pytest.mark.parametrize(
    ("jobs", "code", "message"),
    [
        (SaidJobs("FAILED", 2, LOST), 2, "job id failed on node1: no room; finished prompts are in "),
        (SaidJobs("FAILED", -9, None, "exit code -9, logs:\nKilled"), 137, "job id failed: Killed; finished"),
        (SaidJobs("FAILED", None), 1, "job id failed: its driver ended without a word; finished"),
        (SaidJobs("STOPPED"), 130, "job id was stopped; finished"),
        (SaidJobs("RUNNING"), 130, "interrupted; job id was stopped; finished"),
    ],
)
def test_the_exit_code_is_the_drivers(jobs: Any, code: int, message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(CiuicError) as found:
        run(jobs, "id", read_job(write(GENERATE)), print)
    assert (found.value.exit_code, jobs.stopped) == (code, jobs.end.status == "RUNNING")
    assert str(found.value).startswith(message)


def test_rules_and_budgets_for_nodes_that_are_gone_no_longer_count(write: Callable[..., Path]) -> None:
    both = ["node0/cpu", "node1/cpu"]
    rules = Placement().put("*", on="CPU").put("layers.0", on="node1/cpu").put("layers.1", on=both)
    rules = rules.put("layers.2", on=both, shares=(1, 3)).put("layers.3", on=both, shares=(0, 1))
    job = replace(read_job(write(GENERATE)), placement=rules, memory={"node0/cpu": 1 << 28, "node1/cpu": 1 << 28})
    there = Topology((DeviceSpec(name="node0/cpu", kind="CPU", memory_bytes=1 << 30),))
    left = left_of(job, there)
    assert left.placement
    assert [(rule.pattern, rule.on, rule.shares) for rule in left.placement.rules] == [
        ("*", ("CPU",), ()), ("layers.1", ("node0/cpu",), ()), ("layers.2", ("node0/cpu",), (1,)),
        ("layers.3", ("node0/cpu",), ()),
    ]  # fmt: skip
    assert left.memory == {"node0/cpu": 1 << 28}
    graph = Model(job.model, "int4").graph
    assert set(left.placement.resolve(graph, there).values()) == {"node0/cpu"}


# From a shell

native = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
CIUIC = [sys.executable, "-c", "import sys; from ciuic_runtime.cli import main; main()"]
PATIENCE = 180.0  # s, on a machine that does something else besides
RESUME = "[generate]\nresume = true"


@dataclass
class Shell:
    address: str
    folder: Path
    nodes: Any
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *error: object) -> None:
        """Of a test that failed, commands may still run."""
        for process in self.begun:
            process.terminate()
            process.wait(PATIENCE)

    def begin(self, *arguments: object, where: bool = True) -> subprocess.Popen[str]:
        """A command whose output goes to `<command>.out` and `.err`."""
        command = [*CIUIC, *map(str, arguments), *(["--address", self.address] if where else [])]
        with (
            open(self.folder / f"{arguments[0]}.out", "w") as out,
            open(self.folder / f"{arguments[0]}.err", "w") as err,
        ):
            self.begun.append(subprocess.Popen(command, stdout=out, stderr=err, text=True))
        return self.begun[-1]

    def call(self, *arguments: object, code: int = 0) -> Any:
        """The JSON that a command prints."""
        process = self.begin(*arguments, "--json")
        assert process.wait(PATIENCE) == code, self.said(arguments[0])
        return json.loads((self.folder / f"{arguments[0]}.out").read_text())

    def said(self, command: object) -> str:
        return "".join((self.folder / f"{command}.{end}").read_text() for end in ("out", "err"))

    def wait_for(self, what: str, process: subprocess.Popen[str], command: str = "launch") -> None:
        limit = time.monotonic() + PATIENCE
        while what not in self.said(command):
            assert process.poll() is None, self.said(command)
            assert time.monotonic() < limit, self.said(command)
            time.sleep(0.05)


@pytest.fixture
def folder(tiny_int4: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_int4)
    (tmp_path / "p.txt").write_text("".join(f"prompt number {i}\n" for i in range(12)))
    return tmp_path


@pytest.fixture
def shell(cluster: Any, folder: Path) -> Iterator[Shell]:
    with Shell(cluster.address, folder, cluster) as shell:
        yield shell


def job(shell: Shell, max_tokens: int, more: str = "", rules: str = TWO_NODES) -> Path:
    path = shell.folder / "job.toml"
    settings = f"context = 400\nthreads = 1\nmax_num_seqs = 2\n{more}"
    path.write_text(f"{settings}{GENERATE}max_tokens = {max_tokens}\nignore_eos = true\n{rules}")
    return path


def driver_of_a_job() -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ciuic_runtime.cluster.run_job" in process.cmdline():
                return process
    raise AssertionError("no job runs")


@contextlib.contextmanager
def paused(process: psutil.Process) -> Iterator[None]:
    """So that it cannot end while it is looked at."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def kill_second_node(shell: Shell) -> None:
    [node] = shell.nodes.worker_nodes
    raylet = node.all_processes["raylet"][0].process
    raylet.kill()
    raylet.wait()


@native
def test_a_job_of_two_nodes_is_launched_seen_and_done(shell: Shell, tiny_int4: Path) -> None:
    put_back(shell.nodes, 2)
    process = shell.begin("launch", job(shell, 150), "--json")
    shell.wait_for(" prompts, ", process)
    with paused(driver_of_a_job()):
        [listed] = shell.call("jobs")["jobs"]
        assert (listed["name"], listed["kind"], listed["status"]) == ("job", "generate", "RUNNING")
        assert "looking at node1" in shell.call("logs", listed["id"])["log"]
    assert process.wait(PATIENCE) == 0, shell.said("launch")
    done = json.loads((shell.folder / "launch.out").read_text())
    assert (done["id"], done["status"], done["exit_code"], done["restarts"]) == (listed["id"], "SUCCEEDED", 0, 0)
    assert (done["result"]["finished"], done["result"]["new_tokens"]) == (12, 12 * 150)
    lines = [json.loads(line) for line in Path(done["result"]["output"]).read_text().splitlines()]
    with ciuic_runtime.LLM(tiny_int4, max_model_len=400, max_num_seqs=2, threads=1) as llm:
        params = ciuic_runtime.SamplingParams(max_tokens=150, ignore_eos=True)
        expected = llm.generate([line["prompt"] for line in lines], params)
    assert [line["token_ids"] for line in lines] == [list(o.token_ids) for o in expected]

    (shell.folder / "out.jsonl").unlink()
    sent = shell.call("launch", shell.folder / "job.toml", "--detach")["id"]
    assert shell.call("stop", sent)["status"] == "STOPPED"


@native
@pytest.mark.slow
def test_a_job_whose_node_is_lost_says_which_and_why(shell: Shell) -> None:
    """Each node has memory for its half: what is left cannot hold the model."""
    put_back(shell.nodes, 2)
    half = '[memory]\n"node0/cpu" = "1500KiB"\n"node1/cpu" = "1500KiB"\n'
    process = shell.begin("launch", job(shell, 300, rules=TWO_NODES + half), "--json")
    shell.wait_for(" prompts, ", process)
    kill_second_node(shell)
    assert process.wait(PATIENCE) == 2, shell.said("launch")
    error = json.loads((shell.folder / "launch.out").read_text())["error"]
    assert error["exit_code"] == 2
    assert "failed on node1: stage 1 on node1 was lost: " in error["message"]
    assert "cannot hold the model" in error["message"]
    assert f"finished prompts are in {shell.folder / 'out.jsonl'}" in error["message"]
    assert 0 < len((shell.folder / "out.jsonl").read_text().splitlines()) < 12


@native
@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_and_ctrl_c_ends_it_with_the_job(folder: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("ciuic-ray-*"))
    (folder / "p.txt").write_text("one\n" * 200)
    with Shell("", folder, None) as shell:
        process = shell.begin("launch", job(shell, 300, rules=""), where=False)
        shell.wait_for(" prompts, ", process)
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, shell.said("launch")
        assert re.search(r"interrupted; job job-\w+ was stopped; finished prompts are in ", shell.said("launch"))
        assert 0 < len((folder / "out.jsonl").read_text().splitlines()) < 200
    wait_until(lambda: not any(p.is_running() for p in started), "processes are left")
    assert set(Path(tempfile.gettempdir()).glob("ciuic-ray-*")) == before
    ours = {str(p.pid) for p in started}  # other tests may run beside this one
    assert not [f.name for f in Path("/dev/shm").iterdir() if ours & set(re.findall(r"\d+", f.name))]


@native
@pytest.mark.slow
def test_a_job_that_was_stopped_is_followed_asked_and_resumed(shell: Shell, tiny_int4: Path) -> None:
    put_back(shell.nodes, 2)
    prompts = 24  # so many that they are not done before the job is stopped
    (shell.folder / "p.txt").write_text("".join(f"prompt number {i}\n" for i in range(prompts)))
    sent = shell.call("launch", job(shell, 300), "--detach")["id"]
    follow = shell.begin("logs", sent, "--follow")
    shell.wait_for(" prompts, ", follow, "logs")
    [answer] = shell.call("replan", sent)["models"]
    assert (answer["id"], answer["moves"]) == (sent, False)
    assert answer["text"] == "there is no node that the plan does not know: node0, node1"
    assert sent in shell.call("stop", "nobody", code=2)["error"]["message"], "which jobs there are"
    assert shell.call("stop", sent)["status"] == "STOPPED"
    assert {s["id"]: s["status"] for s in shell.call("jobs")["jobs"]}[sent] == "STOPPED"
    assert "is there already" in shell.call("launch", shell.folder / "job.toml", code=2)["error"]["message"]
    assert follow.wait(PATIENCE) == 0
    assert "looking at node1" in shell.said("logs")
    assert "ciuic-result" not in shell.said("logs")
    output = shell.folder / "out.jsonl"
    before = output.read_text().splitlines()
    assert 0 < len(before) < prompts

    (shell.folder / "job.toml").write_text((shell.folder / "job.toml").read_text().replace("[generate]", RESUME))
    done = shell.call("launch", shell.folder / "job.toml")["result"]
    assert (done["finished"], done["kept"]) == (prompts, len(before))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(prompts))
    assert all(json.loads(line) in lines for line in before)
    with ciuic_runtime.LLM(tiny_int4, max_model_len=400, max_num_seqs=2, threads=1) as llm:
        params = ciuic_runtime.SamplingParams(max_tokens=300, ignore_eos=True)
        expected = llm.generate([line["prompt"] for line in lines], params)
    assert [line["token_ids"] for line in lines] == [list(o.token_ids) for o in expected]


@native
@pytest.mark.slow
def test_a_job_begins_again_when_its_node_comes_back(shell: Shell) -> None:
    """Each node has memory for its half: the model fits again when there are two of them."""
    put_back(shell.nodes, 2)
    half = '[memory]\n"node0/cpu" = "1500KiB"\n"node1/cpu" = "1500KiB"\n'
    process = shell.begin("launch", job(shell, 300, "restarts = 3\n", rules=TWO_NODES + half), "--json")
    shell.wait_for(" prompts, ", process)
    kill_second_node(shell)
    shell.wait_for("; restart 1 of 3 in 5 s", process)
    put_back(shell.nodes, 2)
    assert process.wait(PATIENCE) == 0, shell.said("launch")
    done = json.loads((shell.folder / "launch.out").read_text())
    assert done["restarts"] in (1, 2)
    assert "stage 1 on node1 was lost: " in done["lost"][0]
    assert (done["result"]["finished"], done["result"]["new_tokens"]) == (12, 12 * 300)
    assert re.search(r"[1-9]\d* of 12 prompts, ", shell.said("launch").split("; restart 1 of 3")[0])
