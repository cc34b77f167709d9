"""The directory of datasets: a plain Orbax manager for the item `dataset`, as in Orbax's emergency manager.

It holds the dataset of persistent steps only. What fits is committed with the arrays as well, and is taken from
there first, so that a step on the ramdisks comes back with its dataset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt.errors import ExtrasError


class DatasetDirectory:
    """All processes make the same calls in the same order. Raises what Orbax raises."""

    def __init__(
        self,
        directory: epath.PathLike,
        options: orbax_emergency.CheckpointManagerOptions | None,
        item_handlers: Any,
        handler_registry: Any,
    ) -> None:
        options = options or orbax_emergency.CheckpointManagerOptions()
        kept = options.persistent
        self._manager = ocp.CheckpointManager(
            epath.Path(directory),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=1,  # Asked only where a persistent step is due.
                max_to_keep=kept.max_to_keep,
                keep_period=kept.keep_period,
                preservation_policy=kept.preservation_policy,
                step_name_format=options.step_name_format,
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

    def save(self, step: int, args: Any, custom_metadata: Mapping[str, Any] | None) -> None:
        """Saves the dataset of a step. Steps from there on belong to a life that a restore has ended."""
        for void in [old for old in self._manager.all_steps() if old >= step]:
            self._manager.delete(void)
        plain = dict(custom_metadata) if custom_metadata is not None else None
        self._manager.save(step, args=args, force=True, custom_metadata=plain)

    def restore(self, step: int, args: Any) -> Any:
        """The dataset of exactly this step; raises ExtrasError when it is not here."""
        if step not in self._manager.all_steps():
            raise ExtrasError(
                f"step {step} was restored, but its dataset is neither part of it nor in "
                f"{self._manager.directory}, which holds the datasets of the persistent steps "
                f"{list(self._manager.all_steps())}. Restore one of these."
            )
        return self._manager.restore(step, args=args)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def check_for_errors(self) -> None:
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()
