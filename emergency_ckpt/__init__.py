"""Checkpoint manager for JAX training jobs: ramdisk tier, persistent tier, restore from survivors.

The names below are the public surface. They are imported on first use, so that importing the package (and the
command line, and the agent) does not import jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emergency_ckpt.config import Config, load_config
    from emergency_ckpt.distributed import arrange_mesh, initialize_distributed
    from emergency_ckpt.errors import (
        AgentStartError,
        ConfigError,
        CoordinationTimeoutError,
        CorruptDataError,
        CorruptShardsError,
        EmergencyCheckpointError,
        ExtrasError,
        ForeignRunError,
        LocalCapacityError,
        LocalDirectoryError,
        NoRestorableStepError,
        PeerFailedError,
        PeerUnavailableError,
        PersistentStoreError,
        ReplicaDivergenceError,
        StaleGenerationError,
        StateMismatchError,
        StepOccupiedError,
        StoreBucketMissingError,
        StoreCredentialsError,
        StoreCredentialsExpiredError,
        StoreEncryptionError,
        StoreFullError,
        StorePermissionError,
        StoreRegionError,
        StoreThrottledError,
        StoreUnreachableError,
        StoreUnsupportedError,
        TopologyError,
        UnsupportedStateError,
    )
    from emergency_ckpt.manager import (
        CheckpointManager,
        GlobalExtras,
        ReshardedExtras,
        RestoredState,
        RestoreReport,
        StepAlreadyExistsError,
    )
    from emergency_ckpt.options import (
        CheckpointManagerOptions,
        LocalCheckpointOptions,
        MultiprocessingOptions,
        PersistentCheckpointOptions,
    )

__all__ = [
    "AgentStartError",
    "CheckpointManager",
    "CheckpointManagerOptions",
    "Config",
    "ConfigError",
    "CoordinationTimeoutError",
    "CorruptDataError",
    "CorruptShardsError",
    "EmergencyCheckpointError",
    "ExtrasError",
    "ForeignRunError",
    "GlobalExtras",
    "LocalCapacityError",
    "LocalCheckpointOptions",
    "LocalDirectoryError",
    "MultiprocessingOptions",
    "NoRestorableStepError",
    "PeerFailedError",
    "PeerUnavailableError",
    "PersistentCheckpointOptions",
    "PersistentStoreError",
    "ReplicaDivergenceError",
    "ReshardedExtras",
    "RestoreReport",
    "RestoredState",
    "StaleGenerationError",
    "StateMismatchError",
    "StepAlreadyExistsError",
    "StepOccupiedError",
    "StoreBucketMissingError",
    "StoreCredentialsError",
    "StoreCredentialsExpiredError",
    "StoreEncryptionError",
    "StoreFullError",
    "StorePermissionError",
    "StoreRegionError",
    "StoreThrottledError",
    "StoreUnreachableError",
    "StoreUnsupportedError",
    "TopologyError",
    "UnsupportedStateError",
    "arrange_mesh",
    "initialize_distributed",
    "load_config",
]

_HOME = {
    "CheckpointManager": "manager",
    "CheckpointManagerOptions": "options",
    "LocalCheckpointOptions": "options",
    "MultiprocessingOptions": "options",
    "PersistentCheckpointOptions": "options",
    "RestoreReport": "manager",
    "RestoredState": "manager",
    "StepAlreadyExistsError": "manager",
    "GlobalExtras": "manager",
    "ReshardedExtras": "manager",
    "Config": "config",
    "load_config": "config",
    "arrange_mesh": "distributed",
    "initialize_distributed": "distributed",
}
"""The module of each public name; names that are not listed are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
