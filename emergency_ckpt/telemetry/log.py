"""The log: one absl line per event, as text for people or as JSON for machines.

Every line says which run, generation, process, slice and step it is about and what operation wrote it; it is
one line, whatever an error message in it contains.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

from absl import logging as absl_logging

from emergency_ckpt.telemetry.events import Event, Severity
from emergency_ckpt.telemetry.metrics import Metrics

LogFormat = Literal["text", "json"]
EventListener = Callable[[dict[str, Any]], object]

_LEVELS: dict[str, int] = {
    "info": absl_logging.INFO,
    "warning": absl_logging.WARNING,
    "error": absl_logging.ERROR,
}
_SHORT_RUN_CHARACTERS = 8
# Attribute of our log records, by which the formatter below knows them.
_JSON_MARK = "emergency_ckpt_json"


@dataclasses.dataclass(frozen=True)
class LogContext:
    """Whose lines these are; None where it is not known yet (run and generation, before all agreed)."""

    run: str | None
    generation: int | None
    process: int
    slice: int | None

    @property
    def short_run(self) -> str | None:
        """The first eight characters of the run id: enough to tell runs apart in a log."""
        return self.run[:_SHORT_RUN_CHARACTERS] if self.run else None


class CheckpointLogger:
    """Writes the lines of one process and counts its events. Safe to use from any thread."""

    def __init__(
        self,
        context: LogContext,
        metrics: Metrics,
        log_format: LogFormat = "text",
        listener: EventListener | None = None,
    ) -> None:
        """`listener` gets every event as well, as the fields of its JSON line; its errors become warnings."""
        if log_format not in ("text", "json"):
            raise ValueError(f"log_format is {log_format!r}; expected 'text' or 'json'")
        self.context = context
        self.metrics = metrics
        self.log_format: LogFormat = log_format
        self._listener = listener

    def bind(self, **changes: Any) -> CheckpointLogger:
        """A logger with some fields of the context replaced (`bind(generation=3)`), all else the same."""
        context = dataclasses.replace(self.context, **changes)
        return CheckpointLogger(context, self.metrics, self.log_format, self._listener)

    @absl_logging.skip_log_prefix
    def emit(self, event: Event) -> None:
        """Counts the event and writes its line."""
        self.metrics.observe(event)
        fields, message = _event_fields(event), event.describe()
        self._write(event.severity, event.operation, event.step, message, fields)
        if self._listener is None:
            return
        try:
            self._listener(self._entry(event.severity, event.operation, event.step, message, fields))
        except Exception as error:  # It is the user's, and saving goes on whatever it raises.
            self.warning("log", event.step, f"the logger failed on an event: {type(error).__name__}: {error}")

    @absl_logging.skip_log_prefix
    def info(self, operation: str, step: int | None, message: str, **details: Any) -> None:
        """A line that is no event. `details` are appended to a text line and are an object in a JSON line."""
        self._write_message("info", operation, step, message, details)

    @absl_logging.skip_log_prefix
    def warning(self, operation: str, step: int | None, message: str, **details: Any) -> None:
        """As `info`, for what somebody should look at although the job goes on."""
        self._write_message("warning", operation, step, message, details)

    @absl_logging.skip_log_prefix
    def error(self, operation: str, step: int | None, message: str, **details: Any) -> None:
        """As `info`, for what failed."""
        self._write_message("error", operation, step, message, details)

    @absl_logging.skip_log_prefix
    def _write_message(
        self, severity: Severity, operation: str, step: int | None, message: str, details: dict[str, Any]
    ) -> None:
        if self.log_format == "text" and details:
            message += " (" + ", ".join(f"{key}={value}" for key, value in details.items()) + ")"
        self._write(severity, operation, step, message, {"details": details} if details else {})

    @absl_logging.skip_log_prefix
    def _write(
        self, severity: Severity, operation: str, step: int | None, message: str, fields: dict[str, Any]
    ) -> None:
        if self.log_format == "json":
            line = self._json_line(severity, operation, step, message, fields)
        else:
            line = self._text_line(operation, step, message)
        absl_logging.log(_LEVELS[severity], "%s", line, extra={_JSON_MARK: self.log_format == "json"})

    def _text_line(self, operation: str, step: int | None, message: str) -> str:
        context = self.context
        where = {
            "step": step,
            "gen": context.generation,
            "run": context.short_run,
            "process": context.process,
            "slice": context.slice,
        }
        known = " ".join(f"{key}={'-' if value is None else value}" for key, value in where.items())
        return " | ".join(f"emergency_ckpt {operation} {known}: {message}".splitlines())

    def _json_line(
        self, severity: Severity, operation: str, step: int | None, message: str, fields: dict[str, Any]
    ) -> str:
        entry = self._entry(severity, operation, step, message, fields)
        return json.dumps(entry, separators=(",", ":"), allow_nan=False)

    def _entry(
        self, severity: Severity, operation: str, step: int | None, message: str, fields: dict[str, Any]
    ) -> dict[str, Any]:
        """All that a line says, in JSON's types."""
        context = self.context
        entry = {
            "severity": severity.upper(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(),
            "operation": operation,
            "step": step,
            "generation": context.generation,
            "run": context.short_run,
            "process": context.process,
            "slice": context.slice,
            "message": message,
        }
        return _plain(entry | fields)


def write_json_lines_bare() -> None:
    """Makes every log handler of this process write our JSON lines without its own prefix in front.

    Lines of others keep their form. Call it once, after logging is set up; calling it again changes nothing.
    """
    handlers: list[logging.Handler] = [*logging.root.handlers, absl_logging.get_absl_handler().python_handler]
    for handler in handlers:
        if not isinstance(handler.formatter, _BareJsonFormatter):
            handler.setFormatter(_BareJsonFormatter(handler.formatter or logging.Formatter()))


class _BareJsonFormatter(logging.Formatter):
    """Leaves our JSON lines as they are and hands every other record to the formatter that was there."""

    def __init__(self, others: logging.Formatter) -> None:
        super().__init__()
        self._others = others

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if getattr(record, _JSON_MARK, False) else self._others.format(record)


def _event_fields(event: Event) -> dict[str, Any]:
    """What the event holds besides its step, which every line has anyway."""
    return {name: value for name, value in dataclasses.asdict(event).items() if name != "step"}


def _plain(value: Any) -> Any:
    """`value` in JSON's types: numbers that JSON lacks become null, unknown objects their text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
