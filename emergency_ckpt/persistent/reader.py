"""Reading boxes of leaves from a committed step, ours or one that plain Orbax wrote.

Ours are verified: whole shards against the block checksums of the save, any other box chunk by chunk. Others
carry no checksums; `StepReader.verified` tells.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emergency_ckpt.core.checksums import block_seed, first_bad_block
from emergency_ckpt.core.conversion import as_array
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard, dtype_of
from emergency_ckpt.core.values import Value, shown
from emergency_ckpt.errors import (
    CorruptDataError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StateMismatchError,
)
from emergency_ckpt.persistent.arrays import (
    array_spec,
    leaf_chunks,
    new_context,
    ocdbt,
    settle_reads,
    storage_dtype,
)
from emergency_ckpt.persistent.box_cuts import cut_box
from emergency_ckpt.persistent.fields import parsed
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.step_files import (
    CHECKSUMS_FILE,
    EXTRAS_FILE,
    ITEM_NAMES,
    LAYOUT_FILE,
    ORBAX_TREE_FILE,
    checksums_from_bytes,
    digest,
    extras_from_json,
    read_side_info,
    unseal,
)
from emergency_ckpt.persistent.tree_metadata import (
    TreeMetadata,
    TreeNode,
    read_key_implementations,
    read_strings,
    read_tree_metadata,
    tree_nodes,
)

_OPENED_AT_ONCE = 256
# A box that is larger than what may be in flight is read in pieces, so many of them at a time.
_PIECES_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class BoxRequest:
    """One box of one leaf and the array that receives it.

    `out` has the leaf's dtype and the box's shape, C-contiguous and writable.
    """

    leaf: str
    box: Box
    out: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Piece(BoxRequest):
    """What one read gives. `completes`: the request that is whole when this piece and those before it are."""

    completes: BoxRequest | None


class StepReader:
    """One committed step. Local to the calling process; not for use by several threads at once.

    Args:
      step: the step's directory, or the files below it.
      item: the item directory; None for the one that the step has.
      directory_step: the step that the directory's name stands for; None where that is not known.
      timeout_seconds: limit for each single wait for the store while opening.

    Raises CorruptDataError when a file of the step is damaged, PersistentStoreError when there is no such step.
    """

    def __init__(
        self,
        step: str | os.PathLike[str] | Files,
        item: str | None = None,
        *,
        directory_step: int | None = None,
        timeout_seconds: float = 300.0,
    ):
        self._files: Files = open_files(step) if isinstance(step, str | os.PathLike) else step
        self._timeout_seconds = timeout_seconds
        self._context = new_context()
        self._arrays: dict[str, Any] = {}
        entries = self._files.entries()
        self.side = read_side_info(self._files, (e.name for e in entries), directory_step)
        lone = [e.name for e in entries if e.name in (LAYOUT_FILE, CHECKSUMS_FILE)]
        if self.side is None and lone:
            raise CorruptDataError(
                f"{self.path} holds {lone[0]} but not the side file that belongs to it"
                " (emergency_ckpt.<generation>.<nonce>.json): the step is damaged. Restore another one."
            )
        self.item = item if item is not None else self._find_item([e.name for e in entries])

    @property
    def path(self) -> str:
        """The step's directory."""
        return self._files.locate()

    @property
    def files(self) -> Files:
        """What lies in the step's directory."""
        return self._files

    @property
    def verified(self) -> bool:
        """Whether what is read is checked; only steps written by this package carry checksums."""
        return self.side is not None

    @property
    def step_id(self) -> StepId | None:
        """Generation and step, None for a step of another program (its number is its directory's name)."""
        return self.side.step_id if self.side else None

    @functools.cached_property
    def layout(self) -> Layout | None:
        """The layout of the job that saved the step, None for a step of another program."""
        if self.side is None:
            return None
        layout = Layout.from_bytes(self._our_file(LAYOUT_FILE))
        if layout.hash != self.side.layout_hash:
            raise CorruptDataError(
                f"{self._files.locate(LAYOUT_FILE)} is layout {layout.hash}, expected {self.side.layout_hash}"
            )
        return layout

    @functools.cached_property
    def leaves(self) -> Mapping[str, LeafSpec]:
        """Every array leaf by name. For a step of another program this opens every array."""
        if self.layout is not None:
            return self.layout.leaf
        names = self._tree.arrays
        self._open(names)
        return {
            name: LeafSpec(name, tuple(self._arrays[name].shape), self._arrays[name].dtype.numpy_dtype.name)
            for name in names
        }

    @property
    def saved_arrays(self) -> tuple[str, ...]:
        """The names of the array leaves; opens none of them."""
        return tuple(self.layout.leaf) if self.layout is not None else self._tree.arrays

    @functools.cached_property
    def extras(self) -> Mapping[str, bytes]:
        """Small per-process state that was saved with the step, by owner key."""
        if self.side is None or EXTRAS_FILE not in self.side.digests:
            return {}
        where = self._files.locate(EXTRAS_FILE)
        raw = unseal(self._our_file(EXTRAS_FILE), where, "Restore another step.")
        return parsed(raw, lambda found: extras_from_json(found["extras"]), where, "Restore another step.")

    def values(self) -> dict[str, Value]:
        """The leaves that are not arrays, by name."""
        return dict(self._values)

    def values_of(self, names: Iterable[str]) -> dict[str, Value]:
        """The values of these leaves, as far as they are there; a 0-d array counts as a number."""
        wanted = set(names)
        found = {name: value for name, value in self._values.items() if name in wanted}
        for name in sorted(wanted - found.keys()):
            leaf = self.leaves.get(name)
            if leaf is not None and leaf.shape == ():
                out = np.empty((), dtype_of(leaf.dtype))
                self.read_box(name, Box((), ()), out)
                found[name] = out[()]
        return found

    @functools.cached_property
    def _values(self) -> Mapping[str, Value]:
        if self.side is not None:
            return self.side.values
        self._open(self._tree.numbers)
        numbers = settle_reads(
            [self._arrays[name].read() for name in self._tree.numbers],
            f"reading the scalars of {self.path}",
            self._timeout_seconds,
        )
        strings = read_strings(self._files, self.item, self._tree.strings)
        return {**{n: v.item() for n, v in zip(self._tree.numbers, numbers, strict=True)}, **strings}

    @functools.cached_property
    def key_implementations(self) -> Mapping[str, str]:
        """PRNG implementation by leaf, of those that are known to be typed keys; their leaves are integers."""
        if self.layout is not None:
            return self.layout.key_implementations
        return read_key_implementations(self._files, self.item)

    @functools.cached_property
    def nodes(self) -> tuple[TreeNode, ...]:
        """Leaves and empty nodes of the saved tree, in its order."""
        path = f"{self.item}/{ORBAX_TREE_FILE}".lstrip("/")
        known = dict(self.layout.metadata_files).get(ORBAX_TREE_FILE) if self.layout is not None else None
        return tree_nodes(self._files.read(path) if known is None else known, self._files.locate(path))

    def check_leaves(
        self,
        wanted: Iterable[LeafSpec],
        values: Collection[str] = (),
        keys: Mapping[str, str] | None = None,
    ) -> tuple[str, ...]:
        """Returns the array leaves that are saved but not wanted.

        `values` names the other leaves, `keys` has the PRNG implementations of typed keys. A saved number may
        be wanted as a 0-d array that can hold it, and the other way round; integers may be wanted as keys.
        Raises StateMismatchError, naming every leaf that is missing or has another shape, dtype or PRNG
        implementation.
        """
        by_name = {leaf.name: leaf for leaf in wanted}
        wrong = [
            f"{name}: saved {self._describe_saved(name)}, wanted {_describe(leaf)}"
            for name, leaf in sorted(by_name.items())
            if self.leaves.get(name) != leaf and self._number_as(leaf) is None
        ]
        wrong += [
            f"{name}: saved {self._describe_saved(name)}, wanted a value"
            for name in sorted(values)
            if name not in self._values and getattr(self.leaves.get(name), "shape", None) != ()
        ]
        wrong += [
            f"{name}: saved {self.key_implementations[name]} keys, wanted {implementation} keys"
            for name, implementation in sorted((keys or {}).items())
            if self.key_implementations.get(name, implementation) != implementation
        ]
        extra = tuple(name for name in self.leaves if name not in by_name)
        if wrong:
            unwanted = f"\nSaved but not wanted: {', '.join(extra[:20])}" if extra else ""
            raise StateMismatchError(
                f"{self.path} does not hold the wanted state; {len(wrong)} leaves differ:\n  "
                + "\n  ".join(wrong)
                + unwanted
                + "\nRestore with the model configuration that saved the step, or restore the parameters only."
            )
        return extra

    def read_box(self, leaf: str, box: Box, out: np.ndarray) -> None:
        """Reads one box into `out` and verifies it."""
        self.read_boxes([BoxRequest(leaf, box, out)])

    def read_boxes(
        self,
        requests: Sequence[BoxRequest],
        concurrent_bytes: int = 1024**3,
        timeout_seconds: float = 1800.0,
        is_stopped: Callable[[], bool] | None = None,
    ) -> None:
        """Reads boxes into their arrays, at most `concurrent_bytes` of them at a time (a chunk at least).

        When it raises, nothing in the arrays may be used; no read is left running but after a time-out. Once
        `is_stopped` says so, no further read begins, and it raises PersistentStoreError.

        Raises StateMismatchError when an array does not fit its leaf, CorruptDataError for a box that is
        missing or does not verify, PersistentStoreError when the store fails or the time is over.
        """
        requests = [request for request in requests if not self._put_number(request)]
        for request in requests:
            self._check_request(request)
        self._open(dict.fromkeys(request.leaf for request in requests))
        deadline = time.monotonic() + timeout_seconds
        running: collections.deque[tuple[_Piece, Any]] = collections.deque()
        running_bytes = 0
        failure: EmergencyCheckpointError | None = None
        waiting = collections.deque(p for each in requests for p in self._pieces(each, concurrent_bytes))
        while running or (waiting and failure is None):
            if failure is None and is_stopped is not None and is_stopped():
                failure = PersistentStoreError(f"reading {self.path} was stopped: nobody wants it any more")
            fits = bool(waiting) and running_bytes + waiting[0].out.nbytes <= concurrent_bytes
            if waiting and failure is None and (fits or not running):
                piece = waiting.popleft()
                running.append((piece, self._start(piece)))
                running_bytes += piece.out.nbytes
                continue
            piece, future = running.popleft()
            running_bytes -= piece.out.nbytes
            try:
                what = self._where(piece)
                settle_reads([future], what, max(deadline - time.monotonic(), 0.001))
                if piece.completes is not None:
                    self._verify(piece.completes, self._where(piece.completes))
            except (CorruptDataError, PersistentStoreError) as error:
                failure = failure or error
        if failure is not None:
            raise failure

    @functools.cached_property
    def saved_checksums(self) -> Mapping[Shard, tuple[int, ...]]:
        """Block checksums of every shard as it was saved; empty for a step of another program."""
        if self.layout is None:
            return {}
        where = self._files.locate(CHECKSUMS_FILE)
        table = checksums_from_bytes(self._our_file(CHECKSUMS_FILE), self.layout, where)
        return dict(zip(self.layout.shards, table, strict=True))

    @functools.cached_property
    def _tree(self) -> TreeMetadata:
        return read_tree_metadata(self._files, self.item)

    @functools.cached_property
    def _chunks(self) -> Mapping[str, tuple[int, ...]]:
        if self.layout is None or self.side is None:
            return {}
        return leaf_chunks(self.layout, self.side.max_chunk_bytes)

    def _find_item(self, names: Sequence[str]) -> str:
        if self.side is not None:
            return self.side.item
        if found := [name for name in ITEM_NAMES if name in names]:
            return found[0]
        if ORBAX_TREE_FILE in names:
            return ""
        if not names:
            raise PersistentStoreError(
                f"{self.path} does not exist or is empty. Give the directory of a step, or of the item in it."
            )
        raise PersistentStoreError(
            f"{self.path} is not a committed checkpoint of a state: it holds {list(names)[:10]}, expected"
            f" one of the directories {', '.join(ITEM_NAMES)}. If it is the directory of a run, give one of its"
            " steps; if the item has another name, give the item's directory."
        )

    def _our_file(self, name: str) -> bytes:
        """Content of one of our files, checked against the side file."""
        assert self.side is not None
        where = self._files.locate(name)
        try:
            data = self._files.read(name)
        except FileNotFoundError as error:
            raise CorruptDataError(f"{where} is missing: the step is damaged. Restore another one.") from error
        if digest(data) != self.side.digests.get(name):
            raise CorruptDataError(
                f"{where} is damaged: its {len(data)} bytes do not match their checksum. Restore another step."
            )
        return data

    def _open(self, names: Iterable[str]) -> None:
        """Opens arrays that are not open yet, some at a time."""
        missing = [name for name in names if name not in self._arrays]
        for at in range(0, len(missing), _OPENED_AT_ONCE):
            some = missing[at : at + _OPENED_AT_ONCE]
            arrays = settle_reads(
                [ts.open(self._spec(name), open=True, read=True, context=self._context) for name in some],
                f"opening {len(some)} leaves of {self.path} from {some[0]!r}",
                self._timeout_seconds,
            )
            self._arrays.update(zip(some, arrays, strict=True))

    def _spec(self, name: str) -> dict[str, Any]:
        if self.side is not None:
            kvstore = ocdbt(self._files.kvstore(self.item), in_bucket=self._files.is_bucket)
            return array_spec(kvstore, self.leaves[name], self._chunks[name], self.side.compression)
        if self._tree.ocdbt:
            kvstore = ocdbt(self._files.kvstore(self.item), in_bucket=self._files.is_bucket)
            kvstore["path"] = f"{name}/"
            del kvstore["config"]
        else:
            kvstore = self._files.kvstore(f"{self.item}/{name}".lstrip("/"))
        return {
            "driver": "zarr3" if self._tree.zarr3 else "zarr",
            "kvstore": kvstore,
            "fill_missing_data_reads": self._tree.fills_missing,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }

    def _number_as(self, leaf: LeafSpec) -> np.ndarray | None:
        """The saved number that is wanted as this array, None if there is none that it can hold.

        Floats are rounded, as JAX does with Python's; other numbers must be kept exactly.
        """
        value = self._values.get(leaf.name)
        if leaf.shape != () or value is None:
            return None
        return as_array(value, dtype_of(leaf.dtype), rounds=True)

    def _put_number(self, request: BoxRequest) -> bool:
        """Fills a request for a leaf that was saved as a number; False for any other."""
        if request.leaf in self.leaves or request.out.shape != ():
            return False
        array = self._number_as(LeafSpec(request.leaf, (), request.out.dtype.name))
        if array is None:
            return False
        request.out[...] = array
        return True

    def _describe_saved(self, name: str) -> str:
        value = self._values.get(name)
        return (
            _describe(self.leaves.get(name)) if value is None else f"the {type(value).__name__} {shown(value)}"
        )

    def _check_request(self, request: BoxRequest) -> None:
        leaf = self.leaves.get(request.leaf)
        if leaf is None or not (
            len(request.box.start) == len(leaf.shape) and Box.whole(leaf.shape).contains(request.box)
        ):
            raise StateMismatchError(
                f"{self.path} has no box {request.box} of leaf {request.leaf!r}: it holds {_describe(leaf)}"
            )
        out = request.out
        if out.shape != request.box.shape or out.dtype != dtype_of(leaf.dtype) or not out.flags.c_contiguous:
            raise StateMismatchError(
                f"leaf {request.leaf!r}, box {request.box} of {self.path} is"
                f" {leaf.dtype}{list(request.box.shape)}; the array for it is {out.dtype}{list(out.shape)},"
                f" C-contiguous: {out.flags.c_contiguous}"
            )

    def _pieces(self, request: BoxRequest, most_bytes: int) -> list[_Piece]:
        """What is read at once: the box, or several pieces, the last of which makes the box whole."""
        box, out = request.box, request.out
        boxes = [box]
        if out.nbytes > most_bytes:
            chunk = self._arrays[request.leaf].chunk_layout.read_chunk.shape
            boxes = cut_box(box, chunk, out.itemsize, max(most_bytes // _PIECES_AT_ONCE, 1))
        pieces = []
        for number, each in enumerate(boxes, 1):
            inside = (slice(a - o, b - o) for a, b, o in zip(each.start, each.stop, box.start, strict=True))
            is_last = number == len(boxes)
            pieces.append(_Piece(request.leaf, each, out[(*inside, ...)], request if is_last else None))
        return pieces

    def _start(self, request: BoxRequest) -> Any:
        stored = storage_dtype(self.leaves[request.leaf].dtype)
        target = ts.array(request.out.view(stored), context=self._context, copy=False)
        return target.write(self._arrays[request.leaf][request.box.slices()])

    def _verify(self, request: BoxRequest, what: str) -> None:
        """Checks a box that is a saved shard against its block checksums."""
        if self.side is None:
            return
        shard = Shard(request.leaf, request.box)
        expected = self.saved_checksums.get(shard)
        if expected is None:
            return
        seed = block_seed(self.side.step_id.generation, shard, self.leaves[request.leaf].dtype)
        data = request.out.reshape(-1).view(np.uint8).data
        bad = first_bad_block(data, expected, seed)
        if bad is not None:
            raise CorruptDataError(f"{what}: block {bad} does not match its checksum. Restore another step.")

    def _where(self, request: BoxRequest) -> str:
        step = self.step_id or "a step of another program"
        return f"reading {request.leaf}{request.box} of {step} from {self.path}"


def _describe(leaf: LeafSpec | None) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if leaf else "nothing"
