"""Which processes keep copies of what, so that losing a slice loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_EXTRAS_KEEPERS = 2
"""How many others keep a copy of a process's extras, where there are so many."""


def extras_keepers(process_slice: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Per process, the other processes that keep a copy of its extras; none for a lone process.

    They stand in the next slices (slices in a circle) at the same rank within them, so that two lost slices
    never take all copies along. With one slice the failure domain is the host: the next processes keep them.
    """
    domains = failure_domains(process_slice)
    members: list[list[int]] = [[] for _ in range(max(domains, default=-1) + 1)]
    for process, domain in enumerate(domains):
        members[domain].append(process)
    rank = {process: at for among in members for at, process in enumerate(among)}
    keepers: list[tuple[int, ...]] = []
    for process, domain in enumerate(domains):
        following = [members[(domain + ahead) % len(members)] for ahead in range(1, len(members))]
        keepers.append(tuple(among[rank[process] % len(among)] for among in following[:_EXTRAS_KEEPERS]))
    return tuple(keepers)


def failure_domains(process_slice: Sequence[int]) -> tuple[int, ...]:
    """Per process what fails together with it: its slice, or, in a job of one slice, itself alone."""
    slices = sorted(set(process_slice))
    if len(slices) == 1:
        return tuple(range(len(process_slice)))
    number = {s: i for i, s in enumerate(slices)}
    return tuple(number[s] for s in process_slice)


def assign_directories(held: Mapping[int, int | None], processes: Sequence[int]) -> dict[int, int]:
    """Which directory (by ordinal) each process of one host takes.

    Each takes the one with its own shards where there is one, so that after a restart everybody finds what it
    sealed; the others share what is left, lowest ordinals first.

    Args:
      held: the directories that exist: ordinal → the process index whose shards are in it (None: nobody's).
      processes: the process indices on this host.
    """
    assigned: dict[int, int] = {}
    for ordinal in sorted(held):
        position = held[ordinal]
        if position is not None and position in processes and position not in assigned:
            assigned[position] = ordinal
    taken = set(assigned.values())
    free = (o for o in range(len(held) + len(processes)) if o not in taken)
    for process in sorted(processes):
        if process not in assigned:
            assigned[process] = next(free)
    return assigned
