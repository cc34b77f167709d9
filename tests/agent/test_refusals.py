"""Nobody is let in without the token, and no request gets anything but what its ids name (invariant 11)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from emergency_ckpt.agent.block_ranges import MAX_REQUEST_BYTES, Asked, BlockRange, gaps_behind
from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.core.layout import SHARD_ALIGNMENT, Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import PeerUnavailableError
from tests.agent.served import RUN, Ramdisk, raw, start

STEP = StepId(1, 7)
LAYOUT = "0" * 32
PAGES = [
    "GET /metrics",
    "GET /v1/status",
    "GET /v1/attach",
    "POST /v1/leave",
    "GET /v1/inventory",
    f"GET /v1/layouts/{LAYOUT}",
    f"GET /v1/runs/{RUN}/steps/1/7/slots/{LAYOUT}/0/manifest",
    f"POST /v1/runs/{RUN}/steps/1/7/slots/{LAYOUT}/0/shards",
    "GET /",
    "GET /../../etc/passwd",
    "DELETE /v1/status",
]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("token", ["", "wrong", "\xff\xfe"])
def test_every_page_but_the_health_asks_for_the_token(
    served: tuple[Ramdisk, Endpoint], page: str, token: str
) -> None:
    _, endpoint = served
    assert raw(endpoint, page, token=token)[0] == 401


def test_the_health_is_told_to_everybody_and_nothing_else_is_in_it(served: tuple[Ramdisk, Endpoint]) -> None:
    _, endpoint = served
    assert raw(endpoint, "GET /healthz", token="") == (200, {"status": "ok"})


def test_a_client_with_the_token_of_another_agent_is_told_so(served: tuple[Ramdisk, Endpoint]) -> None:
    _, endpoint = served
    with (
        PeerClient(dataclasses.replace(endpoint, token="another")) as client,
        pytest.raises(PeerUnavailableError, match="token is that of another agent") as caught,
    ):
        client.status()
    assert caught.value.code == "unauthorized"


def test_no_token_is_seen_where_an_endpoint_is_shown(served: tuple[Ramdisk, Endpoint]) -> None:
    _, endpoint = served
    assert endpoint.token not in f"{endpoint!r} {endpoint}"
    assert Endpoint.from_json(json.loads(json.dumps(endpoint.to_json()))) == endpoint


@pytest.mark.parametrize(
    "change", [{"port": 0}, {"port": True}, {"host": 3}, {"token": "a\r\nb"}, {"tls": 1}, {"ca_file": "\0"}]
)
def test_an_endpoint_with_an_unusable_field_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        Endpoint.from_json({**Endpoint("h", 1, "t").to_json(), **change})


@pytest.mark.parametrize(
    "run",
    [
        "..",
        ".",
        "%2e%2e",
        "%2e%2e%2f%2e%2e%2fetc",
        "%2Fetc%2Fpasswd",
        "a%00b",
        "a" * 65,
        "%F0%9F%98%80",
        "a%20b",
        "-a",
    ],
)
def test_a_run_that_is_no_id_is_refused(served: tuple[Ramdisk, Endpoint], run: str) -> None:
    _, endpoint = served
    status, _ = raw(endpoint, f"GET /v1/runs/{run}/steps/1/7/slots/{LAYOUT}/0/manifest")
    assert status in (400, 404)


@pytest.mark.parametrize(
    "rest",
    [
        "-1/7/slots/{}/0",
        "1/0x7/slots/{}/0",
        "1/٣/slots/{}/0",
        "1/07/slots/{}/0",
        "1/7/slots/{}/99999999999999999999999999",
        "1/7/slots/{}x/0",
        "1/7/slots/..%2f..%2fslot_0/0",
        "1/7/slots/%2e%2e/0",
        "1/7/slots/{}/0%00",
    ],
)
def test_numbers_and_layouts_are_strict(served: tuple[Ramdisk, Endpoint], rest: str) -> None:
    _, endpoint = served
    page = f"GET /v1/runs/{RUN}/steps/{rest.format(LAYOUT)}/manifest"
    status, _ = raw(endpoint, page.encode("ascii", "backslashreplace").decode())
    assert status in (400, 404)


@pytest.mark.parametrize("name", ["..%2f..%2fagent.json", "agent.json", "%00", LAYOUT.upper() + "A", "*"])
def test_only_hashes_name_layouts(served: tuple[Ramdisk, Endpoint], name: str) -> None:
    _, endpoint = served
    assert raw(endpoint, f"GET /v1/layouts/{name}")[0] == 400
    assert raw(endpoint, f"GET /v1/layouts/{LAYOUT}") == (
        404,
        {"error": "layout_not_here", "message": "no directory here has this layout"},
    )


def test_another_run_has_nothing_here(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    with PeerClient(endpoint) as client:
        manifest = client.manifest(slot)
        other = dataclasses.replace(slot, run="another-run")
        with pytest.raises(PeerUnavailableError, match="404"):
            client.fetch(other, disk.layout, manifest, disk.places())
        with pytest.raises(PeerUnavailableError, match="404"):
            client.manifest(dataclasses.replace(slot, position=1))


@pytest.mark.parametrize(
    "asked",
    [
        {"whole": [], "parts": [[0, 0, 0]]},
        {"whole": [], "parts": [[0, 3, 1]]},
        {"whole": [], "parts": [[0, 0, 4]]},
        {"whole": [], "parts": [[0, 2**61, 1]]},
        {"whole": [], "parts": [[0, 0, 2**63]]},
        {"whole": [], "parts": [[0, -1, 1]]},
        {"whole": [], "parts": [[0, True, 1]]},
        {"whole": [], "parts": [[0, 0.0, 1]]},
        {"whole": [], "parts": [[0, 0, 10**4000]]},
        {"whole": [], "parts": [["big", 0, 1]]},
        {"whole": [], "parts": [[0, 0]]},
        {"whole": [], "parts": [[0, 0, 1, 1]]},
        {"whole": [], "parts": [[10**6, 0, 1]]},
        {"whole": [], "parts": [[2**61, 0, 1]]},
        {"whole": [], "parts": {}},
        {"whole": [], "parts": []},
        {"whole": [10**6], "parts": []},
        {"whole": [-1], "parts": []},
        {"whole": [1, 0], "parts": []},
        {"whole": [0, 0], "parts": []},
        {"whole": [[0, 0, 1]], "parts": []},
        {"whole": [[0, 5, 0]], "parts": []},
        {"whole": [[0, 2**40, 1]], "parts": []},
        {"whole": [[0, 3, 2**61]], "parts": []},
        {"whole": [[0, 3]], "parts": []},
        {"whole": ["0"], "parts": []},
        {"whole": 0, "parts": []},
        {"whole": [0]},
        [],
        None,
    ],
    ids=lambda asked: repr(asked)[:50],
)
def test_absurd_ranges_are_refused(served: tuple[Ramdisk, Endpoint], asked: object) -> None:
    disk, endpoint = served
    slot = disk.save(STEP) if disk.store.sealed(STEP) is None else SlotId(RUN, STEP, disk.layout.hash, 0)
    status, said = raw(endpoint, f"POST {slot.address}/shards", json.dumps(asked).encode())
    assert (status, said["error"]) == (400, "malformed")


def test_a_shard_without_bytes_is_refused(served: tuple[Ramdisk, Endpoint]) -> None:
    disk, endpoint = served
    slot = disk.save(STEP) if disk.store.sealed(STEP) is None else SlotId(RUN, STEP, disk.layout.hash, 0)
    empty = disk.layout.shard_nbytes.index(0)
    for asked in (Asked([empty]), Asked([], [BlockRange(empty, 0, 1)])):
        status, said = raw(endpoint, f"POST {slot.address}/shards", asked.to_bytes())
        assert (status, said["error"]) == (400, "malformed")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"\xff\xfe",
        b"{}",
        b"[]",
        b"[" * 900_000,
        b'{"a":' * 150_000,
        b"[" + b"1" * 10_000 + b"]",
        json.dumps({"whole": list(range(0, 60_000, 3)), "parts": []}).encode(),
        json.dumps({"whole": [], "parts": [[0, 0, 1]] * 17_000}).encode(),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_no_lists_of_ranges_are_refused(served: tuple[Ramdisk, Endpoint], body: bytes) -> None:
    _, endpoint = served
    page = f"POST /v1/runs/{RUN}/steps/1/7/slots/{LAYOUT}/0/shards"
    status, said = raw(endpoint, page, body)
    assert (status, said["error"]) == (400, "malformed")


def test_a_request_that_asks_for_more_than_a_gibibyte_is_refused(served: tuple[Ramdisk, Endpoint]) -> None:
    disk, endpoint = served
    slot = disk.save(STEP) if disk.store.sealed(STEP) is None else SlotId(RUN, STEP, disk.layout.hash, 0)
    body = Asked([], [BlockRange(0, 0, 3)] * 100).to_bytes()
    status, said = raw(endpoint, f"POST {slot.address}/shards", body)
    assert status == 400
    assert "bytes were asked for" in said["message"]


def test_a_body_that_is_too_large_is_refused(served: tuple[Ramdisk, Endpoint]) -> None:
    _, endpoint = served
    page = f"POST /v1/runs/{RUN}/steps/1/7/slots/{LAYOUT}/0/shards"
    assert raw(endpoint, page, b" " * (MAX_REQUEST_BYTES + 1)) == (
        413,
        {"error": "too_large", "message": "Request Entity Too Large"},
    )


@pytest.mark.parametrize(
    "head", ["GET /" + "a" * 20_000, "\0\0\0", "GET", "GET / HTTP/1.1\r\nA: " + "b" * 20_000]
)
def test_oversize_and_broken_heads_are_refused(served: tuple[Ramdisk, Endpoint], head: str) -> None:
    _, endpoint = served
    assert raw(endpoint, head)[0] == 400
    with PeerClient(endpoint) as client:
        client.status()


def test_a_client_that_does_not_read_is_cut_and_its_place_is_free_again(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root, stall_seconds=0.5)
    body = Asked([], [BlockRange(0, 0, 3)] * 20).to_bytes()
    lazy: list[socket.socket] = []
    for _ in range(40):  # More than there are places.
        connection = socket.create_connection((endpoint.host, endpoint.port), 30)
        head = (
            f"POST {slot.address}/shards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.token}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        lazy.append(connection)
    places = disk.places()
    with PeerClient(endpoint, timedelta(seconds=60)) as client:
        client.fetch(slot, disk.layout, client.manifest(slot), places)
        disk.assert_content(STEP, places)
        # What is read from here on must not keep one alive that came to its place last.
        while client.status()["connections"] > 1:
            continue
    for connection in lazy:
        received = 0
        with connection:
            try:
                while data := connection.recv(1024 * 1024):
                    received += len(data)
            except ConnectionResetError:
                pass
        assert received < 20 * 2 * 16 * 2**20


def test_a_request_that_does_not_arrive_whole_is_given_up(disk: Ramdisk) -> None:
    endpoint = start(disk.root, stall_seconds=0.5)
    page = f"/v1/runs/{RUN}/steps/1/7/slots/{LAYOUT}/0/shards"
    head = (
        f"POST {page} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.token}\r\nContent-Length: 100\r\n"
    )
    with (
        socket.create_connection((endpoint.host, endpoint.port), 30) as half_body,
        socket.create_connection((endpoint.host, endpoint.port), 30) as half_head,
        socket.create_connection((endpoint.host, endpoint.port), 30) as silent,
    ):
        half_body.sendall(f"{head}\r\n[".encode())
        half_head.sendall(head.encode())
        assert half_body.recv(65536).startswith(b"HTTP/1.1 408")
        for connection in (half_head, silent):
            try:
                assert connection.recv(65536) == b""
            except ConnectionResetError:
                continue


numbers = st.integers(0, 2**40)


@given(
    st.lists(numbers, unique=True, max_size=20).map(sorted),
    st.lists(st.builds(BlockRange, numbers, numbers, st.integers(1, 2**40)), max_size=20),
)
def test_what_is_asked_for_is_understood_as_it_was_meant(whole: list[int], parts: list[BlockRange]) -> None:
    assume(whole or parts)
    assert Asked.from_bytes(Asked(whole, parts).to_bytes()) == Asked(tuple(whole), parts)


@given(st.lists(st.integers(0, 3 * SHARD_ALIGNMENT), max_size=12), st.data())
def test_shards_that_follow_each_other_are_one_piece_and_the_gaps_account_for_all_of_it(
    sizes: list[int], data: st.DataObject
) -> None:
    leaves = [LeafSpec(f"leaf{i:02}", (size,), "uint8") for i, size in enumerate(sizes)]
    held = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]
    mine = [shard for shard in held if data.draw(st.booleans())]
    layout = Layout.build(leaves, {0: mine, 1: held}, (0, 1))
    entries = [entry for entry in layout.slot_entries(0) if entry.nbytes and data.draw(st.booleans())]
    wanted = [entry.shard for entry in entries]
    places = layout.slot_places(0)
    gaps = gaps_behind(wanted, places)
    pieces = Asked(wanted).pieces(places)
    slot = np.arange(layout.data_bytes(0)) // SHARD_ALIGNMENT  # Any content that tells places apart.
    sent = np.concatenate([slot[:0], *(slot[offset : offset + length] for offset, length in pieces)])
    at = 0
    for entry, gap in zip(entries, gaps, strict=True):
        assert (sent[at : at + entry.nbytes] == slot[entry.offset : entry.offset + entry.nbytes]).all()
        assert 0 <= gap < SHARD_ALIGNMENT
        at += entry.nbytes + gap
    assert at == len(sent)
    assert all(offset + length < after for (offset, length), (after, _) in itertools.pairwise(pieces))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(json_values)
def test_any_other_json_is_refused_with_one_kind_of_error(value: object) -> None:
    try:
        Asked.from_bytes(json.dumps(value).encode())
    except ValueError:
        return


@given(st.integers(0, 2**40), st.integers(0, 100), st.integers(-5, 100))
def test_the_bytes_of_a_range_lie_within_its_shard(nbytes: int, first: int, count: int) -> None:
    wanted = BlockRange(0, first, count)
    try:
        begin, end = wanted.bytes_within(nbytes)
    except ValueError:
        return
    assert 0 <= begin < end <= nbytes
