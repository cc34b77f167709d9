"""The body of an answer lands in its places, however they and the reads are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta

import pytest

from emergency_ckpt.agent.connection import MOST_BUFFERS, Answer, PeerConnection
from emergency_ckpt.errors import PeerUnavailableError
from tests.agent.served import SayingServer

LIMIT = timedelta(seconds=20)


def fetch(body: bytes, groups: Sequence[Sequence[int]], announced: int | None = None) -> bytes:
    """What an answer with this body gives when it is read into places of these sizes, group by group."""
    length = len(body) if announced is None else announced
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()

    def read(answer: Answer) -> bytes:
        places = [[bytearray(size) for size in sizes] for sizes in groups]
        for group in places:
            answer.fill([memoryview(place) for place in group])
        return b"".join(place for group in places for place in group)

    with SayingServer(head + body) as server:
        connection = PeerConnection(server.endpoint, LIMIT)
        try:
            return connection.exchange("GET", "/", read)
        finally:
            connection.close()


@pytest.mark.parametrize("seed", range(8))
def test_places_of_any_sizes_get_their_bytes(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 100, 5_000, 65_536, 100_000, 3_000_000]) for _ in range(40)]
    body = chance.randbytes(sum(sizes))
    groups, at = [], 0
    while at < len(sizes):
        count = chance.randrange(1, 12)
        groups.append(sizes[at : at + count])
        at += count
    assert fetch(body, groups) == body


def test_more_places_than_one_call_fills_are_filled() -> None:
    body = random.Random(1).randbytes(1000 * (2 * MOST_BUFFERS + 3))
    assert fetch(body, [[1000] * (2 * MOST_BUFFERS + 3)]) == body


@pytest.mark.parametrize("sizes", [[10], [200_000], [1_000_000, 500_000]])
def test_a_body_that_ends_early_is_an_error(sizes: list[int]) -> None:
    body = bytes(sum(sizes) - 1)
    with pytest.raises(PeerUnavailableError, match="ended 1 bytes early"):
        fetch(body, [sizes], announced=sum(sizes))


def test_more_than_was_announced_is_never_read() -> None:
    with pytest.raises(PeerUnavailableError, match="ended 100000 bytes early"):
        fetch(bytes(200_000), [[100_000, 200_000]], announced=200_000)
