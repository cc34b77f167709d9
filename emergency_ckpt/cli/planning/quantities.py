"""Numbers as people write them: `70B` parameters, `448GB` or `60000Mi` of memory.

What cannot be read is refused with what could be.
"""

from __future__ import annotations

import math
import re

from emergency_ckpt.errors import ConfigError

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)}
_BYTES |= {f"{letter}i{end}": 1024**power for power, letter in enumerate("KMGTP", 1) for end in ("", "B")}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)", re.ASCII)


def parse_count(text: str) -> int:
    """A number of things: 7000000000, 7e9 or 7B."""
    return _parse(text, _COUNTS, "a number such as 70e9 or 70B (K, M, B, T)")


def parse_bytes(text: str) -> int:
    """A number of bytes: 448GB is 448 * 10^9, 60000Mi (or MiB) is 60000 * 2^20."""
    return _parse(text, _BYTES, "bytes such as 448GB, 417GiB or 60000Mi")


def _parse(text: str, units: dict[str, int], expected: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ConfigError(f"{text!r} cannot be read; expected {expected}")
    value = float(match[1]) * units[match[2]]
    if not 0 < value < 2**62:
        raise ConfigError(f"{text!r} is out of range; expected {expected}, above 0")
    return math.ceil(value)
