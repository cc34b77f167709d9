"""The pointer to the newest step: one small file for scripts and for people, which nobody has to believe.

It is written after a commit, and after steps were deleted. It may be stale, missing or damaged: whoever needs
to know which steps there are lists them.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Any

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.fields import parsed, typed, whole_number
from emergency_ckpt.persistent.files import Files

LATEST = "emergency_ckpt/latest.json"
_FORMAT_VERSION = 1
_ADVICE = "It only points at the newest step; the next commit writes it anew."


@dataclasses.dataclass(frozen=True, slots=True)
class Latest:
    """What the pointer says.

    Attributes:
      name: of the step's directory in the root.
      time: when it was written, in ISO 8601.
    """

    step_id: StepId
    name: str
    time: str


def write_latest(files: Files, step: StepId, name: str) -> None:
    """Points at a step. Raises PersistentStoreError."""
    content = {
        "format": _FORMAT_VERSION,
        "step": step.step,
        "generation": step.generation,
        "directory": name,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    files.write(LATEST, f"{json.dumps(content)}\n".encode())


def read_latest(files: Files) -> Latest | None:
    """What the pointer says, unchecked; None where there is none, or one that says nothing.

    Raises PersistentStoreError.
    """
    try:
        data = files.read(LATEST)
        return parsed(json.loads(data), _parse, files.locate(LATEST), _ADVICE)
    except (FileNotFoundError, CorruptDataError, ValueError, RecursionError):
        return None


def _parse(raw: Any) -> Latest:
    if raw["format"] != _FORMAT_VERSION:
        raise ValueError("another format")
    step = StepId(whole_number(raw["generation"]), whole_number(raw["step"]))
    return Latest(step, typed(raw["directory"], str), typed(raw["time"], str))
