"""A directory is tried before a job relies on it: listed, written, read, deleted; refusals say what they lack.

What is written is tiny, has a name of its own that tells its age, and is gone afterwards.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator

import tensorstore as ts

from emergency_ckpt.errors import (
    PersistentStoreError,
    StoreBucketMissingError,
    StoreEncryptionError,
    StorePermissionError,
)
from emergency_ckpt.persistent.arrays import new_context, settle, settle_reads
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.object_store.failures import ADVICE
from emergency_ckpt.persistent.object_store.s3 import S3Store

_RECORDS = "emergency_ckpt"
_PROBE = re.compile(r"probe-(\d+)-[0-9a-f]{32}")
_OLD_SECONDS = 3600.0
_RIGHTS = {
    "s3": {
        "list": "s3:ListBucket",
        "write": "s3:PutObject",
        "read": "s3:GetObject",
        "delete": "s3:DeleteObject",
    },
    "gs": {
        "list": "storage.objects.list",
        "write": "storage.objects.create",
        "read": "storage.objects.get",
        "delete": "storage.objects.delete",
    },
}


def new_probe() -> str:
    """A directory for probes that nobody else uses, relative to the root."""
    return f"{_RECORDS}/probe-{int(time.time())}-{uuid.uuid4().hex}"


def try_files(files: ObjectFiles, probe: str, seconds: float) -> None:
    """Does once what a job does all the time. Raises the error that says what to mend.

    Args:
      files: the directory, its store with limits that fit.
      probe: where small objects are put, relative to it; see `new_probe`.
      seconds: limit of each wait for TensorStore, which reads and writes arrays with credentials of its own.
    """
    _try_listing(files, probe)
    _try_absent(files, probe)
    path, data = f"{probe}/by_us", uuid.uuid4().hex.encode()
    with _needing(files, "write", path):
        files.write(path, data)
    try:
        with _needing(files, "read", path):
            if files.read(path) != data:
                raise PersistentStoreError(
                    f"{files.locate(path)} was written, and other bytes are read from it"
                )
        try_tensorstore(files, probe, seconds)
    except BaseException:
        with contextlib.suppress(PersistentStoreError):
            files.delete_tree(probe)
        raise
    with _needing(files, "delete", path):
        files.delete(path)
        files.delete_tree(probe)


def try_tensorstore(files: ObjectFiles, probe: str, seconds: float) -> None:
    """Whether TensorStore writes to and reads from the same place. Leaves an object."""
    data = uuid.uuid4().hex.encode()
    what = f"trying TensorStore, with the credentials it finds itself, in {files.locate(probe)}"
    kvstore = settle([ts.KvStore.open(files.kvstore(probe), context=new_context())], what, seconds)[0]
    settle([kvstore.write("by_tensorstore", data)], what, seconds)
    try:
        ours: bytes | None = files.read(f"{probe}/by_tensorstore")
    except FileNotFoundError:
        ours = None
    theirs = settle_reads([kvstore.read("by_tensorstore")], what, seconds)[0].value
    if not ours == theirs == data:
        raise PersistentStoreError(
            f"{what}: what it writes is not found at {files.store.server or 'the same path'}: it talks to"
            " another server. Compare the endpoint of the environment and of the profile."
        )


def sweep_probes(files: ObjectFiles) -> None:
    """Removes what trials that were killed have left. Those of the last hour may be in use."""
    for entry in files.entries(_RECORDS):
        match = _PROBE.fullmatch(entry.name)
        if match and int(match[1]) < time.time() - _OLD_SECONDS:
            files.delete_tree(f"{_RECORDS}/{entry.name}")


def _try_listing(files: ObjectFiles, probe: str) -> None:
    try:
        files.store.check(files.inside())
    except StorePermissionError as error:
        if isinstance(error, StoreEncryptionError) or (rights := _rights(files)) is None:
            raise
        path = f"{probe}/by_us"
        try:
            files.write(path, b"")
        except (StorePermissionError, StoreBucketMissingError):
            raise StorePermissionError(
                f"{files.locate()}: these credentials may neither list nor write there: the bucket is another"
                f" account's, or they have no rights in it ({rights['list']} on the bucket, {rights['write']},"
                f" {rights['read']} and {rights['delete']} on its objects). {_bare(error)}"
            ) from error
        with contextlib.suppress(PersistentStoreError):
            files.delete(path)
        raise StorePermissionError(_lacking(files, "list", rights["list"], error)) from error


def _try_absent(files: ObjectFiles, probe: str) -> None:
    """Who may not list is told that absent objects are forbidden, and new array stores cannot be begun."""
    try:
        files.read(f"{probe}/never_there")
    except FileNotFoundError:
        return
    except StorePermissionError as error:
        if (rights := _rights(files)) is None:
            raise
        raise StorePermissionError(
            f"{files.locate()}: these credentials may list there, and what is absent is refused to them in"
            f" place of being absent: give them {rights['list']} on the bucket without a condition (on a"
            f" prefix, say), or {rights['read']} on the objects below, whichever is missing. {_bare(error)}"
        ) from error


@contextlib.contextmanager
def _needing(files: ObjectFiles, doing: str, path: str) -> Iterator[None]:
    """Says of a refusal which right is missing, or which encryption is demanded."""
    try:
        yield
    except StoreEncryptionError:
        raise
    except PersistentStoreError as error:
        denied = type(error) is StorePermissionError
        if (rights := _rights(files)) is None or not (denied or type(error) is PersistentStoreError):
            raise
        if doing == "write" and isinstance(files.store, S3Store):
            kind = files.store.demanded_encryption(f"{files.inside()}{path}")
            if kind is not None:
                raise StoreEncryptionError(
                    f"{files.locate()}: the bucket refuses what is put without the header"
                    f" x-amz-server-side-encryption: {kind}, which is not sent. Make {kind} its default"
                    " encryption, which needs no header, and take the condition out of its policy. "
                    f"{_bare(error)}"
                ) from error
        if not denied:
            raise
        raise StorePermissionError(_lacking(files, doing, rights[doing], error)) from error


def _lacking(files: ObjectFiles, doing: str, right: str, error: PersistentStoreError) -> str:
    may = {"list": "write", "write": "list", "read": "list and write", "delete": "list, write and read"}[doing]
    return (
        f"{files.locate()}: these credentials may {may} there, and may not {doing}: give them {right}"
        f" ({'on the bucket' if doing == 'list' else 'on the objects below'}). {_bare(error)}"
    )


def _bare(error: PersistentStoreError) -> str:
    """Its message without the usual advice, where there is a better one."""
    return str(error).replace(ADVICE[type(error)], "").strip()


def _rights(files: ObjectFiles) -> dict[str, str] | None:
    """What the operations are called in policies; None for a file system, whose errors say it themselves."""
    return _RIGHTS.get(files.locate().partition("://")[0])
