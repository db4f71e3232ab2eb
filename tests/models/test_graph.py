"""The task graph of a model: its tasks and pages, and how much work each is, against formulas written out here."""

from __future__ import annotations

import pytest

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.model import parse_format
from ciuic_runtime.models.config import load_spec, read_config
from ciuic_runtime.models.graph import PREFILL_CHUNK, SCORE_ROWS, activation_dtype, build_graph, cache_dtype
from ciuic_runtime.models.layout import KERNEL_FORMATS, LAYOUT_VERSION, page_layout
from ciuic_runtime.models.tensors import tensors
from ciuic_runtime.schedulers import cost
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Page, Step, Task, TaskGraph, Work

TINY = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip

# One operation and one byte per second: seconds are operations and bytes.
UNIT = DeviceSpec("sim:0", "SIM", memory_bandwidth=1.0, matrix_rates={"bfloat16": 1.0, "float32": 1.0})


@pytest.fixture(autouse=True)
def whole_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed forms are computed with the whole of a device's limits, not the share assumed by default."""
    monkeypatch.setattr(cost, "ASSUMED_COMPUTE_UTILISATION", 1.0)
    monkeypatch.setattr(cost, "ASSUMED_MEMORY_UTILISATION", 1.0)


def work(name: str, task: str, step: Step, format: str = "bfloat16") -> tuple[float, float]:
    """(flops, bytes) of a task."""
    cost = CostModel(Topology((UNIT,)), format).task(build_graph(load_spec(name), format).task(task), UNIT, step)
    return cost.compute_s, cost.memory_s


def padded(nbytes: int) -> int:
    """A page's bytes in a format that kernels compute: whole pages of memory."""
    return -(-nbytes // 4096) * 4096


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


def test_router_and_vectors_stay_in_float32() -> None:
    """Small beside what they decide: the router with its selection bias, norms."""
    graph = build_graph(load_spec("deepseek-v3"), "bfloat16")
    assert graph.rows["layers.3.router"].nbytes == padded(4 * 256 * 7168 + 4 * 256)
    assert graph.rows["layers.3.mlp_norm"].nbytes == padded(4 * 7168)
    roles = {p.role: p.layout for p in page_layout(load_spec("deepseek-v3"), "layers.3.router", "bfloat16").parts}
    assert roles == {"gate": "f32-rows", "e_score_correction_bias": "f32-rows"}


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


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_v2_lite_attention_of_a_prompt_is_expanded(format: str) -> None:
    n, start = 100, 28
    context, pairs = n + start, sum(start + i for i in range(1, n + 1))
    flops, nbytes = work("deepseek-v2-lite", "layers.5.attention", Step.prefill(n, start=start), format)
    projections = 2 * n * (2048 * 16 * 192 + 2048 * (512 + 64) + 16 * 128 * 2048)
    expansion = 2 * context * 512 * 16 * (128 + 128)
    scores, values = 2 * pairs * 16 * 192, 2 * pairs * 16 * 128
    assert flops == projections + expansion + scores + values
    matrices, norm, absorbed = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048, 512, 512 * 16 * 128
    if format == "float32":
        assert nbytes == 4 * (matrices + norm) + n * 4 * 2048 * 4 + context * 576 * 4
        return
    # The keys' expansion lies there twice; of it a prompt reads the form that is not turned round.
    weights = padded(2 * (matrices + absorbed) + 4 * norm) - 2 * absorbed
    assert nbytes == weights + n * 4 * 2048 * 4 + context * 576 * 2


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_v3_attention_of_generated_tokens_is_absorbed(format: str) -> None:
    batch, context = 3, 1000
    flops, nbytes = work("deepseek-v3", "layers.60.attention", Step.decode(context, batch), format)
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 128 * 128 * 7168
    absorbed = 128 * 128 * 512 + 128 * 512 * 128  # queries into the latent space, results out of it
    attention = context * (128 * 576 + 128 * 512)
    assert flops == 2 * batch * (projections + absorbed + attention)
    matrices, norms, keys = projections + 512 * 128 * 256, 1536 + 512, 512 * 128 * 128
    if format == "float32":
        assert nbytes == 4 * (matrices + norms) + batch * (4 * 7168 * 4 + context * 576 * 4)
        return
    weights = padded(2 * (matrices + keys) + 4 * norms) - 2 * keys
    assert nbytes == weights + batch * (4 * 7168 * 4 + context * 576 * 2)


@pytest.mark.parametrize(("format", "size", "cached"), [("float32", 4, 4), ("bfloat16", 2, 2)])
def test_grouped_query_attention(format: str, size: int, cached: int) -> None:
    spec = read_config(TINY | {"num_key_value_heads": 2})
    task = build_graph(spec, format).task("layers.1.attention")
    cost = CostModel(Topology((UNIT,)), format).task(task, UNIT, Step.decode(50))
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64
    assert cost.compute_s == 2 * weights + 50 * 2 * 2 * 64
    assert padded(size * weights) == size * weights
    assert cost.memory_s == size * weights + 4 * 64 * 4 + 50 * 2 * 32 * cached


@pytest.mark.parametrize(("format", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize(
    ("name", "layer", "hidden", "width", "k", "shared"),
    [("deepseek-v2-lite", 3, 2048, 1408, 6, 2), ("deepseek-v3", 30, 7168, 2048, 8, 1)],
)
def test_experts(
    name: str, layer: int, hidden: int, width: int, k: int, shared: int, format: str, size: int
) -> None:  # fmt: skip
    expert = 3 * hidden * width
    assert padded(2 * expert) == 2 * expert
    flops, nbytes = work(name, f"layers.{layer}.experts", Step.decode(10), format)
    assert flops == 2 * k * expert
    assert nbytes == pytest.approx(size * k * expert + 3 * k * hidden * 4)  # one token reads exactly k experts
    flops, nbytes = work(name, f"layers.{layer}.shared_experts", Step.decode(10), format)
    assert (flops, nbytes) == (2 * shared * expert, size * shared * expert + 3 * hidden * 4)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_a_token_costs_two_operations_per_active_parameter(name: str) -> None:
    """At context 0: attention has nothing to attend, norms and vectors are small."""
    graph = build_graph(load_spec(name))
    cost = CostModel(Topology((UNIT,)))
    for step in (Step.decode(0), Step("prefill", 1, 1, 0, 1, 1)):
        total = sum(cost.task(task, UNIT, step).compute_s for task in graph)
        assert total == pytest.approx(2 * graph.active_parameters, rel=0.001)


@pytest.mark.parametrize(("format", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_chunk_that_ends_no_prompt_does_not_read_the_head(format: str, size: int) -> None:
    within = Step("prefill", 512, 1, 512 * 513 / 2, 512, sampled=0)
    assert work("deepseek-v3", "head", within, format) == (0, 0)
    flops, nbytes = work("deepseek-v3", "head", Step.prefill(512), format)
    assert flops == 2 * 7168 * 129280
    assert nbytes == 7168 * 129280 * size + 7168 * 4 + 129280 * 4


def test_cache_is_the_latent() -> None:
    graph = build_graph(load_spec("deepseek-v3"))
    assert graph.kv_bytes_per_token == 61 * 576 * 2
    assert graph.task("layers.0.attention").kv_bytes_per_token == 576 * 2


def test_torch_working_memory_grows_with_the_context_of_one_sequence() -> None:
    """V2-Lite's first layer at 4096 positions in float32: expanded keys and values, a copy of the keys, scores and
    their softmax. A process was seen to grow by 407 MiB for 512 tokens and 205 MiB for 64, its cache apart."""
    graph = build_graph(load_spec("deepseek-v2-lite"), "float32")
    expanded = 16 * 4096 * ((128 + 128 + 192) * 4 + 192 * 4)
    scores = 8 * 16 * 4096
    assert graph.working_bytes(1, 512, 4096) - graph.working_bytes(1, 512, 0) == expanded + scores * 256
    assert graph.working_bytes(1, 64, 4096) - graph.working_bytes(1, 64, 0) == expanded + scores * 64
    assert graph.working_bytes(1, 512, 4096) == pytest.approx(407 * 2**20, rel=0.1)
    assert graph.working_bytes(1, 64, 4096) == pytest.approx(205 * 2**20, rel=0.1)
    # Sequences are attended one after the other; what more of them add is their tokens and logits.
    assert graph.working_bytes(8, 512, 4096) - graph.working_bytes(1, 512, 4096) == 7 * 3 * 4 * 102400
    assert graph.working_bytes(1000, 1, 0) > graph.working_bytes(512, 1, 0) + 488 * 3 * 4 * 102400  # decode is wider


@pytest.mark.parametrize("format", KERNEL_FORMATS)
def test_kernels_expand_a_context_block_by_block(format: str) -> None:
    """Per position there is the latent alone. In bfloat16 a process grew by 41 MiB for 512 tokens at 4096 positions."""
    graph = build_graph(load_spec("deepseek-v2-lite"), format)
    assert graph.working_bytes(1, 512, 4096) - graph.working_bytes(1, 512, 0) == 2 * 512 * 4096
    assert 41 * 2**20 < graph.working_bytes(1, 512, 4096) < 2 * 41 * 2**20
    assert graph.working_bytes(8, 512, 4096) - graph.working_bytes(1, 512, 4096) == 7 * 4 * 102400
    assert graph.working_bytes(1000, 1, 0) > graph.working_bytes(512, 1, 0) + 488 * 4 * 102400  # decode is wider


def test_constants_are_those_of_the_engine() -> None:
    from ciuic_runtime.engine.config import RuntimeConfig
    from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS
    from ciuic_runtime.ops.attention import QUERY_ROWS
    from ciuic_runtime.schedulers.workload import CACHE_BLOCK_TOKENS

    assert QUERY_ROWS == SCORE_ROWS
    assert RuntimeConfig().prefill_chunk == PREFILL_CHUNK
    assert BLOCK_TOKENS == CACHE_BLOCK_TOKENS


@pytest.mark.parametrize(
    ("format", "least", "most"), [("int4", 4.1, 4.6), ("int8", 8.1, 8.4), ("bfloat16", 16.0, 16.4)]
)
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_pages_have_the_size_of_their_layout(name: str, format: str, least: float, most: float) -> None:
    spec = load_spec(name)
    graph = build_graph(spec, format)
    assert all(page.nbytes == page_layout(spec, page.name, format).nbytes for page in graph.pages.values())
    assert least < 8 * graph.nbytes / graph.parameters < most


def test_kernels_compute_in_float32_and_cache_in_bfloat16() -> None:
    spec = load_spec("deepseek-v2-lite")
    assert {activation_dtype(f) for f in ("float32", *KERNEL_FORMATS)} == {"float32"}
    assert cache_dtype("float32") == "float32"
    for format in KERNEL_FORMATS:
        graph = build_graph(spec, format)
        assert cache_dtype(format) == "bfloat16"
        assert graph.hidden_bytes_per_token == 4 * 2048
        assert graph.kv_bytes_per_token == 27 * 576 * 2 == build_graph(spec, "float32").kv_bytes_per_token / 2


@pytest.mark.parametrize("format", KERNEL_FORMATS)
def test_attention_of_a_kernels_page_reads_the_form_it_computes(format: str) -> None:
    """The expansion lies there twice, turned round for the absorbed form: a pass reads one of the two."""
    spec = load_spec("deepseek-v2-lite")
    layout = page_layout(spec, "layers.5.attention", format)
    task = build_graph(spec, format).task("layers.5.attention")
    assert task.nbytes == layout.nbytes
    assert task.prefill.bytes_fixed == layout.nbytes - layout.part("k_b_absorbed").nbytes
    assert task.decode.bytes_fixed == layout.nbytes - layout.part("k_b").nbytes


def test_a_packed_tied_head_reads_its_own_part() -> None:
    spec = read_config(TINY | {"tie_word_embeddings": True})
    page = page_layout(spec, "embedding", "int4")
    head = build_graph(spec, "int4").task("head")
    assert head.nbytes == page.nbytes
    assert head.decode.bytes_fixed == page.nbytes - page.part("weight").nbytes >= page.part("head").nbytes


def test_a_tied_head_in_bfloat16_is_the_embedding_itself() -> None:
    spec = read_config(TINY | {"tie_word_embeddings": True})
    assert [p.role for p in page_layout(spec, "embedding", "bfloat16").parts] == ["weight"]
    head = build_graph(spec, "bfloat16").task("head")
    assert head.decode.bytes_fixed == head.nbytes == padded(320 * 64 * 2)


@pytest.mark.parametrize("format", KERNEL_FORMATS)
def test_kernels_are_called_once_or_twice_per_task(format: str) -> None:
    graph = build_graph(load_spec("deepseek-v3"), format)
    for task in graph:
        for work in (task.prefill, task.decode):
            assert work.launches == (2 if task.kind in ("attention", "experts") else 1), task.name
            assert (work.launches_per_expert, work.launches_per_sequence) == (0, 0)
            assert (work.products, work.products_per_expert, work.products_per_sequence) == (0, 0, 0)


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_packed_formats_go_by_the_int8_rate_and_the_bandwidth(format: str) -> None:
    rates = {"int8": 8.0, "bfloat16": 2.0, "float32": 1.0}
    for known, expected in ((rates, 8.0), (rates | {"int8": 0.0}, 2.0), ({"float32": 1.0}, 1.0)):
        device = DeviceSpec(
            "sim:0", "SIM", memory_bandwidth=3.0, matrix_rates=known, matrix_vector_rates={"bfloat16": 99.0}
        )
        model = CostModel(Topology((device,)), format)
        assert model.matrix_rate(device) == expected
        assert model.weight_bandwidth(device, 1) == 3.0


def test_formats_by_name() -> None:
    spec = read_config(TINY)
    assert [parse_format(f, spec) for f in ("auto", "bf16", "bfloat16", "int4", "int8", "float32")] == [
        "bfloat16", "bfloat16", "bfloat16", "int4", "int8", "float32",
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match=r"^format 'int3' is not one of auto, float32, bfloat16, int4, int8$"):
        parse_format("int3", spec)


def test_a_packed_model_has_one_format() -> None:
    spec = read_config(TINY | {"ciuic": {"format": "int4", "layout_version": LAYOUT_VERSION}}, "small")
    assert spec.packed == "int4"
    assert parse_format("auto", spec) == parse_format("int4", spec) == "int4"
    with pytest.raises(InvalidInput, match=r"small is packed as int4 and cannot be had in int8; leave the format out"):
        parse_format("int8", spec)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"format": "int4", "layout_version": LAYOUT_VERSION + 1}, "layout_version is 2; this runtime reads layout"),
        ({"format": "int4"}, "layout_version is missing"),
        ({"format": "int3", "layout_version": LAYOUT_VERSION}, "format is 'int3'; this runtime reads layout"),
        ("int4", "must be an object"),
    ],
)
def test_a_packing_that_is_not_known_is_refused(section: object, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        read_config(TINY | {"ciuic": section})
