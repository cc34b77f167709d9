"""Every process of a real job derives the same layout, saves its own part of it, and gets it back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import Box, covers
from emergency_ckpt.errors import UnsupportedStateError
from emergency_ckpt.jaxio.assemble import assemble
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.orbax_metadata import layout_metadata_files
from emergency_ckpt.jaxio.snapshot import take_snapshot
from emergency_ckpt.jaxio.topology import Topology
from tests.integration.processes import run_job
from tests.jaxio.memory_slot import GENERATION, MemorySlot, abstract, same


def make_state(mesh):
    """Leaves over all processes, within slices, and on each process alone."""

    def over(spec, shape, dtype=jnp.float32):
        def fill():
            return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape).astype(dtype)

        return jax.jit(fill, out_shardings=NamedSharding(mesh, spec))()

    last = jax.devices()[-1:]
    elsewhere = NamedSharding(Mesh(np.array(last), ("one",)), P())
    keys = jax.jit(
        lambda: jax.random.split(jax.random.key(1), 4), out_shardings=NamedSharding(mesh, P("model"))
    )()
    return {
        "params": {"cut": over(P("model"), (8, 4)), "both": over(P(("replica", "model")), (8,), jnp.bfloat16)},
        "replicated": over(P(), (3,)),
        "scalar": over(P(), ()),
        "keys": keys,
        "last_process_only": jax.make_array_from_callback(
            (2, 3), elsewhere, lambda index: np.ones((2, 3), np.float32)[index], dtype=jnp.float32
        ),
        "numpy": np.arange(5),
        "step": jnp.int32(7),
        "count": 7,
        "text": "same everywhere",
        "none": None,
    }


def save_and_restore(replicas):
    devices = np.array(jax.devices()).reshape(replicas, -1)
    mesh = Mesh(devices, ("replica", "model"))
    topology = Topology.from_mesh(mesh, "replica")
    state = make_state(mesh)
    layout = build_layout(state, topology, layout_metadata_files(state, "state"))
    wanted = abstract(state)
    assert build_layout(wanted, topology, layout_metadata_files(wanted, "state")).hash == layout.hash
    process = jax.process_index()
    slot = MemorySlot.fill(layout, take_snapshot(StateBinder(wanted, layout, process), state), process)
    restored = assemble(
        wanted, layout, process, GENERATION, lambda index: slot.read(index, process), slot.values
    )
    slot.data[:] = 0
    assert same(restored, state)
    # A collective over restored arrays: they are what JAX takes them for, on every process.
    total = jax.jit(lambda cut, step: cut.sum() + step, out_shardings=NamedSharding(mesh, P()))
    assert float(total(restored["params"]["cut"], restored["step"])) == 31 * 16 + 7
    return {
        "layout": layout.to_bytes().decode(),
        "hash": layout.hash,
        "slices": topology.process_slice,
        "groups": topology.groups,
        "checksums": sorted(slot.checksums.items()),
        "kinds": change_kinds(mesh, topology),
    }


def change_kinds(mesh, topology):
    """A number became an array over all processes, which is donated after the save; and the other way round."""
    process = jax.process_index()
    counted = jax.jit(lambda: jnp.int32(41), out_shardings=NamedSharding(mesh, P()))()
    array = jax.ShapeDtypeStruct((), jnp.int32, sharding=counted.sharding)
    found = []
    for wanted, live in (({"step": array}, {"step": 41}), ({"step": 0}, {"step": counted})):
        layout = build_layout(wanted, topology)
        snapshot = take_snapshot(StateBinder(wanted, layout, process), live)
        if live["step"] is counted:
            jax.block_until_ready(jax.jit(lambda step: step + 1, donate_argnums=0)(counted))
            assert counted.is_deleted()
        slot = MemorySlot.fill(layout, snapshot, process)
        read = functools.partial(slot.read, process=process)
        step = assemble(wanted, layout, process, GENERATION, read, slot.values)["step"]
        found.append([type(step).__name__, int(step), sorted(slot.checksums.items())])
    return found


def own_device_seen_by_the_other():
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    topology = Topology(jax.process_index(), (0, 1), None)
    try:
        return build_layout({"w": leaf}, topology).hash
    except UnsupportedStateError as error:
        return str(error)


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    """What the processes of a job of two slices report."""
    return run_job(save_and_restore, request.param, 2, devices_per_process=8 // request.param)


def test_all_processes_derive_one_layout_that_covers_every_leaf(results):
    assert len({result["hash"] for result in results}) == 1
    layout = Layout.from_bytes(results[0]["layout"].encode())
    count = len(results)
    assert layout.process_count == count
    assert results[0]["slices"] == [p * 2 // count for p in range(count)]
    assert results[0]["groups"] == [[p, p + count // 2] for p in range(count // 2)]
    for leaf in layout.leaves:
        held = [layout.shards[i] for indices in layout.process_shards for i in indices]
        assert covers([shard.box for shard in held if shard.leaf == leaf.name], Box.whole(leaf.shape))


def test_replicas_of_a_shard_have_equal_checksums_on_all_their_holders(results):
    layout = Layout.from_bytes(results[0]["layout"].encode())
    checksums = [dict(result["checksums"]) for result in results]
    for index, holders in enumerate(layout.shard_holders):
        assert all(checksums[holder][index] == checksums[holders[0]][index] for holder in holders)
    alone = {layout.shards[i].leaf for i, h in enumerate(layout.shard_holders) if h == (len(results) - 1,)}
    assert "last_process_only" in alone
    everywhere = {layout.shards[i].leaf for i, h in enumerate(layout.shard_holders) if len(h) == len(results)}
    assert everywhere >= {"replicated", "scalar", "numpy", "step"}


def test_a_number_may_become_an_array_over_all_processes_and_the_other_way_round(results):
    for result in results:
        assert result["kinds"] == results[0]["kinds"]
        assert [kind[:2] for kind in result["kinds"]] == [["ArrayImpl", 41], ["int", 41]]


def test_a_single_device_array_of_another_process_is_refused_there():
    own, other = run_job(own_device_seen_by_the_other, 2)
    assert len(own) == 32
    assert "'w' lies on one single device of process 0, seen from process 1" in other
