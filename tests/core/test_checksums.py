"""Checksums detect any damage, and any shard or generation put in the place of another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core import checksums
from emergency_ckpt.core.checksums import block_seed, checksum_blocks, copy_and_checksum, first_bad_block
from emergency_ckpt.core.shards import Box, Shard, block_ranges

contents = st.binary(max_size=300)
block_sizes = st.integers(1, 64)
seeds = st.integers(0, 2**64 - 1)


@given(contents, block_sizes, seeds)
def test_undamaged_data_verifies(data: bytes, block_bytes: int, seed: int) -> None:
    expected = checksum_blocks(data, seed, block_bytes)
    assert len(expected) == len(block_ranges(len(data), block_bytes))
    assert first_bad_block(data, expected, seed, block_bytes) is None


@given(st.binary(min_size=1, max_size=40), block_sizes, seeds)
def test_every_flipped_bit_is_found_in_its_block(data: bytes, block_bytes: int, seed: int) -> None:
    expected = checksum_blocks(data, seed, block_bytes)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert first_bad_block(damaged, expected, seed, block_bytes) == bit // 8 // block_bytes


@pytest.mark.parametrize("position", range(0, 4099, 41))
def test_a_changed_byte_anywhere_in_a_long_block_is_found(position: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 4099, np.uint8)
    expected = checksum_blocks(data, 1)
    data[position] += 1
    assert first_bad_block(data, expected, 1) == 0


@given(st.binary(min_size=1, max_size=300), block_sizes, seeds, st.data())
def test_data_that_is_cut_short_or_too_long_is_found(
    data: bytes, block_bytes: int, seed: int, draw: st.DataObject
) -> None:
    expected = checksum_blocks(data, seed, block_bytes)
    cut = draw.draw(st.integers(0, len(data) - 1))
    assert first_bad_block(data[:cut], expected, seed, block_bytes) == cut // block_bytes
    assert first_bad_block(data + b"\0", expected, seed, block_bytes) == len(data) // block_bytes


identities = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["w", "w.b", "w[0:4]", "layers.0"]),
    st.sampled_from([Box((), ()), Box((0,), (4,)), Box((0,), (8,)), Box((4,), (8,)), Box((0, 0), (4, 4))]),
    st.sampled_from(["float32", "int32", "bfloat16"]),
)


@given(identities, identities, st.binary(min_size=1, max_size=64))
def test_bytes_of_another_shard_generation_or_dtype_do_not_verify(
    one: tuple[int, str, Box, str], other: tuple[int, str, Box, str], data: bytes
) -> None:
    seed, other_seed = (block_seed(g, Shard(leaf, box), dtype) for g, leaf, box, dtype in (one, other))
    expected = checksum_blocks(data, seed)
    assert (first_bad_block(data, expected, other_seed) is None) == (one == other)


@given(contents, block_sizes, seeds)
def test_every_form_of_a_buffer_has_the_same_checksums(data: bytes, block_bytes: int, seed: int) -> None:
    expected = checksum_blocks(data, seed, block_bytes)
    array = np.frombuffer(data, np.uint8)
    assert checksum_blocks(memoryview(data), seed, block_bytes) == expected
    assert checksum_blocks(array, seed, block_bytes) == expected
    if data and len(data) % 4 == 0:
        assert checksum_blocks(array.view(np.uint32), seed, block_bytes) == expected
        assert checksum_blocks(array.view(np.uint32).data, seed, block_bytes) == expected


@given(contents, block_sizes, seeds, st.integers(1, 50))
def test_copying_gives_the_checksums_of_what_was_copied(
    data: bytes, block_bytes: int, seed: int, piece_bytes: int
) -> None:
    source = np.frombuffer(data, np.uint8)
    target = np.full(len(data), 0xAA, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_CACHED_BYTES", piece_bytes)
        found = copy_and_checksum(source, target, seed, block_bytes)
    assert found == checksum_blocks(data, seed, block_bytes)
    assert target.tobytes() == data


@pytest.mark.parametrize("nbytes", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_copying_more_than_one_piece_gives_the_same_checksums(nbytes: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    target = np.zeros_like(source)
    assert copy_and_checksum(source, target, 7, 2**21) == checksum_blocks(source, 7, 2**21)
    assert (source == target).all()
