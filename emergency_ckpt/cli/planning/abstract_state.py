"""The exact size of a state, from a function of the user's that describes it: `--state module:function`.

The function takes nothing and returns a pytree of `jax.ShapeDtypeStruct`, with shardings or without. Only this
module imports jax, and nothing is computed: no device but the CPU is needed.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emergency_ckpt.core.forecast.job_shape import JobShape, Protection
from emergency_ckpt.core.forecast.sizing import StateSize, evenly_sharded
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.shards import Box, dtype_of
from emergency_ckpt.core.storage import storage_layout
from emergency_ckpt.errors import ConfigError, EmergencyCheckpointError

if TYPE_CHECKING:
    from emergency_ckpt.jaxio.state import Leaf


def state_size(named: str, shape: JobShape, protection: Protection, replica_axis: int | str) -> StateSize:
    """The bytes of the state that `module:function` describes, in a job of this shape.

    With shardings (over a `jax.sharding.Mesh` or `AbstractMesh` of the whole job) every shard is known: devices
    stand in the order of the mesh, those of a slice one after the other, host by host. Without any, the state
    is taken as sharded evenly over the hosts.

    Raises ConfigError for what is no such function, or no state of a job of this shape.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from emergency_ckpt.jaxio.state import LeafKind, flatten

    leaves = [leaf for leaf in flatten(_call(named)).leaves if leaf.kind is not LeafKind.VALUE]
    total = sum(math.prod(leaf.shape) * dtype_of(leaf.dtype).itemsize for leaf in leaves)
    if not total:
        raise ConfigError(f"--state {named}: the state has no arrays")
    if all(leaf.is_process_local for leaf in leaves):
        return evenly_sharded(
            total, shape, protection, f"{named}, taken as evenly sharded: it has no shardings"
        )
    layout = _layout(named, leaves, shape, replica_axis)
    slots = storage_layout(layout, protection.copies, protection.spreads)
    held, stored = (_fullest(each) for each in (layout, slots))
    return StateSize(total, held, stored, f"{named}, by its shardings")


def _fullest(layout: Layout) -> int:
    """Bytes of the largest slot of all hosts."""
    firsts = {kind: host for host, kind in reversed(list(enumerate(layout.held.kinds)))}
    return max(layout.data_bytes(host) for host in firsts.values())


def _call(named: str) -> Any:
    module_name, colon, function_name = named.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"--state {named!r}: expected module:function, for example my_model.train:state")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As `python -m` does.
    try:
        function = importlib.import_module(module_name)
        for name in function_name.split("."):
            function = getattr(function, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--state {named}: there is no such function to import ({error}); the module must be installed, or "
            "lie in this directory"
        ) from error
    if not callable(function):
        raise ConfigError(f"--state {named}: it is a {type(function).__name__}, not a function")
    try:
        return function()
    except EmergencyCheckpointError:
        raise
    except Exception as error:
        # Whatever the user's program raises is told as such, not as a fault of this one.
        raise ConfigError(f"--state {named}: the function raised {type(error).__name__}: {error}") from error


def _layout(named: str, leaves: list[Leaf], shape: JobShape, replica_axis: int | str) -> Layout:
    cuts: dict[Any, Mapping[int, tuple[Box, ...]]] = {}
    boxes: dict[str, Mapping[int, tuple[Box, ...]]] = {}
    for leaf in leaves:
        key = None if leaf.is_process_local else (leaf.sharding, leaf.key_dims), leaf.shape
        if key not in cuts:
            whole = dict.fromkeys(range(shape.hosts), (Box.whole(leaf.shape),))
            cuts[key] = whole if leaf.is_process_local else _boxes(named, leaf, shape, replica_axis)
        boxes[leaf.name] = cuts[key]
    specs = [LeafSpec(leaf.name, leaf.shape, leaf.dtype) for leaf in leaves]
    return Layout.build_from_boxes(specs, boxes, shape.process_slice)


def _boxes(named: str, leaf: Leaf, shape: JobShape, replica_axis: int | str) -> dict[int, tuple[Box, ...]]:
    """Per host, the boxes of a leaf that its devices hold."""
    mesh, spec = getattr(leaf.sharding, "mesh", None), getattr(leaf.sharding, "spec", None)
    if mesh is None or spec is None:
        kind = type(leaf.sharding).__name__
        raise ConfigError(
            f"--state {named}: leaf {leaf.name!r} has a {kind}; give it a jax.sharding.NamedSharding, or none"
        )
    sizes: dict[str, int] = dict(mesh.shape)
    axis = _replica_axis(named, tuple(sizes), replica_axis)
    devices = math.prod(sizes.values())
    if sizes[axis] != shape.slices or devices % shape.hosts:
        raise ConfigError(
            f"--state {named}: its mesh {sizes} has {sizes[axis]} along the replica axis {axis!r} and "
            f"{devices} devices; the job has {shape.slices} slices of {shape.hosts_per_slice} hosts. Give "
            "the same numbers"
        )
    names = [axis, *(name for name in sizes if name != axis)]
    per_host = devices // shape.hosts
    held: dict[int, set[Box]] = {host: set() for host in range(shape.hosts)}
    for place, at in enumerate(itertools.product(*(range(sizes[name]) for name in names))):
        held[place // per_host].add(_box(named, leaf, spec, sizes, dict(zip(names, at, strict=True))))
    return {host: tuple(sorted(found)) for host, found in held.items()}


def _box(named: str, leaf: Leaf, spec: Any, sizes: Mapping[str, int], at: Mapping[str, int]) -> Box:
    """The box that the device at this place of the mesh holds (as a partition spec says it)."""
    start, stop = [0] * len(leaf.shape), list(leaf.shape)
    for dimension, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts = math.prod(sizes[axis] for axis in axes)
        if leaf.shape[dimension] % parts:
            raise ConfigError(
                f"--state {named}: dimension {dimension} of leaf {leaf.name!r} has {leaf.shape[dimension]} "
                f"elements, which {parts} devices cannot share evenly"
            )
        index = 0
        for axis in axes:
            index = index * sizes[axis] + at[axis]
        length = leaf.shape[dimension] // parts
        start[dimension], stop[dimension] = index * length, (index + 1) * length
    return Box(tuple(start), tuple(stop))


def _replica_axis(named: str, names: tuple[str, ...], wanted: int | str) -> str:
    if isinstance(wanted, str) and wanted in names:
        return wanted
    if isinstance(wanted, int) and -len(names) <= wanted < len(names):
        return names[wanted]
    raise ConfigError(f"--state {named}: its mesh has the axes {names}, not checkpoint_replica_axis={wanted!r}")
