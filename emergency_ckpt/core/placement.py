"""Which processes keep copies of what, so that losing a slice loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def extras_keepers(process_slice: Sequence[int]) -> tuple[int | None, ...]:
    """Per process, the one other process that keeps a copy of its extras; None for a lone process.

    The keeper stands in the next slice (slices in a circle) at the same rank within it, so that a lost slice
    never takes both copies along. With one slice the failure domain is the host: the next process keeps them.
    """
    members: dict[int, list[int]] = {}
    for process, slice_index in enumerate(process_slice):
        members.setdefault(slice_index, []).append(process)
    slices = sorted(members)
    keepers: list[int | None] = []
    for process, slice_index in enumerate(process_slice):
        rank = members[slice_index].index(process)
        if len(slices) > 1:
            following = members[slices[(slices.index(slice_index) + 1) % len(slices)]]
            keepers.append(following[rank % len(following)])
        elif len(process_slice) > 1:
            keepers.append((process + 1) % len(process_slice))
        else:
            keepers.append(None)
    return tuple(keepers)


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
