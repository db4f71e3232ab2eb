"""The task graph of a model: its tasks and pages, and how much work each is, against formulas written out here."""

from __future__ import annotations

import pytest

from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.models.config import load_spec, read_config
from ciuic_runtime.models.graph import PREFILL_CHUNK, SCORE_ROWS, build_graph
from ciuic_runtime.models.tensors import tensors
from ciuic_runtime.schedulers import cost
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Page, Step, Task, TaskGraph, Work

TINY = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip

# One operation and one byte per second: seconds are operations and bytes.
UNIT = DeviceSpec("sim:0", "SIM", memory_bandwidth=1.0, matrix_rates={"bfloat16": 1.0})


@pytest.fixture(autouse=True)
def whole_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed forms are computed with the whole of a device's limits, not the share assumed by default."""
    monkeypatch.setattr(cost, "ASSUMED_COMPUTE_UTILISATION", 1.0)
    monkeypatch.setattr(cost, "ASSUMED_MEMORY_UTILISATION", 1.0)


def work(name: str, task: str, step: Step) -> tuple[float, float]:
    """(flops, bytes) of a task."""
    cost = CostModel(Topology((UNIT,))).task(build_graph(load_spec(name)).task(task), UNIT, step)
    return cost.compute_s, cost.memory_s


def test_layers_and_their_tasks() -> None:
    graph = build_graph(load_spec("deepseek-v3"))
    assert [layer.name for layer in graph.layers] == [f"layers.{i}" for i in range(61)]
    dense, moe = graph.layers[2], graph.layers[3]
    assert [t.kind for t in dense.tasks] == ["norm", "attention", "norm", "mlp"]
    assert [t.kind for t in moe.tasks] == ["norm", "attention", "norm", "router", "shared_experts", "experts"]
    assert graph.tasks[0].name == "embedding"
    assert [t.name for t in graph.tasks[-2:]] == ["final_norm", "head"]
    assert len(moe.weights) == 5 + 256
    assert moe.nbytes == sum(page.nbytes for page in moe.weights)
    assert graph.pages["layers.14.experts.27"] == Page("layers.14.experts.27", 3 * 7168 * 2048 * 2)


@pytest.mark.parametrize(
    "name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"]
)
def test_pages_hold_every_tensor_once(name: str) -> None:
    spec = load_spec(name)
    graph = build_graph(spec, "float32")
    assert graph.nbytes == 4 * sum(t.num_parameters for t in tensors(spec)) == 4 * graph.parameters
    assert list(graph.rows) == [row for task in graph for row, _ in task.rows]


def test_tied_embeddings_are_one_page() -> None:
    tied = build_graph(read_config(TINY | {"tie_word_embeddings": True}))
    untied = build_graph(read_config(TINY | {"tie_word_embeddings": False}))
    assert tied.task("head").pages == tied.task("embedding").pages
    assert untied.nbytes - tied.nbytes == 320 * 64 * 2
    assert tied.rows["head"].name == "embedding"


def test_selection_bias_stays_in_float32() -> None:
    graph = build_graph(load_spec("deepseek-v3"), "bfloat16")
    assert graph.rows["layers.3.router"].nbytes == 2 * 256 * 7168 + 4 * 256


def test_order_errors_name_the_task() -> None:
    first = Task("a", "mlp", None, (Page("a", 1),), Work(), Work(), after=("b",))
    with pytest.raises(ValueError, match="a depends on b, which does not come before it"):
        TaskGraph("g", (first,))
    alone = Task("a", "mlp", None, (Page("a", 1),), Work(), Work())
    with pytest.raises(ValueError, match="task a occurs twice in graph g"):
        TaskGraph("g", (alone, alone))
    with pytest.raises(ValueError, match="g has no tasks"):
        TaskGraph("g", ())
    with pytest.raises(ValueError, match="no task named b in g"):
        TaskGraph("g", (alone,)).task("b")


def test_equal_graphs_have_equal_hashes() -> None:
    spec = read_config(TINY)
    one, other = build_graph(spec), build_graph.__wrapped__(spec)
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one != build_graph(spec, "float32")


def test_v2_lite_attention_of_a_prompt_is_expanded() -> None:
    n, start = 100, 28
    context, pairs = n + start, sum(start + i for i in range(1, n + 1))
    flops, nbytes = work("deepseek-v2-lite", "layers.5.attention", Step.prefill(n, start=start))
    projections = 2 * n * (2048 * 16 * 192 + 2048 * (512 + 64) + 16 * 128 * 2048)
    expansion = 2 * context * 512 * 16 * (128 + 128)
    scores, values = 2 * pairs * 16 * 192, 2 * pairs * 16 * 128
    assert flops == projections + expansion + scores + values
    weights = 2 * (2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048)
    assert nbytes == weights + n * 4 * 2048 * 2 + context * 576 * 2


def test_v3_attention_of_generated_tokens_is_absorbed() -> None:
    batch, context = 3, 1000
    flops, nbytes = work("deepseek-v3", "layers.60.attention", Step.decode(context, batch))
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 128 * 128 * 7168
    absorbed = 128 * 128 * 512 + 128 * 512 * 128  # queries into the latent space, results out of it
    attention = context * (128 * 576 + 128 * 512)
    assert flops == 2 * batch * (projections + absorbed + attention)
    weights = 2 * (projections + 512 * 128 * 256 + 1536 + 512)
    assert nbytes == weights + batch * (4 * 7168 * 2 + context * 576 * 2)


def test_grouped_query_attention() -> None:
    spec = read_config(TINY | {"num_key_value_heads": 2})
    task = build_graph(spec).task("layers.1.attention")
    cost = CostModel(Topology((UNIT,))).task(task, UNIT, Step.decode(50))
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64
    assert cost.compute_s == 2 * weights + 50 * 2 * 2 * 64
    assert cost.memory_s == 2 * weights + 4 * 64 * 2 + 50 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("name", "layer", "hidden", "width", "k", "shared"),
    [("deepseek-v2-lite", 3, 2048, 1408, 6, 2), ("deepseek-v3", 30, 7168, 2048, 8, 1)],
)
def test_experts(name: str, layer: int, hidden: int, width: int, k: int, shared: int) -> None:
    expert = 3 * hidden * width
    flops, nbytes = work(name, f"layers.{layer}.experts", Step.decode(10))
    assert flops == 2 * k * expert
    assert nbytes == pytest.approx(2 * k * expert + 3 * k * hidden * 2)  # one token reads exactly k experts
    flops, nbytes = work(name, f"layers.{layer}.shared_experts", Step.decode(10))
    assert (flops, nbytes) == (2 * shared * expert, 2 * shared * expert + 3 * hidden * 2)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_a_token_costs_two_operations_per_active_parameter(name: str) -> None:
    """At context 0: attention has nothing to attend, norms and vectors are small."""
    graph = build_graph(load_spec(name))
    cost = CostModel(Topology((UNIT,)))
    for step in (Step.decode(0), Step("prefill", 1, 1, 0, 1, 1)):
        total = sum(cost.task(task, UNIT, step).compute_s for task in graph)
        assert total == pytest.approx(2 * graph.active_parameters, rel=0.001)


def test_a_chunk_that_ends_no_prompt_does_not_read_the_head() -> None:
    within = Step("prefill", 512, 1, 512 * 513 / 2, 512, sampled=0)
    assert work("deepseek-v3", "head", within) == (0, 0)
    flops, nbytes = work("deepseek-v3", "head", Step.prefill(512))
    assert flops == 2 * 7168 * 129280
    assert nbytes == 7168 * 129280 * 2 + 7168 * 2 + 129280 * 4


def test_cache_is_the_latent() -> None:
    graph = build_graph(load_spec("deepseek-v3"))
    assert graph.kv_bytes_per_token == 61 * 576 * 2
    assert graph.task("layers.0.attention").kv_bytes_per_token == 576 * 2


def test_working_memory_grows_with_the_context_of_one_sequence() -> None:
    """V2-Lite at 4096 positions: expanded keys and values, their float32 copies, scores and their softmax. A process
    was seen to grow by 297 MiB for 512 tokens and 204 MiB for 64."""
    graph = build_graph(load_spec("deepseek-v2-lite"))
    expanded = 16 * 4096 * ((128 + 128 + 192) * 2 + (192 + 192 + 128) * 4)
    scores = 8 * 16 * 4096
    whole = graph.working_bytes(1, 512, 4096) - graph.working_bytes(1, 512, 0)
    assert whole == expanded + scores * 256
    assert whole == pytest.approx(297 * 2**20, rel=0.1)
    short = graph.working_bytes(1, 64, 4096) - graph.working_bytes(1, 64, 0)
    assert short == pytest.approx(204 * 2**20, rel=0.1)
    # Sequences are attended one after the other; what more of them add is their tokens and logits.
    assert graph.working_bytes(8, 512, 4096) - graph.working_bytes(1, 512, 4096) == 7 * 3 * 4 * 102400
    assert graph.working_bytes(1000, 1, 0) > graph.working_bytes(512, 1, 0) + 488 * 3 * 4 * 102400  # decode is wider


def test_constants_are_those_of_the_engine() -> None:
    from ciuic_runtime.engine.config import RuntimeConfig
    from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS
    from ciuic_runtime.ops.attention import QUERY_ROWS
    from ciuic_runtime.schedulers.workload import CACHE_BLOCK_TOKENS

    assert QUERY_ROWS == SCORE_ROWS
    assert RuntimeConfig().prefill_chunk == PREFILL_CHUNK
    assert BLOCK_TOKENS == CACHE_BLOCK_TOKENS
