"""The directory of datasets in a bucket, where Orbax's own manager cannot work: same layout, same rules.

Handlers write into directories of their host at the call; what they wrote goes into the bucket in the
background, each file from one process, and process 0 puts the marker last, which names every file with its
digest. Without its marker a dataset is not there.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from emergency_ckpt.agent.worker import Worker
from emergency_ckpt.core.extras import Item
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.step_files import ORBAX_COMMIT_FILE, ORBAX_STEP_FILE, digest
from emergency_ckpt.persistent.trees import download_tree
from emergency_ckpt.runtime.agreement import agree, tell
from emergency_ckpt.runtime.datasets import ONLY_ITEM
from emergency_ckpt.runtime.failures import raise_together
from emergency_ckpt.runtime.items import DATASET, ItemHandlers
from emergency_ckpt.runtime.job import Job

_FORMAT = "emergency_ckpt.dataset"


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to be done in the bucket: some datasets go, and one comes (`step` None: none)."""

    key: str
    given_up: tuple[int, ...] = ()
    step: int | None = None
    own: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    table: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)  # owner, size, digest by path
    handlers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class BucketDatasets:
    """All processes make the same calls in the same order; they mean what they do in `DatasetDirectory`."""

    def __init__(self, files: ObjectFiles, job: Job, handlers: ItemHandlers, timeout: timedelta) -> None:
        """Collective. `timeout`: longest time for putting one dataset into the bucket.

        Raises PersistentStoreError on process 0, where the bucket does not tell what is there; PeerFailedError
        on the others.
        """
        self._files = files
        self._job = job
        self._handlers = handlers
        self._names = job.settings.names
        self._timeout = timeout
        self._calls = 0
        limit = job.settings.coordination_timeout
        self._steps = frozenset[int](tell(job.coordinator, "datasets/steps", self._committed, limit))
        self._worker: Worker[_Task] = Worker("dataset", self._do)

    @property
    def steps(self) -> Collection[int]:
        """The steps whose datasets are here, or on their way; the same on all processes after `wait`."""
        return self._steps

    def save(
        self, step: int, args: Any, custom_metadata: Mapping[str, Any] | None, persistent: Collection[int]
    ) -> None:
        newest = max(persistent, default=0)  # Steps after it may be on their way.
        self.wait()
        given_up = tuple(o for o in self._steps if o >= step or (o < newest and o not in persistent))
        self._steps -= set(given_up)
        key = self._key()
        job, started = self._job, time.time_ns()
        written: dict[str, Item] = {}

        def mine() -> Any:
            named = dict(args.items()) if isinstance(args, ocp.args.Composite) else {ONLY_ITEM: args}
            for name, item in named.items():
                written[name] = self._handlers.save(DATASET if name == ONLY_ITEM else name, item)
            return {
                n: [i.handler, {f: [len(d), digest(d)] for f, d in i.files.items()}] for n, i in written.items()
            }

        # Where several processes write one file of an item, the lowest process's counts.
        told = agree(job.coordinator, f"{key}/files", mine, _merged, job.settings.coordination_timeout)
        self._steps |= {step}
        self._worker.submit(
            _Task(
                key,
                given_up,
                step,
                {
                    path: written[item].files[file]
                    for path, (owner, *_) in told["table"].items()
                    for item, _, file in [path.partition("/")]
                    if owner == job.process
                },
                told["table"],
                told["handlers"],
                {"custom_metadata": dict(custom_metadata or {}), "init_timestamp_nsecs": started},
            )
        )

    def restore(self, step: int, args: Any) -> Any:
        """The dataset of one of `steps`. Raises CorruptDataError for files that are not what was saved."""
        name = self._names.name(step)
        with tempfile.TemporaryDirectory(prefix="emergency_ckpt-dataset-") as temporary:
            directory = Path(temporary)
            download_tree(self._files, name, directory)
            self._check(directory, name)
            for file in (ORBAX_COMMIT_FILE, ORBAX_STEP_FILE):
                (directory / file).unlink(missing_ok=True)
            if not isinstance(args, ocp.args.Composite):
                return self._handlers.restore(DATASET, args, epath.Path(directory / ONLY_ITEM))
            found = {n: self._handlers.restore(n, a, epath.Path(directory / n)) for n, a in args.items()}
            return ocp.args.Composite(**found)

    def delete_void(self, restored: int, persistent: Collection[int]) -> None:
        self.wait()
        self._delete([o for o in self._steps if o > restored and o not in persistent])

    def delete(self, step: int) -> None:
        self.wait()
        self._delete([step] if step in self._steps else [])

    def wait(self, limit: timedelta | None = None) -> None:
        patience = self._timeout + 2 * self._job.settings.coordination_timeout
        limit = patience if limit is None else min(limit, patience)
        if not self._worker.wait(limit):
            raise PersistentStoreError(
                f"the datasets in {self._files.locate()} were still being written after "
                f"{limit.total_seconds():g} s"
            )

    def check_for_errors(self) -> None:
        raise_together(self._worker.take_errors())

    def close(self, limit: timedelta | None = None) -> None:
        try:
            self.wait(limit)
        finally:
            self._worker.close(timedelta(0))
        self.check_for_errors()

    def _delete(self, steps: list[int]) -> None:
        if steps:
            self._steps -= set(steps)
            self._worker.submit(_Task(self._key(), tuple(steps)))
            self.wait()

    def _key(self) -> str:
        """The prefix of the keys of one task; those of the last but one are read by nobody any more."""
        self._calls += 1
        if self._job.leads and self._calls > 2:
            self._job.coordinator.delete(f"datasets/{self._calls - 2}")
        return f"datasets/{self._calls}"

    # In the worker's thread.

    def _do(self, task: _Task) -> None:
        """Ends alike on all processes."""
        job = self._job

        def mine() -> None:
            if job.leads:
                self._remove(task)
            for path, data in task.own.items():
                self._files.write(f"{self._names.name(task.step or 0)}/{path}", data)

        try:
            # What has the same number must be gone before others write theirs.
            if task.step is not None and not job.leads:
                job.coordinator.get(f"{task.key}/removed", self._timeout)
            agree(job.coordinator, f"{task.key}/stored", mine, lambda _: self._commit(task), self._timeout)
        except Exception as error:
            if task.step is not None:
                self._steps -= {task.step}
            where = self._files.locate()
            what = (
                f"the datasets of {list(task.given_up)} are not gone from {where}"
                if task.step is None
                else f"the dataset of step {task.step} did not reach {where}"
            )
            told = PersistentStoreError(f"{what}: {error}")
            told.__cause__ = error
            self._job.log.error("dataset", task.step, str(told))
            raise told from error

    def _remove(self, task: _Task) -> None:
        """Removes what is given up, markers first, and what has none: this process alone writes here."""
        try:
            gone = {self._names.name(step) for step in task.given_up}
            if task.step is not None:
                gone |= self._unfinished() | {self._names.name(task.step)}
            for name in sorted(gone):
                self._files.delete(f"{name}/{ORBAX_COMMIT_FILE}")
                self._files.delete_tree(name)
        finally:
            if task.step is not None:
                self._job.coordinator.put(f"{task.key}/removed", b"1")

    def _commit(self, task: _Task) -> None:
        """Process 0, when every process has put its files there."""
        if task.step is None:
            return
        name = self._names.name(task.step)
        only = task.handlers.get(ONLY_ITEM) if len(task.handlers) == 1 else None
        metadata = {
            "item_handlers": only or dict(task.handlers),
            "metrics": {},
            "performance_metrics": {},
            **task.metadata,
            "commit_timestamp_nsecs": time.time_ns(),
        }
        self._files.write(f"{name}/{ORBAX_STEP_FILE}", json.dumps(metadata).encode())
        marker = {"format": _FORMAT, "files": {path: told[1:] for path, told in task.table.items()}}
        self._files.write(f"{name}/{ORBAX_COMMIT_FILE}", json.dumps(marker, sort_keys=True).encode())

    def _committed(self) -> list[int]:
        return sorted(step for name, step in self._found() if self._has_marker(name))

    def _unfinished(self) -> set[str]:
        return {name for name, _ in self._found() if not self._has_marker(name)}

    def _found(self) -> list[tuple[str, int]]:
        entries = [
            (entry.name, self._names.step(entry.name)) for entry in self._files.entries() if entry.is_directory
        ]
        return [(name, step) for name, step in entries if step is not None]

    def _has_marker(self, name: str) -> bool:
        return any(entry.name == ORBAX_COMMIT_FILE for entry in self._files.entries(name))

    def _check(self, directory: Path, name: str) -> None:
        """That the files are those of the marker; Orbax's own marker names none."""
        where = self._files.locate(name)
        try:
            marker = json.loads((directory / ORBAX_COMMIT_FILE).read_bytes())
        except FileNotFoundError as error:
            raise PersistentStoreError(f"there is no dataset in {where}; it was deleted meanwhile") from error
        except ValueError:
            return
        if not isinstance(marker, dict) or marker.get("format") != _FORMAT:
            return
        for path, (size, right) in marker["files"].items():
            file = directory / path
            data = file.read_bytes() if file.is_file() else None
            if data is None or len(data) != size or digest(data) != right:
                what = "is missing" if data is None else "is not what was saved"
                raise CorruptDataError(f"{where}/{path} {what}: the dataset is damaged. Restore another step.")


def _merged(told: list[Any]) -> Any:
    """Which process puts which file there, and the handlers of the items."""
    table: dict[str, list[Any]] = {}
    handlers: dict[str, str] = {}
    for process, items in enumerate(told):
        for item, (handler, files) in items.items():
            handlers.setdefault(item, handler)
            for file, (size, right) in files.items():
                table.setdefault(f"{item}/{file}", [process, size, right])
    return {"table": table, "handlers": handlers}
