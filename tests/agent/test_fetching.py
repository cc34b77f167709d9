"""What a client gets from an agent is what was saved, bit for bit, or an error that says what it is not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import random
import socket
import urllib.request
from datetime import timedelta

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from emergency_ckpt.agent import client as clients
from emergency_ckpt.agent.block_ranges import Asked
from emergency_ckpt.agent.client import Blocks, PeerClient
from emergency_ckpt.agent.ending import end_agent
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.core.layout import SHARD_ALIGNMENT
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import BLOCK_BYTES
from emergency_ckpt.errors import CorruptShardsError, PeerUnavailableError
from tests.agent.served import RUN, CuttingProxy, Ramdisk, SayingServer, content, start

STEP = StepId(1, 7)


def test_every_shard_of_a_slot_arrives_bit_for_bit(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    with PeerClient(start(disk.root)) as client:
        (holding,) = client.inventory()
        assert holding.id == slot
        layout, manifest = client.layout(slot.layout), client.manifest(slot)
        assert layout == disk.layout
        assert holding.digest == manifest.digest
        places = disk.places()
        assert client.fetch(slot, layout, manifest, places) == sum(place.nbytes for _, place in places)
        disk.assert_content(STEP, places)


def test_a_step_that_is_sealed_while_the_agent_runs_is_served_too(disk: Ramdisk) -> None:
    with PeerClient(start(disk.root)) as client:
        assert client.inventory() == ()
        first, second = disk.save(STEP), disk.save(StepId(2, 8))
        assert {holding.id for holding in client.inventory()} == {first, second}
        places = disk.places()
        client.fetch(second, disk.layout, client.manifest(second), places)
        disk.assert_content(StepId(2, 8), places)


def test_blocks_of_a_shard_can_be_fetched_alone(served: tuple[Ramdisk, Endpoint]) -> None:
    disk, endpoint = served
    step = StepId(1, 1)
    slot = disk.save(step)
    whole = content(step, disk.layout, 0)
    second = np.zeros(BLOCK_BYTES, np.uint8)
    last = np.zeros(12345, np.uint8)
    with PeerClient(endpoint) as client:
        manifest = client.manifest(slot)
        client.fetch_blocks(slot, disk.layout, manifest, [Blocks(0, last, 2), Blocks(0, second, 1, 1)])
        for wrong in (Blocks(0, last, 1), Blocks(0, last, 3), Blocks(0, last, -1, 1), Blocks(99999, last)):
            with pytest.raises((ValueError, IndexError)):
                client.fetch_blocks(slot, disk.layout, manifest, [wrong])
    np.testing.assert_array_equal(second, whole[BLOCK_BYTES : 2 * BLOCK_BYTES])
    np.testing.assert_array_equal(last, whole[2 * BLOCK_BYTES :])


def test_small_batches_bring_the_same_bytes(disk: Ramdisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_BATCH_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(clients, "_BATCH_RANGES", 7)
    slot = disk.save(STEP)
    places = disk.places()
    with PeerClient(start(disk.root)) as client:
        client.fetch(slot, disk.layout, client.manifest(slot), places)
    disk.assert_content(STEP, places)


def test_the_connection_is_kept_and_is_opened_anew_when_the_agent_was_replaced(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    token_file = disk.root / "token"
    token_file.write_text("a-token-of-the-job")
    endpoint = start(disk.root, token_file=token_file)
    with PeerClient(endpoint) as client:
        for _ in range(5):
            client.manifest(slot)
        assert client.status()["connections"] == 1
        end_agent(disk.root, 20)
        again = start(disk.root, token_file=token_file, port=endpoint.port)
        assert again == endpoint
        assert client.manifest(slot).step == STEP


@pytest.mark.long  # A thousand connections at once need a machine that does nothing else.
def test_many_clients_at_once_are_all_served_or_told_to_come_back(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root, connections=64)
    shard = disk.layout.shard_index[next(s for s in disk.layout.shards if s.leaf == "small199")]
    with PeerClient(endpoint) as client:
        manifest = client.manifest(slot)

    def fetch(_: int) -> bool:
        place = np.zeros(disk.layout.shard_nbytes[shard], np.uint8)
        with PeerClient(endpoint, timedelta(seconds=50)) as client:
            client.fetch(slot, disk.layout, manifest, [(shard, place)])
        return np.array_equal(place, content(STEP, disk.layout, shard))

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        assert all(pool.map(fetch, range(1000)))


def test_the_server_counts_what_it_did(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    places = disk.places()
    with PeerClient(endpoint) as client:
        client.fetch(slot, disk.layout, client.manifest(slot), places)
        status = client.status()
    assert status["runs"] == [RUN]
    assert status["trainers"] == 0
    request = urllib.request.Request(f"{endpoint}/metrics")
    request.add_header("Authorization", f"Bearer {endpoint.token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    total = sum(place.nbytes for _, place in places)
    # With what lies between shards that follow each other.
    assert samples["emergency_ckpt_agent_served_bytes_total"] == status["bytes_served"]
    assert total <= status["bytes_served"] < total + SHARD_ALIGNMENT * len(places)
    assert samples["emergency_ckpt_agent_trainers"] == 0


def test_a_flipped_bit_is_noticed_and_its_shard_named(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    bad = [shard for shard, _ in disk.places() if disk.layout.shards[shard].leaf in ("big", "small100")]
    entries = {entry.shard: entry for entry in disk.layout.slot_entries(0)}
    sealed = disk.store.sealed(STEP)
    assert sealed is not None
    for shard in bad:
        sealed.data[entries[shard].offset + entries[shard].nbytes - 1] ^= 1
    places = disk.places()
    with PeerClient(start(disk.root)) as client:
        with pytest.raises(CorruptShardsError, match="small100") as caught:
            client.fetch(slot, disk.layout, client.manifest(slot), places)
        assert caught.value.shards == tuple(sorted(bad))
        good = [place for place in places if place[0] not in bad]
        disk.assert_content(STEP, good)
        # The connection is as good as before.
        client.fetch(slot, disk.layout, client.manifest(slot), good)


def test_bytes_of_another_generation_do_not_verify(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    with PeerClient(start(disk.root)) as client:
        manifest = dataclasses.replace(client.manifest(slot), step=StepId(2, 7))
        with pytest.raises(CorruptShardsError):
            client.fetch(slot, disk.layout, manifest, disk.places())


def test_a_step_that_was_given_up_is_a_clean_error(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    with PeerClient(start(disk.root)) as client:
        manifest = client.manifest(slot)
        disk.store.give_up(STEP)
        for ask in (
            lambda: client.manifest(slot),
            lambda: client.fetch(slot, disk.layout, manifest, disk.places()),
        ):
            with pytest.raises(PeerUnavailableError, match="was given up") as caught:
                ask()
            assert caught.value.code == "slot_not_here"


def test_a_slot_that_is_taken_for_another_step_gives_an_error_and_never_other_bytes(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    with PeerClient(start(disk.root)) as client:
        manifest = client.manifest(slot)
        other = content(StepId(9, 9), disk.layout, 0)
        sealed = disk.store.sealed(STEP)
        assert sealed is not None
        # The data of the next step is there, and the manifest of the one before still says the old.
        sealed.shard(0)[:] = other
        with pytest.raises(CorruptShardsError):
            client.fetch(slot, disk.layout, manifest, disk.places())
        # It is gone by the time that somebody looks.
        with CuttingProxy(client.endpoint, 10_000_000) as proxy, PeerClient(proxy.endpoint) as through:
            disk.manifest_file(STEP).unlink()
            with pytest.raises(PeerUnavailableError):
                through.fetch(slot, disk.layout, manifest, disk.places())


def test_a_file_that_is_cut_during_the_transfer_ends_the_answer_short(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    path = disk.data_file(STEP)
    with PeerClient(start(disk.root)) as client:
        manifest = client.manifest(slot)
        client.fetch(slot, disk.layout, manifest, disk.places())
        whole = os.stat(path).st_size
        os.truncate(path, whole // 2)
        with pytest.raises(PeerUnavailableError):
            client.fetch(slot, disk.layout, manifest, disk.places())


def test_a_connection_that_is_cut_anywhere_is_an_error_and_what_arrived_before_counts_for_nothing(
    disk: Ramdisk,
) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    with PeerClient(endpoint) as client:
        manifest = client.manifest(slot)
    total = sum(place.nbytes for _, place in disk.places())
    chosen = random.Random(0)
    for cut in (0, 1, 20, 150, *(chosen.randrange(total) for _ in range(6)), total):
        with (
            CuttingProxy(endpoint, cut) as proxy,
            PeerClient(proxy.endpoint) as client,
            pytest.raises(PeerUnavailableError, match="What to do"),
        ):
            client.fetch(slot, disk.layout, manifest, disk.places())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nnull",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=lambda answer: repr(answer[:40]),
)
def test_whatever_another_program_answers_is_a_clean_error(disk: Ramdisk, answer: bytes) -> None:
    slot = disk.save(STEP)
    sealed = disk.store.sealed(STEP)
    assert sealed is not None
    with SayingServer(answer) as server, PeerClient(server.endpoint, timedelta(seconds=5)) as client:
        for ask in (
            client.status,
            lambda: client.fetch(slot, disk.layout, sealed.manifest, disk.places()),
        ):
            with pytest.raises(PeerUnavailableError, match="the agent at http://"):
                ask()


def test_an_agent_that_trickles_is_given_up_at_the_time_limit(disk: Ramdisk) -> None:
    # It says that more is coming, and nothing comes.
    with (
        SayingServer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{") as server,
        PeerClient(server.endpoint, timedelta(seconds=0.2)) as client,
        pytest.raises(PeerUnavailableError),
    ):
        client.status()


def test_nobody_listening_is_a_clean_error() -> None:
    with SayingServer(b"") as server:
        endpoint = server.endpoint
    with PeerClient(endpoint) as client, pytest.raises(PeerUnavailableError, match="Connection refused"):
        client.status()


def test_a_slot_that_is_given_up_during_the_transfer_ends_the_answer_short(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    body = Asked([0]).to_bytes()
    head = (
        f"POST {slot.address}/shards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.token}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((endpoint.host, endpoint.port), 30) as connection:
        # Little fits between the two ends, so that most is not sent yet when the step goes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        connection.sendall(head.encode() + body)
        received = len(connection.recv(1000))
        disk.store.give_up(STEP)
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1024 * 1024):
                received += len(data)
    assert received < disk.layout.shard_nbytes[0]
