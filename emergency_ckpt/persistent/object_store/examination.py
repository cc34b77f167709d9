"""Trying out a persistent directory as a job would use it, and more thoroughly than a start has time for.

Everything that is written lies in one directory of its own, and is removed again whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore as ts

from emergency_ckpt.core.layout import LeafSpec
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.persistent.arrays import array_spec, new_context, ocdbt, settle, settle_reads
from emergency_ckpt.persistent.files import LocalFiles, ObjectFiles
from emergency_ckpt.persistent.object_store.bucket_settings import gcs_findings, s3_findings
from emergency_ckpt.persistent.object_store.gcs import GOOGLES_SERVER, GcsStore
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.object_store.probe import Honoured, probe_conditional_puts
from emergency_ckpt.persistent.object_store.report import Finding, Level, Report
from emergency_ckpt.persistent.object_store.s3 import S3Store
from emergency_ckpt.persistent.object_store.trial import new_probe, try_files

LIMITS = Limits(attempt_seconds=30.0, total_seconds=90.0, attempts=5, pause_seconds=(0.2, 5.0))
_WAIT_SECONDS = 90.0
_SKEW_SECONDS = 60.0
_SEVERAL = 5
_MIB = 1024**2


def examine(location: str, megabytes: int = 64, streams: int = 8, limits: Limits = LIMITS) -> Report:
    """What becomes of a job that uses this directory. Raises ConfigError for what cannot be one.

    Args:
      megabytes: how much is written and read to measure the throughput (MiB); 0 measures none.
      streams: objects that are written, and read, at a time.
    """
    files = open_files(location, limits)
    absent = _absent_parents(files)
    examination = _Examination(files, new_probe(), megabytes, streams)
    findings: list[Finding] = []
    try:
        findings += examination.findings()
    finally:
        findings += examination.clean_up()
        for directory in absent:
            with contextlib.suppress(OSError):  # It was there before, or somebody else uses it by now.
                directory.rmdir()
    server, credentials = _access(files)
    return Report(files.locate(), server, credentials, tuple(findings))


class _Examination:
    def __init__(self, files: ObjectFiles, probe: str, megabytes: int, streams: int) -> None:
        self._files = files
        self._probe = probe
        self._below = files.below(probe)
        self._store = self._below.store  # Of a file system, the directory of the probe.
        self._wrote = False
        self._keeps_versions = False
        self._megabytes = megabytes
        self._streams = streams

    def findings(self) -> Iterator[Finding]:
        first = self._tried("rights", self._rights)
        yield first
        if first.level is Level.FAIL:
            return
        for check, look in (
            ("listing", self._listing),
            ("ranged read", self._ranged_read),
            ("replacing", self._replacing),
            ("conditional puts", self._conditional_puts),
            ("arrays", self._arrays),
            ("deleting many", self._deleting),
            ("encryption", self._encryption),
            ("clock", self._clock),
        ):
            found = self._tried(check, look)
            if found.said:
                yield found
        if isinstance(self._store, S3Store):
            yield from self._noting_versions(s3_findings(self._store))
        elif isinstance(self._store, GcsStore):
            yield from self._noting_versions(gcs_findings(self._store))
        else:
            yield self._tried("room", self._room)
        if self._megabytes:
            yield from self._throughput()

    def _noting_versions(self, findings: Iterator[Finding]) -> Iterator[Finding]:
        for finding in findings:
            self._keeps_versions |= finding.check == "versioning" and finding.said != "off"
            yield finding

    def clean_up(self) -> list[Finding]:
        """Says something only where it cannot remove what was written."""
        where = self._files.locate(self._probe)
        try:
            self._files.delete_tree(self._probe)
        except PersistentStoreError as error:
            try:
                is_left = bool(self._files.entries(self._probe))
            except PersistentStoreError:
                is_left = self._wrote
            if is_left:
                return [Finding("cleaning up", Level.WARN, f"could not be done: {error}", f"Remove {where}.")]
        try:
            if isinstance(self._store, S3Store | GcsStore):
                self._store.delete_versions(self._files.inside(self._probe))
        except PersistentStoreError as error:
            if self._keeps_versions:
                fix = f"Remove all versions below {where}, when that is allowed."
                return [Finding("cleaning up", Level.WARN, f"old versions are left: {error}", fix)]
        return []

    def _tried(self, check: str, look: Callable[[], Finding]) -> Finding:
        try:
            return look()
        except EmergencyCheckpointError as error:
            return Finding(check, Level.FAIL, str(error))
        except FileNotFoundError as error:
            return Finding(check, Level.FAIL, f"what was written is not there: {error}")

    def _rights(self) -> Finding:
        if isinstance(self._files, LocalFiles):
            self._files.make_directory("")
        try_files(self._files, self._probe, _WAIT_SECONDS)
        self._wrote = True
        return Finding("rights", Level.OK, "may list, write, read and delete, TensorStore with the same rights")

    def _listing(self) -> Finding:
        names = [f"object {number}" for number in range(_SEVERAL)]
        for name in names:
            self._below.write(f"listed/{name}", name.encode())
        found = [entry.name for entry in self._below.entries("listed")]
        if found != names:
            return Finding("listing", Level.FAIL, f"of {names}, just written, a listing has {found}")
        return Finding("listing", Level.OK, "what was written is listed at once")

    def _ranged_read(self) -> Finding:
        data = bytes(range(256)) * 16
        key = f"{self._below.inside()}ranged"
        self._store.put(key, data)
        if self._store.read(key, 1000, 1500) != data[1000:1500] or self._store.read(key) != data:
            said = "a part of an object that is asked for is not what comes"
            return Finding("ranged read", Level.FAIL, said, "Use a store that honours Range.")
        return Finding("ranged read", Level.OK, "parts of objects are read alone")

    def _replacing(self) -> Finding:
        for content in b"first", b"second":
            self._below.write("replaced", content)
        if (found := self._below.read("replaced")) != b"second":
            return Finding("replacing", Level.FAIL, f"after a replacement {found[:20]!r} is read")
        return Finding("replacing", Level.OK, "the new content is read at once")

    def _conditional_puts(self) -> Finding:
        check = "conditional puts"
        if isinstance(self._files, LocalFiles):
            self._below.write("before/file", b"")
            self._files.rename(f"{self._probe}/before", f"{self._probe}/after")
            return Finding("renaming", Level.OK, "directories are renamed, which commits a step")
        if self._store.server == GOOGLES_SERVER:
            return Finding(check, Level.OK, "honoured, as Google documents")
        found = probe_conditional_puts(self._store, self._below.inside("conditions"))
        said = found.description.rpartition(f"{found.found.value}: ")[2]
        if found.found is Honoured.YES:
            return Finding(check, Level.OK, f"{found.found.value}: {said}")
        return Finding(
            check,
            Level.WARN,
            f"{found.found.value}: {said}",
            "Steps are committed by looking first and reading back: keep two jobs from using one directory at"
            " the same time, or use a server that honours If-None-Match and If-Match.",
        )

    def _arrays(self) -> Finding:
        """By the very specification with which steps are written."""
        leaf, expected = LeafSpec("array", (64, 1024), "float32"), np.arange(65536, dtype=np.float32)
        spec = array_spec(ocdbt(self._below.kvstore("arrays")), leaf, (16, 1024), "none")
        what = f"writing and reading an array in {self._below.locate('arrays')}"
        written = settle([ts.open(spec, create=True, context=new_context())], what, _WAIT_SECONDS)[0]
        settle([written.write(expected.reshape(leaf.shape)).commit], what, _WAIT_SECONDS)
        opened = settle_reads([ts.open(spec, open=True, context=new_context())], what, _WAIT_SECONDS)[0]
        found = settle_reads([opened.read()], what, _WAIT_SECONDS)[0]
        if not np.array_equal(found.reshape(-1), expected):
            return Finding("arrays", Level.FAIL, "an array that was written is read otherwise")
        if "manifest.ocdbt" not in [entry.name for entry in self._below.entries("arrays")]:
            return Finding("arrays", Level.FAIL, "what TensorStore writes is not found among the small files")
        return Finding("arrays", Level.OK, "TensorStore writes and reads zarr3 in OCDBT at the same place")

    def _deleting(self) -> Finding:
        prefix = self._below.inside("listed")
        self._store.delete_many([f"{prefix}object {number}" for number in range(_SEVERAL)])
        if left := [entry.name for entry in self._below.entries("listed")]:
            return Finding("deleting many", Level.FAIL, f"after the deletion a listing has {left}")
        return Finding("deleting many", Level.OK, "several objects at once, and no listing has them")

    def _encryption(self) -> Finding:
        if not isinstance(self._store, S3Store):
            return Finding("encryption", Level.OK, "")  # GCS: among the settings; a file system does not say.
        answer = self._store.answer_to_head(f"{self._below.inside()}replaced")
        kind = answer.get("ServerSideEncryption")
        if kind is None:
            said = "objects are not encrypted by the store, or it does not say so; none is demanded"
            return Finding("encryption", Level.OK, said)
        named = "with a key of KMS" if answer.get("SSEKMSKeyId") else "with the store's own key"
        return Finding("encryption", Level.OK, f"by default {kind}, {named}; no header is demanded")

    def _clock(self) -> Finding:
        self._below.write("clock", b"")
        begun = time.time()
        if isinstance(self._store, S3Store):
            answer = self._store.answer_to_head(f"{self._below.inside()}clock")
            theirs = answer["LastModified"].timestamp()
        elif isinstance(self._store, GcsStore):
            theirs = self._store.written_at(f"{self._below.inside()}clock")
        else:
            theirs = os.stat(self._below.locate("clock")).st_mtime
        skew = theirs - begun
        figures = {"skew_seconds": round(skew, 1)}
        if abs(skew) < _SKEW_SECONDS:
            return Finding("clock", Level.OK, f"{abs(skew):.0f} s from that of the store", figures=figures)
        said = f"this host is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the store"
        fix = "Set it by NTP: from 15 minutes on, S3 refuses all requests."
        return Finding("clock", Level.WARN, said, fix, figures)

    def _room(self) -> Finding:
        found = os.statvfs(self._files.locate())
        free = found.f_bavail * found.f_frsize
        said = f"{free / 1024**3:.1f} GiB are free"
        if os.stat(self._files.locate()).st_dev == os.stat("/").st_dev:
            fix = "Check that it is mounted: a container's own disk ends with the container."
            return Finding("room", Level.WARN, f"{said}, on the disk of this machine's root", fix)
        return Finding("room", Level.OK, said, figures={"free_bytes": free})

    def _throughput(self) -> Iterator[Finding]:
        size = self._megabytes * _MIB // self._streams
        data = os.urandom(size)  # Nothing that a store could leave out.
        prefix = self._below.inside("throughput")
        keys = [f"{prefix}{number}" for number in range(self._streams)]

        def write(key: str) -> None:
            self._store.put(key, data)

        def read(key: str) -> None:
            if self._store.read(key) != data:
                raise PersistentStoreError(f"{self._store.locate(key)} was written, and other bytes are read")

        for check, act in (("throughput up", write), ("throughput down", read)):
            yield self._tried(check, lambda c=check, a=act: self._measured(c, a, keys, size))

    def _measured(self, check: str, act: Callable[[str], None], keys: list[str], size: int) -> Finding:
        begun = time.monotonic()
        with ThreadPoolExecutor(len(keys), "emergency_ckpt throughput") as pool:
            list(pool.map(act, keys))
        seconds = max(time.monotonic() - begun, 1e-6)
        speed = len(keys) * size / seconds
        figures = {"bytes_per_second": round(speed), "seconds": round(seconds, 3)}
        said = f"{speed / _MIB:.0f} MiB/s with {len(keys)} streams ({len(keys) * size / _MIB:.0f} MiB)"
        if isinstance(self._files, LocalFiles) and check.endswith("down"):
            said += ", from this machine's memory perhaps"
        return Finding(check, Level.OK, said, figures=figures)


def _absent_parents(files: ObjectFiles) -> list[Path]:
    """Directories that come into being with the examination, innermost first."""
    if not isinstance(files, LocalFiles):
        return []
    records = Path(files.locate("emergency_ckpt"))
    return [path for path in (records, *records.parents) if not path.exists()]


def _access(files: ObjectFiles) -> tuple[str, str]:
    """Server and kind of credentials."""
    try:
        server = files.store.server
        if isinstance(files.store, S3Store):
            return f"{server} (region {files.store.settings.region})", files.store.settings.kind_of_credentials
        return server, ""
    except EmergencyCheckpointError:
        return "", ""
