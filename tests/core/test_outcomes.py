"""The rules of one process's part in agreeing on outcomes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.outcomes import OutcomeRecord, Progress
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import CorruptDataError


@given(st.sampled_from(Outcome), st.integers(0, 10_000), st.text())
def test_a_record_survives_the_wire(outcome: Outcome, process: int, reason: str) -> None:
    record = OutcomeRecord(outcome, process, reason)
    assert OutcomeRecord.from_bytes(record.to_bytes()) == record


@given(st.binary(max_size=40) | st.sampled_from([b"[]", b"null", b'["maybe",0,""]', b'["complete",{},""]']))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptDataError, match="same version"):
        OutcomeRecord.from_bytes(data)


def test_a_process_reports_once_on_each_save() -> None:
    reported = Progress().report(0)
    with pytest.raises(ValueError, match="save 0 was already reported on"):
        reported.report(0)


def test_a_report_waits_for_the_outcomes_of_all_earlier_saves() -> None:
    with pytest.raises(ValueError, match="report on save 1 came before the outcome of save 0"):
        Progress().report(0).may_report(1)
    assert Progress().report(0).learn(0).may_report(1)


def test_a_late_seal_does_not_count() -> None:
    assert not Progress().learn(0).may_report(0)
    with pytest.raises(ValueError, match="no report on it counts"):
        Progress().learn(0).report(0)


@pytest.mark.parametrize("save", [0, 2])
def test_outcomes_are_learned_once_and_in_order(save: int) -> None:
    with pytest.raises(ValueError, match=f"save {save} was asked for, but the next one .* save 1"):
        Progress().learn(0).learn(save)


@given(st.lists(st.integers(-1, 30), min_size=1, max_size=5), st.integers(0, 30))
def test_only_what_every_process_has_read_is_removed(newest_reports: list[int], removed: int) -> None:
    old = Progress(reported=31, known=31, removed=removed).removable(newest_reports)
    assert all(all(report > save for report in newest_reports) for save in old)
    assert all(save >= removed for save in old)
    left = Progress(31, 31, removed).remove(old)
    assert left.removed == old.stop
    assert not left.removable(newest_reports)
