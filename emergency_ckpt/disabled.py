"""The manager of a job with `enable_checkpointing=False`: the same calls, without effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from etils import epath

from emergency_ckpt.core.copies import Survivable
from emergency_ckpt.errors import NoRestorableStepError
from emergency_ckpt.manager import CheckpointManager
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.restored_state import RestoredState


class DisabledCheckpointManager(CheckpointManager):
    """Saves nothing and finds nothing to restore, so that a train loop needs no `if`. Touches no directory."""

    def __init__(self, mesh: jax.sharding.Mesh, exit_code: int) -> None:
        self._mesh = mesh
        self._exit_code = exit_code
        self._last_restore = None

    @property
    def directory(self) -> epath.Path:
        raise NoRestorableStepError("there is no checkpoint directory: enable_checkpointing is False")

    @property
    def in_primary_slice(self) -> bool:
        return jax.process_index() == 0

    @property
    def run_id(self) -> str:
        return ""

    @property
    def generation(self) -> int:
        return 0

    def survivable_losses(self) -> Survivable:
        return Survivable(0, 0, "all of it")

    def metrics_snapshot(self) -> dict[str, float]:
        return {}

    def all_steps(self, read: bool | None = None) -> Sequence[int]:
        return []

    def latest_step(self) -> int | None:
        return None

    def latest_complete_step(self) -> int | None:
        return None

    def best_step(self, metric: str | None = None, mode: Literal["max", "min"] = "max") -> int | None:
        return None

    def should_save(self, step: int) -> bool:
        return False

    def reached_preemption(self, step: int) -> bool:
        return False

    @property
    def should_exit(self) -> bool:
        return False

    @property
    def exit_code(self) -> int:
        return self._exit_code

    @property
    def notices(self) -> tuple[Notice, ...]:
        return ()

    def save(self, step: int, args: Any, **_: Any) -> bool:
        return False

    def finish(self, step: int, state: Any, *, extras: Mapping[str, Any] | None = None) -> None:
        pass

    def persist_newest(self) -> None:
        pass

    def restore(self, step: int | None, args: Any = None) -> Any:
        raise NoRestorableStepError("nothing is saved or restored: enable_checkpointing is False")

    def restore_or_init(
        self, init: Callable[[], Any], extras: Mapping[str, Any] | None = None
    ) -> RestoredState:
        return RestoredState(init(), None, {}, "scratch")

    def reload(self) -> None:
        pass

    def delete(self, step: int) -> None:
        raise NoRestorableStepError(f"there is no step {step}: enable_checkpointing is False")

    def metrics(self, step: int) -> Any:
        raise NoRestorableStepError(f"there is no step {step}: enable_checkpointing is False")

    def metadata(self, step: int | None = None) -> Any:
        raise NoRestorableStepError("nothing is saved: enable_checkpointing is False")

    def item_metadata(self, step: int) -> Any:
        raise NoRestorableStepError(f"there is no step {step}: enable_checkpointing is False")

    def wait_until_finished(self) -> None:
        pass

    def check_for_errors(self) -> None:
        pass

    def close(self) -> None:
        pass
