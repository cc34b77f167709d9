"""Trying the persistent directory when a manager is made: what is wrong is told at start, not at step 10,000.

What is wrong for good ends the start at once. A store that does not answer is waited for, for a while.
"""

from __future__ import annotations

import dataclasses
import time

from emergency_ckpt.errors import StoreThrottledError, StoreUnreachableError
from emergency_ckpt.persistent.bounded import within
from emergency_ckpt.persistent.conditions import find_conditions
from emergency_ckpt.persistent.files import RenamingFiles
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.object_store.probe import ConditionalPuts, Honoured
from emergency_ckpt.persistent.object_store.trial import new_probe, sweep_probes, try_files
from emergency_ckpt.telemetry.log import CheckpointLogger

_QUICK = Limits(attempt_seconds=15.0, total_seconds=20.0, attempts=4, pause_seconds=(0.2, 2.0))
_MANY = 10_000
_PASSING = (StoreUnreachableError, StoreThrottledError)


def try_directory(directory: str, patience: float, log: CheckpointLogger) -> None:
    """Raises the PersistentStoreError that says what to mend, within twice `patience` seconds.

    One process calls this, before it writes anything there.
    """
    deadline = time.monotonic() + 2 * patience
    what = f"trying {directory}"
    try:
        try:
            found = within(patience, what, lambda: _tried(directory, patience))
        except _PASSING as error:
            log.warning("start", None, f"{error} The start waits for it, for up to {patience:g} s")
            within(patience, what, lambda: _wait(directory, patience))
            left = max(deadline - time.monotonic(), 1.0)
            found = within(left, what, lambda: _tried(directory, patience))
    except _PASSING as error:
        raise type(error)(
            f"{error} Nothing is lost: what the ramdisks hold stays there. Start again when the store answers:"
            " a life of the run takes its number there, so that no two of them have the same."
        ) from error
    if found is not None:
        _tell(*found, log)


def _tried(directory: str, patience: float) -> tuple[ConditionalPuts, bool] | None:
    """What the store makes of conditional puts, and whether that is new; None where a rename commits."""
    files = open_files(directory, _limits(patience))
    if isinstance(files, RenamingFiles):
        files.make_directory("")
    probe = new_probe()
    try_files(files, probe, min(patience, _QUICK.total_seconds))
    sweep_probes(files)
    return None if isinstance(files, RenamingFiles) else find_conditions(files, probe)


def _wait(directory: str, patience: float) -> None:
    """Until the store answers at all."""
    limits = dataclasses.replace(_limits(patience), total_seconds=patience, attempts=_MANY)
    files = open_files(directory, limits)
    files.store.check(files.inside())


def _tell(found: ConditionalPuts, is_new: bool, log: CheckpointLogger) -> None:
    said = found.description if is_new else f"{found.description} (as an earlier start found out)"
    if found.found is Honoured.YES:
        log.info("start", None, said)
    else:
        log.warning(
            "start",
            None,
            f"{said}. Steps are committed by looking first and reading back: keep two jobs from writing to "
            "this directory at the same time",
        )


def _limits(patience: float) -> Limits:
    return dataclasses.replace(
        _QUICK,
        attempt_seconds=min(_QUICK.attempt_seconds, patience / 2),
        total_seconds=min(_QUICK.total_seconds, patience),
    )
