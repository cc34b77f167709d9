"""What an agent makes of a trainer that hangs: it says so once, with who is behind, and may end it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.progress import Phase, Progress, Told
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.stalls import StallLimits
from tests.agent.jobs import Job, make_job
from tests.agent.served import Ramdisk


@pytest.fixture
def job(disk: Ramdisk, tmp_path: Path) -> Job:
    return make_job(disk, tmp_path / "bucket")


def stalled(job: Job) -> list[dict[str, object]]:
    with PeerClient(job.record.endpoint) as client:
        return client.status()["stalled"]


@pytest.mark.parametrize(
    ("seconds", "median", "floor", "phase", "stall"),
    [
        (1e6, 0.1, 0, "training", False),  # Nobody watches.
        (1e6, 0.1, 5, "paused", False),
        (1e5, None, 1e5, "training", False),
        (3e5, None, 1e5, "training", True),
        (9e5, 1e5, 5, "training", False),
        (11e5, 1e5, 5, "training", True),
    ],
)
def test_a_step_is_a_stall_beyond_its_limit_and_never_in_a_pause(
    seconds: float, median: float | None, floor: float, phase: Phase, *, stall: bool
) -> None:
    said = Progress(7, phase, seconds, median, 1, 1, StallLimits(10.0, floor), last_call=False)
    assert (Told(said, time.monotonic()).stall_seconds is not None) == stall


def test_a_step_that_takes_too_long_is_told_once(job: Job) -> None:
    with job.trainer() as trainer:
        job.tell(trainer, "tell(7, 20, 0.1, floor=5)")
        job.wait_for(lambda: len(stalled(job)) == 1)
        job.tell(trainer, "tell(7, 25, 0.1, floor=5)")
        (said,) = stalled(job)
        assert (said["process"], said["step"], said["behind"]) == (0, 7, "process 0 is at step 7")
        assert " process 0 of generation 1 " in job.log
        assert "have passed since step 7, and recent ones took 0.1 s; process 0 is at step 7" in job.log
        job.tell(trainer, "tell(8, 0.1, 0.1, floor=5)")
        job.wait_for(lambda: stalled(job) == [])
        assert "process 0 goes on, after" in job.log
    assert job.log.count("hangs: ") == 1


def test_a_trainer_that_hangs_for_too_long_is_ended_once_the_newest_step_is_persistent(job: Job) -> None:
    job.save(7)
    with job.trainer(flush=False) as trainer:
        job.run_in(trainer, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
        job.tell(trainer, "tell(7, 3, 0.1, floor=1, restart=1, last_call=False)")
        assert trainer.wait(60) == -9
    job.wait_for(lambda: all(said in job.log for said in ("was committed", " died")))
    assert job.committed == [StepId(1, 7)]
    order = ["hangs: ", "was committed", "gets SIGTERM, so that the job restarts", "gets SIGKILL", "died"]
    places = [job.log.index(said) for said in order]
    assert places == sorted(places)


def test_a_trainer_that_goes_on_while_the_newest_step_is_drained_is_left_alone(job: Job) -> None:
    bucket = Path(job.destination.root)
    job.save(7)
    with job.trainer() as trainer:
        bucket.rename(bucket.with_name("aside"))
        job.tell(trainer, "tell(7, 3, 0.1, floor=1, restart=1)")
        job.wait_for(lambda: "the persistent tier does not answer, and is asked again" in job.log)
        job.tell(trainer, "tell(8, 0, 0.1, floor=600)")
        bucket.with_name("aside").rename(bucket)
        job.wait_for(lambda: "process 0 goes on, and is left alone" in job.log)
        assert job.committed == [StepId(1, 7)]
        assert trainer.poll() is None


def test_a_trainer_of_another_container_is_not_signalled(job: Job) -> None:
    with job.trainer() as trainer:
        job.run_in(
            trainer, "namespace = 1; real = os.stat; os.stat = lambda path: type('S', (), {'st_ino': 1})"
        )
        job.tell(trainer, "tell(7, 3, 0.1, floor=1, restart=1)")
        job.run_in(trainer, "os.stat = real")
        job.wait_for(lambda: "in another namespace of processes" in job.log)
        assert trainer.poll() is None
