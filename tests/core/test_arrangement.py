"""Hosts are arranged so that they keep the most bytes, whatever was swapped; nobody moves for nothing."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.arrangement import Arrangement, HeldStep, Place, Standing, arrange
from emergency_ckpt.core.lineage import StepId

STEP = StepId(1, 12)


def standing(slices: int, hosts: int) -> Standing:
    places = tuple(Place(s, h) for s in range(slices) for h in range(hosts))
    return Standing(places, (1,) * slices, (0,) * hosts)


def on_ramdisks(
    order: list[int | None], hosts: int, replicated: bool, step: StepId = STEP
) -> list[list[HeldStep]]:
    """Per process what the process of that number saved; None where its ramdisk is empty."""

    def held(saved: int) -> HeldStep:
        content = str(saved % hosts if replicated else saved)
        return HeldStep(step, content, 100 + saved % hosts, Place(*divmod(saved, hosts)))

    return [[] if saved is None else [held(saved)] for saved in order]


def most_kept(held: list[list[HeldStep]], slices: int, hosts: int, move_hosts: bool) -> int:
    """By trying all orders."""
    needed = {each.place: each.content for of in held for each in of}
    best = 0
    for order in itertools.permutations(range(slices)):
        kept = 0
        for source, target in enumerate(order):
            mine = held[source * hosts : (source + 1) * hosts]
            orders = itertools.permutations(range(hosts)) if move_hosts else [tuple(range(hosts))]
            kept += max(
                sum(
                    each.nbytes
                    for of, spot in zip(mine, spots, strict=True)
                    for each in of
                    if needed.get(Place(target, spot)) == each.content
                )
                for spots in orders
            )
        best = max(best, kept)
    return best


@st.composite
def swapped(draw: st.DrawFn) -> tuple[int, int, list[int | None]]:
    slices, hosts = draw(st.sampled_from([(1, 4), (2, 1), (2, 2), (3, 2), (4, 1), (2, 3)]))
    order: list[int | None] = list(draw(st.permutations(range(slices * hosts))))
    for lost in draw(st.sets(st.integers(0, slices * hosts - 1), max_size=2)):
        order[lost] = None
    return slices, hosts, order


@given(swapped(), st.booleans())
def test_no_order_of_slices_and_hosts_keeps_more_bytes(
    world: tuple[int, int, list[int | None]], move_hosts: bool
) -> None:
    slices, hosts, order = world
    held = on_ramdisks(order, hosts, replicated=False)
    before = standing(slices, hosts)
    found = arrange(before, held, move_hosts=move_hosts)
    assert found == arrange(before, held, move_hosts=move_hosts)
    assert sorted(found.places) == sorted(before.places), "everybody has a place of his own"
    for process, place in enumerate(found.places):
        assert place.slice == found.places[process // hosts * hosts].slice, "slices stay together"
        assert move_hosts or place.spot == process % hosts
    assert found.kept_bytes == most_kept(held, slices, hosts, move_hosts)


@given(swapped(), st.booleans())
def test_nobody_moves_where_nothing_is_gained(
    world: tuple[int, int, list[int | None]], move_hosts: bool
) -> None:
    slices, hosts, order = world
    held = on_ramdisks(order, hosts, replicated=False)
    found = arrange(standing(slices, hosts), held, move_hosts=move_hosts)
    if found.kept_bytes == found.kept_before:
        assert found.moved(standing(slices, hosts)) == ()


def test_replicated_slices_that_changed_numbers_stay_because_each_has_what_the_others_need() -> None:
    held = on_ramdisks([2, 3, 0, 1], 2, replicated=True)
    found = arrange(standing(2, 2), held, move_hosts=True)
    assert found.moved(standing(2, 2)) == ()
    assert found.kept_bytes == 402


def test_the_step_that_most_hold_counts_and_not_an_old_one_of_a_host_that_was_away() -> None:
    held = on_ramdisks([1, 0, None], 1, replicated=False)
    held[2] = on_ramdisks([1], 1, replicated=False, step=StepId(1, 4))[0]
    held[0] += on_ramdisks([2], 1, replicated=False, step=StepId(2, 99))[0]
    found = arrange(standing(3, 1), held, move_hosts=False)
    assert found.step == STEP
    assert [place.slice for place in found.places] == [1, 0, 2]
    assert found.reason == (
        "slices 0, 1 change places: 2 of 3 hosts stand where all they hold of step 12 (generation 1) is "
        "needed, 200 bytes instead of 0"
    )


def test_slices_of_another_size_and_hosts_on_spots_of_another_form_do_not_change_places() -> None:
    unlike = Standing((Place(0, 0), Place(1, 0)), (1, 2), (0,))
    held = on_ramdisks([1, 0], 1, replicated=False)
    assert arrange(unlike, held, move_hosts=True).moved(unlike) == ()
    one_slice = Standing((Place(0, 0), Place(0, 1)), (1,), (0, 1))
    held = on_ramdisks([1, 0], 2, replicated=False)
    assert arrange(one_slice, held, move_hosts=True).moved(one_slice) == ()


def test_nothing_known_moves_nobody() -> None:
    for held in ([[], []], [[HeldStep(STEP, "a", 1, None)], []]):
        found = arrange(standing(2, 1), held, move_hosts=True)
        assert isinstance(found, Arrangement)
        assert found.places == standing(2, 1).places
        assert "all hosts stand where they stood" in found.reason


def test_four_thousand_processes_are_arranged_as_well() -> None:
    """A mistake in the order of growth takes minutes here, and the limit of a test ends it."""
    for slices, hosts in ((4096, 1), (64, 64), (1, 4096), (2, 2048)):
        shuffled = random.Random(3).sample(range(slices), slices)
        order: list[int | None] = [s * hosts + h for s in shuffled for h in reversed(range(hosts))]
        found = arrange(standing(slices, hosts), on_ramdisks(order, hosts, replicated=False), move_hosts=True)
        assert found.kept_bytes == sum(100 + p % hosts for p in range(slices * hosts))
