"""Whether a store honours conditional puts: tried out, since some servers ignore the condition silently.

A commit relies on it: of several processes that create one object, exactly one may be told that it did.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from emergency_ckpt.errors import StoreUnsupportedError
from emergency_ckpt.persistent.object_store.operations import ObjectStore


class Honoured(enum.Enum):
    """What became of the conditions."""

    YES = "honoured"
    REFUSED = "refused"
    IGNORED = "ignored"
    NOT_ATOMIC = "not atomic"
    ONLY_IF_ABSENT = "honoured for objects that are absent only"


@dataclasses.dataclass(frozen=True, slots=True)
class ConditionalPuts:
    """What was found, and a sentence that says it, with the store's name."""

    found: Honoured
    description: str

    @property
    def can_create(self) -> bool:
        """Whether `put_if_absent` has exactly one winner."""
        return self.found in (Honoured.YES, Honoured.ONLY_IF_ABSENT)

    @property
    def can_replace(self) -> bool:
        """Whether `put_if_unchanged` replaces only what it should."""
        return self.found is Honoured.YES


def probe_conditional_puts(
    store: ObjectStore, prefix: str = "", writers: int = 8, rounds: int = 3
) -> ConditionalPuts:
    """Puts small objects under `prefix`, one after the other and at the same time, and deletes them again.

    `prefix` is empty or ends with '/'. One process calls this, once. Raises PersistentStoreError where
    the store fails in any other way.
    """
    keys = [f"{prefix}emergency_ckpt.probe-{uuid.uuid4().hex}" for _ in range(1 + rounds)]
    try:
        found, why = _probe(store, keys, writers)
    finally:
        store.delete_many(keys)
    return ConditionalPuts(found, f"conditional puts at {store.locate(prefix)} are {found.value}: {why}")


def still_honours(store: ObjectStore, prefix: str = "") -> bool:
    """Whether of two creations of one object, one after the other, the second is refused still.

    For a store that was tried as a whole before: versions that a bucket has since then may change it.
    """
    key = f"{prefix}emergency_ckpt.probe-{uuid.uuid4().hex}"
    try:
        return store.put_if_absent(key, b"first") is not None and store.put_if_absent(key, b"second") is None
    except StoreUnsupportedError:
        return False
    finally:
        store.delete(key)


def _probe(store: ObjectStore, keys: list[str], writers: int) -> tuple[Honoured, str]:
    try:
        version = store.put_if_absent(keys[0], b"first")
        again = store.put_if_absent(keys[0], b"second")
    except StoreUnsupportedError as error:
        return Honoured.REFUSED, str(error)
    if version is None:
        return Honoured.IGNORED, "an object that was never there was told to be there"
    if again is not None:
        return Honoured.IGNORED, "an object that was there was replaced"
    for key in keys[1:]:
        winners = _race(store, key, writers)
        if len(winners) != 1 or store.read(key) != winners[0]:
            return Honoured.NOT_ATOMIC, f"of {writers} that created one object at once {len(winners)} did"
    return _probe_replacing(store, keys[0], version)


def _race(store: ObjectStore, key: str, writers: int) -> list[bytes]:
    """The contents of those that were told that they created the object."""
    start = threading.Barrier(writers)

    def create(number: int) -> bytes | None:
        content = f"writer {number}".encode()
        start.wait(60)
        return content if store.put_if_absent(key, content) is not None else None

    with ThreadPoolExecutor(writers, "emergency_ckpt probe") as pool:
        return [content for content in pool.map(create, range(writers)) if content is not None]


def _probe_replacing(store: ObjectStore, key: str, version: str) -> tuple[Honoured, str]:
    creating = "of all that created one object at once exactly one did"
    try:
        newer = store.put_if_unchanged(key, b"third", version)
        if newer is None:
            return Honoured.ONLY_IF_ABSENT, f"{creating}; an object that did not change was not replaced"
        if store.put_if_unchanged(key, b"fourth", version) is not None:
            return Honoured.ONLY_IF_ABSENT, f"{creating}; an object that had changed was replaced"
    except StoreUnsupportedError:
        return Honoured.ONLY_IF_ABSENT, f"{creating}; replacing is refused"
    return Honoured.YES, f"{creating}, and only what had not changed was replaced"
