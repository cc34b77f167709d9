"""The records of a run in the persistent root, as they are read: generations, activations, deletions.

A record is believed only if its checksum, every field and its own name agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from emergency_ckpt.core.lineage import Activation, Deletion, StepId
from emergency_ckpt.persistent.fields import parsed, step_id, typed, whole_number
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.step_files import unseal

# Where they lie in the root.
RUN_ID_FILE = "emergency_ckpt/run_id"
GENERATIONS = "emergency_ckpt/generations"
ACTIVATIONS = "emergency_ckpt/activations"

_GENERATION_ADVICE = "It is the record of one life of the run. Restore it from a backup, or delete it."
_ACTIVATION_ADVICE = (
    "It is the record of a restore: it says which step a life of the run began from, and so which later steps"
    " of earlier lives no longer count. Restore it from a backup; or delete it, and those steps count again, as"
    " older than every step of later lives."
)
_DELETION_ADVICE = "It is the record of steps that were deleted on purpose; without it they may be missed."
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """One life of the run. `parent` is the step it was restored from, None for a start from scratch."""

    number: int
    nonce: str
    parent: StepId | None = None


def read_generation(files: Files, path: str) -> Generation:
    """Raises FileNotFoundError, CorruptDataError, PersistentStoreError, as all of these do."""

    def parse(raw: Any) -> Generation:
        parent = None if raw["parent"] is None else step_id(raw["parent"])
        return Generation(_as_named(raw["number"], path), typed(raw["nonce"], str), parent)

    return _read(files, path, parse, _GENERATION_ADVICE)


def read_activation(files: Files, path: str) -> Activation | None:
    """The activation in a record; None where the record was withdrawn."""

    def parse(raw: Any) -> Activation | None:
        generation = _as_named(raw["generation"], path)
        if raw.get("withdrawn"):
            return None
        return Activation(generation, None if raw["step"] is None else whole_number(raw["step"]))

    return _read(files, path, parse, _ACTIVATION_ADVICE)


def read_deletion(files: Files, path: str) -> Deletion | None:
    """What was deleted on purpose; None where the record was withdrawn."""

    def parse(raw: Any) -> Deletion | None:
        if raw.get("withdrawn"):
            return None
        return Deletion(step_id(raw["upto"]), None if raw["newest"] is None else step_id(raw["newest"]))

    return _read(files, path, parse, _DELETION_ADVICE)


def record_number(name: str) -> int:
    """The number of a record, which its name has."""
    return int(name.partition(".")[0])


def _read(files: Files, path: str, parse: Callable[[Any], _T], advice: str) -> _T:
    where = files.locate(path)
    return parsed(unseal(files.read(path), where, advice), parse, where, advice)


def _as_named(raw: Any, path: str) -> int:
    named = record_number(path.rpartition("/")[2])
    if whole_number(raw) != named:
        raise ValueError(f"it says {raw}, its name {named}: it was renamed or copied")
    return named
