"""Bytes and durations as a person reads them: three digits and a unit, never a long number."""

from __future__ import annotations

_BYTE_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(nbytes: int) -> str:
    """`536870912` → `'512.0 MiB'`; below one KiB the exact number."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in _BYTE_UNITS:
        value /= 1024
        # 1023.96 would print as 1024.0, so it already belongs to the next unit.
        if abs(value) < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value:.1f} {_BYTE_UNITS[-1]}"


def format_seconds(seconds: float) -> str:
    """`0.000412` → `'0.41 ms'`, `0.081` → `'81 ms'`, `2.5` → `'2.50 s'`, `187` → `'3 min 7 s'`."""
    if abs(seconds) < 5e-7:
        return "0 ms"
    if abs(seconds) < 0.00995:
        return f"{seconds * 1000:.2g} ms"
    if abs(seconds) < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 99.95:
        return f"{seconds:.2f} s" if abs(seconds) < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
