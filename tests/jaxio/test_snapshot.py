"""Snapshots hold the bytes of the moment they were taken, whatever happens to the state afterwards."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.errors import UnsupportedStateError
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.snapshot import Snapshot, take_snapshot
from emergency_ckpt.jaxio.topology import Topology
from tests.jaxio.memory_slot import MemorySlot
from tests.jaxio.states import dtypes_state, filled, kinds_state, mesh, shardings_state


def parts(state):
    layout = build_layout(state, Topology.single_process())
    return layout, StateBinder(state, layout, 0)


def in_window(binder, state, window_bytes):
    """The snapshot as it is taken on accelerators: buffers stay on their devices until they are asked for."""
    bound = binder.bind(state)
    return Snapshot(list(bound.buffers), bound.values, window_bytes)


@pytest.mark.parametrize("make", [dtypes_state, shardings_state, kinds_state])
@pytest.mark.parametrize("window_bytes", [1, 64, 2**30])
def test_the_window_hands_out_the_same_bytes_as_the_views(make, window_bytes):
    state = make()
    layout, binder = parts(state)
    views = take_snapshot(binder, state)
    windowed = in_window(binder, state, window_bytes)
    assert views.may_defer
    assert not windowed.may_defer
    first = MemorySlot.fill(layout, views)
    second = MemorySlot.fill(layout, windowed)
    assert first.data.tobytes() == second.data.tobytes()
    assert first.checksums == second.checksums
    assert first.values == second.values


def test_donating_the_state_after_the_call_does_not_change_the_snapshot():
    sharding = NamedSharding(mesh(), P("data", "model"))
    state = {f"w{i}": filled((64, 64), "float32", sharding, i) for i in range(4)} | {"n": jnp.arange(1000.0)}
    old = {name: np.array(leaf) for name, leaf in state.items()}
    layout, binder = parts(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    snapshot = take_snapshot(binder, state)
    for _ in range(3):
        state = jax.block_until_ready(overwrite(state))
    for index, data in snapshot.iter_shards():
        shard = layout.shards[index]
        assert data.tobytes() == old[shard.leaf][shard.box.slices()].tobytes()


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
    assert [data.tobytes() for _, data in snapshot.iter_shards()] == [expected, expected]


def test_arrays_in_a_device_layout_of_their_own_are_handed_out_in_c_order():
    from jax.experimental.layout import Format, Layout

    sharding = NamedSharding(mesh(), P("data"))
    array = jax.device_put(jnp.arange(32.0).reshape(8, 4), Format(Layout((1, 0)), sharding))
    assert np.asarray(array.addressable_shards[0].data).flags.f_contiguous
    _, binder = parts({"w": array})
    found = [data.tobytes() for _, data in take_snapshot(binder, {"w": array}).iter_shards()]
    assert found == [
        np.arange(16.0, dtype=np.float32).tobytes(),
        np.arange(16.0, 32.0, dtype=np.float32).tobytes(),
    ]


def test_views_copy_nothing():
    state = {"w": filled((64, 64), "float32", NamedSharding(mesh(), P("data")))}
    _, binder = parts(state)
    addresses = {s.data.unsafe_buffer_pointer() for s in state["w"].addressable_shards}
    for _, data in take_snapshot(binder, state).iter_shards():
        assert data.ctypes.data in addresses
        assert not data.flags.writeable


def test_shards_are_let_go_one_by_one():
    state = {f"w{i}": jnp.full(1024, i, jnp.float32) for i in range(3)}
    _, binder = parts(state)
    snapshot = take_snapshot(binder, state)
    pointers = [state[f"w{i}"].unsafe_buffer_pointer() for i in range(3)]
    reuse = jax.jit(lambda x: x + 1, donate_argnums=0)
    shards = snapshot.iter_shards()
    for _ in range(3):
        next(shards)
    assert reuse(state["w0"]).unsafe_buffer_pointer() == pointers[0]
    assert reuse(state["w2"]).unsafe_buffer_pointer() != pointers[2]


def test_the_window_keeps_no_host_copy_with_the_arrays_of_the_state():
    state = {"w": filled((8, 4), "int4", NamedSharding(mesh(), P("data")))}
    _, binder = parts(state)
    for _ in in_window(binder, state, 1).iter_shards():
        pass
    assert all(s.data._npy_value is None for s in state["w"].addressable_shards)


def test_a_snapshot_is_consumed_once():
    _, binder = parts({"n": np.ones(1)})
    snapshot = take_snapshot(binder, {"n": np.ones(1)})
    list(snapshot.iter_shards())
    with pytest.raises(ValueError, match="consumed or released"):
        snapshot.iter_shards()
    released = take_snapshot(binder, {"n": np.ones(1)})
    released.release()
    with pytest.raises(ValueError, match="consumed or released"):
        released.iter_shards()


def test_an_array_that_is_deleted_before_its_window_comes_is_named():
    state = {"a": jnp.ones(4), "b": jnp.ones(4)}
    _, binder = parts(state)
    shards = in_window(binder, state, 1).iter_shards()
    next(shards)
    state["b"].delete()
    with pytest.raises(UnsupportedStateError, match=r"'b'.*deleted"):
        next(shards)


def test_values_travel_beside_the_shards():
    state = {"step": 7, "lr": 0.1, "name": "run", "w": jnp.ones(1)}
    _, binder = parts(state)
    assert take_snapshot(binder, state).values == {"step": 7, "lr": 0.1, "name": "run"}
