"""The manager of a job with `enable_checkpointing=False`: same calls, no effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from emergency_ckpt.runtime.restored_state import RestoredState


class DisabledCheckpointManager:
    """Saves nothing and restores nothing, so that a train loop needs no `if`."""

    last_restore = None

    def save(self, step: int, args: Any, **_: Any) -> bool:
        return False

    def finish(self, step: int, state: Any, **_: Any) -> None:
        pass

    def restore_or_init(self, init: Callable[[], Any], extras: Any = None) -> RestoredState:
        return RestoredState(init(), None, {}, "scratch")

    def all_steps(self, read: bool | None = None) -> Sequence[int]:
        return []

    def latest_step(self) -> int | None:
        return None

    def should_save(self, step: int) -> bool:
        return False

    def reached_preemption(self, step: int) -> bool:
        return False

    def wait_until_finished(self) -> None:
        pass

    def check_for_errors(self) -> None:
        pass

    def close(self) -> None:
        pass
