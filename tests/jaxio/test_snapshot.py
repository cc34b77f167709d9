"""Snapshots hold the bytes of the moment they were taken, whatever happens to the state afterwards."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.snapshot import take_snapshot
from emergency_ckpt.jaxio.topology import Topology
from tests.jaxio.memory_slot import MemorySlot, written
from tests.jaxio.states import filled, mesh


def parts(state):
    layout = build_layout(state, Topology.single_process())
    return layout, StateBinder(state, layout, 0)


def test_donating_the_state_after_the_call_does_not_change_the_snapshot():
    sharding = NamedSharding(mesh(), P("data", "model"))
    state = {f"w{i}": filled((64, 64), "float32", sharding, i) for i in range(4)} | {"n": jnp.arange(1000.0)}
    old = {name: np.array(leaf) for name, leaf in state.items()}
    layout, binder = parts(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    snapshot = take_snapshot(binder, state)
    for _ in range(3):
        state = jax.block_until_ready(overwrite(state))
    for index, data in written(snapshot).items():
        shard = layout.shards[index]
        assert data == old[shard.leaf][shard.box.slices()].tobytes()


def test_another_thread_may_consume_the_snapshot_while_training_goes_on():
    state = {"w": filled((256, 256), "float32", NamedSharding(mesh(), P("model")))}
    expected = np.array(state["w"])
    layout, binder = parts(state)
    snapshot = take_snapshot(binder, state)
    step = jax.jit(lambda s: {"w": s["w"] + 1}, donate_argnums=0)
    slots = []
    trained, writer = threading.Event(), threading.Thread(target=lambda: slots.append(write()))

    def write():
        assert trained.wait(60)
        return MemorySlot.fill(layout, snapshot)

    writer.start()
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    trained.set()
    writer.join(60)
    np.testing.assert_array_equal(np.asarray(slots[0].restore({"w": state["w"]})["w"]), expected)


def test_numpy_leaves_are_copied_at_the_call():
    state = {"n": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    _, binder = parts(state)
    snapshot = take_snapshot(binder, state)
    state["n"][:] = -1
    state["f"][:] = -1
    expected = np.arange(6.0).tobytes()
    assert list(written(snapshot).values()) == [expected, expected]


def test_arrays_in_a_device_layout_of_their_own_are_handed_out_in_c_order():
    from jax.experimental.layout import Format, Layout

    sharding = NamedSharding(mesh(), P("data"))
    array = jax.device_put(jnp.arange(32.0).reshape(8, 4), Format(Layout((1, 0)), sharding))
    assert np.asarray(array.addressable_shards[0].data).flags.f_contiguous
    _, binder = parts({"w": array})
    assert list(written(take_snapshot(binder, {"w": array})).values()) == [
        np.arange(16.0, dtype=np.float32).tobytes(),
        np.arange(16.0, 32.0, dtype=np.float32).tobytes(),
    ]


def test_views_copy_nothing():
    state = {"w": filled((64, 64), "float32", NamedSharding(mesh(), P("data")))}
    _, binder = parts(state)
    addresses = {s.data.unsafe_buffer_pointer() for s in state["w"].addressable_shards}

    def check(_: int, data: np.ndarray) -> None:
        assert data.ctypes.data in addresses
        assert not data.flags.writeable

    take_snapshot(binder, state).write(check)


def test_shards_are_let_go_one_by_one():
    state = {f"w{i}": jnp.full(1024, i, jnp.float32) for i in range(3)}
    _, binder = parts(state)
    snapshot = take_snapshot(binder, state)
    pointers = [state[f"w{i}"].unsafe_buffer_pointer() for i in range(3)]
    reuse = jax.jit(lambda x: x + 1, donate_argnums=0)

    def check(index: int, _: np.ndarray) -> None:
        if index == 2:
            assert reuse(state["w0"]).unsafe_buffer_pointer() == pointers[0]
            assert reuse(state["w2"]).unsafe_buffer_pointer() != pointers[2]

    snapshot.write(check)


def test_a_snapshot_is_written_once():
    _, binder = parts({"n": np.ones(1)})
    snapshot = take_snapshot(binder, {"n": np.ones(1)})
    written(snapshot)
    with pytest.raises(ValueError, match="written or released"):
        written(snapshot)
    released = take_snapshot(binder, {"n": np.ones(1)})
    released.release()
    with pytest.raises(ValueError, match="written or released"):
        written(released)


def test_values_travel_beside_the_shards():
    state = {"step": 7, "lr": 0.1, "name": "run", "w": jnp.ones(1)}
    _, binder = parts(state)
    assert take_snapshot(binder, state).values == {"step": 7, "lr": 0.1, "name": "run"}


def test_shards_that_the_layout_gives_to_others_are_not_read():
    """Their arrays may be gone: nothing touches them, whether it views or copies."""
    sharding = NamedSharding(mesh(), P("data"))
    state = {f"w{i}": filled((8, 4), "float32", sharding, i) for i in range(4)}
    whole = build_layout(state, Topology.single_process())
    kept = tuple(i for i, shard in enumerate(whole.shards) if shard.leaf in ("w1", "w2"))[1:]
    layout = dataclasses.replace(whole, process_shards=(kept,))
    old = {name: np.array(leaf) for name, leaf in state.items()}
    for platforms in ({"cpu"}, ()):
        binder = StateBinder(state, layout, 0, platforms)
        assert [buffer.shard for buffer in binder.bind(state).buffers] == list(kept)
        lasting = {name: leaf if name in ("w1", "w2") else leaf.copy() for name, leaf in state.items()}
        binder.bind(lasting)
        for name in ("w0", "w3"):
            lasting[name].delete()
        found = written(take_snapshot(binder, lasting))
        assert sorted(found) == list(kept)
        for index, data in found.items():
            shard = layout.shards[index]
            assert data == old[shard.leaf][shard.box.slices()].tobytes()
