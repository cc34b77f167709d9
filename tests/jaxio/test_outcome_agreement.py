"""Outcomes are written once, read alike by all, and `complete` means that every process sealed."""

from __future__ import annotations

import concurrent.futures
import random
import threading
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.outcomes import OutcomeRecord
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.jaxio.coordination import Coordinator, InMemoryCluster, InMemoryCoordinator, SingleProcess
from emergency_ckpt.jaxio.outcome_agreement import OutcomeAgreement

LONG = timedelta(seconds=60)
AT_ONCE = timedelta(0)
COMPLETE, ABANDONED = Outcome.COMPLETE, Outcome.ABANDONED


def agreements(processes: int, cluster: InMemoryCluster | None = None) -> list[OutcomeAgreement]:
    cluster = cluster or InMemoryCluster(processes)
    return [OutcomeAgreement(cluster.coordinator(i), generation=1) for i in range(processes)]


def test_a_save_that_all_processes_sealed_is_complete_for_all() -> None:
    job = agreements(3)
    for process in job:
        process.report_sealed(0)
    assert [process.await_outcome(0, LONG).outcome for process in job] == [COMPLETE] * 3


def test_a_job_of_one_process_completes_by_its_own_seal() -> None:
    alone = OutcomeAgreement(SingleProcess(), generation=1)
    alone.report_sealed(0)
    assert alone.await_outcome(0, LONG).outcome is COMPLETE


def test_one_process_that_cannot_seal_abandons_the_save_for_all_at_once() -> None:
    job = agreements(3)
    job[0].report_sealed(0)
    job[2].abandon(0, "no slot is free")
    record = OutcomeRecord(ABANDONED, 2, "no slot is free")
    assert [process.await_outcome(0, LONG) for process in job] == [record] * 3


def test_a_timeout_abandons_and_names_who_had_not_reported() -> None:
    job = agreements(4)
    job[1].report_sealed(0)
    job[3].report_sealed(0)
    record = job[1].await_outcome(0, AT_ONCE)
    assert (record.outcome, record.process) == (ABANDONED, 1)
    assert record.reason.endswith("processes that had not reported: [0, 2]")
    assert [job[i].await_outcome(0, LONG) for i in (0, 2, 3)] == [record] * 3


@pytest.mark.parametrize("knows", [True, False], ids=["outcome known", "outcome not known yet"])
def test_late_seals_change_nothing(knows: bool) -> None:
    job = agreements(2)
    job[0].abandon(0, "why not")
    if knows:
        assert job[1].await_outcome(0, LONG).outcome is ABANDONED
    job[1].report_sealed(0)
    if not knows:
        assert job[1].await_outcome(0, LONG).outcome is ABANDONED
    assert job[0].await_outcome(0, LONG).outcome is ABANDONED


def test_giving_up_after_completion_reads_complete() -> None:
    job = agreements(2)
    for process in job:
        process.report_sealed(0)
    assert job[0].await_outcome(0, LONG).outcome is COMPLETE
    assert job[1].await_outcome(0, AT_ONCE).outcome is COMPLETE


def test_generations_do_not_meet() -> None:
    cluster = InMemoryCluster(2)
    old, new = (OutcomeAgreement(cluster.coordinator(i), generation=i + 1) for i in range(2))
    old.report_sealed(0)
    new.report_sealed(0)
    assert new.await_outcome(0, AT_ONCE).outcome is ABANDONED


def test_a_generation_leaves_nothing_behind() -> None:
    cluster = InMemoryCluster(2)
    job = agreements(2, cluster)
    for process in job:
        process.report_sealed(0)
    job[1].discard()
    assert cluster.key_count() == 0


def test_keys_of_callers_go_with_their_save() -> None:
    cluster = InMemoryCluster(2)
    job = agreements(2, cluster)
    cluster.put(f"{job[0].keys_of(0)}/extras", b"")
    for save in (0, 1):
        for process in job:
            process.report_sealed(save)
        for process in job:
            process.await_outcome(save, LONG)
    assert cluster.entries(job[0].keys_of(0)) == {}


@pytest.mark.parametrize("last", [COMPLETE, ABANDONED])
def test_keys_do_not_grow_with_the_saves(last: Outcome) -> None:
    cluster = InMemoryCluster(2)
    job = agreements(2, cluster)
    most = 0
    for save in range(1000):
        job[0].report_sealed(save)
        if last is COMPLETE:
            job[1].report_sealed(save)
        else:
            job[1].abandon(save, "the ramdisk is broken")
        assert {process.await_outcome(save, LONG).outcome for process in job} == {last}
        most = max(most, cluster.key_count())
    assert most <= (6 if last is COMPLETE else 2 + 2 * 130)


class _Interrupted(Exception):
    """Ends a simulated process."""


class _Interleaving(InMemoryCoordinator):
    """A process whose every operation takes effect only when the schedule gives it its turn."""

    def __init__(self, cluster: InMemoryCluster, index: int, processes: int, schedule: _Schedule) -> None:
        super().__init__(cluster, index, processes)
        self._schedule = schedule

    def put(self, key: str, value: bytes) -> None:
        self._schedule.turn(self.process_index)
        super().put(key, value)

    def put_once(self, key: str, value: bytes) -> bytes:
        self._schedule.turn(self.process_index)
        return super().put_once(key, value)

    def get(self, key: str, timeout: timedelta) -> bytes:
        # A wait ends when the schedule says so: with the value if it is there, else with the time-out.
        self._schedule.turn(self.process_index)
        return super().get(key, AT_ONCE)

    def entries(self, prefix: str) -> dict[str, bytes]:
        self._schedule.turn(self.process_index)
        return super().entries(prefix)

    def increment(self, key: str) -> int:
        self._schedule.turn(self.process_index)
        return super().increment(key)

    def delete(self, prefix: str) -> None:
        self._schedule.turn(self.process_index)
        super().delete(prefix)


class _Schedule:
    """Lets exactly one process take one step at a time, in a random order, and kills some on the way."""

    def __init__(self, processes: int, seed: int, deaths: dict[int, int]) -> None:
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._steps_left = [deaths.get(p, 10**9) for p in range(processes)]
        self._running = set(range(processes))
        self._waiting: set[int] = set()
        self._chosen: int | None = None

    def turn(self, process: int) -> None:
        with self._changed:
            if self._steps_left[process] == 0:
                raise _Interrupted
            self._steps_left[process] -= 1
            self._waiting.add(process)
            self._choose()
            assert self._changed.wait_for(lambda: self._chosen == process, 60)
            self._waiting.discard(process)
            self._chosen = None

    def leave(self, process: int) -> None:
        with self._changed:
            self._running.discard(process)
            self._choose()

    def _choose(self) -> None:
        """Once every running process asks for its turn, one of them gets it."""
        if self._chosen is None and self._waiting and self._waiting == self._running:
            self._chosen = self._random.choice(sorted(self._waiting))
            self._changed.notify_all()


@settings(max_examples=150)
@given(data=st.data())
def test_all_processes_read_one_outcome_in_every_interleaving(data: st.DataObject) -> None:
    processes, saves = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    acts = st.sampled_from(["seal", "seal", "seal", "fail", "late"])
    plan = data.draw(
        st.lists(st.lists(acts, min_size=saves, max_size=saves), min_size=processes, max_size=processes)
    )
    deaths = data.draw(st.dictionaries(st.integers(0, processes - 1), st.integers(0, 12), max_size=2))
    schedule = _Schedule(processes, data.draw(st.integers(0, 2**32)), deaths)
    cluster = InMemoryCluster(processes)
    sealed: list[set[int]] = [set() for _ in range(saves)]
    read: list[set[OutcomeRecord]] = [set() for _ in range(saves)]

    def run(process: int) -> None:
        coordinator: Coordinator = _Interleaving(cluster, process, processes, schedule)
        agreement = OutcomeAgreement(coordinator, generation=1)
        try:
            for save in range(saves):
                act = plan[process][save]
                if act == "seal":
                    sealed[save].add(process)
                    agreement.report_sealed(save)
                elif act == "fail":
                    agreement.abandon(save, "no slot")
                read[save].add(agreement.await_outcome(save, LONG))
                if act == "late":
                    sealed[save].add(process)
                    agreement.report_sealed(save)
        except _Interrupted:
            pass
        finally:
            schedule.leave(process)

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, range(processes)))

    for save in range(saves):
        assert len(read[save]) <= 1, f"save {save} has several outcomes"
        for record in read[save]:
            if record.outcome is COMPLETE:
                assert sealed[save] == set(range(processes)), f"save {save} is complete without all seals"
                assert all(plan[p][save] == "seal" for p in range(processes))


@pytest.mark.parametrize("seed", range(5))
def test_all_processes_read_one_outcome_with_free_running_threads(seed: int) -> None:
    processes, saves = 6, 40
    cluster = InMemoryCluster(processes)

    def run(process: int) -> list[OutcomeRecord]:
        choice = random.Random(seed * 100 + process)
        agreement = OutcomeAgreement(cluster.coordinator(process), generation=1)
        records = []
        for save in range(saves):
            patience = timedelta(milliseconds=choice.choice([0, 1, 60_000]))
            if choice.random() < 0.05:
                agreement.abandon(save, "no slot")
                records.append(agreement.await_outcome(save, patience))
            else:
                with concurrent.futures.ThreadPoolExecutor(1) as sealer:  # its seal may come late
                    sealing = sealer.submit(agreement.report_sealed, save)
                    records.append(agreement.await_outcome(save, patience))
                    sealing.result(60)
        agreement.report_sealed(saves)
        records.append(agreement.await_outcome(saves, LONG))
        return records

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        by_process = list(pool.map(run, range(processes)))
    assert all(records == by_process[0] for records in by_process)
    # The last save was complete: nothing is left of the others, late seals included.
    assert cluster.key_count() == processes + 2
