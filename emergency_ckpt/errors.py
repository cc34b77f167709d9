"""One exception per failure that a user can act on.

Every message says what happened, where (step, leaf, slice, process, path), what was expected and found,
and what to do next. Catch `EmergencyCheckpointError` for all of them.
"""


class EmergencyCheckpointError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(EmergencyCheckpointError, ValueError):
    """A flag is unknown, has a wrong type, or contradicts another one."""


class TopologyError(EmergencyCheckpointError, ValueError):
    """The mesh and the replica axis do not describe slices of whole processes."""


class UnsupportedStateError(EmergencyCheckpointError, TypeError):
    """A leaf of the state cannot be checkpointed (its type or its placement)."""


class StateMismatchError(EmergencyCheckpointError, ValueError):
    """The state that is wanted and the state that was saved differ in leaves, shapes or dtypes."""


class LocalDirectoryError(EmergencyCheckpointError, OSError):
    """The local checkpoint directory is missing, not writable, or used by somebody else."""


class LocalCapacityError(LocalDirectoryError):
    """The ramdisk, or the memory limit it counts against, has no room for the slots."""


class ForeignRunError(LocalDirectoryError):
    """The local directory, or the persistent one, holds data of another run."""


class CorruptDataError(EmergencyCheckpointError, ValueError):
    """Stored bytes do not match their checksum, or a file of ours is damaged."""


class CorruptShardsError(CorruptDataError):
    """Shards came from another process with bytes that do not match their checksums.

    `shards`: their indices into the layout they were asked for by, ascending. All others that were asked for in
    the same call are good.
    """

    def __init__(self, message: str, shards: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.shards = shards


class ReplicaDivergenceError(CorruptDataError):
    """Copies of the state that must be equal are not: some device or memory damages data silently.

    `step`: the saved step in which it showed. `leaves`: the leaves that differ.
    """

    def __init__(self, message: str, step: int, leaves: tuple[str, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.leaves = leaves


class NoRestorableStepError(EmergencyCheckpointError, FileNotFoundError):
    """No step, or not the step that was asked for, can be made whole from what survived."""


class PersistentStoreError(EmergencyCheckpointError, OSError):
    """The persistent tier could not be read or written."""


class StoreUnreachableError(PersistentStoreError):
    """The store does not answer: a wrong endpoint, no network, a server that is down or hangs."""


class StoreCredentialsError(PersistentStoreError):
    """There are no credentials for the object store, or it does not know them."""


class StoreCredentialsExpiredError(StoreCredentialsError):
    """The credentials for the object store were good once and are expired."""


class StorePermissionError(PersistentStoreError):
    """The credentials are good, and may not do this: the bucket is another account's, or a right is missing."""


class StoreEncryptionError(StorePermissionError):
    """The bucket takes only what is encrypted as it demands, or its key may not be used."""


class StoreBucketMissingError(PersistentStoreError):
    """There is no such bucket."""


class StoreRegionError(PersistentStoreError):
    """The bucket is in another region than the one that is configured."""


class StoreThrottledError(PersistentStoreError):
    """The store asks for fewer requests, and kept doing so through all repetitions."""


class StoreFullError(PersistentStoreError):
    """The store, or the quota in it, has no room left."""


class StoreUnsupportedError(PersistentStoreError):
    """The store does not have an operation that is needed."""


class StepOccupiedError(PersistentStoreError):
    """The number of a step is taken in the persistent tier by another one, which no restore made void."""


class StaleGenerationError(PersistentStoreError):
    """A newer generation of this run exists: this process belongs to a job that was replaced."""


class CoordinationTimeoutError(EmergencyCheckpointError, TimeoutError):
    """Some processes did not answer within the time limit; the message names them."""


class PeerFailedError(EmergencyCheckpointError, RuntimeError):
    """Another process reported an error during an operation that all processes do together."""


class PeerUnavailableError(EmergencyCheckpointError, ConnectionError):
    """An agent cannot be reached, does not answer in time or in full, or no longer has what was asked for.

    `code` says in one word what it was (`slot_not_here`, `busy`, `unreachable`, ...). Nothing is known to be
    damaged: asking again, or another process, may succeed.
    """

    def __init__(self, message: str, code: str = "unreachable") -> None:
        super().__init__(message)
        self.code = code


class AgentStartError(EmergencyCheckpointError, RuntimeError):
    """The agent of this host cannot be started, or does not do what is asked of it."""


class ExtrasError(EmergencyCheckpointError, ValueError):
    """Per-process extras are too large, not serialisable, or do not fit this process count."""
