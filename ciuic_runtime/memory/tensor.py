"""`CiuicTensor`: numpy's way of writing over torch's memory, for operators that users write.
Knows shapes, types and arithmetic; whose memory it is and which device holds it is torch's and the pool's business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ciuic_runtime.devices.errors import InvalidInput

Axis = int | Sequence[int] | None

# numpy's names that torch spells otherwise; the others are the same.
_TORCH_NAMES = {"power": "pow", "equal": "eq"}


class CiuicTensor:
    """An array with numpy's methods, in torch's memory: `CiuicTensor((8, 2048), "float32")`, at first all zeros.

    Always true, whatever it holds, so that `t or other` asks whether there is a tensor. `==` asks whether two are the
    same one; the other comparisons go by element. Results are new tensors. `.data` is torch's tensor."""

    __slots__ = ("__weakref__", "data")

    data: torch.Tensor

    def __init__(self, shape: Sequence[int] | int, dtype: str = "float32") -> None:
        self.data = torch.zeros(shape if isinstance(shape, int) else tuple(shape), dtype=parse_dtype(dtype))

    @staticmethod
    def of(memory: torch.Tensor) -> CiuicTensor:
        """The same memory, seen in numpy's way."""
        made = object.__new__(CiuicTensor)
        made.data = memory
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> str:
        return str(self.data.dtype).removeprefix("torch.")

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        """Values in it."""
        return self.data.numel()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def T(self) -> CiuicTensor:
        return _of(self.data.permute(*reversed(range(self.ndim))))

    def max(self, axis: Axis = None, keepdims: bool = False) -> CiuicTensor:
        return _of(self.data.amax(_dims(self, axis), keepdims))

    def min(self, axis: Axis = None, keepdims: bool = False) -> CiuicTensor:
        return _of(self.data.amin(_dims(self, axis), keepdims))

    def sum(self, axis: Axis = None, keepdims: bool = False) -> CiuicTensor:
        return _of(self.data.sum(_dims(self, axis), keepdims))

    def mean(self, axis: Axis = None, keepdims: bool = False) -> CiuicTensor:
        return _of(self.data.mean(_dims(self, axis), keepdims))

    def exp(self) -> CiuicTensor:
        return _of(self.data.exp())

    def log(self) -> CiuicTensor:
        return _of(self.data.log())

    def sqrt(self) -> CiuicTensor:
        return _of(self.data.sqrt())

    def tanh(self) -> CiuicTensor:
        return _of(self.data.tanh())

    def reshape(self, *shape: Any) -> CiuicTensor:
        return _of(self.data.reshape(*shape))

    def astype(self, dtype: str) -> CiuicTensor:
        return _of(self.data.to(parse_dtype(dtype)))

    def copy(self) -> CiuicTensor:
        return _of(self.data.clone())

    def item(self) -> Any:
        return self.data.item()

    def tolist(self) -> Any:
        return self.data.tolist()

    def numpy(self) -> Any:
        """As a numpy array; bfloat16, which numpy lacks, becomes float32."""
        host = self.data.detach().cpu()
        return (host.float() if host.dtype == torch.bfloat16 else host).numpy()

    def __add__(self, other: Any) -> CiuicTensor:
        return _of(self.data + _plain(other))

    def __sub__(self, other: Any) -> CiuicTensor:
        return _of(self.data - _plain(other))

    def __mul__(self, other: Any) -> CiuicTensor:
        return _of(self.data * _plain(other))

    def __truediv__(self, other: Any) -> CiuicTensor:
        return _of(self.data / _plain(other))

    def __pow__(self, other: Any) -> CiuicTensor:
        return _of(self.data ** _plain(other))

    def __matmul__(self, other: Any) -> CiuicTensor:
        return _of(self.data @ _plain(other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> CiuicTensor:
        return _of(_plain(other) - self.data)

    def __rtruediv__(self, other: Any) -> CiuicTensor:
        return _of(_plain(other) / self.data)

    def __rpow__(self, other: Any) -> CiuicTensor:
        return _of(_plain(other) ** self.data)

    def __neg__(self) -> CiuicTensor:
        return _of(-self.data)

    def __abs__(self) -> CiuicTensor:
        return _of(self.data.abs())

    def __lt__(self, other: Any) -> CiuicTensor:
        return _of(self.data < _plain(other))

    def __le__(self, other: Any) -> CiuicTensor:
        return _of(self.data <= _plain(other))

    def __gt__(self, other: Any) -> CiuicTensor:
        return _of(self.data > _plain(other))

    def __ge__(self, other: Any) -> CiuicTensor:
        return _of(self.data >= _plain(other))

    def __getitem__(self, index: Any) -> CiuicTensor:
        if isinstance(index, tuple):
            return _of(self.data[tuple(_plain(i) for i in index)])
        return _of(self.data[_plain(index)])

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return True

    def __float__(self) -> float:
        return float(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.numpy(), dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """`np.exp(t)`, `np.maximum(t, 0)`: torch's function of that name."""
        function = getattr(torch, _TORCH_NAMES.get(ufunc.__name__, ufunc.__name__), None)
        if function is None or method != "__call__" or options:
            return NotImplemented
        memory = next(i.data for i in inputs if isinstance(i, CiuicTensor))
        result = function(*(torch.as_tensor(_plain(i), dtype=_beside(i, memory)) for i in inputs))
        return _of(result) if isinstance(result, torch.Tensor) else NotImplemented

    def __array_function__(self, function: Any, types: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """`np.max(t, axis=-1)`: the method of that name."""
        method = getattr(CiuicTensor, function.__name__, None)
        if method is None or not isinstance(args[0], CiuicTensor):
            return NotImplemented
        return method(*args, **options)

    def __repr__(self) -> str:
        return f"CiuicTensor({self.shape}, {self.dtype}, {self.data.device})"


_of = CiuicTensor.of


def _plain(value: Any) -> Any:
    """As torch takes it: memory, or a number, which leaves a tensor's type as it is."""
    if isinstance(value, CiuicTensor):
        return value.data
    if isinstance(value, np.generic):
        return value.item()
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _beside(value: Any, memory: torch.Tensor) -> torch.dtype | None:
    """The type that a number takes beside a tensor of numbers with a point: the tensor's."""
    number = isinstance(value, (bool, int, float, np.generic))
    return memory.dtype if number and memory.is_floating_point() else None


def _dims(tensor: CiuicTensor, axis: Axis) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(tensor.ndim))
    return (axis,) if isinstance(axis, int) else tuple(axis)


def parse_dtype(name: str) -> torch.dtype:
    """torch's type of that name; raises InvalidInput for others."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidInput(f"dtype {name!r} is not known; float32, bfloat16, int64 and bool are among those that are")
    return found
