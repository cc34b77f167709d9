"""Which host stands where in the mesh, so that as many bytes as possible lie where they are needed already.

An assignment problem: whole slices change places, and on request the hosts within them. Of all arrangements
that keep the most bytes, the one in which most slices stay is taken, and within them most hosts.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.plan_words import processes_named

Matrix = npt.NDArray[np.float64]

_EXACT = 1 << 40
"""Bytes are counted in this many units at most, so that they and the wish to stay fit a double exactly."""


@dataclasses.dataclass(frozen=True, slots=True)
class MeshPlace:
    """Where a host stood in a mesh: the mesh's shape, and its positions as indices into the flat array.

    It is what a slot remembers of the job that sealed it.
    """

    shape: tuple[int, ...]
    positions: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Place:
    """A host's place in the mesh: a slice, and its spot there (equal spots lie alike in their slices)."""

    slice: int
    spot: int


@dataclasses.dataclass(frozen=True, slots=True)
class HeldStep:
    """One sealed step on a host's ramdisk.

    Attributes:
      step: which step.
      content: equal for slots with the same bits of the same shards.
      nbytes: how many bytes they are.
      place: where in a mesh of this shape the host stood that saved it; None where that is not known.
    """

    step: StepId
    content: str
    nbytes: int
    place: Place | None


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where the hosts stand before anything is arranged.

    Attributes:
      places: per process, its place.
      slice_rows: per slice how many rows of the mesh it has; slices of the same number can change places.
      spot_forms: per spot its form; hosts on spots of one form can change places.
    """

    places: tuple[Place, ...]
    slice_rows: tuple[int, ...]
    spot_forms: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Where the hosts are to stand.

    Attributes:
      places: per process, its place. A slice moves as a whole: no two processes of one slice part.
      step: the step whose shards counted; None where nothing was told.
      kept_bytes: of that step, on the ramdisks of hosts that stand where they need all they hold.
      kept_before: the same where nobody moves.
      reason: in words.
    """

    places: tuple[Place, ...]
    step: StepId | None
    kept_bytes: int
    kept_before: int
    reason: str

    def moved(self, standing: Standing) -> tuple[int, ...]:
        """The processes that stand elsewhere than before, ascending."""
        both = enumerate(zip(self.places, standing.places, strict=True))
        return tuple(process for process, (now, before) in both if now != before)


def arrange(standing: Standing, held: Sequence[Sequence[HeldStep]], *, move_hosts: bool) -> Arrangement:
    """Where every process is to stand, given per process what is on its ramdisk.

    Every place needs what was saved there. A host keeps its bytes where it stands on a place that needs just
    these (replicas are equal, so any of theirs will do), and none otherwise. What counts is the step that most
    hosts hold, of several the newest. `move_hosts`: hosts may change places within their slice, too.
    """
    step = _step_that_counts(held)
    found = [
        min((each for each in of if each.step == step), key=lambda each: each.place is None, default=None)
        for of in held
    ]
    known = {p: each for p, each in enumerate(found) if each is not None and each.place is not None}
    if step is None or not known:
        why = "no ramdisk holds a step" if step is None else "no ramdisk tells of a place in such a mesh"
        return Arrangement(standing.places, step, 0, 0, f"{why}: all hosts stand where they stood")
    problem = _Problem(standing, known)
    hosts_may_move = move_hosts and problem.slices_are_alike
    worth = problem.worth_of_hosts_moved() if hosts_may_move else problem.worth()
    target = _assign(worth, standing.slice_rows)
    places = list(standing.places)
    for source, slice_index in enumerate(target):
        for process, spot in problem.spots_in(source, int(slice_index), hosts_may_move).items():
            places[process] = Place(int(slice_index), spot)
    kept, before = problem.kept(places), problem.kept(standing.places)
    arranged = Arrangement(tuple(places), step, kept, before, "")
    if kept <= before:
        arranged = dataclasses.replace(arranged, places=standing.places, kept_bytes=before)
    reason = _describe(arranged, standing, problem)
    if move_hosts and not problem.slices_are_alike:
        reason += "; hosts stay in their order, because they lie differently in different slices"
    return dataclasses.replace(arranged, reason=reason)


class _Problem:
    """Who holds what, and which place needs what, as numbers: contents by number, -1 for nothing known."""

    def __init__(self, standing: Standing, known: Mapping[int, HeldStep]) -> None:
        self._standing = standing
        self.held = known
        slices, spots = len(standing.slice_rows), len(standing.spot_forms)
        numbers: dict[str, int] = {}
        for each in known.values():
            numbers.setdefault(each.content, len(numbers))
        self._number = {p: numbers[each.content] for p, each in known.items()}
        self._bytes = np.zeros(len(numbers), np.float64)
        for each in known.values():
            self._bytes[numbers[each.content]] = each.nbytes
        self._has = np.full((slices, spots), -1, np.int64)
        self._stands = np.full((slices, spots), -1, np.int64)
        for process, place in enumerate(standing.places):
            self._stands[place.slice, place.spot] = process
            self._has[place.slice, place.spot] = self._number.get(process, -1)
        self._needs = self._needed(slices, spots)

    def _needed(self, slices: int, spots: int) -> npt.NDArray[np.int64]:
        told: dict[Place, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        for process, each in self.held.items():
            if each.place is not None:
                told[each.place][self._number[process]] += 1
        needs = np.full((slices, spots), -1, np.int64)
        for place, by in told.items():
            needs[place.slice, place.spot] = min(by, key=lambda number: (-by[number], number))
        for spot in range(spots):
            # Where slices that tell are replicas of each other, so is one of which nobody tells.
            column = needs[:, spot]
            some = column[column >= 0]
            if len(some) > 1 and (some == some[0]).all():
                column[column < 0] = some[0]
        return needs

    @property
    def slices_are_alike(self) -> bool:
        """Whether all slices have the same spots."""
        return bool(((self._stands >= 0) == (self._stands[:1] >= 0)).all())

    def worth(self) -> Matrix:
        """Bytes kept by each slice (row) at the place of each (column), its hosts in their order."""
        worth = np.zeros((len(self._has), len(self._has)))
        for spot in range(self._has.shape[1]):
            has, needs = self._has[:, spot], self._needs[:, spot]
            rows, columns = np.flatnonzero(has >= 0), np.flatnonzero(needs >= 0)
            if len(rows) and len(columns):
                fits = has[rows, None] == needs[None, columns]
                worth[np.ix_(rows, columns)] += fits * self._bytes[has[rows], None]
        return worth

    def worth_of_hosts_moved(self) -> Matrix:
        """The same, with the hosts of each slice in the best order. The slices are alike."""
        worth = np.zeros((len(self._has), len(self._has)))
        forms = np.array(self._standing.spot_forms, np.int64)
        for form in np.unique(forms).tolist():
            has, needs = self._has[:, forms == form], self._needs[:, forms == form]
            holders, wanters = _counted(has), _counted(needs)
            for number, (rows, count) in holders.items():
                if number in wanters:
                    columns, wanted = wanters[number]
                    pairs = np.minimum(count[:, None], wanted[None, :])
                    worth[np.ix_(rows, columns)] += pairs * self._bytes[number]
        return worth

    def spots_in(self, source: int, target: int, hosts_may_move: bool) -> dict[int, int]:
        """Per process of slice `source` its spot at the place of slice `target`."""
        stands = self._stands[source]
        here = {int(stands[spot]): int(spot) for spot in np.flatnonzero(stands >= 0)}
        if not hosts_may_move:
            return here
        forms = self._standing.spot_forms
        needs = self._needs[target]
        fits = {p: spot for p, spot in here.items() if 0 <= self._number.get(p, -1) == needs[spot]}
        free: dict[tuple[int, int], collections.deque[int]] = collections.defaultdict(collections.deque)
        for spot in sorted(set(here.values()) - set(fits.values())):
            free[forms[spot], int(needs[spot])].append(spot)
        for process, spot in here.items():
            matching = free.get((forms[spot], self._number.get(process, -2)))
            if process not in fits and matching:
                fits[process] = matching.popleft()
        left = set(here.values()) - set(fits.values())
        for process, spot in here.items():
            if process not in fits and spot in left:
                fits[process] = spot
                left.discard(spot)
        for process, spot in here.items():
            if process not in fits:
                fits[process] = min(other for other in left if forms[other] == forms[spot])
                left.discard(fits[process])
        return fits

    def fitting(self, places: Sequence[Place]) -> list[int]:
        """The processes that stand where all they hold is needed."""
        return [
            process
            for process, number in self._number.items()
            if self._needs[places[process].slice, places[process].spot] == number
        ]

    def kept(self, places: Sequence[Place]) -> int:
        return sum(self.held[process].nbytes for process in self.fitting(places))


def _counted(
    numbers: npt.NDArray[np.int64],
) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Per content that is there: the rows that have it, and how often each."""
    found: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for row, column in zip(*np.nonzero(numbers >= 0), strict=True):
        found[int(numbers[row, column])][int(row)] += 1
    return {
        number: (np.array(sorted(by), np.int64), np.array([by[row] for row in sorted(by)], np.int64))
        for number, by in found.items()
    }


def _step_that_counts(held: Sequence[Sequence[HeldStep]]) -> StepId | None:
    """A host that was away has old steps, one that was faster a step that nobody else has."""
    holders = collections.Counter(step for of in held for step in {each.step for each in of})
    return max(holders, key=lambda step: (holders[step], step), default=None)


def _assign(worth: Matrix, slice_rows: Sequence[int]) -> Sequence[int]:
    """Per slice the one at whose place it is to stand."""
    count = len(worth)
    home = np.arange(count)
    if worth.diagonal().sum() >= worth.max(axis=1).sum():
        return home.tolist()
    # scipy comes with jax, and is imported by those only who have something to arrange.
    from scipy.optimize import linear_sum_assignment  # pyright: ignore

    unit = max(1.0, float(worth.max(axis=1).sum()) / _EXACT)
    wish = np.floor(worth / unit) * (count + 1) + np.eye(count)
    rows = np.array(slice_rows)
    wish[rows[:, None] != rows[None, :]] = -float(_EXACT) * (count + 1)
    _, target = linear_sum_assignment(wish, maximize=True)  # pyright: ignore
    return [int(each) for each in target]  # pyright: ignore


def _describe(arranged: Arrangement, standing: Standing, problem: _Problem) -> str:
    step, moved = arranged.step, arranged.moved(standing)
    fitting = len(problem.fitting(arranged.places))
    held = f"{fitting} of {len(standing.places)} hosts stand where all they hold of {step} is needed"
    if not moved:
        better = " (no other order would keep more)" if fitting < len(problem.held) else ""
        return f"{held}, and nobody moves{better}"
    both = {p: (standing.places[p], arranged.places[p]) for p in moved}
    slices = sorted({before.slice for before, now in both.values() if before.slice != now.slice})
    if slices:
        named = f"slices {', '.join(map(str, slices))}" if len(slices) < 9 else f"{len(slices)} slices"
    else:
        named = processes_named(moved)
    within = sum(before.spot != now.spot for before, now in both.values())
    hosts = f", and {within} hosts theirs within slices" if slices and within else ""
    return (
        f"{named} change places{hosts}: {held}, {arranged.kept_bytes} bytes instead of {arranged.kept_before}"
    )
