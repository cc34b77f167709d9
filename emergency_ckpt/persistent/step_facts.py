"""What is known of a committed step beside its state: times, metrics and custom metadata. Read, never written.

Of our steps the user's part comes from the side file, which has a checksum; times, and all of another program's
steps, from Orbax's own files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.step_files import (
    ORBAX_METRICS_FILE,
    ORBAX_STEP_FILE,
    read_side_info,
)


@dataclasses.dataclass(frozen=True, slots=True)
class StepFacts:
    """What a step says of itself.

    Attributes:
      started_nanoseconds, committed_nanoseconds: Unix times; None where the step does not say.
      metrics, custom_metadata: of the user; empty where there are none.
      handlers: by item, the name of the handler that Orbax restores it with; "" for a step that is one item.
    """

    started_nanoseconds: int | None
    committed_nanoseconds: int | None
    metrics: Mapping[str, Any]
    custom_metadata: Mapping[str, Any]
    handlers: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])


def read_step_facts(files: Files, directory_step: int | None = None) -> StepFacts:
    """The facts of the step whose files these are. Raises CorruptDataError, PersistentStoreError.

    `directory_step` is the step that the name of the directory stands for, None where that is not known.
    """
    said = _json_object(files, ORBAX_STEP_FILE)
    side = read_side_info(files, (entry.name for entry in files.entries()), directory_step)
    if side is not None:
        metrics, custom = side.metrics, side.custom_metadata
    else:
        metrics, custom = _json_object(files, ORBAX_METRICS_FILE), said.get("custom_metadata") or {}
        if not isinstance(custom, dict):
            raise CorruptDataError(
                f"{files.locate(ORBAX_STEP_FILE)} is damaged: its custom_metadata is no object: {custom!r:.40}"
            )
    return StepFacts(
        _nanoseconds(said.get("init_timestamp_nsecs")),
        _nanoseconds(said.get("commit_timestamp_nsecs")),
        metrics,
        custom,
        read_handlers(said),
    )


def read_handlers(step_file: Mapping[str, Any]) -> dict[str, str]:
    """Handlers by item as Orbax's step metadata names them; one name alone is that of the whole step."""
    said = step_file.get("item_handlers") or {}
    if isinstance(said, str):
        return {"": said}
    return {str(name): str(handler) for name, handler in said.items()} if isinstance(said, dict) else {}


def _json_object(files: Files, path: str) -> Mapping[str, Any]:
    """Content of a file of Orbax's; nothing where there is no such file."""
    try:
        data = files.read(path)
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{files.locate(path)} is damaged: it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptDataError(
            f"{files.locate(path)} is damaged: {type(content).__name__} instead of an object"
        )
    return content


def _nanoseconds(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**63 else None
