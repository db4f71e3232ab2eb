"""The compiled CPU kernels (csrc/); addresses are those of contiguous rows, as torch's data_ptr() gives them, and 0 is
none. Operators let other Python threads run while they compute; weights and buffers are kept alive by the caller."""

from collections.abc import Sequence

def rms_norm_f32(x: int, weight: int, out: int, rows: int, hidden: int, eps: float) -> None: ...
def rms_norm_bf16(x: int, weight: int, out: int, rows: int, hidden: int, eps: float) -> None: ...
def dequantise_fp8(
    src: int, rows: int, columns: int, scales: int, block_rows: int, block_columns: int, dst: int, bf16: bool
) -> None: ...
def pack_instruction_sets() -> list[str]: ...
def pack_matrix(layout: str, src: int, src_dtype: str, rows: int, columns: int, dst: int, isa: str = "") -> bool: ...
def unpack_matrix(layout: str, src: int, rows: int, columns: int, dst: int, isa: str = "") -> None: ...
def instruction_sets(usable: bool = True) -> list[str]:
    """Best first; those this processor can run."""

class ThreadPool:
    """Threads in all, the caller being one of them; worker i is bound to cpus[i % len(cpus)], or to none."""

    def __init__(self, threads: int, cpus: Sequence[int]) -> None: ...
    @property
    def threads(self) -> int: ...

class Matrix:
    """One matrix [rows, columns], or `count` of them one after the other, in a layout of models/layout.py."""

    def __init__(self, layout: str, count: int, rows: int, columns: int, data: int) -> None: ...
    @staticmethod
    def none() -> Matrix: ...
    @property
    def nbytes(self) -> int: ...

class MlpWeights:
    def __init__(
        self, gate: Matrix, up: Matrix, down: Matrix, gate_bias: int = 0, up_bias: int = 0, down_bias: int = 0
    ) -> None: ...

class MlaWeights:
    """sizes: heads, nope, rope, value, kv_rank. matrices: q, q_a, q_b, kv_a, k_b, k_b_absorbed, v_b, o; either q, or
    q_a and q_b. vectors: q_a_norm, kv_a_norm, q_a_bias, kv_a_bias, o_bias."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        matrices: Sequence[Matrix],
        vectors: Sequence[int],
        norm_eps: float,
        scale: float,
    ) -> None: ...

class GqaWeights:
    """sizes: heads, kv_heads, dim. matrices: q, k, v, o, and their biases."""

    def __init__(
        self, sizes: tuple[int, int, int], matrices: Sequence[Matrix], biases: Sequence[int], scale: float
    ) -> None: ...

class RouteParams:
    def __init__(
        self,
        experts: int,
        per_token: int,
        groups: int,
        groups_per_token: int,
        sigmoid: bool,
        group_top2: bool,
        limited: bool,
        normalise: bool,
        scaling: float,
    ) -> None: ...

class Rope:
    """Tables [positions, dim / 2] of cosines and sines."""

    def __init__(self, cos: int, sin: int, dim: int, interleaved: bool) -> None: ...

class Batch:
    """positions, slots: int64 [rows]. sequences: first row, rows, position of the first, block table, and whether they
    are prompt tokens."""

    def __init__(
        self, rows: int, positions: int, slots: int, sequences: Sequence[tuple[int, int, int, Sequence[int], bool]]
    ) -> None: ...

class Operators:
    """The kernels of one instruction set on one pool. One call at a time; a pool may serve several."""

    def __init__(self, instruction_set: str, pool: ThreadPool) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def workspace_nbytes(self) -> int: ...
    def linear(self, w: Matrix, bias: int, x: int, rows: int, residual: int, out: int, /) -> None: ...
    def mlp(self, w: MlpWeights, x: int, rows: int, residual: int, out: int, /) -> None: ...
    def route(
        self, p: RouteParams, weight: Matrix, bias: int, x: int, rows: int, ids: int, weights: int, /
    ) -> None: ...
    def experts(
        self,
        shape: MlpWeights,
        addresses: int,
        num_experts: int,
        x: int,
        ids: int,
        rows: int,
        per_token: int,
        out: int,
        /,
    ) -> None:
        """addresses [num_experts, 3]: gate, up, down. Rows of experts whose addresses are 0 are left alone."""
    def combine(
        self,
        expert_rows: int,
        weights: int,
        rows: int,
        per_token: int,
        hidden: int,
        added0: int,
        added1: int,
        out: int,
        /,
    ) -> None: ...
    def mla(self, w: MlaWeights, rope: Rope, batch: Batch, x: int, residual: int, cache: int, out: int, /) -> None: ...
    def gqa(self, w: GqaWeights, rope: Rope, batch: Batch, x: int, residual: int, cache: int, out: int, /) -> None: ...
    def rms_norm(self, x: int, weight: int, rows: int, width: int, eps: float, out: int, /) -> None: ...
    def embed(self, table: int, ids: int, rows: int, width: int, out: int, /) -> None: ...
