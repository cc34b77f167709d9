"""How restore plans speak of processes and shards: a few words, however many there are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

_NAMED = 8


def processes_named(processes: Iterable[int]) -> str:
    numbers = sorted(processes)
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    shown = ", ".join(map(str, numbers[:_NAMED])) + more
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def slices_or_processes(processes: Collection[int], process_slice: Sequence[int]) -> str:
    """'slice 1' where these are whole slices of several, the process numbers otherwise."""
    slices = {process_slice[p] for p in processes}
    members = [p for p, s in enumerate(process_slice) if s in slices]
    if max(process_slice, default=0) > 0 and members == sorted(processes):
        return ("slice " if len(slices) == 1 else "slices ") + ", ".join(map(str, sorted(slices)))
    return processes_named(processes)


def is_one(named: str) -> bool:
    """Whether the verb that follows is to be singular."""
    return named.startswith(("slice ", "process "))


def shards_counted(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def because(what: str, why: str) -> str:
    return f"{what} ({why})" if why else what
