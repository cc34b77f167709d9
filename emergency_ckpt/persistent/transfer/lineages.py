"""The records of a run, brought to a copy of it: whose it is, its lives, and which steps no longer count.

They come before any step, so that what a restore left behind counts nowhere. Two directories that each went on
by themselves are no copies of each other, and are refused before anything is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from emergency_ckpt.core.lineage import Activation
from emergency_ckpt.errors import ConfigError, CorruptDataError, ForeignRunError
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.records import ACTIVATIONS, GENERATIONS, RUN_ID_FILE, read_activation
from emergency_ckpt.persistent.run_directories import RunDirectory
from emergency_ckpt.persistent.store import PersistentStore

_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """What the target lacks: records to create, and some to write anew, by path."""

    create: dict[str, bytes]
    replace: dict[str, bytes]

    def bring(self, target: Files) -> None:
        """Raises ForeignRunError when somebody else made one of them meanwhile, PersistentStoreError."""
        for path, data in self.create.items():
            if not target.create(path, data) and target.read(path) != data:
                raise ForeignRunError(
                    f"{target.locate(path)} was made by a job meanwhile. End the job at the target, then"
                    " copy again."
                )
        for path, data in self.replace.items():
            target.write(path, data)


def compare_records(source: RunDirectory, target: RunDirectory) -> Records:
    """What the target lacks. Raises ForeignRunError unless it is empty or a copy of the same run."""
    found = Records({}, {})
    mine, theirs = source.run_id(), target.run_id()
    if mine and theirs and mine != theirs:
        raise ForeignRunError(
            f"{target.location} holds the run {theirs}, {source.location} the run {mine}: a job has begun there"
            " by itself. Copy into an empty directory."
        )
    if mine and not theirs:
        found.create[RUN_ID_FILE] = source.files.read(RUN_ID_FILE)
    for directory in GENERATIONS, ACTIVATIONS:
        here, there = _contents(source.files, directory), _contents(target.files, directory)
        for path, data in here.items():
            if path not in there:
                found.create[path] = data
            elif there[path] != data:
                _compare(source.files, target.files, path, found, data)
    return found


def bring_deletion(source: PersistentStore, target: PersistentStore) -> None:
    """Steps that were deleted on purpose at the source are missed at the target by nobody."""
    here, there = source.deletion(), target.deletion()
    if here is not None and here != there and (there is None or here.upto >= there.upto):
        target.record_deletion(here)


def bring_root_metadata(source: PersistentStore, target: PersistentStore) -> None:
    """The user's metadata of the directory, unless there is some."""
    if (metadata := source.root_metadata()) is not None:
        target.create_root_metadata(metadata)


def _compare(source: Files, target: Files, path: str, found: Records, data: bytes) -> None:
    """One record that both have, with other bytes: a fork, or one that was not written to its end."""
    if path.startswith(f"{ACTIVATIONS}/"):
        here, there = _readable(source, path), _readable(target, path)
        if here is not None and there is None:
            found.replace[path] = data
            return
        if here is None or here == there:
            return
    raise ForeignRunError(
        f"{target.locate(path)} and {source.locate(path)} differ: a job has gone on at each of the two places,"
        " with other steps under the same numbers. Copy into an empty directory, and choose which goes on."
    )


def _readable(files: Files, path: str) -> Activation | None:
    try:
        return read_activation(files, path)
    except CorruptDataError:
        return None


def _contents(files: Files, directory: str) -> dict[str, bytes]:
    paths = [f"{directory}/{e.name}" for e in files.entries(directory) if e.name.endswith(".json")]
    read: Callable[[str], bytes] = files.read
    with ThreadPoolExecutor(_AT_ONCE, "emergency_ckpt records") as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))


def check_apart(source: RunDirectory, target: RunDirectory) -> None:
    """Raises ConfigError where one of the two directories is, or lies in, the other."""
    one, other = f"{source.location.rstrip('/')}/", f"{target.location.rstrip('/')}/"
    if one.startswith(other) or other.startswith(one):
        raise ConfigError(f"{source.location} and {target.location} are not two places: one is in the other")
