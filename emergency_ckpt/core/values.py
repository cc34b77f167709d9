"""Values: leaves that slots cannot hold as raw numbers, in typed JSON for manifests and side files.

What is read back has the type and the bits of what was written. Nothing is ever unpickled, and every field of
what is read is checked before it is used.
"""

from __future__ import annotations

import base64
import enum
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from emergency_ckpt.core.dtypes import dtype_from_json, dtype_to_json, is_describable
from emergency_ckpt.errors import CorruptDataError, UnsupportedStateError

MAX_VALUE_BYTES = 1024**2

Array: TypeAlias = np.ndarray[Any, Any]
Value: TypeAlias = bool | int | float | complex | str | bytes | np.generic | Array
_FAILURES = (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, struct.error)
VALUE_TYPES = (bool, int, float, complex, str, bytes, enum.Enum, np.generic)

_SHOWN_CHARACTERS = 80
_HEXADECIMAL = re.compile(r"-?0x[0-9a-f]+")
_PYTHON_TYPES = (int, float, complex, str, bytes)
_PLAIN_INTEGERS = range(-(2**63), 2**64)


def captured(name: str, value: Any) -> Value:
    """A value as it is now, of a type that JSON keeps; members of enums by their value, arrays as copies.

    Raises UnsupportedStateError, naming the leaf, for what has no such form.
    """
    while isinstance(value, enum.Enum):
        value = value.value
    nbytes = _nbytes(value)
    if nbytes is None:
        raise UnsupportedStateError(
            f"leaf {name!r} is {_described(value)}, which cannot be checkpointed; expected an array, a typed "
            "PRNG key, a number, a bool, a string, bytes, or a member of an enum of these. Keep other objects "
            "out of the state."
        )
    if nbytes > MAX_VALUE_BYTES:
        raise UnsupportedStateError(
            f"leaf {name!r} is {_described(value)} of {nbytes} bytes; what is not an array of numbers in "
            f"native byte order travels with the metadata of a step and may have {MAX_VALUE_BYTES} bytes. "
            "Convert it to such an array, or keep it out of the state."
        )
    return _plain(value)


def values_to_json(values: Mapping[str, Value]) -> dict[str, list[Any]]:
    """`{leaf: [type, content]}`; raises UnsupportedStateError for a value of another type."""
    return {name: _to_json(captured(name, value)) for name, value in sorted(values.items())}


def values_from_json(raw: Any) -> dict[str, Value]:
    """The inverse; raises CorruptDataError for what `values_to_json` did not write."""
    name = None
    try:
        values: dict[str, Value] = {}
        for name, (kind, content) in raw.items():
            values[str(name)] = _READ[kind](content)
        return values
    except _FAILURES as error:
        raise CorruptDataError(
            f"the saved values of non-array leaves are damaged at {name!r}: {type(error).__name__}: {error}"
        ) from error


def shown(value: Any) -> str:
    """The value in at most 80 characters, for messages."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits in decimal.
        text = hex(value)
    return text[:_SHOWN_CHARACTERS]


def _plain(value: Any) -> Any:
    """Without subclasses of the user, and memory that somebody else may change."""
    if type(value) in _ARRAY_TYPES:
        return _copied(cast(Array, value))
    if isinstance(value, np.void):
        return _copied(np.asarray(value))[()]
    if isinstance(value, np.generic | bool) or type(value) in _PYTHON_TYPES:
        return cast(Any, value)
    if isinstance(value, str):
        return str.__str__(value)  # not what a class of the user shows of itself
    for base in _PYTHON_TYPES:
        if isinstance(value, base):
            return base(cast(Any, value))
    return value


def _copied(array: Array) -> Array:
    """In C order and with zeros between the fields of structures: replicas are to agree in every byte."""
    copy = np.zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


# Other subclasses of ndarray (masked arrays, matrices, records) mean more than their numbers.
_ARRAY_TYPES = (np.ndarray, np.memmap)


def _nbytes(value: Any) -> int | None:
    """Bytes that a value takes; None where it has no form."""
    if isinstance(value, np.str_ | np.bytes_ | str | bytes):
        return len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else len(value)
    if isinstance(value, np.generic | np.ndarray):
        array = cast(Array, value)
        known = isinstance(value, np.generic) or type(array) in _ARRAY_TYPES
        return array.nbytes if known and is_describable(array.dtype) else None
    if isinstance(value, int):
        return -(-value.bit_length() // 8)
    return 16 if isinstance(value, float | complex) else None


def _described(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return f"of type {type(value).__name__}" + (f" and dtype {dtype}" if dtype is not None else "")


def _to_json(value: Value) -> list[Any]:
    if isinstance(value, np.str_):
        return ["np.str", _text_to_json(str.__str__(value))]
    if isinstance(value, np.bytes_):
        return ["np.bytes", _base64(bytes(value))]
    if isinstance(value, np.generic):
        scalar: Array = np.asarray(value)
        return ["numpy", [dtype_to_json(scalar.dtype), scalar.tobytes().hex()]]
    if isinstance(value, np.ndarray):
        return ["array", [dtype_to_json(value.dtype), list(value.shape), _base64(value.tobytes())]]
    if isinstance(value, bool):
        return ["bool", value]
    if isinstance(value, int):
        return ["int", value if value in _PLAIN_INTEGERS else hex(value)]
    if isinstance(value, float):
        return ["float", _float_to_json(value)]
    if isinstance(value, complex):
        return ["complex", [_float_to_json(value.real), _float_to_json(value.imag)]]
    return ["bytes", _base64(value)] if isinstance(value, bytes) else ["str", _text_to_json(value)]


def _bool_from_json(content: Any) -> bool:
    return _instance(content, bool)


def _int_from_json(content: Any) -> int:
    if isinstance(content, str) and _HEXADECIMAL.fullmatch(content):
        return int(content, 16)
    if isinstance(content, bool):
        raise ValueError(f"{content!r} is no integer")
    return _instance(content, int)


def _float_to_json(value: float) -> Any:
    # JSON has no numbers that are not finite.
    return value if math.isfinite(value) else struct.pack(">d", value).hex()


def _float_from_json(content: Any) -> float:
    if isinstance(content, str):
        return struct.unpack(">d", bytes.fromhex(content))[0]
    return _instance(content, float)


def _complex_from_json(content: Any) -> complex:
    real, imaginary = content
    return complex(_float_from_json(real), _float_from_json(imaginary))


def _text_to_json(text: str) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON would join two lone surrogates into one character.
        return [_base64(text.encode("utf-8", "surrogatepass"))]
    return text


def _text_from_json(content: Any) -> str:
    if isinstance(content, list):
        (encoded,) = cast(list[Any], content)
        return _bytes_from_json(encoded).decode("utf-8", "surrogatepass")
    return _instance(content, str)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes_from_json(content: Any) -> bytes:
    return base64.b64decode(_instance(content, str), validate=True)


def _numpy_from_json(content: Any) -> np.generic:
    described, data = content
    return cast(Any, _memory(dtype_from_json(described), (), bytes.fromhex(data)))[()]


def _array_from_json(content: Any) -> Array:
    described, shape, data = content
    return _memory(dtype_from_json(described), [_int_from_json(n) for n in shape], _bytes_from_json(data))


def _memory(dtype: np.dtype[Any], shape: Sequence[int], data: bytes) -> Array:
    if min(shape, default=0) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are no {dtype}{list(shape)}")
    return np.ndarray(shape, dtype, bytearray(data))


_T = TypeVar("_T")


def _instance(content: Any, wanted: type[_T]) -> _T:
    if not isinstance(content, wanted):
        raise ValueError(f"{content!r:.80} is of type {type(content).__name__}, expected {wanted.__name__}")
    return content


_READ: dict[str, Callable[[Any], Value]] = {
    "bool": _bool_from_json,
    "int": _int_from_json,
    "float": _float_from_json,
    "complex": _complex_from_json,
    "str": _text_from_json,
    "bytes": _bytes_from_json,
    "np.str": lambda content: np.str_(_text_from_json(content)),
    "np.bytes": lambda content: np.bytes_(_bytes_from_json(content)),
    "numpy": _numpy_from_json,
    "array": _array_from_json,
}
