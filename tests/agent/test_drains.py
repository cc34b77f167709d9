"""Drains by an agent: asked for by the trainer of its host, carried out whatever becomes of that."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emergency_ckpt.agent.attachment import attach
from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.draining import carry_out, destination_of
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.order_client import OrderClient
from emergency_ckpt.agent.orders import (
    Destination,
    Life,
    Registration,
    Share,
    destination_from_json,
    destination_to_json,
    registration_from_json,
    registration_to_json,
    share_from_json,
    share_to_json,
)
from emergency_ckpt.agent.record import LOG, AgentRecord, agent_directory, read_record
from emergency_ckpt.core.checksums import checksum_blocks, shard_seed
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import (
    CorruptDataError,
    PeerUnavailableError,
    PersistentStoreError,
    StaleGenerationError,
)
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.store import PersistentStore
from tests.agent.served import (
    LOCAL,
    RUN,
    AcceptingServer,
    CuttingProxy,
    Ramdisk,
    pid_of,
    raw,
    start,
    wait_until_gone,
)
from tests.persistent.objects import KINDS
from tests.persistent.paced import Paced, open_paced_store
from tests.persistent.saving import read_shards

STEP = StepId(1, 7)
WAIT = timedelta(seconds=5)


@dataclasses.dataclass
class Job:
    """A ramdisk, the persistent root of its run, and where drains go."""

    disk: Ramdisk
    store: PersistentStore
    destination: Destination

    def share(self, *holders: int, position: int = 0, commits: bool = True, step: int = 7) -> Share:
        return Share(step, 0, self.disk.layout.hash, position, holders or (0,), commits)

    @property
    def nonce(self) -> str:
        return self.destination.life.nonce

    @property
    def record(self) -> AgentRecord:
        start(self.disk.root)
        record = read_record(agent_directory(self.disk.root))
        assert record is not None
        return record

    @property
    def owner(self) -> OrderClient:
        return OrderClient.of_this_host(self.record)

    def wait_for_end(self, drain: str) -> tuple[str, str]:
        while (report := self.owner.look(drain, WAIT)).ending is None:
            pass
        return report.ending, report.reason

    def wait_for_part(self, drain: str) -> None:
        """Until the part of process 0 is written, and the drain waits for others."""
        while not list(Path(self.store.files.locate()).glob("*/emergency_ckpt.parts/0.json")):
            assert self.owner.look(drain).ending is None

    @property
    def left(self) -> list[str]:
        """Steps and attempts in the persistent root."""
        return sorted(
            path.name for path in Path(self.store.files.locate()).iterdir() if path.name.startswith("7")
        )


@pytest.fixture
def job(disk: Ramdisk, tmp_path: Path) -> Job:
    store = PersistentStore(tmp_path / "bucket")
    store.files.write("emergency_ckpt/run_id", f"{RUN}\n".encode())
    generation = store.mint_generation(0, None)
    return Job(disk, store, destination_of(store, RUN, generation, "default", WriteOptions(), 60.0))


def test_a_step_is_committed_by_the_agent_that_was_asked(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    drain = job.owner.begin(job.destination, job.share())
    assert job.wait_for_end(drain) == ("done", "")
    assert [step.step_id for step in job.store.steps()] == [STEP]
    with PeerClient(job.record.endpoint) as client:
        assert client.status()["drains"] == 0


def test_only_the_owner_of_the_host_says_where_to(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    endpoint = job.record.endpoint
    body = json.dumps(
        {"destination": destination_to_json(job.destination), "share": share_to_json(job.share())}
    )
    for head in ("POST /v1/drains", f"PUT /v1/trainers/{'0' * 32}", f"DELETE /v1/trainers/{'0' * 32}"):
        status, said = raw(endpoint, head, body.encode())
        assert (status, said["error"]) == (403, "not_of_this_host")
    with pytest.raises(PeerUnavailableError, match="no_such_life"):
        OrderClient(endpoint).begin_of_life(job.destination.life, job.share())
    assert job.left == []


def test_a_slot_that_is_not_here_is_refused(job: Job) -> None:
    job.disk.save(STEP, nonce="b")
    for share in (job.share(), job.share(step=8)):
        with pytest.raises(PeerUnavailableError) as refused:
            job.owner.begin(job.destination, share)
        assert refused.value.code == "slot_not_here"


def test_a_slot_is_not_overwritten_until_its_drain_is_over(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    sealed = job.disk.store.sealed(STEP)
    assert sealed is not None
    drain = job.owner.begin(job.destination, job.share(0, 1))
    taken = []
    for number in (8, 9, 10):
        job.disk.save(StepId(1, number), nonce=job.nonce)
        found = job.disk.store.sealed(StepId(1, number))
        assert found is not None
        taken.append(found.index)
    assert sealed.index not in taken
    job.owner.give_up(drain, "enough")
    ending, reason = job.wait_for_end(drain)
    assert ending == "failed"
    assert "enough" in reason
    assert job.left == []
    job.disk.save(StepId(1, 11), nonce=job.nonce)
    job.disk.save(StepId(1, 12), nonce=job.nonce)
    assert job.disk.store.sealed(STEP) is None


def test_damage_is_found_and_nothing_is_committed(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    with open(job.disk.data_file(STEP), "r+b") as data:
        data.write(b"\xff\x00\xff")
    ending, reason = job.wait_for_end(job.owner.begin(job.destination, job.share()))
    assert ending == "corrupt"
    assert "does not match its checksum" in reason
    assert job.left == []


def test_a_later_generation_refuses_the_drain(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    job.store.mint_generation(1, None)
    assert job.wait_for_end(job.owner.begin(job.destination, job.share()))[0] == "superseded"
    assert job.left == []


def test_who_cannot_give_a_part_says_so_to_whoever_waits_for_it(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    drain = job.owner.begin(job.destination, job.share(0, 1))
    job.wait_for_part(drain)
    sealed = job.disk.store.sealed(STEP)
    assert sealed is not None
    with pytest.raises(CorruptDataError, match="holds"):
        carry_out(job.store, job.destination, job.share(0, 1, position=1, commits=False), sealed)
    ending, reason = job.wait_for_end(drain)
    assert ending == "failed"
    assert "given up by the writers of parts [1]" in reason
    assert job.left == []


def test_an_agent_that_is_told_to_end_lets_its_drains_end(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    pid, drain = job.record.pid, job.owner.begin(job.destination, job.share(0, 1))
    job.wait_for_part(drain)
    os.kill(pid, signal.SIGTERM)
    # The other part comes now.
    part = job.share(0, 1, position=1, commits=False)
    other = job.disk.other_slot(STEP, job.nonce)
    carry_out(job.store, job.destination, part, other)
    wait_until_gone(pid)
    assert job.left == ["7"]


def test_a_second_signal_ends_an_agent_at_once_and_the_step_is_invisible(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    pid, drain = job.record.pid, job.owner.begin(job.destination, job.share(0, 1))
    job.wait_for_part(drain)
    log = agent_directory(job.disk.root) / "agent.log"
    os.kill(pid, signal.SIGTERM)
    while "drains are running" not in log.read_text():
        pass
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(pid)
    assert job.store.steps() == []


def test_an_agent_with_a_drain_does_not_leave_for_want_of_trainers(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    start(job.disk.root, idle_seconds=0.2)
    drain = job.owner.begin(job.destination, job.share(0, 1))
    pid = pid_of(job.disk.root)
    job.wait_for_part(drain)
    assert job.owner.look(drain, timedelta(seconds=2)).ending is None
    job.owner.give_up(drain, "enough")
    wait_until_gone(pid)


def test_a_trainer_has_its_agent_drain_and_hears_what_came_of_it(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    agent = HostAgent(job.disk.root, LOCAL)
    try:
        assert agent.drain(job.destination, job.share(), lambda: None) == sum(job.disk.layout.shard_nbytes)
        os.kill(first := pid_of(job.disk.root), signal.SIGKILL)
        job.store.mint_generation(1, None)
        while agent.connect() and pid_of(job.disk.root) == first:
            pass  # It is not noticed yet that the agent is gone; the next one has its port and token.
        with pytest.raises(StaleGenerationError):
            agent.drain(job.destination, job.share(), lambda: None)
    finally:
        agent.close()


def test_an_order_whose_answer_got_lost_is_given_again_and_the_drain_that_runs_is_left_alone(job: Job) -> None:
    """By a trainer that asks the agent once more, and by one that takes it for dead and does it itself."""
    job.disk.save(STEP, nonce=job.nonce)
    sealed = job.disk.store.sealed(STEP)
    assert sealed is not None
    share, record = job.share(0, 1), job.record
    owner = dataclasses.replace(record.endpoint, token=record.owner)
    with CuttingProxy(owner, 0) as proxy, pytest.raises(PeerUnavailableError) as lost:
        OrderClient(proxy.endpoint).begin(job.destination, share)
    assert lost.value.code == "unreachable"
    drain = job.owner.begin(job.destination, share)
    assert job.owner.look_at(job.destination.life).drains == 1
    job.wait_for_part(drain)
    with pytest.raises(PersistentStoreError, match="given up while parts"):
        carry_out(job.store, job.destination, share, sealed, stop=lambda: "the trainer ends")
    assert job.owner.look(drain).ending is None
    other = job.disk.other_slot(STEP, job.nonce)
    carry_out(job.store, job.destination, job.share(0, 1, position=1, commits=False), other)
    assert job.wait_for_end(drain) == ("done", "")
    assert job.owner.begin(job.destination, share) == drain
    assert job.left == ["7"]


class LosingProxy(AcceptingServer):
    """Passes connections on to an agent; of those about drains every second one is cut before the answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._target = (endpoint.host, endpoint.port)
        self._passing: list[threading.Thread] = []
        self._asked = itertools.count()
        self.lost: list[bytes] = []
        super().__init__()

    def deal_with(self, connection: socket.socket) -> None:
        line = connection.recv(65536, socket.MSG_PEEK).partition(b"\r\n")[0]
        target = socket.create_connection(self._target, 30)
        if b"/v1/drains" in line and next(self._asked) % 2 == 0:
            with target:
                target.sendall(connection.recv(65536))
                assert target.recv(1)
            self.lost.append(line)
            return
        for source, sink in (connection.dup(), target), (target.dup(), connection.dup()):
            thread = threading.Thread(target=self._pass, args=(source, sink))
            thread.start()
            self._passing.append(thread)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with source, sink, contextlib.suppress(OSError):
            source.settimeout(60)
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for thread in self._passing:
            thread.join(70)


def test_a_trainer_hears_of_its_drain_though_answers_get_lost(job: Job) -> None:
    job.disk.save(STEP, nonce=job.nonce)
    record, directory = job.record, agent_directory(job.disk.root)
    agent = HostAgent(job.disk.root, LOCAL)
    with LosingProxy(record.endpoint) as proxy:
        endpoint = dataclasses.replace(record.endpoint, port=proxy.port)
        dataclasses.replace(record, endpoint=endpoint).write(directory)
        try:
            nbytes = agent.drain(job.destination, job.share(), lambda: None)
        finally:
            agent.close()
            record.write(directory)
    assert nbytes == sum(job.disk.layout.shard_nbytes)
    assert proxy.lost[0].startswith(b"POST /v1/drains ")
    assert len(proxy.lost) > 1
    assert (directory / LOG).read_text().count("draining") == 1
    assert job.left == ["7"]


def small_slot(nonce: str) -> SealedSlot:
    """All of a step of one leaf."""
    leaf = LeafSpec("w", (8,), "uint8")
    layout = Layout.build([leaf], {0: [Shard("w", Box.whole(leaf.shape))]}, (0,))
    data = np.arange(layout.data_bytes(0), dtype=np.uint8)
    checksums = (checksum_blocks(data[:8], shard_seed(STEP.generation, layout, 0)),)
    return SealedSlot(0, Manifest(RUN, nonce, STEP, layout.hash, 0, 1, checksums), layout, data)


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_who_carry_out_the_same_share_neither_takes_away_what_the_other_commits(
    ramdisk: Path, kind: str
) -> None:
    """The second one from any moment of the first on, as when a trainer takes its agent for dead."""
    first, store = Paced(ramdisk, kind), open_paced_store(ramdisk, kind, lambda: None)
    generation = store.mint_generation(0, None)
    slot = small_slot(generation.nonce)
    destination = destination_of(store, RUN, generation, "default", WriteOptions(), 60.0)
    told = set[str]()
    for number in itertools.count(1):
        share = Share(STEP.step, number, slot.layout.hash, 0, (0,), True)
        paused = first.start(lambda s, x=share: carry_out(s, destination, x, slot), number)
        try:
            carry_out(store, destination, share, slot)
            second = "done"
        except PersistentStoreError as error:
            second = "told" if "another committer is, or was, at work" in str(error) else str(error)
        told.add(second)
        assert isinstance(first.finish(), int)
        (step,) = store.steps()
        read_shards(store.open_step(step))
        store.delete_step(step)
        if not paused:
            break
    assert told == {"done", "told"}


def test_an_agent_whose_only_trainer_says_goodbye_leaves_soon(job: Job) -> None:
    agent = HostAgent(job.disk.root, LOCAL)
    endpoint = agent.connect()
    agent.register(Registration(job.destination, 0, (endpoint,), True))
    pid = pid_of(job.disk.root)
    agent.close()
    wait_until_gone(pid)
    assert "its trainer said goodbye" in (agent_directory(job.disk.root) / "agent.log").read_text()


def test_who_registers_must_be_attached(job: Job) -> None:
    endpoint = job.record.endpoint
    registration = Registration(job.destination, 0, (endpoint,), True)
    with pytest.raises(PeerUnavailableError, match="not_attached"):
        job.owner.register("0" * 32, registration)
    with attach(endpoint, trainer="0" * 32):
        job.owner.register("0" * 32, registration)
        assert OrderClient(endpoint).look_at(job.destination.life).processes == {0: "alive"}


def test_orders_survive_their_json(job: Job) -> None:
    registration = Registration(job.destination, 1, (None, job.record.endpoint), False)
    assert registration_from_json(json.loads(json.dumps(registration_to_json(registration)))) == registration
    share = job.share(0, 1)
    assert share_from_json(json.loads(json.dumps(share_to_json(share)))) == share


@pytest.mark.parametrize(
    "change",
    [
        {"root": "relative"},
        {"root": "/a/../b"},
        {"root": 7},
        {"root": "/a\0b"},
        {"item": "../default"},
        {"item": ""},
        {"prefix": "a/b"},
        {"digits": -1},
        {"concurrent_bytes": "many"},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"life": {"run": "../x", "generation": 1, "nonce": "a"}},
        {"life": {"run": RUN, "generation": 0, "nonce": "a"}},
        {"life": {"run": RUN, "generation": 1, "nonce": "A/"}},
        {"life": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_a_destination_that_makes_no_sense_is_refused(job: Job, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        destination_from_json({**destination_to_json(job.destination), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"holders": []},
        {"holders": [1, 0]},
        {"holders": [1]},
        {"holders": [0, 0]},
        {"holders": [True]},
        {"position": -1},
        {"layout": "x"},
        {"step": 1.5},
        {"commits": 1},
    ],
    ids=str,
)
def test_a_share_that_makes_no_sense_is_refused_by_the_agent(job: Job, change: dict[str, Any]) -> None:
    order = {"destination": destination_to_json(job.destination), "share": share_to_json(job.share()) | change}
    record = job.record
    status, said = raw(record.endpoint, "POST /v1/drains", json.dumps(order).encode(), record.owner)
    assert (status, said["error"]) == (400, "malformed")


def test_a_life_has_a_name() -> None:
    assert str(Life(RUN, 3, "ab")) == f"generation 3 of run {RUN}"
