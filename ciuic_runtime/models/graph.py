"""Builds the task graph of a model from its specification: which tasks there are, what they read, and how many
operations and bytes each takes. Knows no weights and no hardware."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ciuic_runtime.models.layout import KERNEL_FORMATS, PACKED_FORMATS, page_layout
from ciuic_runtime.models.spec import DTYPE_BYTES, ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, count_parameters, tensors_by_page
from ciuic_runtime.schedulers.graph import Page, Task, TaskGraph, TaskKind, Work


@dataclass(frozen=True, slots=True)
class Calls:
    """Operator calls per task: what each costs besides its work is the device's launch overhead."""

    norm: int
    mlp: int
    router: int
    group_limit: int  # of a router with expert groups, beside
    expert: int  # of each routed expert that is touched
    combine: int
    attention: int
    attention_per_sequence: int
    add: int  # a residual to a result
    head: int
    products: bool  # whether they include matrix products that cost something of their own


# Counted in ops/ and models/forward.py.
TORCH_CALLS = Calls(5, 5, 10, 10, 8, 6, 22, 14, 1, 2, True)
# Native kernels are called once or twice per task, whatever it holds.
KERNEL_CALLS = Calls(1, 1, 1, 0, 0, 2, 2, 0, 0, 1, False)
PREFILL_CHUNK = 512  # tokens that one pass takes at most, unless the user says otherwise
SCORE_ROWS = 256  # ops.attention.QUERY_ROWS

# Matrices stay in the type of the run; what is small and sensitive stays in float32, as the checkpoints have it.
FLOAT32_ROLES = ("e_score_correction_bias",)


@lru_cache(maxsize=16)
def build_graph(spec: ModelSpec, format: str = "bfloat16") -> TaskGraph:
    """The tasks of one pass over the model, with weights held in `format`: float32, bfloat16, int8 or int4."""
    return _Builder(spec, format).build()


def activation_dtype(format: str) -> str:
    """What the values between tasks are in; the native kernels take and give float32."""
    return "float32" if format in KERNEL_FORMATS else format


def cache_dtype(format: str) -> str:
    """What the KV cache holds."""
    return "float32" if format == "float32" else "bfloat16"


def tensor_nbytes(tensor: TensorSpec, dtype: str) -> int:
    return tensor.num_parameters * (4 if tensor.role in FLOAT32_ROLES else DTYPE_BYTES[dtype])


def page_nbytes(spec: ModelSpec, page: str, format: str) -> int:
    if format in KERNEL_FORMATS:
        return page_layout(spec, page, format).nbytes
    return sum(tensor_nbytes(t, format) for t in tensors_by_page(spec)[page])


def is_table(spec: ModelSpec, page: str) -> bool:
    """Whether a pass needs single rows of the page: of the embedding, where it is not the head's matrix as well."""
    return page == "embedding" and not spec.tied_embeddings


def table_row_nbytes(spec: ModelSpec, page: str) -> int:
    """Of a table in a packed folder, where it lies row after row; else 0."""
    if not is_table(spec, page) or not spec.packed:
        return 0
    table = page_layout(spec, page, spec.packed).part("weight")
    return table.nbytes // table.matrix[1]


class _Builder:
    def __init__(self, spec: ModelSpec, format: str) -> None:
        self.spec, self.format, self.size = spec, format, DTYPE_BYTES[activation_dtype(format)]
        self.cache_size = DTYPE_BYTES[cache_dtype(format)]
        self.calls = KERNEL_CALLS if format in KERNEL_FORMATS else TORCH_CALLS
        self.pages = {
            name: Page(name, page_nbytes(spec, name, format), table_row_nbytes(spec, name))
            for name in tensors_by_page(spec)
        }
        self.parameters = {
            name: sum(t.num_parameters for t in members if t.is_matrix)
            for name, members in tensors_by_page(spec).items()
        }
        self.products = {
            name: sum(t.is_matrix for t in members) if self.calls.products else 0
            for name, members in tensors_by_page(spec).items()
        }
        self.row = spec.hidden_size * self.size  # bytes of one token's residual
        self.tasks: list[Task] = []

    def build(self) -> TaskGraph:
        spec = self.spec
        self._add("embedding", "embedding", None, Work(bytes_per_token=2 * self.row))
        residual = "embedding"
        for layer in range(spec.num_layers):
            residual = self._layer(layer, residual)
        norm = self._norm("final_norm", None, residual)
        self._head(norm)
        count = count_parameters(spec)
        return TaskGraph(
            name=spec.name,
            tasks=tuple(self.tasks),
            format=self.format,
            parameters=count.total,
            active_parameters=count.active,
            hidden_bytes_per_token=self.row,
            max_positions=spec.max_positions,
            score_rows=SCORE_ROWS,
            prefill_chunk=PREFILL_CHUNK,
            given=(),
            **self._working_bytes(),
        )

    def _layer(self, layer: int, residual: str) -> str:
        name = f"layers.{layer}."
        norm = self._norm(name + "attention_norm", layer, residual)
        attention = self._attention(name + "attention", layer, (norm, residual))
        norm = self._norm(name + "mlp_norm", layer, attention)
        if not self.spec.is_moe(layer):
            work = self._dense(name + "mlp", self.calls.mlp + self.calls.add)
            return self._add(name + "mlp", "mlp", layer, work, after=(norm, attention))
        return self._moe(name, layer, norm, attention)

    def _moe(self, name: str, layer: int, norm: str, attention: str) -> str:
        moe = self.spec.moe
        assert moe is not None
        launches = self.calls.router + (self.calls.group_limit if moe.num_groups > 1 else 0)
        work = self._dense(name + "router", launches)
        router = self._add(name + "router", "router", layer, work, after=(norm,), out=moe.experts_per_token * 12)
        after = [norm, router]
        if moe.num_shared:
            shared = name + "shared_experts"
            after.append(self._add(shared, "shared_experts", layer, self._dense(shared, self.calls.mlp), after=(norm,)))
        after.append(attention)
        pages = tuple(self.pages[f"{name}experts.{e}"] for e in range(moe.num_experts))
        parameters = self.parameters[f"{name}experts.0"]
        work = Work(
            flops_per_token=2.0 * parameters * moe.experts_per_token,
            bytes_per_token=3.0 * self.row * moe.experts_per_token,
            bytes_per_expert=pages[0].nbytes,
            launches=self.calls.combine,
            launches_per_expert=self.calls.expert,
            products_per_expert=self.products[pages[0].name],
        )
        return self._add(
            name + "experts", "experts", layer, work, after=tuple(after), pages=pages,
            num_experts=moe.num_experts, experts_per_token=moe.experts_per_token,
        )  # fmt: skip

    def _norm(self, name: str, layer: int | None, after: str) -> str:
        work = Work(
            flops_per_token=5.0 * self.spec.hidden_size,
            bytes_fixed=self.pages[name].nbytes,
            bytes_per_token=2.0 * self.row,
            launches=self.calls.norm,
            per_sequence=layer is None,
        )
        return self._add(name, "norm", layer, work, after=(after,))

    def _head(self, norm: str) -> None:
        page = "embedding" if self.spec.tied_embeddings else "head"
        table = "weight" if page == "embedding" and self.format in PACKED_FORMATS else ""  # not read by the head
        work = Work(
            flops_per_token=2.0 * self.parameters[page],
            bytes_fixed=self._read(page, table),
            bytes_per_token=self.row + 4.0 * self.spec.vocab_size,
            launches=self.calls.head,
            products=self.products[page],
            per_sequence=True,
        )
        out = 4.0 * self.spec.vocab_size
        self._add("head", "head", None, work, after=(norm,), pages=(self.pages[page],), out=out)

    def _attention(self, name: str, layer: int, after: tuple[str, ...]) -> str:
        kv = self.spec.kv_bytes_per_token(cache_dtype(self.format)) / self.spec.num_layers
        prefill, decode = self._mla(name) if self.spec.mla else self._grouped_query(name)
        return self._add(name, "attention", layer, prefill, decode, after=after, kv=kv)

    def _grouped_query(self, name: str) -> tuple[Work, Work]:
        heads, dim = self.spec.num_heads, self.spec.head_dim
        work = Work(
            flops_per_token=2.0 * self.parameters[name],
            flops_per_pair=4.0 * heads * dim,
            bytes_fixed=self.pages[name].nbytes,
            bytes_per_token=4.0 * self.row,
            bytes_per_position=2.0 * self.spec.num_kv_heads * dim * self.cache_size,
            launches=self.calls.attention,
            launches_per_sequence=self.calls.attention_per_sequence,
            products=self.products[name],
        )
        return work, work

    def _mla(self, name: str) -> tuple[Work, Work]:
        """Prompt tokens expand the latents to keys and values; generated ones absorb the expansion into the query."""
        mla, heads = self.spec.mla, self.spec.num_heads
        assert mla is not None
        expand = 2.0 * heads * (mla.nope_dim + mla.value_dim) * mla.kv_rank  # one position, or absorbed: one token
        common = {
            "bytes_per_token": 4.0 * self.row,
            "bytes_per_position": float(mla.latent_dim * self.cache_size),
            "launches_per_sequence": self.calls.attention_per_sequence,
            "launches": self.calls.attention,
            "products": max(0, self.products[name] - 1),  # all but the expansion
        }
        others = 2.0 * self.parameters[name] - expand
        prefill = Work(
            flops_per_token=others,
            flops_per_pair=2.0 * heads * (mla.qk_dim + mla.value_dim),
            flops_per_position=expand,
            bytes_fixed=self._read(name, "k_b_absorbed"),
            products_per_sequence=1 if self.calls.products else 0,
            **common,  # type: ignore[arg-type]
        )
        decode = Work(
            flops_per_token=others + expand,
            flops_per_pair=2.0 * heads * (mla.latent_dim + mla.kv_rank),
            bytes_fixed=self._read(name, "k_b"),
            products_per_sequence=4 if self.calls.products else 0,  # query in, scores, values, result out
            **common,  # type: ignore[arg-type]
        )
        return prefill, decode

    def _dense(self, page: str, launches: int) -> Work:
        return Work(
            flops_per_token=2.0 * self.parameters[page],
            bytes_fixed=self.pages[page].nbytes,
            bytes_per_token=3.0 * self.row,
            launches=launches,
            products=self.products[page],
        )

    def _read(self, page: str, without: str) -> float:
        """Bytes of a page that a task reads: where it is packed, not the part that only another task or phase uses."""
        if self.format not in KERNEL_FORMATS:
            return self.pages[page].nbytes
        layout = page_layout(self.spec, page, self.format)
        return layout.nbytes - sum(part.nbytes for part in layout.parts if part.role == without)

    def _add(
        self, name: str, kind: TaskKind, layer: int | None, prefill: Work, decode: Work | None = None, *,
        after: tuple[str, ...] = (), pages: tuple[Page, ...] | None = None, out: float | None = None,
        kv: float = 0.0, num_experts: int = 0, experts_per_token: int = 0,
    ) -> str:  # fmt: skip
        """Appends a task; `out` is what it hands on per token, by default one residual row."""
        self.tasks.append(
            Task(
                name,
                kind,
                layer,
                pages if pages is not None else (self.pages[name],),
                prefill,
                decode or prefill,
                after,
                self.row if out is None else out,
                num_experts,
                experts_per_token,
                (),
                kv,
            )
        )
        return name

    def _working_bytes(self) -> dict[str, float]:
        return self._kernel_bytes() if self.format in KERNEL_FORMATS else self._torch_bytes()

    def _kernel_bytes(self) -> dict[str, float]:
        """What tasks hand on, and the kernels' temporaries: inputs made ready for products, queries, results. Keys and
        values are expanded block by block, so per position there is only the latent made ready."""
        spec, mla, moe = self.spec, self.spec.mla, self.spec.moe
        k = moe.experts_per_token if moe else 0
        gathered = k * (spec.hidden_size + moe.intermediate_size) if moe else 0
        query = spec.num_heads * (mla.qk_dim + mla.value_dim if mla else 3 * spec.head_dim)
        temporary = max(2 * max(spec.intermediate_size + spec.hidden_size, gathered), 8 * query + 2 * spec.hidden_size)
        return {
            "working_bytes_per_token": float(self.row * (6 + k) + temporary),
            "working_bytes_per_position": 2.0 * mla.kv_rank if mla else 0.0,
            "working_bytes_per_pair": 0.0,
            "working_bytes_per_sequence": 4.0 * spec.vocab_size,
        }

    def _torch_bytes(self) -> dict[str, float]:
        """Temporaries of the torch path: the widest MLP, attention, float32 logits.

        MLA's prefill expands the latents of a whole context to keys and values, of which torch's attention makes
        float32 copies, and holds scores and their softmax (checked against the growth of a process: within 10 %)."""
        spec, heads, mla = self.spec, self.spec.num_heads, self.spec.mla
        width = max(spec.intermediate_size, spec.moe.intermediate_size * spec.moe.experts_per_token if spec.moe else 0)
        head = mla.qk_dim + mla.nope_dim + 2 * mla.value_dim if mla else 3 * spec.head_dim
        expanded = 0.0
        if mla:
            copies = mla.qk_dim if self.size == 4 else 2 * mla.qk_dim + mla.value_dim
            expanded = heads * ((mla.nope_dim + mla.value_dim + mla.qk_dim) * self.size + copies * 4.0)
        return {
            "working_bytes_per_token": self.size * (3.0 * width + 6.0 * spec.hidden_size + heads * head),
            "working_bytes_per_position": expanded,
            "working_bytes_per_pair": (8.0 if mla else 4.0) * heads,
            "working_bytes_per_sequence": 4.0 * spec.vocab_size * 3,
        }
