"""What a run's store makes of conditional puts: found out once, recorded in its directory, and used.

The record says of which server it is. Where that differs, where the store was weak, or where it is found to be
weak by a shorter trial that every start makes, it is found out anew.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from absl import logging

from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.fields import parsed, typed
from emergency_ckpt.persistent.files import Files, ObjectFiles, RenamingFiles
from emergency_ckpt.persistent.object_store.gcs import GOOGLES_SERVER
from emergency_ckpt.persistent.object_store.probe import (
    ConditionalPuts,
    Honoured,
    probe_conditional_puts,
    still_honours,
)
from emergency_ckpt.persistent.step_files import seal, unseal

RECORD = "emergency_ckpt/conditional_puts.json"
_ADVICE = (
    "It says what the store makes of conditional puts. Delete it: the next start of the job writes it anew."
)


def with_recorded_conditions(files: Files) -> Files:
    """The files of a persistent directory, relying on its record where it has one. Nothing is read yet."""
    if not isinstance(files, ObjectFiles) or isinstance(files, RenamingFiles):
        return files
    return files.relying_on(functools.cache(lambda: _recorded(files)))


def find_conditions(files: ObjectFiles, probes: str) -> tuple[ConditionalPuts, bool]:
    """What the store of this directory makes of conditional puts, and whether that was tried just now.

    `probes`: a directory in it for objects that are gone afterwards. One process calls this, before anything
    else is written. Raises PersistentStoreError.
    """
    server = files.store.server
    known = _read(files)
    if (
        known is not None
        and known[1] == server
        and known[0].found is Honoured.YES
        and (server == GOOGLES_SERVER or still_honours(files.store, files.inside(probes)))
    ):
        return known[0], False
    if server == GOOGLES_SERVER:  # It says so itself, and slows down who writes one object often.
        found = ConditionalPuts(Honoured.YES, f"conditional puts at {server} are honoured, as Google documents")
    else:
        tried = probe_conditional_puts(files.store, files.inside(probes))
        why = tried.description.replace(files.locate(probes), files.locate())
        found = ConditionalPuts(tried.found, why)
    content = {"found": found.found.name, "why": found.description, "server": server, "time": time.time_ns()}
    files.write(RECORD, seal(content))
    return found, True


def _recorded(files: Files) -> ConditionalPuts | None:
    known = _read(files)
    return known[0] if known else None


def _read(files: Files) -> tuple[ConditionalPuts, str] | None:
    """What is recorded, and of which server; a record that cannot be read does not count."""
    where = files.locate(RECORD)

    def parse(raw: Any) -> tuple[ConditionalPuts, str]:
        found = Honoured[typed(raw["found"], str)]
        return ConditionalPuts(found, typed(raw["why"], str)), typed(raw["server"], str)

    try:
        return parsed(unseal(files.read(RECORD), where, _ADVICE), parse, where, _ADVICE)
    except FileNotFoundError:
        return None
    except CorruptDataError as error:
        logging.warning("%s does not count: %s", where, error)
        return None
