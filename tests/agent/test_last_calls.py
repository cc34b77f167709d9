"""Agents drain the newest complete step without their trainers before a host goes away, if that is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.connection import PeerConnection
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PeerUnavailableError
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.preemption.notice import Notice
from tests.agent.jobs import WAIT, Job, make_job
from tests.agent.served import Ramdisk, agents_of, start, wait_until_gone
from tests.servers.environment import use_gcs
from tests.servers.fake_gcs import FakeGcs, running
from tests.servers.proxy import Answer, Proxy, Request


@pytest.fixture
def job(disk: Ramdisk, tmp_path: Path) -> Job:
    return make_job(disk, tmp_path / "bucket")


def notice(seconds: float, detail: str = "") -> Notice:
    """That a host goes away in so many seconds."""
    now = time.time()
    return Notice("aws-spot", "terminate", now, now + seconds, detail)


def status(job: Job) -> dict[str, object]:
    with PeerClient(job.record.endpoint) as client:
        return client.status()


def test_the_newest_step_is_drained_while_its_trainer_hangs_and_only_before_the_deadline(job: Job) -> None:
    """A far deadline is waited for; a nearer one, of another notice, hurries it. The trainer knows nothing."""
    job.save(5)
    job.save(7)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        job.owner.pass_on(notice(3600), process=5)
        job.wait_for(lambda: "the newest complete step is drained in" in job.log)
        assert status(job)["last_calls"] == 1
        assert job.committed == []
        job.owner.pass_on(notice(2, "sooner"), process=5)
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
        job.wait_for(lambda: status(job)["last_calls"] == 0)
        assert trainer.poll() is None
        # The same step is not drained again, and the same notice means nothing new.
        job.owner.pass_on(notice(2, "again"), process=5)
        job.wait_for(lambda: "last call for generation 1" in job.log and "nothing is left" in job.log)
    assert job.log.count("flushing step 7") == 1
    (line,) = [line for line in job.log.splitlines() if "flushing step 7" in line]
    assert "without the trainers" in line
    assert "s are left" in line
    assert "is not written by process 5" in line


def test_a_drain_of_the_trainer_is_left_alone_while_it_moves_and_replaced_where_it_waits_in_vain(
    job: Job,
) -> None:
    job.save(7)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        # Process 1 never brings its part.
        drain = job.owner.begin(job.destination, job.share(7, 0, 1))
        job.owner.pass_on(notice(2))
        job.wait_for(lambda: "step 7 (generation 1) is left to the drain that is running" in job.log)
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
        assert job.owner.look(drain).ending is None
        job.owner.give_up(drain, "enough")
        # It ends, and well where it saw in time that the other one has committed the step.
        job.wait_for(lambda: job.owner.look(drain).ending in ("failed", "done"))
    assert job.committed == [StepId(1, 7)]


@pytest.mark.parametrize(
    ("call", "why"), [("tell(7, last_call=False)", ""), ("agent.close()", "have said goodbye")]
)
def test_nothing_is_drained_for_trainers_that_do_not_want_it_or_have_left(
    job: Job, call: str, why: str
) -> None:
    job.save(7)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        if why:
            job.owner.pass_on(notice(3600))
            job.wait_for(lambda: "is drained in" in job.log)
        job.run_in(trainer, call)
        job.run_in(trainer, 'print("done", flush=True)')
        job.read_line(trainer, "done")
        if why:
            job.wait_for(lambda: why in job.log)
        else:
            job.owner.pass_on(notice(2))
            assert status(job)["last_calls"] == 0
    assert job.committed == []


def test_only_the_owner_of_the_host_passes_on_and_only_the_end_of_a_host(job: Job) -> None:
    record = job.record
    said = dataclasses.asdict(notice(60))
    owner = dataclasses.replace(record.endpoint, token=record.owner)
    for endpoint, body, code in (
        (record.endpoint, said, "not_of_this_host"),
        (owner, {**said, "kind": "save"}, "malformed"),
        (owner, {**said, "process": -1}, "malformed"),
        (owner, {**said, "process": "0"}, "malformed"),
        (owner, {**said, "deadline": "soon"}, "malformed"),
        (owner, {**said, "more": 1}, "malformed"),
        (owner, {"source": "aws-spot"}, "malformed"),
    ):
        connection = PeerConnection(endpoint, WAIT)
        with pytest.raises(PeerUnavailableError, match=code):
            connection.read_json("POST", "/v1/notices", json.dumps(body).encode())
        connection.close()
    page = f"/v1/trainers/{'0' * 32}/progress"
    for endpoint, sent, code in (
        (record.endpoint, {}, "not_of_this_host"),
        (owner, {}, "malformed"),
        (owner, {"step": 1, "limits": []}, "malformed"),
        (owner, {"padding": "x" * 5000}, "malformed"),
    ):
        connection = PeerConnection(endpoint, WAIT)
        with pytest.raises(PeerUnavailableError, match=code):
            connection.read_json("PUT", page, json.dumps(sent).encode())
        connection.close()
    assert status(job)["last_calls"] == 0


def test_an_agent_that_gets_sigterm_tells_its_trainer_and_takes_its_drain_before_it_leaves(job: Job) -> None:
    record, owner = job.record, job.owner
    with job.trainer() as trainer:
        job.tell(trainer, "tell(6)")
        os.kill(record.pid, signal.SIGTERM)
        job.read_line(trainer, "notice agent terminate")
        # The save that it makes of it, seconds later.
        job.save(7)
        owner.begin(job.destination, job.share(7))
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
        job.wait_for(lambda: "trainers listen that save now: 25 s for them" in job.log)
        job.run_in(trainer, "agent.close()")
        wait_until_gone(record.pid)
    assert job.committed == [StepId(1, 7)]


def test_an_agent_that_gets_sigterm_drains_the_newest_step_where_its_trainer_hangs(job: Job) -> None:
    start(job.disk.root, finish_seconds=14.0)
    job.save(7)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        record = job.record
        os.kill(record.pid, signal.SIGHUP)
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
        os.kill(record.pid, signal.SIGHUP)  # A second one, and it does not wait for the trainer.
        wait_until_gone(record.pid)
        assert trainer.poll() is None


class SlowStore(Proxy):
    """Holds every request that changes something, until it is let go."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def forward(self, request: Request) -> Answer:
        if request.method != "GET":
            self.goes_on.wait(90)
        return super().forward(request)


@pytest.fixture
def slow_job(disk: Ramdisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Job, SlowStore]]:
    with running(fake := FakeGcs("jobs")), running(slow := SlowStore(fake.endpoint)):
        use_gcs(monkeypatch, slow.endpoint)
        yield make_job(disk, "gs://jobs/run"), slow
        # They would wait for the store, which is about to be gone.
        for agent in agents_of(disk.root):
            agent.kill()
            wait_until_gone(agent.pid)


@pytest.mark.parametrize("stall_seconds", [4.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_with_two_seconds_left_and_a_store_that_stands_still_nothing_is_half_committed(
    slow_job: tuple[Job, SlowStore], stall_seconds: float
) -> None:
    """It begins at once and does not make it; once the store goes on, and the host lives, the step is whole."""
    job, slow = slow_job
    job.save(7)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        slow.goes_on.clear()
        began = time.monotonic()
        job.owner.pass_on(notice(2))
        job.wait_for(lambda: "may not be over in time, and begins at once" in job.log)
        while time.monotonic() < began + stall_seconds:  # The agent serves meanwhile.
            assert status(job)["last_calls"] == 1
            assert job.committed == []
        slow.goes_on.set()
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
    assert [step.written_by_us for step in PersistentStore("gs://jobs/run").steps()] == [True]


def test_a_host_that_dies_with_its_store_standing_still_comes_back_to_the_step_before(
    slow_job: tuple[Job, SlowStore],
) -> None:
    job, slow = slow_job
    job.save(5)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(5)")
        job.owner.pass_on(notice(1, "first"))
        # What follows the commit is done as well before the store stands still.
        job.wait_for(lambda: "step 5 (generation 1) was committed" in job.log)
        assert job.committed == [StepId(1, 5)]
        job.save(7)
        slow.goes_on.clear()
        job.owner.pass_on(notice(2, "second"))
        job.wait_for(lambda: "flushing step 7" in job.log)
        pid = job.record.pid
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
    slow.goes_on.set()
    assert job.committed == [StepId(1, 5)]
