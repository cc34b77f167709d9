"""The option objects of Orbax's emergency manager, which this package accepts as they are."""

from orbax.checkpoint.experimental.emergency.checkpoint_manager import (
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    MultiprocessingOptions,
    PersistentCheckpointOptions,
)

__all__ = [
    "CheckpointManagerOptions",
    "LocalCheckpointOptions",
    "MultiprocessingOptions",
    "PersistentCheckpointOptions",
]
