"""A writer on a real S3 server, killed at any moment: whole steps only, and none that was told of is lost."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter

import pytest

from emergency_ckpt.core.lineage import StepId, is_void
from emergency_ckpt.persistent.attempts import parse_store_name
from emergency_ckpt.persistent.step_files import Mark
from emergency_ckpt.persistent.store import PersistentStore, without_void
from tests.persistent.object_store.conftest import Place
from tests.persistent.object_store.killed_writer import KEPT, seed_of
from tests.persistent.saving import assert_same, read_shards, small_state

pytestmark = [pytest.mark.server, pytest.mark.parametrize("place", ["s3"], indirect=True)]
STAGES = (
    *("writing", "written", "claimed", "place_found", "merged", "merge_checked", "merge_written"),
    "Orbax's_metadata_written",
    "side_files_written",
    "part_markers_deleted",
    "committed",
)


class Lives:
    """One run, whose writer is killed again and again."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.told: set[StepId] = set()
        self.tally: Counter[str] = Counter()
        self._generation = 0
        self._held: set[StepId] = set()  # as the life that is going on knows them
        self._given_up: set[StepId] = set()  # by retention, which may have deleted them

    def live(self, steps: int, back: int, until: tuple[str, int] | None = None, delay: float = 0.0) -> None:
        """A life that is killed that long after it has said something that often; None: lives to its end."""
        command = [sys.executable, "-m", "tests.persistent.object_store.killed_writer"]
        writer = subprocess.Popen(
            [*command, self.url, str(steps), str(back)], stdout=subprocess.PIPE, text=True
        )
        last, heard = "nothing", 0
        with writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                last = self._hear(line)
                heard += until is not None and last == until[0]
                if until is not None and heard == until[1]:
                    time.sleep(delay)
                    writer.kill()
                    until = None
            code = writer.wait(60)
        assert code in (0, -9), (code, last)
        self.tally[f"killed after {last}" if code else "ended"] += 1

    def _hear(self, line: str) -> str:
        what, number = line.split(maxsplit=1)
        assert what != "failed", line
        if what == "began":
            self._generation = int(number)
        if what == "activated":
            self._held = {step for step in self._held if step.step <= int(number)}
        if what == "committed":
            self.told.add(StepId(self._generation, int(number)))
            self._held.add(StepId(self._generation, int(number)))
            self._given_up |= set(sorted(self._held)[:-KEPT])
        return what

    def look(self) -> None:
        """What a reader finds: whole steps, all that have to be there, and nothing else."""
        store = PersistentStore(self.url)
        valid = without_void(store.steps(), store.activations())
        for held in valid:
            assert_same(read_shards(store.open_step(held)), small_state(seed_of(held.step_id)))
        found = {held.step_id for held in valid}
        self.tally["steps verified"] += len(found)
        self.tally["committed and not told"] += len(found - self.told)
        activations = store.activations()
        assert {step for step in self.told - self._given_up if not is_void(step, activations)} <= found
        self._held = found
        pointed = store.latest()
        assert pointed is None or pointed.name == store.names.name(pointed.step_id.step)

    def assert_tidy(self) -> None:
        """Committed steps, with what belongs to them, and no more."""
        store = PersistentStore(self.url)
        names = {held.name: held for held in store.steps()}
        assert {entry.name for entry in store.files.entries() if entry.name.isdigit()} == set(names)
        assert len(names) == KEPT
        assert not store.files.entries("emergency_ckpt/attempts")
        for name in names:
            mark = Mark.read(store.files.below(name))
            assert mark is not None
            stores = filter(None, (parse_store_name(e.name) for e in store.files.entries(f"{name}/default")))
            owners = {(owner.generation, owner.nonce, owner.ordinal) for owner in stores}
            assert owners == {(mark.step_id.generation, mark.nonce, mark.ordinal)}
            sides = [e.name for e in store.files.entries(name) if e.name.startswith("emergency_ckpt.")]
            assert len([side for side in sides if side.split(".")[1].isdigit()]) == 1


def kill(place: Place, kills: int, seed: int) -> Lives:
    lives = Lives(f"{place.url}/{place.prefix}run", seed)
    lives.live(steps=4, back=0)
    for _ in range(kills):
        moment = lives.random.choice(STAGES), lives.random.randint(1, 3)
        # Later by up to what the longest of what follows takes.
        lives.live(40, lives.random.choice((0, 0, 1, 2)), moment, lives.random.uniform(0, 0.05))
        lives.look()
    lives.live(steps=4, back=1)
    lives.look()
    lives.assert_tidy()
    assert lives.tally["ended"] == 2
    return lives


def test_a_writer_that_is_killed_leaves_whole_steps_and_the_next_life_goes_on(place: Place) -> None:
    lives = kill(place, 5, seed=1)
    assert sum(count for what, count in lives.tally.items() if what.startswith("killed")) == 5


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_writer_that_is_killed_fifty_times(place: Place) -> None:
    seed = time.time_ns()
    lives = kill(place, 50, seed)
    print(f"seed {seed}: {dict(sorted(lives.tally.items()))}")
