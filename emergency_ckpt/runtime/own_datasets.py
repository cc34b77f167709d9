"""The item `dataset` where it has a place of its own beside the steps: what is put there, and when it goes.

What fits into a step's commit lies in both and is taken from the step first. Where there is no such place, none
of this does anything.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from emergency_ckpt.core.locations import is_url
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.object_store.urls import check_location
from emergency_ckpt.runtime.bucket_datasets import BucketDatasets
from emergency_ckpt.runtime.datasets import DatasetDirectory
from emergency_ckpt.runtime.engine import Engine
from emergency_ckpt.runtime.extras import fits
from emergency_ckpt.runtime.items import DATASET, Item, ItemHandlers

_LEAST_PATIENCE = timedelta(seconds=1)


class OwnDatasets:
    """All processes make the same calls in the same order. Raises what the place raises."""

    def __init__(self, engine: Engine, place: DatasetDirectory | BucketDatasets | None = None) -> None:
        self._engine = engine
        self._place = place
        self._went_on_from: int | None = None  # restored, and datasets of later steps may still be there

    @classmethod
    def at(
        cls,
        where: epath.PathLike,
        engine: Engine,
        options: Any,
        handlers: ItemHandlers,
        orbaxs_handlers: tuple[Any, Any],
        timeout: timedelta,
    ) -> OwnDatasets:
        """In a directory or below a URL. `orbaxs_handlers`: `item_handlers` and `handler_registry` of Orbax."""
        where = os.fspath(where)
        if not is_url(where):
            return cls(engine, DatasetDirectory(where, options, *orbaxs_handlers))
        files = open_files(check_location(where))
        assert isinstance(files, ObjectFiles)
        return cls(engine, BucketDatasets(files, engine.job, handlers, timeout))

    @property
    def steps(self) -> Collection[int]:
        """The steps whose datasets are here."""
        return () if self._place is None else self._place.steps

    @property
    def elsewhere(self) -> dict[str, Collection[int]]:
        """Which items are to be had beside the steps' own commits, and of which steps."""
        return {} if self._place is None else {DATASET: self._place.steps}

    def take_whole_checkpoints(self, items: dict[str, Any]) -> None:
        """Leaves out of `items` a dataset that is a checkpoint by itself, and no item of the step."""
        if self._place is not None and isinstance(items.get(DATASET), ocp.args.Composite):
            del items[DATASET]

    def take_large(self, written: dict[str, Item]) -> None:
        """Leaves out of what handlers wrote for the step's commit a dataset that does not fit into that."""
        if self._place is not None and DATASET in written and not fits(written[DATASET]):
            del written[DATASET]

    def save(self, step: int, args: Any, custom_metadata: Mapping[str, Any] | None, is_new: bool) -> None:
        """Puts the dataset of a step that is due for the persistent tier here; `args` are those of the save."""
        dataset = args[DATASET] if isinstance(args, ocp.args.Composite) and DATASET in args else None
        if self._place is None or dataset is None:
            return
        # The step may be on the ramdisks since an earlier save that was not for the persistent tier.
        if is_new or (self._engine.is_newest(step) and step not in self._place.steps):
            self._place.save(step, dataset, custom_metadata, self._engine.persistent_numbers())

    def add_missing(self, step: int, asked: Mapping[str, Any], found: dict[str, Any]) -> None:
        """Adds to what a restore of `step` found the dataset that is asked for and was not in the step."""
        dataset = asked.get(DATASET)
        if self._place is not None and dataset is not None and not self._engine.on_all(DATASET in found):
            found[DATASET] = self._place.restore(step, dataset)

    def note_restored(self, step: int) -> None:
        """Training goes on from `step`: later datasets are of a life that has ended."""
        self._went_on_from = step
        self.delete_void()

    def delete_void(self) -> None:
        """A step that is saved again must never meet the dataset of the life that has ended."""
        if self._went_on_from is None or not self._engine.began:
            return
        restored, self._went_on_from = self._went_on_from, None
        if self._place is not None and any(step > restored for step in self._place.steps):
            self._place.delete_void(restored, self._engine.persistent_numbers())

    def delete(self, step: int) -> None:
        if self._place is not None:
            self._place.delete(step)

    def wait(self) -> None:
        if self._place is not None:
            self._place.wait()

    def check_for_errors(self) -> None:
        if self._place is not None:
            self._place.check_for_errors()

    def close(self, limit: timedelta | None) -> None:
        """Within `limit`, where there is one: the job leaves then, and a failure is a line in the log."""
        if self._place is None:
            return
        if limit is None:
            self._place.close()
            return
        try:
            self._place.close(max(limit, _LEAST_PATIENCE))
        except Exception as error:  # The job leaves, and is to say so by its exit code.
            self._engine.job.log.error("preemption", None, f"the newest dataset may not be saved: {error}")
