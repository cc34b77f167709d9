"""`emergency-ckpt show`: what checkpoints there are, and what was saved with them. Needs no jax."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emergency_ckpt.cli.ramdisks import slot_directories
from emergency_ckpt.errors import ConfigError, NoRestorableStepError
from emergency_ckpt.telemetry.units import format_bytes

if TYPE_CHECKING:
    from emergency_ckpt.local.overview import SlotView
    from emergency_ckpt.persistent.overview import RunView, StepView

_DESCRIPTION = """\
Shows the committed steps of a run in a bucket or a directory, those of plain Orbax included, with the training
state that was saved with them (metrics, custom metadata); of a ramdisk directory the sealed slots. With STEP:
all that is known of that step. Only small files are read, nothing is written, and a job may be running."""
_TOLD = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "location",
        metavar="DIRECTORY",
        help="s3://bucket/prefix, gs://bucket/prefix or a directory: the one whose entries are the steps; or a "
        "ramdisk",
    )
    parser.add_argument("step", metavar="STEP", nargs="?", help="a step, or latest")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="steps that are not read by then are told as such (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run(args: argparse.Namespace) -> int:
    """Prints what there is; returns the exit status."""
    if not 0 < args.timeout <= 86400:
        raise ConfigError(f"--timeout {args.timeout}: expected seconds, up to a day")
    if args.step not in (None, "latest") and not args.step.isdigit():
        raise ConfigError(f"{args.step!r} is no step; give its number, or latest")
    found = _look(args.location, args.step, args.timeout)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        for line in found.lines():
            print(line)
    return 1 if any(each.problem for each in (*found.steps, *found.slots)) else 0


@dataclasses.dataclass(frozen=True)
class _Found:
    run: RunView
    slots: Sequence[SlotView]
    closely: bool

    @property
    def steps(self) -> Sequence[StepView]:
        return self.run.steps

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.run), "slots": [dataclasses.asdict(slot) for slot in self.slots]}

    def lines(self) -> Iterator[str]:
        if self.closely:
            for each in (*self.steps, *self.slots):
                yield from _all_of(each)
            return
        if self.steps or not self.slots:
            run = f"run {self.run.run}, generation {self.run.generation}" if self.run.run else "no run of ours"
            yield f"{self.run.location}: {run}"
            if self.run.metadata:
                yield f"metadata: {_told(self.run.metadata)}"
            yield from _table([_STEP_COLUMNS, *map(_step_cells, self.steps)])
        if self.run.uncommitted and self.steps:
            yield f"not committed, or no step: {', '.join(self.run.uncommitted[:10])}"
        if self.slots:
            yield "slots on the ramdisk"
            yield from _table([_SLOT_COLUMNS, *map(_slot_cells, self.slots)])


def _look(location: str, wanted: str | None, seconds: float) -> _Found:
    # So that --help starts without TensorStore.
    from emergency_ckpt.local.overview import view_slots
    from emergency_ckpt.persistent.overview import view_run

    roots = slot_directories(location)
    slots = view_slots(roots) if roots else []
    step = None if wanted is None else "latest" if wanted == "latest" else int(wanted)
    run = view_run(location, seconds, step)
    if not run.known and not run.steps and not roots:
        held = f"it holds {', '.join(run.uncommitted[:10])}" if run.uncommitted else "it holds no step at all"
        raise NoRestorableStepError(
            f"{run.location} has no committed steps, and no slots of a ramdisk: {held}. Give the directory"
            " whose entries are the steps: base_output_directory/run_name/checkpoints, say."
        )
    if step is None:
        return _Found(run, slots, False)
    if step == "latest":
        step = run.known[-1] if run.known else max((s.step for s in slots if not s.void), default=-1)
    slots = [slot for slot in slots if slot.step == step and not slot.problem]
    if not run.steps and not slots:
        raise NoRestorableStepError(f"{run.location} has no step {step}; it has {list(run.known)}")
    return _Found(run, slots, True)


_STEP_COLUMNS = ("step", "gen", "state", "committed", "bytes", "processes", "item", "metrics", "metadata")
_SLOT_COLUMNS = ("step", "gen", "position", "state", "bytes", "run", "metrics", "metadata")


def _step_cells(step: StepView) -> tuple[str, ...]:
    return (
        str(step.step),
        str(step.generation) if step.generation else "-",
        "unreadable"
        if step.problem
        else "void"
        if step.void
        else "committed"
        if step.run
        else "other program's",
        _when(step.committed),
        "-" if step.bytes is None else format_bytes(step.bytes),
        "-" if step.processes is None else str(step.processes),
        step.item or ".",
        _told(step.metrics),
        step.problem[:_TOLD] if step.problem else _told(step.custom_metadata),
    )


def _slot_cells(slot: SlotView) -> tuple[str, ...]:
    if slot.problem:
        return ("-", "-", "-", "unreadable", "-", "-", "-", slot.problem[:_TOLD])
    state = "complete" if slot.complete else f"{slot.missing} shards bad" if slot.missing else "sealed"
    return (
        str(slot.step),
        str(slot.generation),
        f"{slot.position} of {slot.processes}",
        "void" if slot.void else state,
        format_bytes(slot.bytes),
        slot.run[:8],
        _told(slot.metrics),
        _told(slot.custom_metadata),
    )


def _all_of(each: StepView | SlotView) -> Iterator[str]:
    """One line for each thing that is known."""
    for field in dataclasses.fields(each):
        value = getattr(each, field.name)
        if value is None or value in ("", {}, [], ()):
            continue
        if field.name in ("started", "committed"):
            value = _when(value)
        elif field.name == "bytes":
            value = format_bytes(value)
        elif isinstance(value, Mapping | list | tuple):
            value = json.dumps(value)
        yield f"{field.name + ':':<17} {value}"
    yield ""


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _told(content: Mapping[str, Any]) -> str:
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in content.items()) or "-"
    return text if len(text) <= _TOLD else f"{text[: _TOLD - 1]}…"


def _when(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
