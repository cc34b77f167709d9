"""A void step in the way of two attempts of one life, the second one between any two looks of the first."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.files import Entry, LocalFiles
from emergency_ckpt.persistent.store import PersistentStore, without_void
from tests.persistent.objects import KINDS
from tests.persistent.paced import Paced, open_paced_store
from tests.persistent.saving import assert_same, layout_of, read_shards, save, small_state, write_parts


class Interrupted(LocalFiles):
    """Files of a slow committer: something happens before the n-th time that it looks at or moves step 20."""

    left, happen = 0, staticmethod(lambda: None)

    def entries(self, path: str = "") -> list[Entry]:
        if path == "20":
            self._count()
        return super().entries(path)

    def rename(self, source: str, target: str) -> None:
        if "20" in (source, target):
            self._count()
        super().rename(source, target)

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happen()


def interrupted(root: Path, left: int, happen: Callable[[], object]) -> PersistentStore:
    files = Interrupted(root)
    files.left, files.happen = left, happen  # type: ignore[assignment]
    return PersistentStore(root, files=files)


def prepared(root: Path, kind: str = "files") -> tuple[PersistentStore, list[Attempt]]:
    """Steps 10 and 20 of generation 1; generation 2 began from 10, and makes two attempts at 20."""
    store = open_paced_store(root, kind, lambda: None)
    first = store.mint_generation(0, None)
    for step in (10, 20):
        save(store, Attempt(first, step, "default"), small_state(1))
    second = store.mint_generation(1, StepId(1, 10))
    store.record_activation(Activation(2, 10))
    return store, [Attempt(second, 20, "default", ordinal) for ordinal in range(2)]


def test_what_another_attempt_has_committed_stays_and_both_are_told_so(tmp_path: Path) -> None:
    number, ran, layout = 0, True, layout_of(small_state())
    template, (slow, other) = prepared(tmp_path / "template")
    parts = [write_parts(template, attempt, layout, small_state(2)) for attempt in (slow, other)]
    while ran:
        number += 1
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "template", root)
        store, happened = PersistentStore(root), list[object]()
        happen = lambda s=store, o=other, p=parts[1], h=happened: h.append(commit(s, o, layout, p))  # noqa: E731
        told = commit(interrupted(root, number, happen), slow, layout, parts[0])
        ran = bool(happened)
        held = {step.step_id: step for step in without_void(store.steps(), store.activations())}
        assert held.keys() == {StepId(1, 10), StepId(2, 20)}
        assert_same(read_shards(store.open_step(held[StepId(2, 20)])), small_state(2))
        assert {told, *happened} == {held[StepId(2, 20)]}
        assert not list(root.glob("20.*")) or not ran
    assert number > 5


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_clear_away_the_same_void_step_take_nothing_from_each_other(ramdisk: Path, kind: str) -> None:
    """The second one between any two operations of the first, between a look and what follows it included."""
    template, attempts = prepared(ramdisk / "template", kind)
    layout = layout_of(small_state())
    parts = [write_parts(template, attempt, layout, small_state(i)) for i, attempt in enumerate(attempts)]
    seen = set[tuple[bool, int]]()
    for number in itertools.count(1):
        root = ramdisk / str(number)
        shutil.copytree(ramdisk / "template", root)
        store, slow = open_paced_store(root, kind, lambda: None), Paced(root, kind)
        paused = slow.start(lambda s: commit(s, attempts[0], layout, parts[0]), number)
        told = commit(store, attempts[1], layout, parts[1])
        first = slow.finish()
        held = {step.step_id: step for step in store.steps()}[StepId(2, 20)]
        assert told == held
        assert first == held or isinstance(first, PersistentStoreError)
        arrays = read_shards(store.open_step(held))
        assert_same(arrays, small_state(int(arrays["count"])))
        seen.add((first == held, int(arrays["count"])))
        shutil.rmtree(root)
        if not paused:
            break
    assert seen == {(True, 0), (True, 1), (False, 1)} - ({(False, 1)} if kind == "files" else set())


def test_a_step_that_is_seen_half_because_it_goes_is_not_taken_for_one_that_may_not(tmp_path: Path) -> None:
    """As when another attempt has moved the void step away and deletes it: its side file is gone already."""
    store, (attempt, _) = prepared(tmp_path)
    (side,) = (tmp_path / "20").glob("emergency_ckpt.1.*.json")

    class HalfSeen(LocalFiles):
        looks = 0

        def entries(self, path: str = "") -> list[Entry]:
            found = super().entries(path)
            if path != "20":
                return found
            self.looks += 1
            # The first one only finds it in the way, the next ones say whose it is.
            return [entry for entry in found if entry.name != side.name] if self.looks in (2, 3) else found

    layout = layout_of(small_state())
    parts = write_parts(store, attempt, layout, small_state(2))
    slow = PersistentStore(tmp_path, files=HalfSeen(tmp_path))
    told = commit(slow, attempt, layout, parts)
    assert told.step_id == StepId(2, 20)


def test_what_is_no_step_goes_and_a_step_that_stays_is_named(tmp_path: Path) -> None:
    store, (attempt, _) = prepared(tmp_path)
    shutil.rmtree(tmp_path / "20")
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "notes.txt").write_text("nobody's")
    save(store, attempt, small_state(2))
    assert not store.remove_leftovers(attempt.generation), "the name stays taken in this life"
    (removed,) = (tmp_path / "emergency_ckpt/removed").iterdir()
    assert [path.name for path in removed.iterdir()] == ["removed"]
    later = store.mint_generation(2, StepId(2, 20))
    with pytest.raises(
        PersistentStoreError, match=r"20 holds step 20 \(generation 2\), which no restore made void"
    ):
        save(store, Attempt(later, 20, "default"), small_state(3))
    store.abandon(Attempt(later, 20, "default"))
    assert store.remove_leftovers(later)
    assert not list((tmp_path / "emergency_ckpt/removed").iterdir())
