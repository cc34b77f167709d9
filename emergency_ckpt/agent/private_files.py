"""Files that an agent keeps beside the slots for nobody but its owner: tokens may be in them.

They appear whole, by rename; what somebody else put in their place is not read, and never waited for.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError


def write_private(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, readable by the owner only. Raises LocalDirectoryError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise LocalDirectoryError(
            f"the agent cannot write {path} ({len(data)} bytes): {error.strerror}. Check the owner of the "
            "local checkpoint directory, its room, and that it is not mounted read-only."
        ) from error


def read_private(path: Path, what: str, most_bytes: int) -> bytes | None:
    """The content of a file of this user, None where there is none.

    Raises CorruptDataError for one that is larger, LocalDirectoryError for one that is no file, is of another
    user, or cannot be read.
    """
    try:
        # A FIFO does not block, and a link leads nowhere.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalDirectoryError(
            f"the {what} {path} cannot be read: {error.strerror}. Run the agent and the job as one user, and "
            "remove what is not theirs from the ramdisk."
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LocalDirectoryError(f"{path} should be a {what} and is no file: remove it, then start again")
        if status.st_uid not in (0, os.geteuid()):
            raise LocalDirectoryError(
                f"{path} belongs to user {status.st_uid}, not to this one ({os.geteuid()}): run the agent and "
                "the job as one user, or remove what is not yours from the ramdisk"
            )
        if status.st_size > most_bytes:
            raise CorruptDataError(f"the {what} {path} has {status.st_size} bytes, {most_bytes} at most")
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(most_bytes)
    finally:
        os.close(fd)
