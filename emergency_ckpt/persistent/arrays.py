"""How leaves lie in TensorStore: zarr3 arrays in OCDBT stores, every chunk with a crc32c.

Where a write or a read could silently give zeros (an omitted chunk of zeros, a missing chunk), it is an error.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.shards import Box, dtype_of
from emergency_ckpt.errors import (
    CorruptDataError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StoreUnreachableError,
    UnsupportedStateError,
)
from emergency_ckpt.persistent.chunks import chunk_shape
from emergency_ckpt.persistent.object_store.failures import tensorstore_failure

COMPRESSIONS = ("none", "zstd")
_INLINE_BYTES = 1024
OBJECT_BYTES = 32 * 1024**2
"""Objects of array data in buckets: one request puts one, and TensorStore has up to 32 of them on their way."""

# Chunks that follow each other come by one request: a thousand small leaves by some dozen.
_JOINED_READS = {
    "experimental_read_coalescing_threshold_bytes": 4096,
    "experimental_read_coalescing_merged_bytes": 8 * 1024**2,
    "experimental_read_coalescing_interval": "10ms",
}
_NODE_CACHE_BYTES = 64 * 1024 * 1024
_DAMAGE = ("DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT")
# TensorStore says every status but INVALID_ARGUMENT at the beginning of its message.
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """How parts are written.

    Attributes:
      concurrent_bytes: at most this many bytes of shards are being written at a time (one shard at least).
      max_chunk_bytes: upper bound of a chunk, which is the smallest piece that can be read. Reading chunks of
        over 32 MiB is slower by half, since the C library gives their memory back after each.
      compression: "none" or "zstd".
      target_data_file_bytes: size at which OCDBT starts another data file; None for TensorStore's default. In
        buckets 32 MiB at most.
      timeout_seconds: limit for each single wait for the store.
      stall_seconds: and for how long nothing of it may come to an end (see `uploads`).
    """

    concurrent_bytes: int = 1024**3
    max_chunk_bytes: int = 16 * 1024**2
    compression: str = "none"
    target_data_file_bytes: int | None = None
    timeout_seconds: float = 1800.0
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        limits = (self.concurrent_bytes, self.max_chunk_bytes, self.timeout_seconds, self.stall_seconds)
        if min(limits) <= 0:
            raise ValueError(f"sizes and time limits must be positive: {self}")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {COMPRESSIONS}, not {self.compression!r}")


def new_context() -> ts.Context:
    """A context to share between stores: decoded chunks are not cached, OCDBT's tree nodes are."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "cache_pool#ocdbt": {"total_bytes_limit": _NODE_CACHE_BYTES},
        }
    )


def ocdbt(
    base: dict[str, Any], target_data_file_bytes: int | None = None, *, in_bucket: bool = False
) -> dict[str, Any]:
    """TensorStore's specification of the OCDBT store in a key-value store, such as `Files.kvstore` names.

    Values of up to 1 KiB, array metadata among them, lie inside the tree nodes, which carry checksums.
    """
    spec: dict[str, Any] = {
        "driver": "ocdbt",
        "base": base,
        "cache_pool": "cache_pool#ocdbt",
        "config": {"max_inline_value_bytes": _INLINE_BYTES},
    }
    if in_bucket:
        target_data_file_bytes = min(target_data_file_bytes or OBJECT_BYTES, OBJECT_BYTES)
        spec |= _JOINED_READS
    if target_data_file_bytes is not None:
        spec["target_data_file_size"] = target_data_file_bytes
    return spec


def array_spec(
    kvstore: dict[str, Any], leaf: LeafSpec, chunk: tuple[int, ...], compression: str
) -> dict[str, Any]:
    """TensorStore's specification of one leaf; opening an array that differs from it fails."""
    stored = storage_dtype(leaf.dtype)
    codecs: list[dict[str, Any]] = [{"name": "bytes"}]
    if stored.itemsize > 1:
        codecs[0]["configuration"] = {"endian": "little"}
    if compression == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": 1}})
    codecs.append({"name": "crc32c"})
    return {
        "driver": "zarr3",
        "kvstore": {**kvstore, "path": f"{leaf.name}/"},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "metadata": {
            "shape": leaf.shape,
            "data_type": stored.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": codecs,
        },
    }


def new_arrays(
    kvstore: dict[str, Any],
    wanted: Sequence[tuple[LeafSpec, tuple[int, ...]]],
    compression: str,
    context: ts.Context,
    transaction: ts.Transaction,
    what: str,
    timeout_seconds: float,
) -> list[Any]:
    """Arrays to write into, one for each leaf with its chunk shape, in a store that no other writer has.

    Their descriptions go into the transaction. The store is not asked whether it has them, which would be a
    request for each array. Raises as `settle` does.
    """
    leaves = {leaf.name: (leaf, chunk) for leaf, chunk in wanted}
    memory = ts.Context()
    in_memory: dict[str, Any] = {"driver": "memory"}
    made = [
        ts.open(array_spec(in_memory, *each, compression), create=True, context=memory)
        for each in leaves.values()
    ]
    settle(made, what, timeout_seconds)
    stores = [ts.KvStore.open(in_memory, context=memory), ts.KvStore.open(kvstore, context=context)]
    described, store = settle(stores, what, timeout_seconds)
    found = settle([described.read(_described(name)) for name in leaves], what, timeout_seconds)
    store = store.with_transaction(transaction)
    texts = zip(leaves, found, strict=True)
    settle([store.write(_described(name), each.value) for name, each in texts], what, timeout_seconds)
    specs = [array_spec(kvstore, leaf, chunk, compression) for leaf, chunk in wanted]
    opened = [
        ts.open(spec, open=True, assume_metadata=True, context=context, transaction=transaction)
        for spec in specs
    ]
    return settle(opened, what, timeout_seconds)


def _described(name: str) -> str:
    """Where zarr has the description of an array."""
    return f"{name}/zarr.json"


def storage_dtype(name: str) -> np.dtype:
    """The dtype under which a leaf is stored: its own, or unsigned bytes where TensorStore has none like it."""
    dtype = dtype_of(name)
    try:
        ts.dtype(dtype)
    except (TypeError, ValueError):
        if dtype.itemsize == 1:
            return np.dtype(np.uint8)
        raise UnsupportedStateError(
            f"dtype {name} has no form in the persistent tier; cast such leaves to one that TensorStore stores."
        ) from None
    return dtype


def leaf_chunks(layout: Layout, max_chunk_bytes: int) -> dict[str, tuple[int, ...]]:
    """Chunk shape of every leaf of a layout."""
    boxes: dict[str, list[Box]] = {leaf.name: [] for leaf in layout.leaves}
    for shard in layout.shards:
        boxes[shard.leaf].append(shard.box)
    return {
        leaf.name: chunk_shape(leaf.shape, boxes[leaf.name], dtype_of(leaf.dtype).itemsize, max_chunk_bytes)
        for leaf in layout.leaves
    }


def settle(futures: Iterable[Any], what: str, timeout_seconds: float) -> list[Any]:
    """The results of TensorStore futures, all of them waited for until one common time limit.

    Raises CorruptDataError where the store says that data is missing or damaged, PersistentStoreError for
    anything else, time-outs included. `what` begins the message.
    """
    return _settle(futures, what, timeout_seconds, _translated)


def settle_reads(futures: Iterable[Any], what: str, timeout_seconds: float) -> list[Any]:
    """As `settle`, for what only reads: there bytes that TensorStore cannot decode are damage, too."""
    return _settle(futures, what, timeout_seconds, _translated_of_read)


def _settle(
    futures: Iterable[Any],
    what: str,
    timeout_seconds: float,
    translated: Callable[[Exception, str], EmergencyCheckpointError],
) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results, failure = [], None
    for future in futures:
        try:
            results.append(future.result(timeout=max(deadline - time.monotonic(), 0.001)))
        except TimeoutError:
            future.cancel()
            failure = failure or StoreUnreachableError(
                f"{what}: no answer from the store within {timeout_seconds:g} s. Check that it is reachable,"
                " or raise the time limit."
            )
        except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
            failure = failure or translated(error, what)
    if failure is not None:
        raise failure
    return results


def _translated(error: Exception, what: str) -> EmergencyCheckpointError:
    if refused := tensorstore_failure(_text(error), what):
        # Not as its cause: the message quotes the server's answer, which may have signatures in it.
        return refused
    return _damaged(error, what) if _text(error).startswith(_DAMAGE) else _failed(error, what)


def _translated_of_read(error: Exception, what: str) -> EmergencyCheckpointError:
    """INVALID_ARGUMENT comes as a ValueError without the name: a node, chunk or description that is none."""
    undecodable = isinstance(error, ValueError) and not _STATUS.match(_text(error))
    return _damaged(error, what) if undecodable else _translated(error, what)


def _damaged(error: Exception, what: str) -> EmergencyCheckpointError:
    translated = CorruptDataError(f"{what}: {_text(error)}. Restore another step.")
    translated.__cause__ = error
    return translated


def _failed(error: Exception, what: str) -> EmergencyCheckpointError:
    translated = PersistentStoreError(f"{what}: {_text(error)}")
    translated.__cause__ = error
    return translated


def _text(error: Exception) -> str:
    return str(error).partition(" [tensorstore_spec=")[0]
