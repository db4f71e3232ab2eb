"""Bytes and rates as people write and read them ("16GiB", "45.2 GB/s").
Knows units only, nothing of devices."""

from __future__ import annotations

import re

from ciuic_runtime.devices.errors import InvalidInput

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str | int | float) -> int:
    """Bytes in "16GiB", "500 MB", "2g" or a plain number of bytes.

    Raises InvalidInput for anything else, for negative and for absurd (over 1 EiB) sizes."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        if not match or match[2].upper() not in _FACTORS:
            raise InvalidInput(f"{text!r} is not a size; write a number with a unit, such as 16GiB or 500MB")
        value = float(match[1]) * _FACTORS[match[2].upper()]
    if not 0 <= value <= 2**60:
        raise InvalidInput(f"{text!r} is not a sensible size; write a number with a unit, such as 16GiB")
    return int(value)


def format_bytes(nbytes: float) -> str:
    """12345678 -> "11.8 MiB": binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            digits = ".0f" if unit == "B" or nbytes >= 1000 else ".3g"
            return f"{nbytes:{digits}} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def format_rate(value: float, unit: str) -> str:
    """4.52e10, "B/s" -> "45.2 GB/s": decimal prefixes, three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
