"""Slots that hold overlapping parts of a state give one version of each shard to all: what most have."""

from __future__ import annotations

import collections
import dataclasses
import random

from hypothesis import assume, given
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.parts import MOST_PARTS, part_digests, part_numbers
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import SlotOf, slot_fingerprints
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.spread import spread
from tests.core.planning_world import STEP, groups_of


def replicated(slices: int, hosts: int, sharded: int, whole: int) -> Layout:
    """Each slice has all: leaves cut over its hosts, leaves that are whole on each host, and a value."""
    held = {
        s * hosts + h: [Shard(f"w{i:02}", Box((h * 4,), (h * 4 + 4,))) for i in range(sharded)]
        + [Shard(f"x{i:02}", Box((0,), (4,))) for i in range(whole)]
        for s in range(slices)
        for h in range(hosts)
    }
    leaves = [LeafSpec(f"w{i:02}", (4 * hosts,), "int8") for i in range(sharded)]
    leaves += [LeafSpec(f"x{i:02}", (4,), "int8") for i in range(whole)]
    return Layout.build(leaves, held, tuple(p // hosts for p in range(slices * hosts)), ["lr"])


@dataclasses.dataclass(frozen=True)
class Kept:
    """A slot, and per shard of its layout a number for its content."""

    layout: Layout
    holding: Holding
    contents: dict[int, int]
    value: int


@dataclasses.dataclass(frozen=True)
class Job:
    planner: Planner
    slots: dict[int, Kept]
    numbers: dict[SlotOf, Fingerprints]

    def asked(self) -> Planner:
        """Its planner, once all slots that it asks have answered."""
        asked = {slot for each in self.planner.differing_replicas(1) for slot in each.asked}
        return dataclasses.replace(self.planner, fingerprints={slot: self.numbers[slot] for slot in asked})

    def voted(self) -> dict[Shard, int]:
        """Per shard the content that wins: of most slots, then good somewhere, then of the lowest slice."""
        ballots: dict[Shard, list[tuple[int, int, bool]]] = collections.defaultdict(list)
        for process, kept in self.slots.items():
            for shard, content in kept.contents.items():
                is_good = shard not in kept.holding.missing
                ballots[kept.layout.shards[shard]].append((process, content, is_good))
        found: dict[Shard, int] = {}
        for shard, cast in ballots.items():
            counts = collections.Counter(content for _, content, _ in cast)

            def standing(
                content: int, cast: list[tuple[int, int, bool]] = cast, counts: dict[int, int] = counts
            ) -> tuple[int, bool, int]:
                good = any(is_good for _, c, is_good in cast if c == content)
                return -counts[content], not good, min(p for p, c, _ in cast if c == content)

            found[shard] = min(counts, key=standing)
        return found

    def got(self, planner: Planner) -> dict[Shard, set[int]] | None:
        """Per shard the contents that processes end with by the plan; None where there is none."""
        plan, _ = planner.plan()
        if plan is None:
            return None
        found: dict[Shard, set[int]] = collections.defaultdict(set)
        for process, own in enumerate(plan.processes):
            assert own.sender is None
            assert not own.persistent
            wanted = {planner.layout.shards[i] for i in planner.layout.process_shards[process]}
            for take in own.takes:
                kept = self.slots[take.process]
                assert not set(take.shards) & set(kept.holding.missing)
                for i in take.shards:
                    found[kept.layout.shards[i]].add(kept.contents[i])
                    wanted.discard(kept.layout.shards[i])
            if own.in_place:
                kept = self.slots[process]
                here = {kept.layout.shards[i]: c for i, c in kept.contents.items()}
                for shard in list(wanted):
                    found[shard].add(here[shard])
                    wanted.discard(shard)
            assert not wanted
        return dict(found)


@st.composite
def jobs(draw: st.DrawFn, *, mixed: bool = True, hosts: int | None = None) -> Job:
    """Slices that share a state: some slots lost, some damaged, some with other bits, some that hold all."""
    slices, hosts = draw(st.integers(1, 5)), hosts or draw(st.integers(1, 2))
    devices = replicated(slices, hosts, draw(st.integers(1, 7)), draw(st.integers(0, 2)))
    stored = spread(devices, draw(st.integers(1, 3)))
    slots: dict[int, Kept] = {}
    numbers: dict[SlotOf, Fingerprints] = {}
    for process in range(devices.process_count):
        if draw(st.integers(0, 7)) == 0:
            continue
        layout = devices if mixed and draw(st.integers(0, 3)) == 0 else stored
        held = layout.process_shards[process]
        odd = draw(st.sets(st.sampled_from(held), max_size=2)) if held else set()
        missing = draw(st.sets(st.sampled_from(held), max_size=1)) if len(held) > 1 else set()
        contents = {shard: draw(st.integers(2, 3)) if shard in odd else 1 for shard in held}
        value = draw(st.sampled_from([1, 1, 1, 2]))
        checksums = [[contents[shard]] for shard in held]
        parts = part_digests(layout, process, checksums, {"lr": value})
        digest = f"{sorted(contents.items())}{value}"
        holding = Holding(STEP, layout.hash, process, digest, (), tuple(sorted(missing)), parts)
        slots[process] = Kept(layout, holding, contents, value)
        slot = SlotOf(STEP, process, layout.hash, process)
        numbers[slot] = slot_fingerprints(layout, process, checksums, {"lr": value})
    inventories = tuple(Inventory(p, (kept.holding,)) for p, kept in slots.items())
    others = {devices.hash: OtherLayout(devices), stored.hash: OtherLayout(stored)}
    planner = Planner(devices, groups_of(devices), inventories, (), others=others, stored=stored)
    return Job(planner, slots, numbers)


@given(jobs())
def test_all_processes_get_the_version_of_each_shard_that_most_slots_have(job: Job) -> None:
    got = job.got(job.asked())
    if got is not None:
        assert got == {shard: {content} for shard, content in job.voted().items() if shard in got}


@given(jobs(mixed=False))
def test_where_nobody_could_be_asked_all_get_the_same_version_all_the_same(job: Job) -> None:
    """Of slots of one layout digests alone tell what differs."""
    got = job.got(job.planner)
    if got is not None:
        assert all(len(contents) == 1 for contents in got.values())


@given(jobs(hosts=1))
def test_all_processes_get_the_same_values_however_few_slices_keep_each_shard(job: Job) -> None:
    assume(all(kept.contents for kept in job.slots.values()))  # By what it holds a slot has counterparts.
    plan, _ = job.asked().plan()
    if plan is None:
        return
    told: set[int] = set()
    for process, own in enumerate(plan.processes):
        describing = [take.process for take in own.takes if not take.shards]
        sources = [process] if own.in_place else describing or [take.process for take in own.takes]
        told |= {job.slots[source].value for source in sources}
    counts = collections.Counter(kept.value for kept in job.slots.values())
    first = next(iter(job.slots.values())).value
    assert told == {min(counts, key=lambda value: (-counts[value], value != first))}


@given(jobs(), st.randoms())
def test_plans_do_not_depend_on_the_order_in_which_processes_answered(job: Job, chance: random.Random) -> None:
    planner = job.asked()
    inventories = list(planner.inventories)
    chance.shuffle(inventories)
    shuffled = dataclasses.replace(planner, inventories=tuple(inventories))
    assert shuffled.plan() == planner.plan()
    assert shuffled.differing_replicas(1) == planner.differing_replicas(1)


@given(jobs())
def test_nobody_is_asked_about_what_digests_tell_to_be_equal(job: Job) -> None:
    for each in job.planner.differing_replicas(1):
        told = [job.slots[slot.process] for slot in each.asked]
        if each.is_certain:
            assert len({(*kept.contents.items(), kept.value) for kept in told}) > 1
        else:
            assert len({kept.layout.hash for kept in told}) > 1, "slots of one layout tell all by digests"


def test_slots_of_three_slices_with_two_copies_have_two_parts_each() -> None:
    stored = spread(replicated(3, 1, 12, 0), 2)
    for process in range(3):
        counts = collections.Counter(part_numbers(stored, stored.held.kinds[process]).tolist())
        assert counts == {0: 4, 1: 4}


def test_what_is_held_in_too_many_ways_is_compared_as_a_whole() -> None:
    """Two processes hold all, and of each shard another set of others holds it too."""
    names = [f"w{i:03}" for i in range(MOST_PARTS + 1)]
    every = [Shard(name, Box((0,), (4,))) for name in names]
    held = {0: every, 1: every, **{2 + i: [shard] for i, shard in enumerate(every)}}
    layout = Layout.build([LeafSpec(n, (4,), "int8") for n in names], held, tuple(range(len(held))))
    assert part_digests(layout, 0, [[1]] * len(every), {}) == ()
    holdings = [Holding(STEP, layout.hash, p, "other" if p == 1 else "same") for p in (0, 1)]
    planner = Planner(layout, (), tuple(Inventory(p, (h,)) for p, h in enumerate(holdings)), ())
    plan, _ = planner.plan()
    assert plan is not None
    assert [own.in_place for own in plan.processes[:2]] == [True, False]
    assert {take.process for own in plan.processes[1:] for take in own.takes} == {0}


def test_an_inventory_without_digests_of_parts_is_read() -> None:
    holding = Holding(STEP, "hash", 1, "digest", (0,), (3,), ("a", "b"))
    said = Inventory(1, (holding,)).to_bytes()
    assert Inventory.from_bytes(said).holdings == (holding,)
    before = Inventory.from_bytes(said.replace(b',["a","b"]', b""))
    assert before.holdings == (dataclasses.replace(holding, parts=()),)
