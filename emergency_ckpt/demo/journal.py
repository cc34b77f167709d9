"""What one process of the demo writes down while it trains: JSON lines that survive a SIGKILL.

A journal holds one life of one process. Every line is one fact and is written whole with a single call, so that
only the last line of a killed process can be cut off; a cut line is not a fact.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class Started:
    """The process began; `time` is in seconds since the epoch here and in every other fact.

    `attempt` counts the lives of the job: 0 at first, one more at each restart.
    """

    time: float
    process: int
    attempt: int


@dataclasses.dataclass(frozen=True)
class Restored:
    """The process has a state to train on: the restored one, or a first one (`step` is None)."""

    time: float
    step: int | None
    reason: str
    source: str
    seconds: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """A step is done; `loss` is its mean loss over the whole batch."""

    time: float
    step: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last step is done: what this process then held.

    Attributes:
      shards: checksum by shard name, of every shard of the state that this process holds.
      position: the state of this process's data iterator.
    """

    time: float
    step: int
    shards: dict[str, str]
    position: dict[str, Any]


Fact: TypeAlias = Started | Restored | Trained | Finished

_KINDS: dict[str, type[Fact]] = {kind.__name__.lower(): kind for kind in (Started, Restored, Trained, Finished)}
_SUFFIX = ".jsonl"


class Journal:
    """Appends facts to a new file of its own in `directory`."""

    def __init__(self, directory: pathlib.Path, process: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{time.time_ns()}-process-{process}{_SUFFIX}"
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)

    def write(self, fact: Fact) -> None:
        line = json.dumps({"fact": type(fact).__name__.lower(), **dataclasses.asdict(fact)}) + "\n"
        os.write(self._file, line.encode())

    def close(self) -> None:
        os.close(self._file)


@dataclasses.dataclass(frozen=True)
class Life:
    """What one start of one process wrote down."""

    started: Started
    restored: Restored | None
    trained: tuple[Trained, ...]
    finished: Finished | None


def read_lives(directory: pathlib.Path) -> tuple[Life, ...]:
    """The lives of all processes that wrote a journal in `directory`, oldest first."""
    lives = [_read_life(path) for path in sorted(directory.glob(f"*{_SUFFIX}"))]
    return tuple(sorted((life for life in lives if life), key=lambda life: life.started.time))


def _read_life(path: pathlib.Path) -> Life | None:
    facts = [_parse(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    started = [fact for fact in facts if isinstance(fact, Started)]
    if not started:
        return None
    return Life(
        started=started[0],
        restored=next((fact for fact in facts if isinstance(fact, Restored)), None),
        trained=tuple(fact for fact in facts if isinstance(fact, Trained)),
        finished=next((fact for fact in facts if isinstance(fact, Finished)), None),
    )


def _parse(line: str) -> Fact:
    fields = json.loads(line)
    return _KINDS[fields.pop("fact")](**fields)
