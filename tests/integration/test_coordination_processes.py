"""Coordination in real jobs: the service of process 0, used beside everything else that uses it."""

from __future__ import annotations

import concurrent.futures
import hashlib
import queue
import random
import threading
import time
from datetime import timedelta

from jax.experimental import multihost_utils

from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.jaxio.coordination import broadcast_from, gather, open_coordinator
from emergency_ckpt.jaxio.ending import LONGEST_CALL_SECONDS
from emergency_ckpt.jaxio.outcome_agreement import OutcomeAgreement
from tests.integration.processes import Job, run_job

LIMIT = timedelta(seconds=60)


def talk() -> list[list[str]]:
    """Several managers at once, each on a thread of its own, while the main thread meets at JAX's barriers."""
    coordinators = [open_coordinator() for _ in range(3)]

    def use(manager: int) -> list[str]:
        coordinator = coordinators[manager]
        seen = []
        for round_ in range(20):
            name = f"{manager}.{round_}.{coordinator.process_index}".encode()
            gathered = gather(coordinator, f"gather/{round_}", name, LIMIT)
            source = round_ % coordinator.process_count
            sent = broadcast_from(coordinator, f"plan/{round_}", gathered[source], source, LIMIT)
            seen += [value.decode() for value in [*gathered, sent]]
        return seen

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(use, manager) for manager in range(3)]
        for step in range(20):
            multihost_utils.sync_global_devices(f"step {step}")
        return [manager.result(60) for manager in running]


def test_managers_talk_from_threads_beside_barriers() -> None:
    found = run_job(talk, 2)
    expected = [
        [f"{m}.{r}.{p}" for r in range(20) for p in (0, 1, r % 2)] for m in range(3)
    ]  # per round: what was gathered from both, then what the source of that round sent on
    assert found == [expected, expected]


def wait_and_end() -> str:
    """A thread of each process waits for what comes late, and then for what never comes, and nobody ends it."""
    coordinator = open_coordinator()
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def wait() -> None:
        heard.put(coordinator.get("late", LIMIT))
        coordinator.get("never", LIMIT)

    threading.Thread(target=wait, daemon=True).start()
    if coordinator.process_index == 0:
        time.sleep(2 * LONGEST_CALL_SECONDS)
        coordinator.put("late", b"now")
    said = heard.get(timeout=60).decode()
    multihost_utils.sync_global_devices("the end")
    return said


def test_a_thread_that_still_waits_does_not_change_how_the_process_ends() -> None:
    assert run_job(wait_and_end, 3) == ["now"] * 3


def agree_often(saves: int) -> dict[str, int]:
    """Runs many saves, some of which a random process abandons; counts outcomes and the keys that exist."""
    coordinator = open_coordinator()
    agreement = OutcomeAgreement(coordinator, generation=1)
    complete = most_keys = 0
    digest = hashlib.sha256()
    choice = random.Random(coordinator.process_index)
    for save in range(saves):
        if choice.random() < 0.1:
            agreement.abandon(save, "no slot is free")
        else:
            agreement.report_sealed(save)
        record = agreement.await_outcome(save, LIMIT)
        digest.update(record.to_bytes())
        complete += record.outcome is Outcome.COMPLETE
        if save % 50 == 0:
            most_keys = max(most_keys, len(coordinator.entries("")))
    return {"complete": complete, "most_keys": most_keys, "digest": int(digest.hexdigest()[:12], 16)}


def test_outcomes_agree_and_keys_do_not_grow_over_many_saves() -> None:
    saves = 1000
    first, second = run_job(agree_often, 2, saves)
    assert first["digest"] == second["digest"]
    assert saves * 0.7 < first["complete"] == second["complete"] < saves
    # One report per process; counter and outcome of this save, of the next, and of abandoned ones in a row.
    assert max(first["most_keys"], second["most_keys"]) < 40


def wait_for_what_never_comes() -> None:
    coordinator = open_coordinator()
    if coordinator.process_index == 0:
        coordinator.get("started", LIMIT)
        print("ready to be killed", flush=True)
        coordinator.get("never", LIMIT)
    coordinator.put("started", b"")
    coordinator.get("never", timedelta(minutes=30))


def test_nobody_hangs_when_the_process_with_the_service_dies() -> None:
    with Job(wait_for_what_never_comes, 2) as job:
        job.wait_for_line(0, "ready to be killed")
        job.kill(0)
        job.wait(LIMIT)
        assert job.failed
