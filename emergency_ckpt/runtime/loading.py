"""Starting a run from another run's checkpoint: its full state, or its parameters only.

Each process reads the boxes that it needs, so the checkpoint may come from any mesh and any sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from emergency_ckpt.core.checksums import checksum_blocks, shard_seed
from emergency_ckpt.errors import StateMismatchError
from emergency_ckpt.jaxio.assemble import StoredShard, assemble
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.state import flatten, key_implementations
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.persistent.reader import BoxRequest, StepReader

PARAMETERS = "params"
_TIMEOUT_SECONDS = 1800.0


def load_state(path: str, abstract_state: Any, topology: Topology, read_bytes: int) -> Any:
    """The state in the checkpoint at `path` (a step, or the item in it), ours or plain Orbax's.

    Each process reads its own shards. Raises StateMismatchError naming every leaf that differs.
    """
    return read_state(StepReader(path), abstract_state, topology, read_bytes)


def read_state(
    reader: StepReader,
    abstract_state: Any,
    topology: Topology,
    read_bytes: int,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> Any:
    """The state as `abstract_state` wants it, from a step in the persistent tier. Local.

    Raises StateMismatchError naming every leaf that differs, CorruptDataError and PersistentStoreError.
    """
    layout = build_layout(abstract_state, topology)
    reader.check_leaves(layout.leaves, layout.value_leaves, key_implementations(abstract_state))
    memory: dict[int, np.ndarray] = {}
    requests = []
    for index in layout.process_shards[topology.process_index]:
        shard = layout.shards[index]
        memory[index] = np.empty(layout.shard_nbytes[index], np.uint8)
        requests.append(BoxRequest(shard.leaf, shard.box, layout.typed(index, memory[index])))
    reader.read_boxes(requests, read_bytes, timeout_seconds)

    def stored(index: int) -> StoredShard:
        return StoredShard(memory[index], checksum_blocks(memory[index], shard_seed(0, layout, index)))

    values = reader.values_of(layout.value_leaves)
    return assemble(abstract_state, layout, topology.process_index, 0, stored, values)


def load_parameters(
    path: str, abstract_state: Any, topology: Topology, read_bytes: int
) -> Callable[[Any], Any]:
    """Reads the parameters of the checkpoint at `path`; what it returns puts them into a fresh state.

    Parameters are the leaves below the key 'params' that is nearest to the root; the checkpoint may hold a
    whole state or them alone, below one such key, several (as flax and MaxText write them) or none.
    Raises StateMismatchError when the state has no such leaves or the checkpoint lacks some.
    """
    leaves, _ = jax.tree_util.tree_flatten(abstract_state)
    names = [leaf.name for leaf in flatten(abstract_state).leaves]
    abstract = dict(zip(names, leaves, strict=True))
    wanted = parameter_names(names)
    if not wanted:
        raise StateMismatchError(
            f"load_parameters_path is set, but no leaf of the state lies below a key {PARAMETERS!r}: "
            f"{names[:5]}…; use load_full_state_path, or name that part of the state so"
        )
    reader = StepReader(path)
    stored_as = find_parameters(wanted, {*reader.leaves, *reader.values()})
    loaded = read_state(reader, {stored_as[name]: abstract[name] for name in wanted}, topology, read_bytes)

    def into(fresh_state: Any) -> Any:
        fresh, treedef = jax.tree_util.tree_flatten(fresh_state)
        merged = [
            loaded[stored_as[name]] if name in stored_as else leaf
            for name, leaf in zip(names, fresh, strict=True)
        ]
        return jax.tree_util.tree_unflatten(treedef, merged)

    return into


def parameter_names(names: Sequence[str]) -> list[str]:
    """The leaves below the key 'params' that is nearest to the root.

    Optimizer states repeat the tree of the parameters, with that key, further below; they are none.
    """
    depths = {name: keys.index(PARAMETERS) for name in names if PARAMETERS in (keys := name.split("."))}
    return [name for name, depth in depths.items() if depth == min(depths.values())]


def find_parameters(wanted: Sequence[str], saved: set[str]) -> Mapping[str, str]:
    """How the parameters are called in a checkpoint with the leaves `saved`: the way that finds most of them.

    Where all ways find as many, the names stay as they are, so that an error names what was looked for.
    """
    best = max(_ways(wanted), key=lambda stored: sum(name in saved for name in stored))
    return dict(zip(wanted, best, strict=True))


def _ways(wanted: Sequence[str]) -> Iterator[list[str]]:
    """The names as they are; then with as many keys 'params' as different writers put before them."""
    yield list(wanted)
    split = [_split(name) for name in wanted]
    heads = {head for head, _ in split}
    for count in (1, 2, 0):
        below = [PARAMETERS] * count
        yield [".".join([*head, *below, *rest]) for head, rest in split]
        if len(heads) == 1:
            yield [".".join([*below, *rest]) for _, rest in split]


def _split(name: str) -> tuple[tuple[str, ...], list[str]]:
    """The keys before the first 'params', and those after it and its repetitions."""
    keys = name.split(".")
    first = keys.index(PARAMETERS)
    rest = keys[first:]
    while len(rest) > 1 and rest[0] == PARAMETERS:
        rest = rest[1:]
    return tuple(keys[:first]), rest
