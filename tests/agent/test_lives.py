"""What agents tell each other of a life comes back as it was told, and nonsense is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.agent.lives import CallReport, CallState, LifeReport
from emergency_ckpt.agent.trainers import State
from emergency_ckpt.core.lineage import StepId

NUMBER = st.integers(0, 2**40)
SECONDS = st.floats(0, 1e9)
REPORTS = st.builds(
    LifeReport,
    st.dictionaries(NUMBER, st.sampled_from(get_args(State))),
    NUMBER,
    NUMBER,
    st.lists(st.tuples(st.builds(StepId, NUMBER, NUMBER), st.booleans())).map(tuple),
    st.none() | st.builds(CallReport, st.sampled_from(get_args(CallState)), SECONDS),
    st.booleans(),
    st.dictionaries(NUMBER, st.tuples(st.none() | NUMBER, SECONDS)),
)


@given(REPORTS)
def test_a_report_comes_back_as_it_was_told(report: LifeReport) -> None:
    assert LifeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize(
    "changes",
    [
        {"processes": {"0": "asleep"}},
        {"processes": {"x": "alive"}},
        {"drains": -1},
        {"writing": True},
        {"running": [[1, 2]]},
        {"running": [[1, "2", False]]},
        {"running": [[1, 2, 0]]},
        {"call": ["late", 1.0]},
        {"call": ["armed", "soon"]},
        {"leaving": 1},
        {"progress": {"0": [1.5, 1.0]}},
        {"progress": [1]},
    ],
    ids=str,
)
def test_nonsense_is_refused(changes: dict[str, Any]) -> None:
    said = LifeReport({0: "alive"}, 1, 1).to_json()
    with pytest.raises((ValueError, TypeError, AttributeError, KeyError)):
        LifeReport.from_json({**said, **changes})
