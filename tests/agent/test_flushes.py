"""What an agent makes of the death of its trainer: the newest restorable step is persistent, older ones go."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emergency_ckpt.agent.leading import Leader
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.persistent.store import PersistentStep
from tests.agent.jobs import Job, make_job
from tests.agent.served import Ramdisk, agents_of, ending_agents, open_ramdisk, pid_of, start
from tests.servers.environment import use_gcs
from tests.servers.fake_gcs import FakeGcs, running
from tests.servers.proxy import Answer, Fault, Kind, Proxy, Request


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


def die(job: Job) -> None:
    """A trainer registers and is killed."""
    with job.trainer():
        pass


def test_a_step_of_an_earlier_life_is_drained_while_it_is_the_newest_one(disk: Ramdisk, bucket: Path) -> None:
    """The trainer died before it had restored anything; the step was saved in the life before."""
    first = make_job(disk, bucket)
    first.save(7)
    second = make_job(disk, bucket)
    die(second)
    second.wait_for(lambda: second.committed == [StepId(1, 7)])
    (step,) = second.store.steps()
    assert (step.nonce, step.written_by_us) == (first.nonce, True)


def test_a_step_that_was_restored_and_after_which_nothing_was_saved_is_drained(
    disk: Ramdisk, bucket: Path
) -> None:
    """Its slot has the nonce of the life that fetched it from other hosts."""
    make_job(disk, bucket)
    second = make_job(disk, bucket)
    second.save(7, generation=1)
    second.store.record_activation(Activation(2, 7))
    die(second)
    second.wait_for(lambda: second.committed == [StepId(1, 7)])


def test_a_step_that_a_restore_left_behind_is_not_drained(disk: Ramdisk, bucket: Path) -> None:
    first = make_job(disk, bucket)
    first.save(5)
    first.save(7)
    second = make_job(disk, bucket)
    second.store.record_activation(Activation(2, 5))
    die(second)
    second.wait_for(lambda: second.committed == [StepId(1, 5)])
    second.wait_for(lambda: "was committed" in second.log)
    assert "step 7" not in second.log


def test_steps_that_were_saved_by_nobody_who_is_known_are_left_alone(disk: Ramdisk, bucket: Path) -> None:
    make_job(disk, bucket)
    job = make_job(disk, bucket)
    job.save(7, generation=1)
    (bucket / "emergency_ckpt/generations/00000001.json").unlink()
    die(job)
    job.wait_for(lambda: "nothing is left to be drained" in job.log)
    assert "steps of generation 1 are left alone" in job.log


def test_older_steps_go_by_the_rule_of_the_trainer(disk: Ramdisk, bucket: Path) -> None:
    job = make_job(disk, bucket)
    for step in (3, 4, 5):
        _commit(job, step)
    job.save(7)
    die(job)
    job.wait_for(lambda: job.committed == [StepId(1, 5), StepId(1, 7)])
    job.wait_for(lambda: "deleted the persistent step 3" in job.log)


def test_where_a_policy_decides_older_steps_stay_for_the_next_trainer(disk: Ramdisk, bucket: Path) -> None:
    job = make_job(disk, bucket, tidies=False)
    for step in (3, 4, 5):
        _commit(job, step)
    job.save(7)
    die(job)
    job.wait_for(lambda: "was committed: step 7" in job.log)
    assert [step.step for step in job.committed] == [3, 4, 5, 7]


def test_an_agent_whose_store_is_away_waits_for_it(disk: Ramdisk, bucket: Path) -> None:
    job = make_job(disk, bucket)
    job.save(7)
    with job.trainer():
        bucket.rename(bucket.with_name("aside"))
    job.wait_for(lambda: "the flush waits for the persistent tier, at most" in job.log)
    bucket.with_name("aside").rename(bucket)
    job.wait_for(lambda: job.committed == [StepId(1, 7)])
    assert job.log.count("waits for the persistent tier") == 1


def test_a_step_whose_drain_failed_is_drained_by_a_flush_which_tries_again_as_well(
    disk: Ramdisk, bucket: Path
) -> None:
    job = make_job(disk, bucket)
    job.save(7)
    for ordinal in (0, 1_000_000_000):  # In the way of the directories of the first attempts.
        (bucket / f"7.orbax-checkpoint-tmp-g1-{job.nonce}-{ordinal}").touch()
    drain = job.owner.begin(job.destination, job.share(7))
    while (report := job.owner.look(drain)).ending is None:
        pass
    assert report.ending == "failed"
    die(job)
    job.wait_for(lambda: job.committed == [StepId(1, 7)] or "could not be drained" in job.log)
    assert job.committed == [StepId(1, 7)], job.log
    assert "the flush waits for the persistent tier, at most" in job.log


def test_what_a_flush_left_whose_agents_died_in_its_middle_is_not_in_the_way_of_the_next(
    disk: Ramdisk, bucket: Path
) -> None:
    """A claim, and of another try the part of a process that is to write something else now."""
    job = make_job(disk, bucket)
    job.save(7)
    for number, left in enumerate(["emergency_ckpt.committer", "emergency_ckpt.parts/0.failed"]):
        path = bucket / f"7.orbax-checkpoint-tmp-g1-{job.nonce}-{1_000_000_000 + number}" / left
        path.parent.mkdir(parents=True)
        path.touch()
    die(job)
    job.wait_for(lambda: job.committed == [StepId(1, 7)] or "could not be drained" in job.log)
    assert job.committed == [StepId(1, 7)], job.log


def _commit(job: Job, step: int) -> PersistentStep:
    """Commits a step by a drain, as a trainer that lives asks for it."""
    job.save(step)
    drain = job.owner.begin(job.destination, job.share(step))
    while job.owner.look(drain).ending is None:
        pass
    (found,) = [held for held in job.store.steps() if held.step_id.step == step]
    return found


class FailingStore(Proxy):
    """Does not answer from the moment that a part is written, until it is let go on."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.goes_on = threading.Event()
        self._fails = False

    def next_fault(self, request: Request) -> Fault | None:
        return Fault(Kind.RESET) if self._fails and not self.goes_on.is_set() else None

    def forward(self, request: Request) -> Answer:
        self._fails = self._fails or (request.method == "POST" and b"emergency_ckpt.parts" in request.body)
        return super().forward(request)


@pytest.mark.long
def test_what_a_try_left_whose_store_failed_in_its_middle_is_removed_after_the_commit(
    disk: Ramdisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(fake := FakeGcs("jobs")), running(store := FailingStore(fake.endpoint)):
        use_gcs(monkeypatch, store.endpoint)
        job = make_job(disk, "gs://jobs/run", seconds=3.0)
        job.save(7)
        die(job)
        job.wait_for(lambda: "the flush waits for the persistent tier, at most" in job.log)
        store.goes_on.set()
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
        job.wait_for(lambda: "flush after the end of its trainer" in job.log)
        left = [name for name in fake.buckets.objects("jobs") if f"g1-{job.nonce}-1000000000" in name]
        assert left == [], sorted(fake.buckets.objects("jobs"))


def test_an_agent_that_is_back_is_asked_again(disk: Ramdisk, bucket: Path) -> None:
    job = make_job(disk, bucket)
    with job.trainer():
        endpoint, there = job.record.endpoint, Registration(job.destination, 0, (job.record.endpoint,), True)
        leader = Leader(there, endpoint, "127.0.0.1", threading.Event(), forgiving_seconds=0.0)
        with contextlib.closing(leader):
            assert list(leader.reports()) == [endpoint]
            agents = agents_of(disk.root)
            for agent in agents:
                agent.kill()
                agent.wait(20)
            assert leader.reports() == {}
            start(disk.root)
            assert list(leader.reports()) == [endpoint]


def test_an_agent_that_has_what_is_missing_of_a_step_is_waited_for(
    disk: Ramdisk, bucket: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stands still when the flush begins. The other one holds one shard of the step."""
    job = make_job(disk, bucket)
    job.save(7)
    with ending_agents(tmp_path), open_ramdisk(tmp_path, process=1) as small, contextlib.ExitStack() as stack:
        other = Job(small, job.store, job.destination)
        other.save(7)
        agents = (job.record.endpoint, other.record.endpoint)
        there = [Registration(job.destination, process, agents, True) for process in (0, 1)]
        stack.enter_context(job.trainer(registration=there[0]))
        stack.enter_context(other.trainer(registration=there[1]))
        leader = Leader(there[1], agents[1], "127.0.0.1", threading.Event())
        stack.enter_context(contextlib.closing(leader))
        led = stack.enter_context(ThreadPoolExecutor(1))
        with caplog.at_level(logging.INFO, logger="emergency_ckpt.agent"):
            os.kill(pid_of(disk.root), signal.SIGSTOP)
            try:
                result = led.submit(leader.lead, job.store, None, ())
                job.wait_for(lambda: "agents that cannot be reached are asked again" in caplog.text)
                assert caplog.text.count("flush without an agent") == 1
            finally:
                os.kill(pid_of(disk.root), signal.SIGCONT)
            said = result.result(60)
        assert said is not None
        assert said.ending == "committed", said
        assert job.committed == [StepId(1, 7)]


def test_an_agent_that_is_not_back_is_named_once_and_a_flush_that_is_stopped_leaves_the_rest(
    disk: Ramdisk, bucket: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(disk, bucket)
    with ending_agents(tmp_path), open_ramdisk(tmp_path, process=1) as small:
        other = Job(small, job.store, job.destination)
        other.save(7)
        agents = (job.record.endpoint, other.record.endpoint)
        there = Registration(job.destination, 1, agents, True)
        for agent in agents_of(disk.root):
            agent.kill()
            agent.wait(20)
        with other.trainer(registration=there), ThreadPoolExecutor(1) as led:
            stopped = threading.Event()
            leader = Leader(there, agents[1], "127.0.0.1", stopped, waiting_seconds=60.0)
            with contextlib.closing(leader), caplog.at_level(logging.INFO, logger="emergency_ckpt.agent"):
                result = led.submit(leader.lead, job.store, None, ())
                job.wait_for(lambda: "agents that cannot be reached are asked again" in caplog.text)
                assert not result.done()
                stopped.set()
                said = result.result(60)
            assert said is not None
            assert (said.ending, said.reason) == ("stood_down", "nothing is done: the agent leaves")
            assert caplog.text.count("flush without an agent") == 1
            with contextlib.closing(
                Leader(there, agents[1], "127.0.0.1", threading.Event(), waiting_seconds=0.1)
            ) as brief:
                said = brief.lead(job.store, None, ())
            assert said is not None
            assert said.ending == "nothing_left"
