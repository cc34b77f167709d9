"""Windows summed over the slices carry every byte to every receiver, whatever the mesh and the windows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.errors import TopologyError
from emergency_ckpt.jaxio.lanes import Ends, Lane, Transfer, plan_lanes

REGION_BYTES = 97


@st.composite
def jobs(draw: st.DrawFn) -> tuple[np.ndarray, list[Transfer]]:
    """Owners of a mesh of aligned slices (each of one or more replicas), and transfers between counterparts."""
    slices, merged = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    places_per_process = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    group_of_place = np.repeat(np.arange(len(places_per_process)), places_per_process)
    group_of_place = group_of_place[draw(st.permutations(range(len(group_of_place))))]
    owners = np.stack(
        [group_of_place + s * len(places_per_process) for s in range(slices) for _ in range(merged)]
    )
    transfers = []
    for group in range(len(places_per_process)):
        counterparts = [group + s * len(places_per_process) for s in range(slices)]
        cuts = sorted(draw(st.lists(st.integers(0, REGION_BYTES), max_size=4)))
        for low, high in zip([0, *cuts], [*cuts, REGION_BYTES], strict=True):
            source = draw(st.sampled_from(counterparts))
            others = [p for p in counterparts if p != source]
            receivers = draw(st.lists(st.sampled_from(others), unique=True))
            transfers.append(Transfer(source, tuple(receivers), low, high - low))
    return owners, draw(st.permutations(transfers))


def region_of(process: int) -> np.ndarray:
    return np.random.default_rng(process).integers(0, 256, REGION_BYTES, np.uint8)


def broadcast(owners: np.ndarray, lanes: list[Lane], ends: list[Ends], window_bytes: int) -> None:
    """The rounds of a broadcast with numpy in place of devices; every device of every process takes part."""
    rounds = -(-max(lane.bytes_per_device for lane in lanes) // window_bytes)
    for round_ in range(rounds):
        for place in range(owners.shape[1]):
            processes = sorted(set(owners[:, place].tolist()))
            windows = np.full((len(processes), window_bytes), 0xAA, np.uint8)
            for window, process in zip(windows, processes, strict=True):
                if not ends[process].fill(window, place, round_):
                    window.fill(0)
            total = windows.view(np.uint32).sum(0, dtype=np.uint32).view(np.uint8)
            for process in processes:
                ends[process].store(total, place, round_)


@given(jobs(), st.integers(1, 12))
def test_every_receiver_gets_the_bytes_of_the_source_and_nothing_else_changes(
    job: tuple[np.ndarray, list[Transfer]], window_words: int
) -> None:
    owners, transfers = job
    lanes = plan_lanes(owners, transfers)
    regions = [region_of(p) for p in range(owners.max() + 1)]
    expected = [region.copy() for region in regions]
    for t in transfers:
        for receiver in t.receivers:
            expected[receiver][t.offset : t.offset + t.nbytes] = regions[t.source][
                t.offset : t.offset + t.nbytes
            ]
    found = [region.copy() for region in regions]

    def ends_of(process: int) -> Ends:
        def read(offset: int, length: int) -> np.ndarray:
            return regions[process][offset : offset + length]

        def write(offset: int, data: np.ndarray) -> None:
            found[process][offset : offset + len(data)] = data

        return Ends(process, lanes, window_words * 4, read, write)

    broadcast(owners, lanes, [ends_of(p) for p in range(len(regions))], window_words * 4)
    for process in range(len(regions)):
        np.testing.assert_array_equal(found[process], expected[process])


@given(jobs(), st.integers(1, 50), st.integers(0, 400))
def test_the_pieces_of_a_lane_tile_its_bytes(
    job: tuple[np.ndarray, list[Transfer]], length: int, at: int
) -> None:
    for lane in plan_lanes(*job):
        pieces = lane.pieces(at, length)
        assert sum(piece[3] for piece in pieces) == max(0, min(at + length, lane.nbytes) - at)
        ends = [(start, start + n) for _, _, start, n in pieces]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


def test_errors_are_kept_and_zeros_sent_until_the_end() -> None:
    lanes = plan_lanes(np.array([[0], [1]]), [Transfer(0, (1,), 0, 16)])

    def read(offset: int, length: int) -> np.ndarray:
        if offset == 0:
            raise OSError("the first window")
        return np.ones(length, np.uint8)

    def write(offset: int, data: np.ndarray) -> None:
        raise OSError(f"no room at {offset} for {data.tolist()}")

    source, receiver = Ends(0, lanes, 8, read, write), Ends(1, lanes, 8, read, write)
    window = np.full(8, 7, np.uint8)
    assert source.fill(window, 0, 0)
    assert window.tolist() == [0] * 8
    assert source.fill(window, 0, 1)
    assert window.tolist() == [1] * 8
    assert str(source.error) == "the first window"
    receiver.store(window, 0, 0)
    receiver.store(window, 0, 1)
    assert str(receiver.error) == "no room at 0 for [1, 1, 1, 1, 1, 1, 1, 1]"


def test_a_read_of_the_wrong_length_is_an_error_of_the_source() -> None:
    lanes = plan_lanes(np.array([[0], [1]]), [Transfer(0, (1,), 0, 4)])
    source = Ends(0, lanes, 4, lambda _, length: np.zeros(length + 1, np.uint8), lambda *_: None)
    assert source.fill(np.zeros(4, np.uint8), 0, 0)
    assert "reading 4 bytes at offset 0 of a region gave uint8 of shape (5,)" in str(source.error)


@pytest.mark.parametrize(
    ("owners", "transfers", "message"),
    [
        ([[0, 0], [1, 2]], [Transfer(0, (1,), 0, 4)], r"process 0 cannot send its region to processes \[1\]"),
        ([[0, 1], [2, 3]], [Transfer(0, (3,), 0, 4)], r"do not stand at the same place"),
        ([[0, 1], [2, 3]], [Transfer(0, (4,), 0, 4)], r"process 4 has no device in the mesh"),
        (
            [[0, 0, 1], [2, 3, 3], [4, 4, 5], [6, 7, 7]],
            [Transfer(0, (4,), 0, 4), Transfer(3, (7,), 0, 4)],
            r"places \(0, 1\) and \(1, 2\) of the mesh overlap|places \(1, 2\) and \(0, 1\)",
        ),
    ],
)
def test_transfers_between_different_places_are_refused(
    owners: list[list[int]], transfers: list[Transfer], message: str
) -> None:
    with pytest.raises(TopologyError, match=message):
        plan_lanes(np.array(owners), transfers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, (0, 1), 0, 4), "both source and receiver"), ((0, (1,), -1, 4), "-1"), ((0, (1,), 0, -4), "-4 bytes")],
)
def test_impossible_transfers_are_refused(
    arguments: tuple[int, tuple[int, ...], int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Transfer(*arguments)
