"""A run's directory as somebody finds it who knows nothing of the job: its steps, however they are named.

Reads only. What is no step is told by name, so that nobody wonders where it went.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from emergency_ckpt.core.lineage import Activation, is_void
from emergency_ckpt.core.locations import is_url
from emergency_ckpt.persistent.attempts import TEMPORARY, PersistentStep, StepNames
from emergency_ckpt.persistent.files import LocalFiles, ObjectFiles
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.object_store.urls import check_location
from emergency_ckpt.persistent.records import RUN_ID_FILE
from emergency_ckpt.persistent.step_files import CLAIM_FILE, PARTS_DIRECTORY
from emergency_ckpt.persistent.store import PersistentStore

_NAME = re.compile(r"(?:.+_)?(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class AnyNames(StepNames):
    """Directories of all prefixes and lengths."""

    def step(self, name: str) -> int | None:
        match = _NAME.fullmatch(name)
        return int(match[1]) if match and name.isascii() and TEMPORARY not in name else None


@dataclasses.dataclass(frozen=True, slots=True)
class FoundStep:
    """A committed step. `void`: a restore left it behind."""

    held: PersistentStep
    void: bool

    @property
    def name(self) -> str:
        return self.held.name

    @property
    def step(self) -> int:
        return self.held.step_id.step

    def __str__(self) -> str:
        return f"step {self.step} ({self.name}/)"


class RunDirectory:
    """One place that holds a run's persistent steps. Raises ConfigError for a URL that cannot be one."""

    def __init__(self, location: str | os.PathLike[str], limits: Limits | None = None) -> None:
        self.location = check_location(os.fspath(location))
        self.files: ObjectFiles = (
            open_files(self.location, limits)
            if is_url(self.location) or limits is None
            else LocalFiles(self.location, limits.total_seconds)
        )
        self.store = PersistentStore(self.location, AnyNames(), self.files)

    def steps(self) -> list[FoundStep]:
        """Every committed step, oldest first. Raises PersistentStoreError, CorruptDataError."""
        self.files.store.check(self.files.inside())
        activations: tuple[Activation, ...] = self.store.activations()
        return [FoundStep(each, is_void(each.step_id, activations)) for each in self.store.steps()]

    def run_id(self) -> str:
        """The id of the run, "" where no job has begun one; whatever it looks like."""
        try:
            return self.files.read(RUN_ID_FILE).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def uncommitted(self, steps: list[FoundStep]) -> list[str]:
        """Directories that are named like steps, or attempts at one, and are none."""
        known = {step.name for step in steps}
        return [
            entry.name
            for entry in self.files.entries()
            if entry.is_directory
            and entry.name not in known
            and (AnyNames().step(entry.name) is not None or TEMPORARY in entry.name)
        ]

    def sizes(self, path: str) -> Mapping[str, int]:
        """The bytes of every file below a directory, by its path there."""
        inside = self.files.inside(path)
        pages = self.files.store.list_pages(inside)
        return {info.key[len(inside) :]: info.size for page in pages for info in page.objects}


def is_scaffolding(path: str) -> bool:
    """Whether a file of a step was of use only while it was written."""
    return path == CLAIM_FILE or path.startswith(f"{PARTS_DIRECTORY}/")
