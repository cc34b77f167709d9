"""Which steps are newer, and which ones a restore left behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.lineage import Activation, Deletion, StepId, begun_from, is_void, newest_promised

steps = st.builds(StepId, st.integers(0, 5), st.integers(0, 5))
activations = st.builds(Activation, st.integers(1, 5), st.none() | st.integers(0, 5))


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[StepId], list[Activation]]:
    """A run: in each generation some steps are saved, then one that is not void, or nothing, is restored."""
    saved: list[StepId] = []
    begun: list[Activation] = []
    for generation in range(1, draw(st.integers(1, 5)) + 1):
        left = [step for step in saved if not is_void(step, begun)]
        restored = draw(st.sampled_from(left)) if left and draw(st.booleans()) else None
        begun.append(Activation(generation, restored.step if restored else None))
        first = restored.step + 1 if restored else 0
        saved += [StepId(generation, first + i) for i in range(draw(st.integers(0, 4)))]
    return saved, begun


@given(steps, steps)
def test_a_later_generation_is_newer_and_then_a_higher_step(one: StepId, other: StepId) -> None:
    assert (one < other) == ((one.generation, one.step) < (other.generation, other.step))


@given(steps, activations)
def test_a_restore_makes_void_the_later_steps_of_earlier_generations_of_the_run_only(
    step: StepId, begun: Activation
) -> None:
    later = begun.step is None or step.step > begun.step
    assert begun.voids(step) == (0 < step.generation < begun.generation and later)


@given(st.lists(steps), st.lists(activations), activations)
def test_void_steps_stay_void(saved: list[StepId], begun: list[Activation], another: Activation) -> None:
    assert all(is_void(step, [*begun, another]) for step in saved if is_void(step, begun))


@given(lives())
def test_the_steps_that_are_not_void_are_one_unbroken_history(
    life: tuple[list[StepId], list[Activation]],
) -> None:
    saved, begun = life
    left = sorted(step for step in saved if not is_void(step, begun))
    numbers = [step.step for step in left]
    assert numbers == sorted(set(numbers))  # newer by generation is newer by step, no number twice


@given(lives())
def test_what_a_restore_began_from_and_what_it_saved_are_not_void(
    life: tuple[list[StepId], list[Activation]],
) -> None:
    saved, begun = life
    last = begun[-1]
    assert not any(is_void(step, begun) for step in saved if step.generation == last.generation)
    if last.step is not None:
        assert any(step.step == last.step and not is_void(step, begun) for step in saved)


def test_a_deletion_settles_what_was_promised_before_it_and_nothing_after_it() -> None:
    gone = Deletion(StepId(2, 8), None)
    assert newest_promised([StepId(1, 9), StepId(2, 8)], [], gone) is None
    assert newest_promised([StepId(2, 9)], [], gone) == StepId(2, 9)
    assert newest_promised([StepId(2, 8)], [], Deletion(StepId(2, 8), StepId(2, 6))) == StepId(2, 6)
    assert newest_promised([], [Activation(3, 4)], Deletion(StepId(2, 8), StepId(2, 6))) is None
    assert newest_promised([StepId(2, 8)], [], None) == StepId(2, 8)


def test_of_two_deletions_the_later_one_says_what_is_left() -> None:
    first = Deletion(StepId(1, 8), StepId(1, 6))
    assert Deletion(StepId(1, 6), None).after(first) == Deletion(StepId(1, 8), None)
    assert first.after(None) == first


@pytest.mark.parametrize(
    ("parents", "activations", "expected"),
    [
        ({}, [], []),
        ({}, [Activation(1, None)], []),
        ({2: StepId(1, 12)}, [Activation(1, None)], [StepId(1, 12)]),
        ({2: StepId(1, 12)}, [Activation(1, None), Activation(2, 12)], [StepId(1, 12)]),
        ({2: StepId(1, 12)}, [Activation(1, None), Activation(2, 5)], [StepId(0, 5)]),
        ({}, [Activation(2, 12)], [StepId(0, 12)]),
        ({2: StepId(1, 12), 3: StepId(2, 20)}, [Activation(2, 12)], [StepId(1, 12), StepId(2, 20)]),
        ({2: StepId(1, 12), 3: StepId(2, 20)}, [Activation(4, None)], []),
        ({2: StepId(0, 12)}, [Activation(3, None)], []),
    ],
)
def test_the_newest_beginning_and_those_that_were_to_follow_it_are_promises(
    parents: dict[int, StepId], activations: list[Activation], expected: list[StepId]
) -> None:
    assert begun_from(parents, activations) == expected
