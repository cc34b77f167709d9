"""The summary says what the journals say: steps and time lost, and every difference between the two runs."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from emergency_ckpt.demo.display import show_summary, story
from emergency_ckpt.demo.journal import Life
from emergency_ckpt.demo.summary import DemoError, JobShape, Summary, summarize
from tests.demo import lives
from tests.demo.lives import Story, changed_end

JOB = JobShape(steps=30, slices=2, processes_per_slice=2, local_period=5, persistent_period=25)
STORY = Story(JOB, reached=18, restored=15, persistent=1)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    steps = draw(st.integers(2, 40))
    job = JobShape(
        steps, draw(st.integers(1, 3)), draw(st.integers(1, 3)), local_period=5, persistent_period=25
    )
    reached = draw(st.integers(1, steps - 1))
    restored = draw(st.none() | st.integers(1, reached))
    return Story(job, reached, restored, draw(st.none() | st.integers(1, reached)))


def summary_of(told: Story) -> Summary:
    return summarize(told.job, told.reference(), told.interrupted(), told.failure)


@given(told=stories())
def test_whatever_is_lost_the_summary_counts_it(told: Story) -> None:
    summary = summary_of(told)
    assert summary.agrees
    assert summary.step_reached == told.reached
    assert summary.step_restored == told.restored
    assert summary.steps_lost == told.reached - (told.restored or 0)
    assert summary.steps_lost_persistent_only == told.reached - (told.persistent or 0)
    assert summary.restored_bytes == 100 * told.job.process_count
    assert summary.reason == f"why {told.restored}"
    assert summary.sources == tuple(f"source {p}" for p in range(told.job.process_count))
    assert summary.first_loss == lives.loss_at(1)
    assert summary.final_loss == lives.loss_at(told.job.steps)
    assert summary.restarts == 1


@given(told=stories())
def test_the_parts_of_the_lost_time_are_its_whole(told: Story) -> None:
    lost = summary_of(told).time_lost
    assert math.isclose(lost.down, lives.DOWN_SECONDS)
    assert math.isclose(lost.restoring, lives.RESTORE_SECONDS)
    assert math.isclose(lost.starting, lives.START_SECONDS - lives.RESTORE_SECONDS)
    retrained = told.reached - (told.restored or 0)
    assert math.isclose(lost.retraining, retrained * lives.STEP_SECONDS, abs_tol=1e-9)
    assert math.isclose(
        lost.total, lives.DOWN_SECONDS + lives.START_SECONDS + retrained * lives.STEP_SECONDS, abs_tol=1e-9
    )


def disagreements(interrupted: tuple[Life, ...]) -> dict[str, str]:
    summary = summarize(JOB, STORY.reference(), interrupted, STORY.failure)
    assert summary.agrees == (not any(not check.agrees for check in summary.checks))
    return {check.name: check.found for check in summary.checks if not check.agrees}


def with_loss(life: Life, step: int, loss: float) -> Life:
    trained = [dataclasses.replace(fact, loss=loss) if fact.step == step else fact for fact in life.trained]
    return dataclasses.replace(life, trained=tuple(trained))


def test_the_last_bit_of_the_final_loss_counts() -> None:
    other = math.nextafter(lives.loss_at(30), 0)
    interrupted = tuple(with_loss(life, 30, other) for life in STORY.interrupted())
    assert disagreements(interrupted) == {
        "final loss": repr(other),
        "loss of every step": "different at step 30",
    }


def test_a_step_that_was_trained_again_must_have_the_same_loss_on_every_process() -> None:
    again = STORY.interrupted()
    one_process = (*again[:-1], with_loss(again[-1], 17, 1.0))
    assert disagreements(one_process) == {"loss of every step": "different at step 17"}


def test_one_shard_with_other_bytes_counts() -> None:
    other = {"w[0:1]": "other", "step[]": "step 30"}
    interrupted = changed_end(changed_end(STORY.interrupted(), 0, shards=other), 2, shards=other)
    assert set(disagreements(interrupted)) == {"parameters and optimizer state"}


def test_replicas_that_differ_are_named() -> None:
    torn = changed_end(STORY.interrupted(), 3, shards={"w[1:2]": "torn", "step[]": "step 30"})
    found = disagreements(torn)
    assert found["replicas of every shard"] == "different: w[1:2]"
    # Even where both runs are torn alike.
    reference = changed_end(STORY.reference(), 3, shards={"w[1:2]": "torn", "step[]": "step 30"})
    assert not summarize(JOB, reference, torn, STORY.failure).agrees


def test_the_data_position_of_each_process_counts() -> None:
    assert set(disagreements(changed_end(STORY.interrupted(), 1, position={"next_index": 31}))) == {
        "data position"
    }


def test_a_process_without_an_end_is_named() -> None:
    cut = tuple(
        dataclasses.replace(life, finished=None) if life.started.process == 2 else life
        for life in STORY.interrupted()
    )
    with pytest.raises(DemoError, match=r"interrupted run .* found those of processes \[0, 1, 3\]"):
        summarize(JOB, STORY.reference(), cut, STORY.failure)


def test_processes_that_start_from_different_steps_are_refused() -> None:
    *others, last = STORY.interrupted()
    assert last.restored is not None
    odd = dataclasses.replace(last, restored=dataclasses.replace(last.restored, step=10))
    with pytest.raises(DemoError, match=r"from \['10', '15'\]"):
        summarize(JOB, STORY.reference(), (*others, odd), STORY.failure)


def test_a_failure_before_the_first_step_is_refused() -> None:
    story_of_nothing = tuple(
        dataclasses.replace(life, trained=()) if life.started.attempt == 0 else life
        for life in STORY.interrupted()
    )
    with pytest.raises(DemoError, match="later step"):
        summarize(JOB, STORY.reference(), story_of_nothing, STORY.failure)


def test_the_json_holds_the_derived_values_too() -> None:
    summary = summary_of(STORY)
    written = json.loads(json.dumps(summary.to_json()))
    assert written["agrees"] is True
    assert written["time_lost"]["total"] == summary.time_lost.total
    assert [check["agrees"] for check in written["checks"]] == [True] * 5
    assert written["steps_lost"] == 3
    assert written["steps_lost_persistent_only"] == 17
    assert written["failure"]["processes"] == [2, 3]


def test_the_story_says_what_was_lost_in_words() -> None:
    words = dict(story(summary_of(STORY)))
    assert words["failure"] == "slice 1 killed (processes 2, 3), its ramdisks wiped"
    assert words["step reached"] == "18 of 30"
    assert words["step restored"] == "15"
    assert words["steps lost"].startswith("3 (saved locally every 5 steps)")
    assert words["steps lost"].endswith("17, from step 1")
    from_scratch = dict(story(summary_of(dataclasses.replace(STORY, restored=None, persistent=None))))
    assert from_scratch["step restored"] == "none: from scratch"
    assert from_scratch["steps lost"].endswith("18, from scratch")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_difference_is_shown_with_both_values(terminal: bool) -> None:
    interrupted = changed_end(STORY.interrupted(), 1, position={"next_index": 31})
    summary = summarize(JOB, STORY.reference(), interrupted, STORY.failure)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    show_summary(console, summary)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "DIFFERENT" in shown
    assert '[{"next_index": 30}, {"next_index": 31}' in shown
    assert "did not come to the same end" in shown
