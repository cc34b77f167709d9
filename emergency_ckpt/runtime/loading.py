"""Starting a run from another run's checkpoint: its full state, or its parameters only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from emergency_ckpt.core.checksums import checksum_blocks, shard_seed
from emergency_ckpt.errors import StateMismatchError
from emergency_ckpt.jaxio.assemble import StoredShard, assemble
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.state import flatten
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.persistent.reader import BoxRequest, StepReader

PARAMETERS = "params"


def load_state(path: str, abstract_state: Any, topology: Topology, read_bytes: int) -> Any:
    """The state in the checkpoint at `path` (a step, or the item in it), ours or plain Orbax's.

    Each process reads its own shards. Raises StateMismatchError naming every leaf that differs.
    """
    layout = build_layout(abstract_state, topology)
    reader = StepReader(path)
    reader.check_leaves(layout.leaves)
    memory: dict[int, np.ndarray] = {}
    requests = []
    for index in layout.process_shards[topology.process_index]:
        shard = layout.shards[index]
        memory[index] = np.empty(layout.shard_nbytes[index], np.uint8)
        requests.append(BoxRequest(shard.leaf, shard.box, layout.typed(index, memory[index])))
    reader.read_boxes(requests, read_bytes)

    def stored(index: int) -> StoredShard:
        return StoredShard(memory[index], checksum_blocks(memory[index], shard_seed(0, layout, index)))

    values = {name: value for name, value in reader.values().items() if name in layout.value_leaves}
    return assemble(abstract_state, layout, topology.process_index, 0, stored, values)


def load_parameters(
    path: str,
    abstract_state: Any,
    init: Callable[[], Any],
    topology: Topology,
    read_bytes: int,
) -> Any:
    """A fresh state from `init` with the parameters of the checkpoint at `path`.

    Parameters are the leaves below a key named 'params'; the checkpoint may hold a whole state or them alone.
    Raises StateMismatchError when the state has no such leaves or the checkpoint lacks some.
    """
    leaves, _ = jax.tree_util.tree_flatten(abstract_state)
    names = [leaf.name for leaf in flatten(abstract_state).leaves]
    wanted = {name: leaf for name, leaf in zip(names, leaves, strict=True) if _is_parameter(name)}
    if not wanted:
        raise StateMismatchError(
            f"load_parameters_path is set, but no leaf of the state lies below a key {PARAMETERS!r}: "
            f"{names[:5]}…; use load_full_state_path, or name that part of the state so"
        )
    saved = StepReader(path).leaves
    stored_as = {name: name if name in saved else _below_parameters(name) for name in wanted}
    loaded = load_state(path, {stored_as[n]: leaf for n, leaf in wanted.items()}, topology, read_bytes)
    fresh, treedef = jax.tree_util.tree_flatten(init())
    return jax.tree_util.tree_unflatten(
        treedef,
        [loaded[stored_as[n]] if n in wanted else leaf for n, leaf in zip(names, fresh, strict=True)],
    )


def _is_parameter(name: str) -> bool:
    return PARAMETERS in _keys(name)


def _below_parameters(name: str) -> str:
    keys = _keys(name)
    return ".".join(keys[keys.index(PARAMETERS) + 1 :])


def _keys(name: str) -> Sequence[str]:
    return name.split(".")
