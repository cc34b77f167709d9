"""The slot state machine that runs in production, explored exhaustively in a hostile world.

Each exploration visits every world that is reachable under its rules, by any interleaving of saves, writes
that end or fail, time-outs, late seals, messages that arrive late or never, drains, crashes at any point, and
restores of the newest or an older step with retraining of the same step numbers. In every world the newest
complete step can be restored, a manifest stands over its own bytes only, nothing is overwritten while it is
drained, and a new step can still become complete.

`make explore` goes on to three processes with three slots, up to EXPLORE_WORLDS worlds each (about a gigabyte
per four million), and says how far it came; without that variable only the first thousands are visited.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.slots import Outcome, SlotTable
from tests.core.explorer import Explorer
from tests.core.slot_world import Rules, Violation

# What is not said is unlimited, so "4 saves" are four steps in all generations together, and no limit means
# any number of steps and crashes.
EXPLORED = {
    "any number of steps and crashes": Rules(),
    "ramdisks wiped, shards replicated": Rules("AA"),
    "older steps restored, messages of older generations": Rules(
        saves=4, restore_older=True, late_messages=True
    ),
    "the running job goes back": Rules(saves=4, crashes=1, live_restore=True, late_messages=True),
    "the running job goes back, ramdisks wiped": Rules("AA", saves=3, crashes=1, live_restore=True),
    "slots pinned by drains": Rules(saves=3, crashes=1, drains=True),
    "slots being repaired": Rules(saves=3, crashes=1, repairs=True),
    "slots drained by another process": Rules(saves=3, crashes=1, outside=True),
    "two steps kept in three slots": Rules(
        slots=3, max_to_keep=2, promises=2, saves=4, crashes=1, in_order=True
    ),
    "a spare slot": Rules(slots=3, saves=3, crashes=1),
    "slots for staging only": Rules(max_to_keep=0, promises=0, saves=2, crashes=1, drains=True),
    "one process two saves ahead": Rules(saves=4, crashes=1, lead=2),
    "three processes": Rules("ABC", saves=2),
    "three processes, some replicated": Rules("AAB", saves=2, restore_older=True),
}

DEEP = {
    "older steps restored, any number of steps": Rules(restore_older=True, late_messages=True),
    "three processes, two slots": Rules("ABC", saves=4),
    "three processes, three slots, three steps": Rules("ABC", slots=3, saves=3),
    "three processes, three slots, four steps": Rules("ABC", slots=3, saves=4),
    "three processes, some replicated": Rules("AAB", slots=3, saves=4, restore_older=True),
    "three processes, two steps kept": Rules("ABC", slots=3, max_to_keep=2, promises=2, saves=4, in_order=True),
    "three processes, drains": Rules("ABC", slots=3, saves=4, drains=True),
    "three processes, the running job goes back": Rules(
        "AAB", slots=3, saves=4, crashes=2, live_restore=True, late_messages=True
    ),
    "drains": Rules(saves=4, drains=True),
    "the running job goes back": Rules("AA", saves=4, crashes=2, live_restore=True, restore_older=True),
}


_FIRST_WORLDS = 4000


@pytest.mark.parametrize("rules", EXPLORED.values(), ids=EXPLORED.keys())
def test_every_reachable_world_keeps_the_newest_complete_step(rules: Rules) -> None:
    explored = Explorer(rules).explore()
    print(explored)
    assert explored.stopped is None
    assert explored.worlds > 1000


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rules", DEEP.values(), ids=DEEP.keys())
def test_deep_exploration(rules: Rules) -> None:
    explored = Explorer(rules).explore(max_worlds=int(os.environ.get("EXPLORE_WORLDS", _FIRST_WORLDS)))
    print(f"\n{rules}: {explored}")
    assert explored.worlds > 1000


# Each protective rule is dropped once: an exploration that then finds nothing would prove nothing.


def _plain(table: SlotTable, **changes: Any) -> SlotTable:
    """The real machine with what `table` knows, changed."""
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(SlotTable)}
    return SlotTable(**(fields | changes))


class IgnoresWriters(SlotTable):
    def protection(self, index: int) -> str | None:
        return super().protection(index) if self.slots[index].sealed else None


class IgnoresPins(SlotTable):
    def protection(self, index: int) -> str | None:
        slots = tuple(dataclasses.replace(slot, pins=0) for slot in self.slots)
        return _plain(self, slots=slots).protection(index)


class IgnoresRepairs(SlotTable):
    def protection(self, index: int) -> str | None:
        slots = tuple(dataclasses.replace(slot, repairing=False) for slot in self.slots)
        return _plain(self, slots=slots).protection(index)


class IgnoresWhatIsUnusable(SlotTable):
    def begin(
        self, step: StepId, pins: int = 0, unusable: Mapping[int, str] = MappingProxyType({})
    ) -> tuple[SlotTable, int | None, str]:
        return super().begin(step, pins)


class TakesUnknownForAbandoned(SlotTable):
    def _given_up(self, step: StepId) -> bool:
        return super()._given_up(step) or step not in self.complete


class TakesSealedForComplete(SlotTable):
    def protection(self, index: int) -> str | None:
        sealed = {slot.step for slot in self.slots if slot.step and slot.sealed}
        return _plain(self, complete=self.complete | sealed).protection(index)


class TakesAbandonedForComplete(SlotTable):
    def protection(self, index: int) -> str | None:
        return _plain(self, complete=self.complete | self.abandoned, abandoned=frozenset()).protection(index)


class LetsVoidStepsSupersede(SlotTable):
    def protection(self, index: int) -> str | None:
        if _plain(self, activations=frozenset()).protection(index) is None:
            return None
        return super().protection(index)


class KeepsVoidSteps(SlotTable):
    def _given_up(self, step: StepId) -> bool:
        return step in self.abandoned


class KeepsAbandonedSteps(SlotTable):
    def _given_up(self, step: StepId) -> bool:
        return super()._given_up(step) and step not in self.abandoned


class KeepsOneOnly(SlotTable):
    def protection(self, index: int) -> str | None:
        return _plain(self, max_to_keep=1).protection(index)


class KeepsOneTooMany(SlotTable):
    def protection(self, index: int) -> str | None:
        return _plain(self, max_to_keep=self.max_to_keep + 1).protection(index)


class HearsAbandonedAfterComplete(SlotTable):
    def settle(self, step: StepId, outcome: Outcome) -> SlotTable:
        if outcome is Outcome.ABANDONED:
            return dataclasses.replace(self, abandoned=self.abandoned | {step})._pruned()
        return super().settle(step, outcome)


LATE = Rules(saves=3, crashes=2, restore_older=True, late_messages=True)


@pytest.mark.parametrize(
    ("broken", "rules"),
    [
        (IgnoresWriters, Rules()),
        (IgnoresPins, Rules(saves=3, crashes=0, drains=True)),
        (IgnoresPins, Rules(max_to_keep=0, promises=0, saves=3, crashes=0, drains=True)),
        (IgnoresRepairs, Rules(saves=3, crashes=0, repairs=True)),
        (IgnoresWhatIsUnusable, Rules(saves=3, crashes=0, outside=True)),
        (TakesUnknownForAbandoned, Rules()),
        (TakesSealedForComplete, Rules()),
        (TakesAbandonedForComplete, Rules()),
        (LetsVoidStepsSupersede, Rules(saves=3, crashes=1, live_restore=True, drains=True)),
        (KeepsVoidSteps, Rules(restore_older=True)),
        (KeepsAbandonedSteps, Rules()),
        (KeepsOneOnly, Rules(slots=3, max_to_keep=2, promises=2, saves=4, crashes=0, in_order=True)),
        (KeepsOneTooMany, Rules()),
        (HearsAbandonedAfterComplete, LATE),
    ],
)
def test_a_machine_without_one_of_its_rules_is_caught(broken: type[SlotTable], rules: Rules) -> None:
    with pytest.raises(Violation):
        Explorer(rules, broken).explore()


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(
            Rules(restore_older=True, activate_early=True), id="a restore counts before all hold its state"
        ),
        pytest.param(
            Rules(live_restore=True, save_early=True), id="a save before the restore is known to be done"
        ),
        pytest.param(
            Rules(live_restore=True, late_messages=True, listen_in_restore=True),
            id="old outcomes are heard in a restore",
        ),
        pytest.param(Rules(keep_manifest=True), id="the manifest of a reused slot stays"),
        pytest.param(
            Rules(saves=3, crashes=0, outside=True, overlook_outside=True), id="a drain elsewhere is overlooked"
        ),
        pytest.param(Rules(slots=3, max_to_keep=2, promises=2, saves=4, crashes=0), id="outcomes out of order"),
    ],
)
def test_a_caller_that_makes_a_mistake_is_caught(mistake: Rules) -> None:
    with pytest.raises(Violation):
        Explorer(mistake).explore()
