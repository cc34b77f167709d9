"""Every line carries its context, is one line, and is a JSON object where JSON was asked for."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import logging as absl_logging
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.telemetry.events import (
    DeviceDivergenceEvent,
    DrainEvent,
    Event,
    RejectedStepEvent,
    RestoreEvent,
    SaveEvent,
    SkippedSaveEvent,
    SourceBytes,
    StartEvent,
)
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext, LogFormat, write_json_lines_bare
from emergency_ckpt.telemetry.metrics import Metrics

CONTEXT = LogContext(run="1a2b3c4d-0000-4000-8000-000000000000", generation=3, process=1, slice=0)
SAVED = SaveEvent(
    step=120,
    bytes=512 * 1024**2,
    blocked_seconds=0.0004,
    sealed_seconds=0.081,
    outcome="complete",
    outcome_seconds=0.095,
)
EVENTS: list[Event] = [
    SAVED,
    SaveEvent(
        step=130,
        bytes=0,
        blocked_seconds=0.0004,
        sealed_seconds=None,
        outcome="abandoned",
        outcome_seconds=30,
        reason="process 3 did not seal within 30 s",
    ),
    SkippedSaveEvent(step=140, blocked_seconds=1, reason="no slot is free: step 120 is drained from both"),
    DrainEvent(step=120, bytes=1024**2, seconds=2, result="committed"),
    DrainEvent(step=130, bytes=0, seconds=0, result="failed", reason="403\nforbidden"),
    DeviceDivergenceEvent(step=120, leaf="w", box="[0:4]", versions=((0, 1, 3), (2,))),
    RejectedStepEvent(step=130, saved_generation=2, reason="block 4 of params.w[0:4] does not match"),
    RestoreEvent(
        step=120,
        saved_generation=2,
        plan="14 of 16 shards local, 2 from slice 1",
        reason="slice 0 lost process 1; persistent 100 not needed",
        sources=(SourceBytes("own slot", 14, 14 * 1024**2), SourceBytes("slice 1", 2, 2 * 1024**2)),
        seconds=1.25,
    ),
    StartEvent(
        step=None,
        local_directory="/local/run",
        persistent_directory="/data/run/checkpoints",
        slots=3,
        slot_bytes=1024**3,
        process_count=4,
        slice_count=2,
        seconds=0.5,
        reason="no step was saved before",
    ),
]


class Records(logging.Handler):
    """Keeps the records that reach the root logger, as a user's own handler would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def records() -> Iterator[Records]:
    handler, verbosity = Records(), absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    logging.root.addHandler(handler)
    yield handler
    logging.root.removeHandler(handler)
    absl_logging.set_verbosity(verbosity)


def logger(log_format: LogFormat) -> CheckpointLogger:
    return CheckpointLogger(CONTEXT, Metrics(), log_format)


def test_a_save_reads_as_one_sentence_for_people(records: Records) -> None:
    logger("text").emit(SAVED)
    assert records.messages == [
        "emergency_ckpt save step=120 gen=3 run=1a2b3c4d process=1 slice=0: "
        "sealed 512.0 MiB, blocked 0.4 ms, sealed after 81 ms, complete after 95 ms"
    ]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_is_one_text_line_with_its_context(records: Records, event: Event) -> None:
    logger("text").emit(event)
    (line,) = records.messages
    step = "-" if event.step is None else event.step
    assert line.startswith(
        f"emergency_ckpt {event.operation} step={step} gen=3 run=1a2b3c4d process=1 slice=0: "
    )
    assert len(line.splitlines()) == 1
    assert records.records[0].levelname.lower() == event.severity


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_is_one_json_object_with_its_context_and_its_numbers(
    records: Records, event: Event
) -> None:
    logger("json").emit(event)
    (line,) = records.messages
    assert len(line.splitlines()) == 1
    found = json.loads(line)
    context = {"run": "1a2b3c4d", "generation": 3, "process": 1, "slice": 0}
    expected = context | {"step": event.step, "operation": event.operation, "severity": event.severity.upper()}
    assert {key: found[key] for key in expected} == expected
    assert found["message"] == event.describe()
    assert json.loads(json.dumps(vars(event), default=vars)).items() <= found.items()


def test_no_event_has_a_field_that_the_context_of_the_line_already_has() -> None:
    context = {"run", "generation", "process", "slice", "operation", "severity", "time", "message"}
    for event in EVENTS:
        assert not context & set(vars(event))


def test_other_lines_carry_the_same_context_and_their_details(records: Records) -> None:
    logger("text").warning("evict", None, "slot of a foreign run", path=Path("/local/a"), bytes=7)
    logger("json").error("evict", 5, "slot of a foreign run", path=Path("/local/a"), ratio=float("nan"))
    text, as_json = records.messages
    assert text == (
        "emergency_ckpt evict step=- gen=3 run=1a2b3c4d process=1 slice=0: "
        "slot of a foreign run (path=/local/a, bytes=7)"
    )
    assert json.loads(as_json)["details"] == {"path": "/local/a", "ratio": None}
    assert [record.levelname for record in records.records] == ["WARNING", "ERROR"]


@given(message=st.text(), detail=st.text(), log_format=st.sampled_from(["text", "json"]))
def test_whatever_a_message_contains_the_line_stays_one_line(
    message: str, detail: str, log_format: LogFormat
) -> None:
    handler = Records()
    logging.root.addHandler(handler)
    try:
        logger(log_format).error("drain", 1, message, detail=detail)
    finally:
        logging.root.removeHandler(handler)
    (line,) = handler.messages
    assert len(line.splitlines()) == 1
    if log_format == "json":
        assert json.loads(line)["message"] == message


def test_what_is_not_known_yet_is_shown_as_missing_and_can_be_bound_later(records: Records) -> None:
    early = CheckpointLogger(LogContext(run=None, generation=None, process=1, slice=None), Metrics())
    early.info("start", None, "waiting for process 0")
    early.bind(run="feedbeef-1", generation=1).info("start", None, "agreed")
    assert records.messages == [
        "emergency_ckpt start step=- gen=- run=- process=1 slice=-: waiting for process 0",
        "emergency_ckpt start step=- gen=1 run=feedbeef process=1 slice=-: agreed",
    ]


def test_a_line_names_the_file_that_wrote_it_and_not_the_log_module(records: Records) -> None:
    logger("text").info("start", None, "here")
    logger("text").emit(SAVED)
    assert {record.filename for record in records.records} == {Path(__file__).name}


def test_bare_json_lines_have_no_prefix_while_lines_of_others_keep_theirs(records: Records) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("PREFIX %(message)s"))
    logging.root.addHandler(handler)
    try:
        write_json_lines_bare()
        write_json_lines_bare()
        logger("json").emit(SAVED)
        logger("text").emit(SAVED)
        absl_logging.warning("of somebody else")
    finally:
        logging.root.removeHandler(handler)
    ours, text, others = stream.getvalue().splitlines()
    assert json.loads(ours)["step"] == 120
    assert text.startswith("PREFIX emergency_ckpt save")
    assert others == "PREFIX of somebody else"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'yaml'; expected 'text' or 'json'"):
        CheckpointLogger(CONTEXT, Metrics(), "yaml")  # type: ignore[arg-type]
