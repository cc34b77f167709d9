"""A committer that dies at any point, or races another: a reader sees the old step or the new, never half."""

from __future__ import annotations

import concurrent.futures
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit, commit_stages
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import PersistentStore, without_void
from tests.persistent.objects import KINDS, open_store
from tests.persistent.saving import assert_same, layout_of, read_shards, save, small_state, write_parts

STAGES = 9


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of store: one that renames directories, or one of objects."""
    return request.param


def prepared(root: Path, kind: str) -> PersistentStore:
    """Steps 10 and 20 of generation 1; generation 2 began from 10, so that 20 is void."""
    store = open_store(root, kind)
    first = store.mint_generation(0, None)
    for step in (10, 20):
        save(store, Attempt(first, step, "default"), small_state(1))
    store.mint_generation(1, StepId(1, 10))
    store.record_activation(Activation(2, 10))
    return store


def assert_old_or_new(store: PersistentStore) -> bool:
    """Whether the new step is there; every step that is listed must be whole."""
    steps = {s.step_id: s for s in without_void(store.steps(), store.activations())}
    for step_id, step in steps.items():
        assert_same(read_shards(StepReader(step.location)), small_state(step_id.generation))
    assert StepId(1, 10) in steps
    assert set(steps) <= {StepId(1, 10), StepId(2, 20)}
    return StepId(2, 20) in steps


def test_a_process_that_dies_before_any_operation_leaves_the_old_step_or_the_new(
    tmp_path: Path, kind: str
) -> None:
    prepared(tmp_path / "template", kind)
    most = 70
    for number in range(1, most):
        shutil.copytree(tmp_path / "template", tmp_path / str(number))
    command = [sys.executable, "-m", "tests.persistent.crashing_committer", str(tmp_path), "1", str(most), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    results = {int(n): int(code) for n, code in (line.split() for line in done.stdout.splitlines())}
    died = [n for n, code in results.items() if code == 9]
    assert died == list(range(1, len(died) + 1)), done.stderr
    assert 15 < len(died) < most - 1
    assert {code for n, code in results.items() if n > len(died)} == {0}, done.stderr
    committed, swept = list[bool](), list[bool]()
    for number in range(1, len(died) + 2):
        store = open_store(tmp_path / str(number), kind)
        committed.append(assert_old_or_new(store))
        # The next job removes what was left and writes the step, whatever happened before.
        generation = store.mint_generation(2, StepId(1, 10))
        store.remove_leftovers(generation)
        assert_tidy(tmp_path / str(number), store)
        swept.append(assert_old_or_new(store))
    # In a bucket whose marker was about to be put, it is: the put may have been on its way.
    assert [n for n, both in enumerate(zip(committed, swept, strict=True)) if both[0] != both[1]] == (
        [committed.index(True) - 1] if kind == "objects" else []
    )
    # Only the last operations come after the commit: deleting what was replaced.
    assert committed == sorted(committed)
    assert committed[-1]
    assert not committed[-10 if kind == "objects" else -16]


def assert_tidy(root: Path, store: PersistentStore) -> None:
    """Nothing but committed steps and what they need is in the root."""
    assert not list(root.glob("*.orbax-checkpoint-tmp*"))
    assert not any(entry.name for entry in store.files.entries("emergency_ckpt/attempts"))
    nonces = {step.name: step.nonce for step in store.steps()}
    for entry in store.files.entries():
        if entry.name.isdigit():
            stores = {e.name for e in store.files.entries(f"{entry.name}/default") if "process" in e.name}
            assert {name.removeprefix("ocdbt.process_").partition("g")[0] for name in stores} == {
                nonces[entry.name]
            }


@pytest.mark.parametrize("stages", range(STAGES))
def test_a_commit_that_stops_after_any_stage_is_invisible_and_does_not_hinder_the_next(
    tmp_path: Path, stages: int, kind: str
) -> None:
    store = open_store(tmp_path / "root", kind)
    generation = store.mint_generation(0, None)
    layout = layout_of(small_state())
    stopped = Attempt(generation, 20, "default")
    parts = write_parts(store, stopped, layout, small_state(5))
    running = commit_stages(store, stopped, layout, parts)
    for _ in range(stages):
        next(running)
    running.close()
    assert store.steps() == []
    if stages:
        with pytest.raises(PersistentStoreError, match="another committer is, or was, at work"):
            commit(store, stopped, layout, parts)
    save(store, Attempt(generation, 20, "default", ordinal=1), small_state(6))
    (step,) = store.steps()
    assert_same(read_shards(StepReader(step.location)), small_state(6))


def test_the_number_of_stages_is_what_these_tests_stop_after(tmp_path: Path, kind: str) -> None:
    store = open_store(tmp_path / "root", kind)
    attempt = Attempt(store.mint_generation(0, None), 20, "default")
    layout = layout_of(small_state())
    names = list(commit_stages(store, attempt, layout, write_parts(store, attempt, layout, small_state())))
    assert len(names) == STAGES - 1
    assert len(set(names)) == len(names)


def test_of_two_committers_of_one_attempt_one_commits_and_one_is_told(tmp_path: Path, kind: str) -> None:
    for number in range(5):
        store = open_store(tmp_path / str(number), kind)
        attempt = Attempt(store.mint_generation(0, None), 20, "default")
        layout = layout_of(small_state())
        parts = write_parts(store, attempt, layout, small_state(3))
        results = race(lambda _, s=store, a=attempt, y=layout, p=parts: commit(s, a, y, p), 2)
        assert len([r for r in results if isinstance(r, PersistentStoreError)]) == 1
        (step,) = store.steps()
        assert step in results
        assert_same(read_shards(StepReader(step.location)), small_state(3))


def test_attempts_at_the_same_step_that_race_leave_one_whole_step(tmp_path: Path, kind: str) -> None:
    for number in range(5):
        store = prepared(tmp_path / str(number), kind)
        generation = store.newest_generation()
        assert generation
        layout = layout_of(small_state())
        attempts = [Attempt(generation, 20, "default", ordinal) for ordinal in range(3)]
        parts = [write_parts(store, attempt, layout, small_state(2)) for attempt in attempts]
        results = race(lambda i, s=store, a=attempts, p=parts, y=layout: commit(s, a[i], y, p[i]), 3)
        told = {r for r in results if isinstance(r, PersistentStoreError)}
        assert len(set(results) - told) == 1, results
        assert kind == "objects" or not told
        for attempt, result in zip(attempts, results, strict=True):
            if result in told:
                store.abandon(attempt)
        if told:  # Whose marker might have been on its way leave their data to the next life of the run.
            store.remove_leftovers(store.mint_generation(0, None))
        assert assert_old_or_new(store)
        assert_tidy(tmp_path / str(number), store)


def test_a_committed_attempt_that_is_abandoned_by_who_did_not_know_stays_a_step(
    tmp_path: Path, kind: str
) -> None:
    store = open_store(tmp_path, kind)
    attempt = Attempt(store.mint_generation(0, None), 20, "default")
    save(store, attempt, small_state(7))
    store.abandon(attempt)
    (step,) = store.steps()
    assert_same(read_shards(StepReader(step.location)), small_state(7))
    assert_tidy(tmp_path, store)


@pytest.mark.parametrize("stages", range(1, STAGES))
def test_an_attempt_that_is_abandoned_while_its_committer_is_at_work_is_no_step(
    tmp_path: Path, kind: str, stages: int
) -> None:
    """By a second committer, in a trainer that takes its agent for dead."""
    store = open_store(tmp_path, kind)
    attempt = Attempt(store.mint_generation(0, None), 20, "default")
    layout = layout_of(small_state())
    parts = write_parts(store, attempt, layout, small_state())
    running = commit_stages(store, attempt, layout, parts)
    for _ in range(stages):
        next(running)
    with pytest.raises(PersistentStoreError, match="another committer is, or was, at work"):
        commit(store, attempt, layout, parts)
    store.abandon(attempt)
    with pytest.raises((PersistentStoreError, CorruptDataError)):
        for _ in running:
            pass
    assert store.steps() == []


class Slow:
    """Deletes one file of a tree at first, the rest by `finish`; renames after `before`."""

    def __init__(self, files: Any, before: Callable[[], object] = lambda: None):
        self._files = files
        self._before = before
        self._left: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def rename(self, source: str, target: str) -> None:
        self._before()
        self._files.rename(source, target)

    def delete_tree(self, path: str) -> None:
        next(p for p in Path(self._files.locate(path)).rglob("*") if p.is_file()).unlink()
        self._left.append(path)

    def finish(self) -> None:
        for path in self._left:
            self._files.delete_tree(path)


def test_what_is_swept_up_while_its_committer_wakes_up_is_no_step(tmp_path: Path) -> None:
    store = open_store(tmp_path, "files")
    attempt = Attempt(store.mint_generation(0, None), 20, "default")
    layout = layout_of(small_state())
    parts = write_parts(store, attempt, layout, small_state())
    sweeping: Any = Slow(store.files)

    def sweep() -> None:
        PersistentStore(tmp_path, files=sweeping).remove_leftovers(store.mint_generation(1, None))

    late: Any = Slow(store.files, sweep)
    with pytest.raises(PersistentStoreError, match="has lost its directory"):
        commit(PersistentStore(tmp_path, files=late), attempt, layout, parts)
    assert store.steps() == []
    sweeping.finish()
    assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))


def race(call, count: int) -> list[object]:
    """Results or errors of concurrent calls that begin together."""
    barrier = threading.Barrier(count)

    def run(index: int) -> object:
        barrier.wait(timeout=30)
        try:
            return call(index)
        except PersistentStoreError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
