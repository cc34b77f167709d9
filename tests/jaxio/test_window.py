"""The window in which accelerators are read: the same bytes, and never more than the window.

CPU devices stand in for accelerators: the binder is told that no platform keeps its arrays in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.errors import UnsupportedStateError
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.snapshot import Snapshot, default_window_bytes, take_snapshot
from emergency_ckpt.jaxio.topology import Topology
from tests.jaxio.memory_slot import MemorySlot, written
from tests.jaxio.states import DTYPES, dtypes_state, filled, kinds_state, mesh, shardings_state

MIB = 1024 * 1024


def windowed(state: Any, window_bytes: int | None = None) -> Snapshot:
    layout = build_layout(state, Topology.single_process())
    return take_snapshot(StateBinder(state, layout, 0, host_platforms=()), state, window_bytes=window_bytes)


def halves_state() -> dict[str, jax.Array]:
    """Every dtype, in two shards."""
    sharding = NamedSharding(mesh(), P("data"))
    return {name: filled((8, 6), name, sharding, seed) for seed, name in enumerate(DTYPES)}


def layouts_state() -> dict[str, jax.Array]:
    """Arrays that lie in their devices' memory in another order than C."""
    sharding = NamedSharding(mesh(), P("data"))
    return {
        "two": jax.device_put(jnp.arange(96.0).reshape(8, 12), Format(Layout((1, 0)), sharding)),
        "three": jax.device_put(jnp.arange(480).reshape(8, 12, 5), Format(Layout((1, 2, 0)), sharding)),
    }


@pytest.mark.parametrize(
    ("make", "window_bytes"),
    [(halves_state, 1), (dtypes_state, 2**30), (shardings_state, 200), (kinds_state, 64), (layouts_state, 200)],
)
def test_the_window_hands_out_the_same_bytes_as_the_views(make: Callable[[], Any], window_bytes: int) -> None:
    state = make()
    layout = build_layout(state, Topology.single_process())
    views = take_snapshot(StateBinder(state, layout, 0), state)
    through = windowed(state, window_bytes)
    assert views.may_defer
    assert not through.may_defer
    # Blocks neither begin nor end where pieces do.
    first, second = (MemorySlot.fill(layout, each, block_bytes=56) for each in (views, through))
    assert first.data.tobytes() == second.data.tobytes()
    assert first.checksums == second.checksums
    assert first.values == second.values


def test_large_and_small_shards_never_take_more_than_the_window() -> None:
    whole, cut = NamedSharding(mesh(), P()), NamedSharding(mesh(), P("data", "model"))
    state = {
        "large": filled((2048, 1024), "float32", cut, 1),
        "row": filled((1, 300_000), "float32", whole, 2),
        "turned": jax.device_put(filled((512, 512), "float32", whole, 3), Format(Layout((1, 0)), whole)),
        **{f"small{i}": filled((100,), "bfloat16", whole, i) for i in range(40)},
    }
    window_bytes = MIB
    snapshot = windowed(state, window_bytes)
    known = {id(array): array for array in jax.live_arrays()}
    pending: list[int] = []

    def measure(_: int, data: np.ndarray) -> None:
        # On CPU a piece on its way is an array of its own, and its host copy is the same memory; what had to be
        # put into C order is a copy beside it.
        flying = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays() if id(a) not in known}
        pending.append(sum(flying.values()) + (data.nbytes if data.flags.writeable else 0))

    snapshot.write(measure)
    assert max(pending) <= window_bytes
    assert max(pending) > window_bytes / 2, "copies are in flight while one is written"
    assert not [array for array in jax.live_arrays() if id(array) not in known]


def test_no_program_is_compiled_at_later_saves_nor_for_each_piece() -> None:
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    whole = NamedSharding(mesh(), P())
    state = {f"w{i}": filled((64, 1003), "float32", whole, i) for i in range(3)}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = written(windowed(state, 4096))
        assert len(compiled) <= 1  # none, if another test had an array of this shape
        compiled.clear()
        assert written(windowed(state, 4096)) == first
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("window_bytes", [16, 4096])
@pytest.mark.parametrize("gone", ["a", "b"])
def test_an_array_that_is_deleted_before_its_piece_comes_is_named(window_bytes: int, gone: str) -> None:
    state = {"a": jnp.ones(5000), "b": jnp.ones(5000)}

    def delete(_: int, __: np.ndarray) -> None:
        state[gone].delete()

    with pytest.raises(UnsupportedStateError, match=rf"'{gone}'.*deleted"):
        windowed(state, window_bytes).write(delete)


def test_an_array_that_is_donated_meanwhile_is_named() -> None:
    state = {"a": jnp.ones(5000), "b": jnp.ones(5000)}
    step = jax.jit(lambda x: x + 1, donate_argnums=0)

    def donate(_: int, __: np.ndarray) -> None:
        if not state["b"].is_deleted():
            step(state["b"])

    with pytest.raises(UnsupportedStateError, match=r"'b'.*donated"):
        windowed(state, 4096).write(donate)


def test_what_the_sink_raises_leaves_nothing_behind() -> None:
    state = {"a": jnp.ones(5000)}
    before = {id(array): array for array in jax.live_arrays()}

    def fail(_: int, __: np.ndarray) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        windowed(state, 4096).write(fail)
    assert not [array for array in jax.live_arrays() if id(array) not in before]


def test_the_window_keeps_no_host_copy_with_the_arrays_of_the_state() -> None:
    state = {"w": filled((8, 4), "int4", NamedSharding(mesh(), P("data")))}
    written(windowed(state, 2**20))
    assert all(s.data._npy_value is None for s in state["w"].addressable_shards)


def test_a_transfer_guard_of_the_train_loop_does_not_stop_a_save() -> None:
    state = {"w": jnp.arange(5000.0)}
    with jax.transfer_guard("disallow"):
        assert written(windowed(state, 4096)) == {0: np.arange(5000, dtype=np.float32).tobytes()}


@pytest.mark.parametrize(
    ("state_bytes", "window_bytes"), [(100, MIB), (20 * MIB, MIB), (1000 * MIB, 50 * MIB), (10**12, 512 * MIB)]
)
def test_the_window_is_a_twentieth_of_the_state(state_bytes: int, window_bytes: int) -> None:
    halves = np.broadcast_to(np.uint8(0), state_bytes // 2)
    assert default_window_bytes(2 * halves.nbytes) == window_bytes
