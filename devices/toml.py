"""A topology as a TOML file: a [[device]] for each device, a [[link]] for each link and a [[domain]] for what links
share, with keys named as in DeviceSpec, Link and Domain.
Knows what is allowed in each key; anything else is one line that names the file, the key and what would do.

`catalogue = "RTX 4090"` in a [[device]], or `catalogue = "pcie4-x16"` in a [[link]], takes from `catalogue.py` whatever
the table does not say itself; its rates are estimated."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ciuic_runtime.devices.catalogue import KnownDevice, KnownLink, find_device, find_link
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Basis, DeviceSpec, Domain, Kind, Link, Topology
from ciuic_runtime.devices.units import parse_bytes

_PREFIX = {"CPU": "cpu", "GPU": "cuda", "SIM": "sim", "DISK": "disk"}
_NAME = re.compile(r"(?:[\w.-]+/)?(cpu|cuda|sim|disk)(?::\d{1,4})?")
_DTYPES = (
    "float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8", "int8", "int4",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Key:
    """What a key may hold: `read` returns the value or raises ValueError, `allowed` says in words what it takes."""

    allowed: str
    read: Callable[[Any], Any]


def topology_from_toml(text: str, source: str) -> Topology:
    """The declared devices and links; `source` names the file in messages."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{source} is not TOML: {error}") from error
    return topology_from_dict(document, source)


def topology_from_dict(document: Mapping[str, Any], source: str) -> Topology:
    """The same from a document that was already parsed, of TOML or of a schedule's JSON."""
    kinds = ("device", "link", "domain")
    _known(document, kinds, source)
    tables = {key: _tables(document, key, source) for key in kinds}
    if not tables["device"]:
        raise InvalidInput(f"{source} declares no devices; write at least one [[device]] with name, kind, memory_bytes")
    devices = tuple(_device(t, f"{source}: {_place('device', i, t)}") for i, t in enumerate(tables["device"], 1))
    links = tuple(_link(t, f"{source}: link {i}") for i, t in enumerate(tables["link"], 1))
    _no_link_twice(links, source)
    domains = tuple(_domain(t, f"{source}: {_place('domain', i, t)}") for i, t in enumerate(tables["domain"], 1))
    try:
        return Topology(devices, links, domains)
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from error


def topology_to_toml(topology: Topology) -> str:
    """Reads back as an equal topology, to the last bit."""
    import tomli_w

    return tomli_w.dumps(topology_to_dict(topology))


def topology_to_dict(topology: Topology) -> dict[str, list[dict[str, Any]]]:
    tables = {"device": [_table(d) for d in topology.devices], "link": [_table(x) for x in topology.links]}
    return tables | ({"domain": [_table(d) for d in topology.domains]} if topology.domains else {})


def read_topology(path: str | Path) -> Topology:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidInput(f"no device file {path}; `ciuic devices` shows what is here without one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read device file {path}: {error}") from error
    return topology_from_toml(text, str(path))


def _device(table: dict[str, Any], where: str) -> DeviceSpec:
    values = _with_catalogue(_values(table, _DEVICE_KEYS, where), find_device, where)
    for key in ("name", "kind"):
        if key not in values:
            raise InvalidInput(f"{where}: {key} is missing; allowed: {_DEVICE_KEYS[key].allowed}")
    name, kind = values["name"], values["kind"]
    if name.rpartition("/")[2].partition(":")[0] != _PREFIX[kind]:
        raise InvalidInput(f"{where}: kind is {kind}, whose names begin with {_PREFIX[kind]}, as in {_PREFIX[kind]}:0")
    if "memory_bytes" not in values and kind != "DISK" and values.get("usable", True):
        raise InvalidInput(f"{where}: memory_bytes is missing; allowed: {_DEVICE_KEYS['memory_bytes'].allowed}")
    values.setdefault("basis", "estimated" if any(values.get(key) for key in _RATE_KEYS) else "unknown")
    return DeviceSpec(**values)


def _link(table: dict[str, Any], where: str) -> Link:
    values = _with_catalogue(_values(table, _LINK_KEYS, where), find_link, where)
    for key in ("src", "dst", "bandwidth"):
        if key not in values:
            raise InvalidInput(f"{where}: {key} is missing; allowed: {_LINK_KEYS[key].allowed}")
    if values["src"] == values["dst"]:
        raise InvalidInput(f"{where}: src and dst are both {values['src']}; a link joins two devices")
    return Link(**{"basis": "estimated", **values})


def _domain(table: dict[str, Any], where: str) -> Domain:
    values = _values(table, _DOMAIN_KEYS, where)
    for key in ("name", "bandwidth"):
        if key not in values:
            raise InvalidInput(f"{where}: {key} is missing; allowed: {_DOMAIN_KEYS[key].allowed}")
    return Domain(**{"basis": "estimated", **values})


def _with_catalogue(
    values: dict[str, Any], find: Callable[[str], KnownDevice | KnownLink], where: str
) -> dict[str, Any]:
    """What the table says, and from the catalogue what it does not; tables in it (rates by dtype) entry by entry."""
    name = values.pop("catalogue", None)
    if name is None:
        return values
    try:
        known = find(name).values()
    except InvalidInput as error:
        raise InvalidInput(f"{where}: catalogue: {error}") from error
    for key, allowed in (("kind", (known.get("kind"), None)), ("basis", ("estimated", None))):
        if values.get(key) not in allowed:
            raise InvalidInput(f"{where}: {key} is {values[key]}, but catalogue {_shown(name)} is {allowed[0]}")
    merged = {k: {**v, **values[k]} for k, v in known.items() if isinstance(v, dict) and k in values}
    return {**known, **values, **merged}


def _values(table: dict[str, Any], keys: Mapping[str, Key], where: str) -> dict[str, Any]:
    _known(table, tuple(keys), where)
    return {key: _value(value, keys[key], f"{where}: {key}") for key, value in table.items()}


def _value(value: Any, key: Key, where: str) -> Any:
    try:
        return key.read(value)
    except ValueError as error:
        raise InvalidInput(f"{where} is {_shown(value)}; allowed: {key.allowed}") from error


def _known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise InvalidInput(f"{where}: unknown key {_shown(key)}; allowed: {', '.join(keys)}")


def _tables(document: Mapping[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InvalidInput(f"{source}: {key} is not a list of tables; write [[{key}]] above each one")
    return tables


def _no_link_twice(links: tuple[Link, ...], source: str) -> None:
    ways = [(x.src, x.dst) for x in links]
    for src, dst in ways:
        if ways.count((src, dst)) > 1:
            raise InvalidInput(f"{source}: link {src} -> {dst} is declared twice; each direction has one link")


def _place(what: str, number: int, table: Mapping[str, Any]) -> str:
    name = table.get("name")
    return f"{what} {number}" + (f" ({name})" if isinstance(name, str) else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _table(fact: DeviceSpec | Link | Domain) -> dict[str, Any]:
    """The fields that differ from their defaults; `basis` always, since its default depends on the others."""
    table = {}
    for item in fields(fact):
        value = getattr(fact, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if item.name == "basis" or value != default:
            table[item.name] = _plain(value)
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


# What a key may hold


def _number(low: float, high: float, unit: str) -> Key:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(value)  # NaN is in no range
        return float(value)

    return Key(f"a number of {unit} from {low:g} to {high:g}", read)


def _count(low: int, high: int, what: str) -> Key:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(value)
        return value

    return Key(f"a number of {what} from {low} to {high}", read)


def _size(low: int) -> Key:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(value)
        nbytes = parse_bytes(value) if isinstance(value, str) else value
        if not low <= nbytes <= 2**60:
            raise ValueError(value)
        return nbytes

    return Key(f'a size such as "16GiB" or a whole number of bytes, from {low} to 2**60', read)


def _choice(values: tuple[str, ...]) -> Key:
    def read(value: Any) -> str:
        if value not in values:
            raise ValueError(value)
        return str(value)

    return Key(" or ".join(f'"{v}"' for v in values), read)


def _text(what: str, pattern: re.Pattern[str] | None = None) -> Key:
    def read(value: Any) -> str:
        if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
            raise ValueError(value)
        return value

    return Key(what, read)


def _mapping(what: str, read_key: Callable[[str], Any], key: Key) -> Key:
    def read(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise ValueError(value)
        return {read_key(k): key.read(v) for k, v in value.items()}

    return Key(f"a table of {what} = {key.allowed}", read)


def _read_dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError(text)
    return text


def _read_whole(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,15}", text):
        raise ValueError(text)
    return int(text)


def _read_fact(value: Any) -> str | int | float | bool:
    if not isinstance(value, (str, int, float, bool)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(value)
    return value


def _read_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(value)
    return tuple(value)


def _read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


_BANDWIDTH = _number(1e3, 1e15, "bytes/s")
_MEMORY_BANDWIDTH = _number(1e6, 1e15, "bytes/s")  # 45 would be GB/s by mistake
_COMPUTE = _number(1e6, 1e20, "operations/s")
_DTYPE = f"dtype ({', '.join(_DTYPES)})"
_DEVICE_NAME = _text('a name such as "cpu", "cpu:1", "cuda:0", "sim:0", "disk" or "node1/cuda:0"', _NAME)
_RATE_KEYS = (
    "memory_bandwidth", "memory_bandwidth_by_threads", "bandwidth_by_access", "matrix_rates", "matrix_vector_rates",
    "launch_overhead", "matrix_launch_overhead",
)  # fmt: skip
_DEVICE_KEYS: dict[str, Key] = {
    "name": _DEVICE_NAME,
    "kind": _choice(get_args(Kind)),
    "model": _text("a text"),
    "memory_bytes": _size(4096),
    "memory_free_bytes": _size(0),
    "memory_bandwidth": _MEMORY_BANDWIDTH,
    "memory_bandwidth_by_threads": _mapping("threads", _read_whole, _MEMORY_BANDWIDTH),
    "bandwidth_by_access": _mapping("bytes per read", _read_whole, _BANDWIDTH),
    "matrix_rates": _mapping(_DTYPE, _read_dtype, _COMPUTE),
    "matrix_vector_rates": _mapping(_DTYPE, _read_dtype, _BANDWIDTH),
    "launch_overhead": _number(0, 10, "seconds"),
    "matrix_launch_overhead": _mapping(_DTYPE, _read_dtype, _number(0, 10, "seconds")),
    "cores": _count(1, 65536, "cores"),
    "threads": _count(1, 65536, "threads"),
    "isa": Key('a list of instruction sets such as ["avx2", "avx512f"]', _read_names),
    "cache_bytes": _mapping("cache level", str, _size(1)),
    "numa_node": _count(0, 65535, "a NUMA node"),
    "facts": _mapping("fact", str, Key("a text, a number, true or false", _read_fact)),
    "basis": _choice(get_args(Basis)),
    "usable": Key("true or false", _read_flag),
    "why_not_usable": _text("a text"),
    "catalogue": _text('a text such as "RTX 4090" or "8 x DDR5-4800"'),
}
_LINK_KEYS: dict[str, Key] = {
    "src": _DEVICE_NAME,
    "dst": _DEVICE_NAME,
    "bandwidth": _BANDWIDTH,
    "latency": _number(0, 60, "seconds"),
    "basis": _choice(get_args(Basis)),
    "domains": Key('a list of names of [[domain]] tables such as ["pcie0"]', _read_names),
    "bandwidth_by_size": _mapping("bytes per transfer", _read_whole, _BANDWIDTH),
    "catalogue": _text('a text such as "pcie4-x16" or "ethernet-10g"'),
}
_DOMAIN_KEYS: dict[str, Key] = {
    "name": _text('a name such as "pcie0", "memory controller" or "nic"', re.compile(r"\S(.*\S)?")),
    "bandwidth": _BANDWIDTH,
    "basis": _choice(get_args(Basis)),
}
