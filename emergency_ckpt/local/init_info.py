"""What a multi-tier volume of GKE tells a host before it joins the job: its process id, and where process 0 is.

The file is read once it is whole. What is half written is waited for, with a limit; what cannot be right is
refused by name, because a wrong process id gives a host the shards of another one.
"""

from __future__ import annotations

import dataclasses
import re
import time
from datetime import timedelta
from pathlib import Path

from absl import logging

from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.small_files import read_file

FILE_NAME = "jax-init-info.txt"
_MAX_BYTES = 4096
_MOST_PROCESSES = 1 << 20
_POLL_SECONDS = 0.1
# How long content without a newline at its end must stay as it is before it counts as whole.
_SETTLED_SECONDS = 1.0
_PROCESS_ID = re.compile(r"\d{1,7}")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]):(\d{1,5})")


@dataclasses.dataclass(frozen=True, slots=True)
class InitInfo:
    """What `jax.distributed.initialize` is to be told: `coordinator_address` is `host:port`."""

    process_id: int
    coordinator_address: str


def wait_for_init_info(directory: Path, limit: timedelta, *, is_expected: bool) -> InitInfo | None:
    """What the file in `directory` says; the platform writes it once it knows which host has process 0.

    Where it is not expected, one look tells whether it is there: None if not. Where it is there, or is
    expected, it is waited for until it is whole.

    Raises LocalDirectoryError when it did not come within `limit` or cannot be read, and CorruptDataError for
    content that cannot be right; both name the file.
    """
    path = directory / FILE_NAME
    deadline = time.monotonic() + limit.total_seconds()
    seen: bytes | None = None
    since = time.monotonic()
    told = False
    while True:
        data, now = read_file(path, "file of process id and coordinator address", _MAX_BYTES), time.monotonic()
        if data is None and not is_expected and seen is None:
            return None
        if data != seen:
            seen, since = data, now
        if data and (_is_ended(data) or now - since >= _SETTLED_SECONDS):
            return parse_init_info(data, str(path))
        if now >= deadline:
            raise LocalDirectoryError(
                f"{path} {_state(data)} after {limit.total_seconds():g} s. The platform writes the process id "
                "of this host and the coordinator's address there when all hosts are known: look at the pods "
                "of the multi-tier checkpointing driver and at hosts that are still missing. On a ramdisk that "
                "is no such volume, set use_replicator_service and enable_multi_tier_checkpointing to False."
            )
        if not told:
            logging.info("waiting up to %g s for %s, which %s", limit.total_seconds(), path, _state(data))
            told = True
        time.sleep(_POLL_SECONDS)


def parse_init_info(data: bytes, origin: str) -> InitInfo:
    """The process id in the first line, the coordinator's address in the second; `origin` goes into the error.

    Later lines may say anything. Raises CorruptDataError.
    """
    try:
        lines = [line.strip() for line in data.decode("ascii").split("\n")]
    except UnicodeDecodeError as error:
        raise _refused(origin, "it is no text", data) from error
    process, address = (*lines, "", "")[:2]
    if not _PROCESS_ID.fullmatch(process) or int(process) >= _MOST_PROCESSES:
        raise _refused(origin, "its first line is no process id (a number from 0)", data)
    found = _ADDRESS.fullmatch(address)
    if not found or not 0 < int(found[1]) < 1 << 16:
        raise _refused(origin, "its second line is no address (host:port) of the coordinator", data)
    return InitInfo(int(process), address)


def _refused(origin: str, why: str, data: bytes) -> CorruptDataError:
    return CorruptDataError(
        f"{origin} cannot be used: {why}. It begins with {data[:60]!r}. Remove it and let the platform write "
        "it anew (restart the pod), or find out what else writes there."
    )


def _is_ended(data: bytes) -> bool:
    """Whether two lines are there with their ends."""
    return data.count(b"\n") >= 2


def _state(data: bytes | None) -> str:
    if data is None:
        return "is not there"
    return "is half written" if data else "is empty"
