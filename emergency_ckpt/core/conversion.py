"""Lossless conversion of values: a number in another type has the same value, or there is none.

Training code changes types without notice (a step counter is a Python int before the first jitted step and an
array after it). What is saved in one type is restored in another only where not one bit of meaning is lost.
"""

from __future__ import annotations

import enum
import math
from typing import Any, TypeAlias, cast

import numpy as np

from emergency_ckpt.core.dtypes import MACHINE_DEPENDENT
from emergency_ckpt.core.values import Array, Value, shown

Number: TypeAlias = bool | int | float | complex

_NUMBERS = (bool, int, float, complex)
_FAILURES = (ValueError, TypeError, OverflowError)


def converted(value: Value, wanted: Any) -> Any:
    """The value in the type that is wanted, as what was asked for before a step was saved says it.

    Among Python's numbers a value that does not fit (0.5 as an int) stays in the type in which it was saved:
    values of Python's own types are free to change. `wanted` is a type. Raises ValueError where it
    cannot hold the value.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0 and not issubclass(wanted, np.ndarray):
        value = value[()]
    if type(value) is wanted:
        return value.copy() if isinstance(value, np.ndarray | np.void) else value
    if issubclass(wanted, enum.Enum):
        return _member(value, wanted)
    if issubclass(wanted, np.ndarray):
        raise ValueError("it is no array")
    if isinstance(value, str | bytes):
        return _text(value, wanted)
    number = _exact(value)
    if number is None:
        raise ValueError(f"a {type(cast(Any, value)).__name__} has no form as {wanted.__name__}")
    found: Any = _as_numpy(number, wanted) if issubclass(wanted, np.generic) else _as_python(number, wanted)
    if found is None and wanted in _NUMBERS:
        return value
    if found is None:
        raise ValueError(f"{shown(number)} has no form as {wanted.__name__}")
    return found


def as_array(value: Value, dtype: np.dtype[Any], *, rounds: bool = False) -> Array | None:
    """A 0-d array of `dtype` that holds the very same number; None where there is none.

    With `rounds`, a float may become the nearest one that a smaller dtype of floats has, as JAX does it.
    """
    number = _exact(value)
    found = None if number is None else _as_numpy(number, dtype)
    if found is None and rounds and isinstance(number, float) and _kind(dtype) is float:
        with np.errstate(all="ignore"):
            nearest = np.asarray(number).astype(dtype)
        # What is too large became infinite, or no number: that is not rounding.
        found = nearest if math.isfinite(float(cast(Any, nearest))) else None
    return None if found is None else np.asarray(found, dtype)


def _member(value: Value, wanted: type[enum.Enum]) -> enum.Enum:
    number = _exact(value)
    return wanted(value if number is None else number)


def _text(value: str | bytes, wanted: Any) -> Any:
    kind: Any = str if isinstance(value, str) else bytes
    found = wanted(value) if issubclass(wanted, kind) else None
    if found != value:
        raise ValueError(f"{kind.__name__} has no form as {wanted.__name__}")
    return found


def _as_python(number: Number, wanted: Any) -> Number | None:
    """The number as one of Python's, or as a class that the user derived from one."""
    base = _base(wanted)
    # A complex number without an imaginary part is the same as its real part.
    plain = number.real if isinstance(number, complex) and base is not complex else number
    try:
        found: Any = None if base is None else wanted(base(plain))
    except _FAILURES:
        return None
    return found if found is not None and _same(found, number) else None


def _base(wanted: Any) -> Any:
    return next((kind for kind in _NUMBERS if issubclass(wanted, kind)), None)


def _as_numpy(number: Number, wanted: Any) -> np.generic | None:
    dtype: np.dtype[Any] = np.dtype(wanted)
    kind = _kind(dtype)
    plain = None if kind is None else _as_python(number, kind)
    if plain is None:
        return None
    try:
        with np.errstate(all="ignore"):
            found = cast(Any, np.asarray(plain).astype(dtype))[()]
            again = _exact(found)
    except _FAILURES:
        return None
    return found if again is not None and _same(again, number) else None


def _exact(value: Any) -> Number | None:
    """The number as Python's own, which holds all of numpy's exactly; None for what is no number."""
    if isinstance(value, np.ndarray):
        array = cast(Array, value)
        value = array[()] if array.ndim == 0 else None
    if not isinstance(value, np.generic):
        return value if isinstance(value, _NUMBERS) else None
    scalar = cast(Any, value)
    kind = _kind(scalar.dtype)
    return None if kind is None else kind(scalar)


def _kind(dtype: np.dtype[Any]) -> type[Number] | None:
    """Python's kind of number for a dtype, ml_dtypes included (which numpy takes for structures)."""
    if dtype.type in MACHINE_DEPENDENT:
        return None
    name = dtype.name
    for kind, prefixes in (
        (bool, ("bool",)),
        (int, ("int", "uint")),
        (float, ("float", "bfloat")),
        (complex, ("complex", "bcomplex")),
    ):
        if name.startswith(prefixes):
            return kind
    return None


def _same(first: Number, second: Number) -> bool:
    """Equal in value, in the sign of zeros, and in being no number; NaNs count as equal to each other."""
    return _same_part(first.real, second.real) and _same_part(first.imag, second.imag)


def _same_part(first: float, second: float) -> bool:
    if first != first or second != second:
        return first != first and second != second
    return first == second and (first != 0 or math.copysign(1, first) == math.copysign(1, second))
