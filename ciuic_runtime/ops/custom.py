"""Operators of the user's own: a class with `forward`, registered in place of one of the engine's.
Knows what each replaceable operator takes and gives, how a replacement is checked; the engine asks for functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.memory.tensor import CiuicTensor


@dataclass(frozen=True, slots=True)
class Cost:
    """The work of one call."""

    flops: float
    nbytes: float  # read and written


class CustomOperator:
    """An operator to derive from. One object serves every layer, for as long as it is registered."""

    def forward(self, *inputs: Any) -> Any:
        """The result for `inputs`, CiuicTensors over the engine's own memory: to be read, not written to.

        Each row (token) must depend on that row alone, or a token's result depends on who shares its batch."""
        raise NotImplementedError

    def cost(self, *inputs: Any) -> Cost | None:
        """The work of a call on these inputs, if it is known; `ciuic doctor` turns it into rates."""
        return None


Output = tuple[tuple[int, ...], torch.dtype]  # shape and type


@dataclass(frozen=True, slots=True)
class Replaceable:
    """An operator of the engine that a user's may stand in for."""

    takes: str
    outputs: Callable[..., tuple[Output, ...]]  # what the inputs given lead to
    compared: Callable[..., torch.Tensor] = lambda outputs, *inputs: outputs[0]  # what is held against the reference
    inside: str = ""  # the operator that it is a part of


def _as_first(x: torch.Tensor, *others: Any) -> tuple[Output, ...]:
    return ((tuple(x.shape), x.dtype),)


def _routed(logits: torch.Tensor, bias: torch.Tensor | None, moe: Any) -> tuple[Output, ...]:
    chosen = (logits.shape[0], moe.experts_per_token)
    return (chosen, torch.int64), (chosen, torch.float32)


def _weight_of_each(outputs: tuple[torch.Tensor, ...], logits: torch.Tensor, *others: Any) -> torch.Tensor:
    """[tokens, experts], 0 where not chosen: the order of experts of equal weight says nothing."""
    ids, weights = outputs
    return torch.zeros_like(logits).scatter_add_(1, ids, weights)


def _combined(rows: torch.Tensor, weights: torch.Tensor) -> tuple[Output, ...]:
    return (((rows.shape[0], rows.shape[2]), rows.dtype),)


REPLACEABLE: Mapping[str, Replaceable] = {
    "rms_norm": Replaceable("x [tokens, hidden], weight [hidden], eps", _as_first),
    "route": Replaceable(
        "logits [tokens, experts], bias [experts] or None, the model's MoeSpec; gives ids and weights, both "
        "[tokens, experts_per_token]", _routed, _weight_of_each,
    ),
    "softmax": Replaceable("logits [tokens, experts]", _as_first, inside="route"),
    "sigmoid": Replaceable("logits [tokens, experts]", _as_first, inside="route"),
    "silu": Replaceable("gate [tokens, width]", _as_first),
    "combine": Replaceable("rows [tokens, experts_per_token, hidden], weights [tokens, experts_per_token]", _combined),
}  # fmt: skip

# Largest difference that passes a check, relative to the value and to the largest value.
_TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2**-6, 2**-7)}


@dataclass(frozen=True, slots=True)
class Registration:
    """Which operator stands in for which. As a context manager it is undone at the end."""

    name: str
    replaces: str
    operator: CustomOperator
    check: bool  # each call is compared with the reference

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if _registered.get(self.replaces) is self:
            del _registered[self.replaces]


_registered: dict[str, Registration] = {}  # replaced operator -> what stands in for it


def register_operator(name: str, cls: type[CustomOperator], replaces: str, check: bool = False) -> Registration:
    """Puts `cls()` in place of an operator in every model opened from now on; a name registered again is replaced.

    With `check`, every call is computed by the reference too, and a difference beyond rounding raises CiuicError."""
    if not isinstance(name, str) or not name.strip():
        raise InvalidInput(f"an operator cannot be called {name!r}; give it a name")
    if not (isinstance(cls, type) and issubclass(cls, CustomOperator) and cls.forward is not CustomOperator.forward):
        raise InvalidInput(f"operator {name!r} is {cls!r}; give a class derived from CustomOperator that has forward()")
    if replaces not in REPLACEABLE:
        raise InvalidInput(
            f"operator {name!r} is to replace {replaces!r}; what can be replaced is {', '.join(REPLACEABLE)}"
        )
    for other in _registered.values():
        if other.name != name and _overlap(other.replaces, replaces):
            raise InvalidInput(
                f"operator {name!r} is to replace {replaces}, and {other.name!r} replaces {other.replaces} already; "
                f"unregister_operator({other.name!r}) first"
            )
    try:
        operator = cls()
    except Exception as error:
        raise InvalidInput(f"operator {name!r} cannot be made: {cls.__name__}() raises {_said(error)}") from error
    for old in [r for r in _registered.values() if r.name == name]:
        del _registered[old.replaces]
    _registered[replaces] = made = Registration(name, replaces, operator, bool(check))
    return made


def unregister_operator(name: str) -> None:
    """The engine's own operator is back in every model opened from now on."""
    for found in [r for r in _registered.values() if r.name == name]:
        del _registered[found.replaces]
        return
    there = ", ".join(repr(r.name) for r in _registered.values()) or "none"
    raise InvalidInput(f"no operator {name!r} is registered; there is {there}")


def registered_operators() -> tuple[Registration, ...]:
    return tuple(_registered.values())


@dataclass(frozen=True)
class Replacements:
    """The user's operators that a model runs with, fixed when it is opened."""

    by_replaced: Mapping[str, Registration] = field(default_factory=dict)

    @staticmethod
    def now() -> Replacements:
        """Those registered at this moment."""
        return Replacements(dict(_registered))

    def __contains__(self, replaced: str) -> bool:
        return replaced in self.by_replaced

    def __bool__(self) -> bool:
        return bool(self.by_replaced)

    def function(self, replaced: str, reference: Callable[..., Any], task: str) -> Callable[..., Any]:
        """The user's operator for `replaced` within a task, taking and giving torch tensors; else `reference`."""
        found = self.by_replaced.get(replaced)
        if found is None:
            return reference
        return lambda *inputs: _call(found, reference, task, inputs)


def _call(found: Registration, reference: Callable[..., Any], task: str, inputs: tuple[Any, ...]) -> Any:
    kind, where = REPLACEABLE[found.replaces], f"operator {found.name!r} in place of {found.replaces}, {task}"
    expected = _outputs(reference(*inputs)) if found.check else None  # before the user's code sees the inputs
    try:
        given = found.operator.forward(*(CiuicTensor.of(i) if isinstance(i, torch.Tensor) else i for i in inputs))
    except Exception as error:
        raise CiuicError(f"{where}: {_said(error)}") from error
    wanted, values = kind.outputs(*inputs), _outputs(given)
    if len(values) != len(wanted):
        raise CiuicError(f"{where}: gives {len(values)} results where {len(wanted)} are wanted")
    results = tuple(_fitting(v, w, where).to(inputs[0].device) for v, w in zip(values, wanted, strict=True))
    if found.replaces == "route" and not ((results[0] >= 0) & (results[0] < inputs[0].shape[1])).all():
        raise CiuicError(f"{where}: gives expert ids that do not exist; the model has 0 to {inputs[0].shape[1] - 1}")
    if expected is not None:
        _compare(kind.compared(results, *inputs), kind.compared(expected, *inputs), where)
    return results if len(results) > 1 else results[0]


def _outputs(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _fitting(value: Any, wanted: Output, where: str) -> torch.Tensor:
    """The result as the engine goes on with it: a number with a point is rounded to the type wanted."""
    shape, dtype = wanted
    tensor = value.data if isinstance(value, CiuicTensor) else value
    kind = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    if not isinstance(tensor, torch.Tensor):
        raise CiuicError(f"{where}: gives {type(value).__name__} where a CiuicTensor, {kind}, is wanted")
    same_kind = tensor.is_floating_point() == dtype.is_floating_point and tensor.dtype != torch.bool
    if tuple(tensor.shape) != shape or not same_kind or tensor.is_complex():
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise CiuicError(f"{where}: gives {found} where {kind} is wanted")
    return tensor.to(dtype).contiguous()


def _compare(result: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    """Raises CiuicError for a difference beyond rounding; what is not a number differs from everything."""
    relative, absolute = _TOLERANCES.get(result.dtype, _TOLERANCES[torch.float32])
    a, b = result.double(), expected.double()
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    largest = torch.where(b.isfinite(), b.abs(), 0.0).max()
    excess = difference - relative * b.abs() - absolute * largest
    if not (excess <= 0).all():
        worst = int(difference.argmax())
        at = [int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape)]
        raise CiuicError(
            f"{where}: differs from the reference by up to {float(difference.flatten()[worst]):.3g}, at {at}, where it "
            f"gives {float(a.flatten()[worst]):.6g} and the reference {float(b.flatten()[worst]):.6g}"
        )


def _overlap(a: str, b: str) -> bool:
    return a == b or REPLACEABLE[a].inside == b or REPLACEABLE[b].inside == a


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
