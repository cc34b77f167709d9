"""What comes back is what was saved, verified, in memory of its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.core.shards import BLOCK_BYTES
from emergency_ckpt.errors import CorruptDataError, StateMismatchError
from emergency_ckpt.jaxio.assemble import StoredShard, assemble
from tests.jaxio.memory_slot import GENERATION, abstract, same, save
from tests.jaxio.states import SPECS, dtypes_state, filled, kinds_state, mesh, shardings_state


@pytest.mark.parametrize("make", [dtypes_state, shardings_state, kinds_state])
@pytest.mark.parametrize("describe", [lambda state: state, abstract], ids=["live", "abstract"])
def test_states_come_back_bit_for_bit_where_they_lay(make, describe):
    state = make()
    assert same(save(state).restore(describe(state)), state)


@pytest.mark.parametrize("make", [dtypes_state, shardings_state, kinds_state])
def test_overwriting_the_slot_afterwards_changes_nothing(make):
    state = make()
    slot = save(state)
    restored = slot.restore(state)
    slot.data[:] = 0xA5
    assert same(restored, state)


def test_numpy_leaves_come_back_as_arrays_that_may_be_written():
    slot = save({"n": np.arange(4)})
    first, second = slot.restore({"n": np.zeros(4, int)}), slot.restore({"n": np.zeros(4, int)})
    first["n"][:] = -1
    np.testing.assert_array_equal(second["n"], np.arange(4))


def test_donating_one_replica_does_not_change_the_others():
    state = {"w": filled((64, 64), "float32", NamedSharding(mesh(), P()))}
    restored = save(state).restore(state)["w"]
    first, *others = (shard.data for shard in restored.addressable_shards)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in restored.addressable_shards]
    assert len(set(pointers)) == len(pointers)
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 7, donate_argnums=0)(first))
    for other in others:
        np.testing.assert_array_equal(np.asarray(other), np.asarray(state["w"]))


def test_a_restored_state_may_be_donated_to_a_step():
    state = {"w": filled((64, 64), "float32", NamedSharding(mesh(), P("model")), 1), "n": jnp.float32(2)}
    slot = save(state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(2):
        after = step(step(slot.restore(state)))
        np.testing.assert_array_equal(np.asarray(after["w"]), np.asarray(state["w"]) + 2)


def test_an_uncommitted_scalar_still_meets_arrays_that_are_spread_over_a_mesh():
    state = {"w": filled((8, 8), "float32", NamedSharding(mesh(), P("data"))), "step": jnp.int32(3)}
    for wanted in (state, abstract(state), {**state, "step": jax.ShapeDtypeStruct((), jnp.int32)}):
        restored = save(state).restore(wanted)
        assert not restored["step"].committed
        jax.block_until_ready(jax.jit(lambda s: s["w"] * s["step"])(restored))


def test_abstract_keys_without_a_place_come_back_as_typed_keys():
    state = {"k": jax.random.key(5, impl="rbg")}
    assert same(save(state).restore(jax.eval_shape(lambda: state)), state)


def test_an_abstract_leaf_may_ask_for_a_device_layout():
    from jax.experimental.layout import Format, Layout

    wanted = Format(Layout((1, 0)), NamedSharding(mesh(), P("data")))
    state = {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4), wanted)}
    restored = save(state).restore({"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=wanted)})["w"]
    assert restored.format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(np.asarray(restored), np.asarray(state["w"]))


@given(
    st.sampled_from(SPECS),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["float32", "bfloat16", "int8"]),
)
@settings(max_examples=40)
def test_any_sharding_of_any_shape_comes_back(spec, rows, columns, dtype):
    state = {"w": filled((8 * rows, 8 * columns), dtype, NamedSharding(mesh(), spec), rows + columns)}
    slot = save(state)
    restored = slot.restore(abstract(state))
    slot.data[:] = 0xFF
    assert same(restored, state)


@given(st.data())
@settings(max_examples=60)
def test_one_flipped_bit_anywhere_is_refused_with_the_shard_that_has_it(data):
    state = _flip_state()
    slot = save(state)
    entry = data.draw(st.sampled_from(slot.layout.slot_entries(0)))
    at = data.draw(st.integers(0, entry.nbytes - 1))
    slot.data[entry.offset + at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(
        CorruptDataError, match=re.escape(f"block 0 of shard {slot.layout.shards[entry.shard]} ")
    ):
        slot.restore(state)


def _flip_state():
    return {
        "w": filled((16, 16), "float32", NamedSharding(mesh(), P("data", "model")), 1),
        "k": jax.random.key(3),
        "n": np.arange(9),
        "s": jnp.float32(1.5),
    }


def test_the_bad_block_of_a_large_shard_is_named_and_others_are_checked_too():
    state = {"w": jnp.zeros(BLOCK_BYTES // 2, jnp.float32)}
    slot = save(state)
    assert same(slot.restore(state), state)
    slot.data[BLOCK_BYTES + 5] ^= 1
    with pytest.raises(
        CorruptDataError, match=rf"block 1 of shard w.*bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES}"
    ):
        slot.restore(state)


def test_bytes_of_another_generation_do_not_verify():
    slot = save({"w": jnp.ones(4)})
    with pytest.raises(CorruptDataError, match="shard w"):
        assemble({"w": jnp.ones(4)}, slot.layout, 0, GENERATION + 1, slot.read, {})


def test_exchanged_shards_of_equal_size_do_not_verify():
    state = {"a": jnp.ones(4), "b": jnp.zeros(4)}
    slot = save(state)
    with pytest.raises(CorruptDataError, match="shard a"):
        assemble(state, slot.layout, 0, GENERATION, lambda index: slot.read(1 - index), {})


@pytest.mark.parametrize(
    "cut", [lambda s: StoredShard(s.data[:-1], s.checksums), lambda s: StoredShard(s.data, ())]
)
def test_a_shard_of_the_wrong_length_is_refused(cut):
    state = {"a": jnp.ones(4)}
    slot = save(state)
    with pytest.raises(CorruptDataError, match=r"shard a\[0:4\].*expected 16 and 1"):
        assemble(state, slot.layout, 0, GENERATION, lambda index: cut(slot.read(index)), {})


def test_replicated_shards_are_read_once():
    state = {"w": filled((8, 4), "float32", NamedSharding(mesh(), P("data")))}
    slot, reads = save(state), []

    def read(index):
        reads.append(index)
        return slot.read(index)

    assert same(assemble(state, slot.layout, 0, GENERATION, read, {}), state)
    assert reads == [0, 1]


@pytest.mark.parametrize(
    ("wanted", "saved"),
    [
        (lambda: {"x": jnp.ones(4)}, "the layout has nothing"),
        (lambda: {"w": jnp.ones(5)}, r"float32\[5\].*the layout has float32\[4\]"),
        (lambda: {"w": jnp.ones(4, jnp.int32)}, r"int32\[4\].*the layout has float32\[4\]"),
        (lambda: {"w": 1}, "no such value was saved"),
    ],
)
def test_what_was_not_saved_is_named(wanted, saved):
    slot = save({"w": jnp.ones(4)})
    with pytest.raises(StateMismatchError, match=saved):
        slot.restore(wanted())


def test_64_bit_arrays_are_refused_where_jax_would_cut_them():
    with jax.enable_x64(True):
        state = {"w": jnp.arange(3, dtype=jnp.int64)}
        slot = save(state)
        assert same(slot.restore(state), state)
    with pytest.raises(StateMismatchError, match=r"'w' was saved as int64.*jax_enable_x64"):
        slot.restore(state)
