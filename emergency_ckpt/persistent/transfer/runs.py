"""Whole run directories from one place to another: records first, then the newest step, then the older ones.

What is at the target is deleted only where that is asked for, or where it is a step that a restore made void
and that another one replaces. A step that cannot be copied costs itself: the others are copied all the same.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from emergency_ckpt.core.lineage import is_void
from emergency_ckpt.errors import (
    CorruptDataError,
    NoRestorableStepError,
    PersistentStoreError,
    StoreFullError,
)
from emergency_ckpt.persistent.run_directories import FoundStep, RunDirectory
from emergency_ckpt.persistent.transfer.lineages import (
    bring_deletion,
    bring_root_metadata,
    check_apart,
    compare_records,
)
from emergency_ckpt.persistent.transfer.objects import Copying
from emergency_ckpt.persistent.transfer.steps import StepCopy, look_at

_TELL_SECONDS = 5.0
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be done.

    Attributes:
      step: this step only; `latest`: the newest one only; by default all that no restore made void.
      verify: read the steps that are at the target already as well.
      delete: delete committed steps at the target that are not at the source.
      dry_run: say what would be done.
    """

    step: int | None = None
    latest: bool = False
    verify: bool = False
    delete: bool = False
    dry_run: bool = False


@dataclasses.dataclass
class Outcome:
    """What was done, by the numbers of steps; `failed` says why. With `dry_run`: what would have been."""

    copied: list[int] = dataclasses.field(default_factory=list[int])
    there: list[int] = dataclasses.field(default_factory=list[int])
    mended: list[int] = dataclasses.field(default_factory=list[int])
    deleted: list[int] = dataclasses.field(default_factory=list[int])
    failed: dict[int, str] = dataclasses.field(default_factory=dict[int, str])
    nbytes: int = 0
    seconds: float = 0.0


def copy_run(source: str, target: str, wanted: Wanted, copying: Copying, tell: Tell) -> Outcome:
    """Copies a run directory; says line by line what it does.

    Raises ConfigError, ForeignRunError and NoRestorableStepError before anything is written;
    PersistentStoreError where a place cannot be reached at all.
    """
    return _Run(RunDirectory(source), RunDirectory(target), wanted, copying, tell).run()


class _Run:
    def __init__(
        self, source: RunDirectory, target: RunDirectory, wanted: Wanted, copying: Copying, tell: Tell
    ) -> None:
        check_apart(source, target)
        self._source, self._target = source, target
        self._wanted, self._copying, self._tell = wanted, copying, tell
        self._outcome = Outcome()
        self._progress = _Progress(tell)

    def run(self) -> Outcome:
        began = time.monotonic()
        here = self._source.steps()
        chosen = self._chosen(here)
        records = compare_records(self._source, self._target)
        if not self._wanted.dry_run:
            records.bring(self._target.files)
            bring_root_metadata(self._source.store, self._target.store)
        left_behind = self._target.store.activations()
        for step in [each for each in chosen if is_void(each.held.step_id, left_behind)]:
            self._tell(f"{step}: a restore at the target left it behind")
            chosen.remove(step)
        there = {step.name: step for step in self._target.steps()}
        self._check_room(chosen, there)
        for step in chosen:
            self._bring(step, there.get(step.name))
        if not self._wanted.dry_run:
            bring_deletion(self._source.store, self._target.store)
        if self._wanted.delete:
            self._delete(here, list(there.values()))
        self._outcome.seconds = time.monotonic() - began
        return self._outcome

    def _chosen(self, here: Sequence[FoundStep]) -> list[FoundStep]:
        """The newest first: it is what a restore needs."""
        good = [step for step in here if not step.void]
        if self._wanted.step is not None:
            good = [step for step in good if step.step == self._wanted.step]
        if not good:
            held = ", ".join(f"{each.step}{' (void)' if each.void else ''}" for each in here) or "none"
            raise NoRestorableStepError(
                f"{self._source.location} holds no such step to copy; its committed steps: {held}. It should be"
                " the directory whose entries are the steps: base_output_directory/run_name/checkpoints, say."
            )
        if len(good) < len(here) and self._wanted.step is None:
            self._tell(f"{len(here) - len(good)} steps that a restore made void stay behind")
        return good[-1:] if self._wanted.latest else good[::-1]

    def _bring(self, step: FoundStep, held: FoundStep | None) -> None:
        try:
            self._bring_step(step, held)
        except (CorruptDataError, PersistentStoreError, FileNotFoundError) as error:
            if step.name not in {each.name for each in self._source.steps()}:
                self._tell(f"{step}: was deleted at the source meanwhile")
                return
            self._outcome.failed[step.step] = str(error)
            self._tell(f"{step}: failed: {error}")

    def _bring_step(self, step: FoundStep, held: FoundStep | None) -> None:
        files = look_at(self._source, step, self._target.files.is_bucket)
        copy = StepCopy(files, self._target, self._copying, self._progress.add)
        if held is not None and copy.is_there(held):
            self._look_after(step, copy)
            return
        if held is not None and not held.void:
            raise PersistentStoreError(
                f"{held.held.location} holds another step of this number ({held.held.step_id}), which no"
                " restore made void. Delete the one that is not wanted."
            )
        self._outcome.copied.append(step.step)
        self._outcome.nbytes += files.nbytes
        what = f"{step}: {_size(files.nbytes)} in {len(files.sizes)} files"
        if self._wanted.dry_run:
            self._tell(f"{what} would be copied")
            return
        if held is not None:
            self._tell(f"{step}: at the target a step that a restore made void gives way")
            self._target.store.delete_step(held.held)
        try:
            with self._progress.of(what, files.nbytes):
                copy.copy()
        except BaseException:
            self._outcome.copied.remove(step.step)
            raise

    def _look_after(self, step: FoundStep, copy: StepCopy) -> None:
        """The step is there: is all of it?"""
        missing = copy.missing()
        damage = f"{len(missing)} files are missing" if missing else ""
        if not damage and self._wanted.verify:
            try:
                copy.verify()
            except CorruptDataError as error:
                damage = str(error)
        if not damage:
            self._outcome.there.append(step.step)
            self._tell(f"{step}: is there" + (", every byte as saved" if self._wanted.verify else ""))
            return
        self._tell(f"{step}: is there, and not whole: {damage}")
        if not self._wanted.dry_run:
            copy.mend(everything=not missing)
        self._outcome.mended.append(step.step)

    def _delete(self, here: Sequence[FoundStep], there: Sequence[FoundStep]) -> None:
        """Only once everything that was wanted is at the target."""
        surplus = [step for step in there if step.name not in {each.name for each in here}]
        if self._outcome.failed and surplus:
            self._tell("nothing is deleted at the target, because not all steps could be copied")
            return
        for step in surplus:
            self._tell(f"{step}: {'would be' if self._wanted.dry_run else 'is'} deleted at the target")
            if not self._wanted.dry_run:
                self._target.store.delete_step(step.held)
            self._outcome.deleted.append(step.step)

    def _check_room(self, chosen: Sequence[FoundStep], there: dict[str, FoundStep]) -> None:
        if self._target.files.is_bucket or self._wanted.dry_run:
            return
        needed = sum(sum(self._source.sizes(s.name).values()) for s in chosen if s.name not in there)
        where = Path(self._target.location)
        while not where.exists():
            where = where.parent
        # What an earlier copy has left is counted as room.
        left = sum(
            n
            for name in self._target.uncommitted(list(there.values()))
            for n in self._target.sizes(name).values()
        )
        free = shutil.disk_usage(where).free
        if needed > free + left:
            raise StoreFullError(
                f"{self._target.location} has {_size(free)} of room, the steps to copy have {_size(needed)}."
                " Make room, or copy one step with --latest."
            )


class _Progress:
    """Tells now and then how far the copying of a step is. Pieces are added by many threads."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._guard = threading.Lock()
        self._what, self._whole, self._done = "", 0, 0
        self._began = self._told = time.monotonic()

    def of(self, what: str, whole: int) -> _Progress:
        self._what, self._whole, self._done = what, whole, 0
        return self

    def __enter__(self) -> None:
        self._began = self._told = time.monotonic()
        self._tell(f"{self._what}: copying")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            seconds = max(time.monotonic() - self._began, 1e-9)
            again = f", {_size(self._whole - self._done)} were there" if self._done < self._whole else ""
            self._tell(f"{self._what}: copied and read back after {seconds:.1f} s{again}")

    def add(self, nbytes: int) -> None:
        with self._guard:
            self._done += nbytes
            now = time.monotonic()
            if now < self._told + _TELL_SECONDS:
                return
            self._told = now
            speed = self._done / max(now - self._began, 1e-9)
            self._tell(f"{self._what}: {_size(self._done)} copied ({_size(int(speed))}/s)")


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
