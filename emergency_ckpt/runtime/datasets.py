"""The directory of datasets: a plain Orbax manager for the item `dataset`, as in Orbax's emergency manager.

It holds the dataset of persistent steps only. What fits is committed with the arrays as well, and is taken from
there first, so that a step on the ramdisks comes back with its dataset. What is kept here follows the
persistent tier: a dataset goes when its step is gone, and has no rules of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.persistent.bounded import within
from emergency_ckpt.runtime.items import DATASET

# What Orbax calls an item that is a whole step.
ONLY_ITEM = "default"
WAIT_SECONDS = 1800.0


class DatasetDirectory:
    """All processes make the same calls in the same order. Raises what Orbax raises.

    Orbax waits for its saves without a limit; here it has that of `async_options.timeout_secs`, after which
    PersistentStoreError is raised and its threads are left behind.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        options: orbax_emergency.CheckpointManagerOptions | None,
        item_handlers: Any,
        handler_registry: Any,
    ) -> None:
        options = options or orbax_emergency.CheckpointManagerOptions()
        self._directory = directory
        given = options.async_options
        self._wait_seconds = float(given.timeout_secs) if given is not None else WAIT_SECONDS
        # With handlers by name Orbax takes items by name only.
        self._names = set(item_handlers) if isinstance(item_handlers, Mapping) else None
        if isinstance(item_handlers, Mapping):
            item_handlers = {ONLY_ITEM if name == DATASET else name: h for name, h in item_handlers.items()}
        self._manager = ocp.CheckpointManager(
            epath.Path(directory),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=1,  # Asked only where a persistent step is due.
                step_name_format=options.step_name_format,
                cleanup_tmp_directories=options.cleanup_tmp_directories,
                enable_async_checkpointing=options.enable_async_checkpointing,
                async_options=self._async_options(options),
                save_root_metadata=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, barrier_sync_key_prefix="emergency_ckpt_datasets"
                ),
            ),
            item_handlers=item_handlers,
            handler_registry=handler_registry,
        )

    def _async_options(self, options: orbax_emergency.CheckpointManagerOptions) -> ocp.options.AsyncOptions:
        """The caller's, but directories are made in the call.

        Otherwise Orbax lets every handler that runs meanwhile wait for a signal that they are made, those of
        items which are saved with the arrays included, and these may come too late to see it.
        """
        given = options.async_options or ocp.options.AsyncOptions()
        return dataclasses.replace(given, create_directories_asynchronously=False)

    @property
    def steps(self) -> Collection[int]:
        """The steps whose datasets are here."""
        return self._manager.all_steps()

    def save(
        self, step: int, args: Any, custom_metadata: Mapping[str, Any] | None, persistent: Collection[int]
    ) -> None:
        """Saves the dataset of a step.

        Args:
          step: newer than all others that stay: those from there on belong to a life that a restore has ended.
          args, custom_metadata: as Orbax wants them.
          persistent: the steps that are in the persistent tier; the same on all processes.
        """
        newest = max(persistent, default=0)  # Steps after it may be on their way.
        self.wait()
        for old in [o for o in self.steps if o >= step or (o < newest and o not in persistent)]:
            self._manager.delete(old)
        plain = dict(custom_metadata) if custom_metadata is not None else None
        self._manager.save(step, args=self._named(args), force=True, custom_metadata=plain)

    def restore(self, step: int, args: Any) -> Any:
        """The dataset of one of `steps`."""
        named = self._named(args)
        restored = self._manager.restore(step, args=named)
        return restored if named is args else restored[ONLY_ITEM]

    def delete_void(self, restored: int, persistent: Collection[int]) -> None:
        """Deletes the datasets of the steps that a restore has left behind; `persistent` as in `save`."""
        self.wait()
        for old in [o for o in self.steps if o > restored and o not in persistent]:
            self._manager.delete(old)

    def delete(self, step: int) -> None:
        """Deletes the dataset of a step, if it is here."""
        if step in self.steps:
            self._manager.delete(step)

    def _named(self, args: Any) -> Any:
        """The arguments with a name around those of a single item, where there must be one."""
        if self._names is None or isinstance(args, ocp.args.Composite):
            return args
        if DATASET not in self._names:
            raise ConfigError(
                f"item_handlers name {sorted(self._names)}, and not {DATASET!r}, which has a directory of its "
                f"own; add its handler: {{{DATASET!r}: …}}"
            )
        return ocp.args.Composite(**{ONLY_ITEM: args})

    def wait(self) -> None:
        self._within("waiting for Orbax to save the datasets in", self._manager.wait_until_finished)

    def check_for_errors(self) -> None:
        self._manager.check_for_errors()

    def close(self, limit: timedelta | None = None) -> None:
        self._within("closing Orbax's manager of the datasets in", self._manager.close, limit)

    def _within(self, what: str, call: Callable[[], object], limit: timedelta | None = None) -> None:
        seconds = self._wait_seconds if limit is None else min(limit.total_seconds(), self._wait_seconds)
        within(seconds, f"{what} {self._directory}", call)
