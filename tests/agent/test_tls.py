"""With a certificate all traffic is encrypted, and an agent that cannot prove who it is gets no token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import trustme

from emergency_ckpt.agent.attachment import attach
from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PeerUnavailableError
from tests.agent.served import CuttingProxy, Ramdisk, SayingServer, start

STEP = StepId(1, 7)


@pytest.fixture
def encrypted(disk: Ramdisk, tmp_path: Path) -> Endpoint:
    """An agent with a certificate for `host.example` and 127.0.0.1."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "host.example")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(tmp_path / "certificate.pem", append=True)
    return start(
        disk.root,
        tls_certificate=tmp_path / "certificate.pem",
        tls_key=tmp_path / "key.pem",
        tls_ca=tmp_path / "ca.pem",
    )


def test_shards_travel_encrypted_and_arrive_bit_for_bit(disk: Ramdisk, encrypted: Endpoint) -> None:
    slot = disk.save(STEP)
    assert encrypted.tls
    assert str(encrypted).startswith("https://")
    places = disk.places()
    with PeerClient(encrypted) as client, attach(encrypted):
        client.fetch(slot, client.layout(slot.layout), client.manifest(slot), places)
        assert client.status()["trainers"] == 1
    disk.assert_content(STEP, places)
    assert start(disk.root) == encrypted


def test_a_cut_encrypted_connection_is_a_clean_error(disk: Ramdisk, encrypted: Endpoint) -> None:
    slot = disk.save(STEP)
    with PeerClient(encrypted) as client:
        manifest = client.manifest(slot)
    for cut in (0, 100, 10_000_000):
        with (
            CuttingProxy(encrypted, cut) as proxy,
            PeerClient(proxy.endpoint) as client,
            pytest.raises(PeerUnavailableError),
        ):
            client.fetch(slot, disk.layout, manifest, disk.places())


def test_a_slot_that_goes_ends_an_encrypted_answer_short(disk: Ramdisk, encrypted: Endpoint) -> None:
    slot = disk.save(STEP)
    with PeerClient(encrypted) as client:
        manifest = client.manifest(slot)
        disk.store.give_up(STEP)
        with pytest.raises(PeerUnavailableError):
            client.fetch(slot, disk.layout, manifest, [(0, np.zeros(disk.layout.shard_nbytes[0], np.uint8))])


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"ca_file": None}, "checkpoint_agent_tls_ca"),
        ({"host": "localhost"}, "for the host that it advertises"),
        ({"tls": False}, "look whether its host and the agent there live"),
    ],
)
def test_an_agent_that_cannot_be_verified_is_not_spoken_to(
    encrypted: Endpoint, change: dict[str, object], advice: str
) -> None:
    other = dataclasses.replace(encrypted, **change)  # type: ignore[arg-type]
    with PeerClient(other, dial="127.0.0.1") as client, pytest.raises(PeerUnavailableError, match=advice):
        client.status()


def test_the_name_is_verified_and_not_the_address_that_is_dialled(encrypted: Endpoint) -> None:
    named = dataclasses.replace(encrypted, host="host.example")
    with PeerClient(named, dial="127.0.0.1") as client:
        assert client.status()["directory"]


def test_certificates_that_are_not_here_are_an_error_that_says_so(encrypted: Endpoint) -> None:
    with pytest.raises(PeerUnavailableError, match="cannot be read"):
        PeerClient(dataclasses.replace(encrypted, ca_file="/nothing/here.pem"))


def test_a_program_that_speaks_no_tls_is_a_clean_error(encrypted: Endpoint) -> None:
    with SayingServer(b"HTTP/1.1 200 OK\r\n\r\n") as server:
        plain = dataclasses.replace(encrypted, port=server.endpoint.port)
        with PeerClient(plain) as client, pytest.raises(PeerUnavailableError):
            client.status()
