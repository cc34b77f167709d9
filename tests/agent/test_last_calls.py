"""Agents drain the newest complete step without their trainers before a host goes away, if that is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from emergency_ckpt.agent import last_calls
from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.connection import PeerConnection
from emergency_ckpt.agent.counters import Counters
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.last_call import LastCallSession
from emergency_ckpt.agent.leading import FlushResult
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.agent.progress import ProgressBoard
from emergency_ckpt.agent.trainers import Trainers
from emergency_ckpt.core.last_call import Estimate
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PeerUnavailableError
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.preemption.notice import Notice
from tests.agent.jobs import WAIT, Job, make_job
from tests.agent.served import (
    AcceptingServer,
    Ramdisk,
    agents_of,
    ending_agents,
    start,
    wait_until_gone,
)
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


def test_a_notice_that_is_over_and_comes_again_with_time_left_is_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where an agent was started anew, and finds at its metadata server what has stood there for hours."""
    monkeypatch.setattr(last_calls, "_AT_LEAST_SECONDS", 0.0)
    calls = last_calls.LastCalls(Trainers(), ProgressBoard(), Counters(), lambda: 0)
    now = time.time()
    event = Notice("gce-maintenance", "terminate", now - 3600, now - 3540, id="event")
    calls.hear_here(event)
    assert not calls.leaving
    calls.hear_here(dataclasses.replace(event, received=now, deadline=now + 60))
    assert calls.leaving
    calls.hear_here(event)
    assert calls.leaving


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


def test_a_drain_that_fails_is_tried_again_while_there_is_time(job: Job, tmp_path: Path) -> None:
    job.save(7)
    # In the way of the directory of the first attempt.
    (tmp_path / f"bucket/7.orbax-checkpoint-tmp-g1-{job.nonce}-2000000000").touch()
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        job.owner.pass_on(notice(2))
        job.wait_for(lambda: job.committed == [StepId(1, 7)] or "could not be drained" in job.log)
        assert job.committed == [StepId(1, 7)], job.log
        job.wait_for(lambda: "step 7 (generation 1) was committed" in job.log)
    assert job.log.count("the newest step was not drained, which is tried again") == 1


class Holding(AcceptingServer):
    """Accepts connections to an agent, and never answers."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.asked = threading.Event()
        self._over = threading.Event()
        super().__init__()
        self.endpoint = dataclasses.replace(endpoint, port=self.port)

    def deal_with(self, connection: socket.socket) -> None:
        self.asked.set()
        self._over.wait(30)

    def __exit__(self, *left: object) -> None:
        self._over.set()
        super().__exit__(*left)


def test_one_that_still_asks_who_comes_first_is_in_nobodys_way(job: Job) -> None:
    """Of two agents that are told at once the lower one leads, also while the other waits for its answer."""
    job.save(7)
    parent = Path("/dev/shm")
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent if parent.is_dir() else None)))
        stack.enter_context(ending_agents(root))
        own = start(job.disk.root)
        other = Job(dataclasses.replace(job.disk, root=root), job.store, job.destination)
        held = stack.enter_context(Holding(own))
        lower = Registration(job.destination, 0, (None, start(root)), flush=True)
        higher = Registration(job.destination, 1, (held.endpoint, None), flush=True)
        for each, registration in ((job, lower), (other, higher)):
            trainer = stack.enter_context(each.trainer(registration=registration))
            each.tell(trainer, "tell(7)")
            each.owner.pass_on(notice(3600))
            each.wait_for(lambda each=each: "is drained in" in each.log)
        other.owner.pass_on(notice(2, "now"))
        assert held.asked.wait(60)
        job.owner.pass_on(notice(2, "now"))
        job.wait_for(lambda: "flushing step 7" in job.log)
        assert "flush without an agent" not in other.log, "it still waits for an answer"
        job.wait_for(lambda: job.committed == [StepId(1, 7)])


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


class LosingStore(Proxy):
    """Answers nothing any more once a step is committed, until it is let go: nobody hears of that."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.committed = threading.Event()
        self.goes_on = threading.Event()

    def forward(self, request: Request) -> Answer:
        lost = Answer(503, {}, b"")
        if self.committed.is_set() and not self.goes_on.is_set():
            return lost
        answer = super().forward(request)
        said = urllib.parse.unquote(request.path).encode() + request.body
        if request.method == "GET" or b"run/7/commit_success.txt" not in said:
            return answer
        self.committed.set()
        return lost


@pytest.mark.long
def test_where_a_commit_is_not_heard_of_the_next_try_finds_it(
    disk: Ramdisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(fake := FakeGcs("jobs")), running(losing := LosingStore(fake.endpoint)):
        use_gcs(monkeypatch, losing.endpoint)
        job = make_job(disk, "gs://jobs/run")
        job.destination = dataclasses.replace(job.destination, stall_seconds=2.0)
        job.save(7)
        with job.trainer() as trainer:
            job.tell(trainer, "tell(7)")
            job.owner.pass_on(notice(2))
            assert losing.committed.wait(60), job.log
            job.wait_for(lambda: "is tried again" in job.log or "could not be drained" in job.log)
            losing.goes_on.set()
            job.wait_for(lambda: "nothing is left to be drained" in job.log)
            assert job.committed == [StepId(1, 7)]
        for agent in agents_of(disk.root):
            agent.kill()
            agent.wait(20)


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


def test_a_notice_that_comes_while_a_call_leads_that_fails_is_met_by_another_one(
    slow_job: tuple[Job, SlowStore],
) -> None:
    job, slow = slow_job
    # Another program's step of that number: no other try mends that.
    job.store.files.create("7/default/manifest.ocdbt", b"")
    job.store.files.create("7/commit_success.txt", b"")
    job.save(7)
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7)")
        slow.goes_on.clear()
        job.owner.pass_on(notice(2, "first"))
        job.wait_for(lambda: "draining step 7" in job.log)
        job.owner.pass_on(notice(3, "second"))
        job.save(9)
        slow.goes_on.set()
        job.wait_for(lambda: StepId(1, 9) in job.committed)
    assert "step 7 (generation 1) was not committed" in job.log


class Broken(LastCallSession):
    """Ends by what nobody thought of while it leads, and a notice comes then."""

    calls = 0

    def _run(self) -> FlushResult:
        self.calls += 1
        if self.calls > 1:
            return FlushResult("committed", "the other one")
        self._state = "leading"
        assert self.hurry(time.monotonic() + 60)
        raise KeyError("7")


def test_a_notice_that_comes_while_a_call_leads_is_met_however_that_ends(job: Job) -> None:
    own = Endpoint("127.0.0.1", 1, "token")
    registration = Registration(job.destination, 0, (own,), flush=True)
    session = Broken(
        registration,
        Trainers(),
        own,
        own.host,
        threading.Event(),
        time.monotonic(),
        lambda: Estimate(1.0, "measured"),
        lambda: [],
    )
    assert session.run().reason == "the other one"
    assert session.report() is not None


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
