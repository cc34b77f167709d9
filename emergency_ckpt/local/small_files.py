"""Small files beside the slots (manifests, layouts): put in place whole or not at all, and read with bounds.

What cannot be written leaves nothing behind, and what stands in a file's place is never waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from emergency_ckpt.errors import CorruptDataError, LocalCapacityError, LocalDirectoryError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def replace_file(path: Path, data: bytes, what: str) -> None:
    """Puts `data` at `path` by rename; `what` names it in the error.

    Raises LocalCapacityError where the ramdisk is full, LocalDirectoryError where it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # Not there, or not removable: the next start removes it.
            temporary.unlink()
        if error.errno in _NO_ROOM:
            raise LocalCapacityError(
                f"{what} ({len(data)} bytes) cannot be written to {path}: the ramdisk is full. Something else "
                "writes there: remove it, or ask for a larger ramdisk."
            ) from error
        raise LocalDirectoryError(
            f"{what} cannot be written to {path}: {error.strerror}. Check that the local checkpoint directory "
            "is still there, its owner, and that it is not mounted read-only."
        ) from error


def read_file(path: Path, kind: str, most_bytes: int) -> bytes | None:
    """The content of a file, None where there is none.

    Raises CorruptDataError for one of more than `most_bytes`, LocalDirectoryError for one that cannot be read
    or is no file.
    """
    try:
        # Looked at once it is open: what was looked at before could have been replaced by a link, or a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise LocalDirectoryError(
                    f"{path} should be a {kind} and is no file: remove it, then start again"
                )
            if status.st_size > most_bytes:
                raise CorruptDataError(f"the {kind} {path} has {status.st_size} bytes, {most_bytes} at most")
            with os.fdopen(os.dup(fd), "rb") as file:
                return file.read(most_bytes)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, LocalDirectoryError):
            raise
        raise LocalDirectoryError(
            f"the {kind} {path} cannot be read: {error.strerror}. Check the owner of the local checkpoint "
            "directory, and that nothing but this package writes there."
        ) from error
