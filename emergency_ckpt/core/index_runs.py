"""Ascending indices in JSON, in few numbers: runs with one distance between neighbours.

A process holds one shard of each leaf, so that its indices are far apart but often evenly so. What is read
back is bounded before memory is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

_SHORTEST_RUN = 4  # Three numbers in place of four.
MOST_INDICES = 1 << 24


def runs_to_json(indices: Sequence[int]) -> list[int | list[int]]:
    """Indices by themselves, and runs as [first, how many, distance]."""
    found: list[int | list[int]] = []
    at = 0
    while at < len(indices):
        end = at + 1
        step = indices[end] - indices[at] if end < len(indices) else 0
        while end < len(indices) and indices[end] - indices[end - 1] == step:
            end += 1
        if end - at >= _SHORTEST_RUN:
            found.append([indices[at], end - at, step])
        else:
            end = at + 1
            found.append(indices[at])
        at = end
    return found


def runs_from_json(raw: Any, most: int = MOST_INDICES) -> tuple[int, ...]:
    """What `runs_to_json` wrote of `most` indices; raises ValueError or TypeError for anything else."""
    if not isinstance(raw, list):
        raise TypeError(f"{raw!r:.80} is no list of runs")
    indices: list[int] = []
    for run in cast(list[Any], raw):
        first, count, step = cast(list[Any], run) if isinstance(run, list) else (run, 1, 1)
        first, count, step = whole_number(first), whole_number(count), whole_number(step)
        if not 0 < count <= most - len(indices) or not step or (indices and first <= indices[-1]):
            raise ValueError(f"{run!r:.80} does not go on a list of ascending indices")
        indices.extend(range(first, first + count * step, step))
    return tuple(indices)


def whole_number(raw: Any) -> int:
    """Raises TypeError or ValueError for what is no whole number from 0 on."""
    if type(raw) is not int:
        raise TypeError(f"{raw!r:.80} is no whole number")
    if not 0 <= raw < 1 << 62:
        raise ValueError(f"{raw!r:.80} is out of range")
    return raw
