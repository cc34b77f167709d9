"""The figures as a table for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.job import Result
from benchmarks.plan import MIB, PROCESSES, Plan
from benchmarks.samples import Samples, Spread
from benchmarks.targets import LENGTHENING, MEMCPY, NO_SAVES, ORBAX, OURS, Judged, judge

_ROWS = (
    ("save: call blocked", "save_blocked_seconds"),
    ("save: call to sealed", "save_sealed_seconds"),
    ("save: call to complete", "save_complete_seconds"),
    ("nothing due: one call", "idle_call_seconds"),
    ("train loop, saves at each step: longer by", LENGTHENING),
    ("restart: open the manager again", "reopen_seconds"),
    ("restart: restore the local step", "restore_seconds"),
    ("restart: both", "restart_seconds"),
    ("first use: open the manager", "first_open_seconds"),
    ("first use: call blocked", "first_save_blocked_seconds"),
    ("first use: call to sealed", "first_save_sealed_seconds"),
    ("first use: call to complete", "first_save_complete_seconds"),
    ("first restart: open the manager again", "first_reopen_seconds"),
    ("first restart: restore the local step", "first_restore_seconds"),
    ("first restart: both", "first_restart_seconds"),
    ("restart, nothing lost: open and restore", "intact_restart_seconds"),
    ("restart, one of two slices lost: open and restore", "slice_lost_restart_seconds"),
)
# Compared with the bare copy of the same bytes.
_OF_MEMCPY = ("save_sealed_seconds", "save_complete_seconds", "restore_seconds", "restart_seconds")


def add_derived(job: Samples, plan: Plan) -> None:
    """Adds how much longer a train step became, round by round."""
    bare = job.of(NO_SAVES, "loop_seconds")
    for name in (OURS, ORBAX, MEMCPY):
        for with_saves, without in zip(job.of(name, "loop_seconds"), bare, strict=False):
            job.add(name, LENGTHENING, (with_saves - without) / plan.loop_steps)


def print_report(
    result: Result, more: Sequence[Table], plan: Plan, facts: dict[str, Any], command: str
) -> None:
    """Writes the table, those of the sections without a job, and how to get it again to standard output."""
    console = Console(width=170, highlight=False)
    job = result.job
    size = f"{result.state_bytes / MIB:.0f} MiB"
    console.print(
        f"{PROCESSES} processes (2 slices) x {size}, {plan.repeats} rounds: median (smallest to largest), the "
        "slower process counts"
    )
    table = Table()
    table.add_column("measurement")
    for heading in ("emergency_ckpt", "Orbax", "Orbax / emergency_ckpt", "memcpy / emergency_ckpt"):
        table.add_column(heading, justify="right")
    for title, measurement in _ROWS:
        ours, orbax = job.of(OURS, measurement), job.of(ORBAX, measurement)
        if ours or orbax:
            of_memcpy = job.of(MEMCPY, "copy_seconds") if measurement in _OF_MEMCPY else []
            table.add_row(
                title,
                _seconds(ours),
                _seconds(orbax),
                _ratio(Spread.of_ratios(orbax, ours)),
                _ratio(Spread.of_ratios(of_memcpy, ours)),
            )
    if table.row_count:
        console.print(table)
    for each in more:
        console.print(each)
    if job.of(OURS, "memory_saves"):
        console.print(_memory_table(result))
    if judged := [each for each in judge(job) if each.steady]:
        console.print(_targets_table(judged))
    for line in _remarks(result, plan):
        console.print(line)
    console.print(
        f"{facts['time']}, commit {facts['commit']}, python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    )
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1024**3:.0f} GiB, load "
        f"{facts['load_average']:.1f} before, took {result.seconds:.0f} s"
    )
    console.print(f"again: {command}", soft_wrap=True)


def _memory_table(result: Result) -> Table:
    table = Table(title="memory over many saves of a small state", title_justify="left")
    table.add_column("saves", justify="right")
    for process in range(len(result.processes)):
        table.add_column(f"process {process}: private memory", justify="right")
    table.add_column("keys in the coordination service", justify="right")
    for number, saves in enumerate(result.job.of(OURS, "memory_saves")):
        private = [each.of(OURS, "memory_private_bytes")[number] for each in result.processes]
        table.add_row(
            f"{saves:.0f}",
            *(f"{nbytes / MIB:.1f} MiB" for nbytes in private),
            f"{result.job.of(OURS, 'memory_coordination_keys')[number]:.0f}",
        )
    return table


def _targets_table(judged: list[Judged]) -> Table:
    table = Table(title="targets, judged by the median of the steady state", title_justify="left")
    for heading in ("target", "to reach", "steady state", "first use", "reached"):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for each in judged:
        unit, factor = each.target.unit
        table.add_row(
            each.target.title,
            f"{'at most' if each.target.at_most else 'at least'} {each.target.limit * factor:g} {unit}",
            _figures(each.steady, factor, unit),
            _figures(each.first, factor, unit),
            "yes" if each.reached else "NO",
        )
    return table


def _figures(spread: Spread | None, factor: float, unit: str) -> str:
    if spread is None:
        return ""
    median, low, high = (value * factor for value in (spread.median, spread.low, spread.high))
    if low == high:
        return f"{median:.3g} {unit}"
    return f"{median:.3g} {unit} ({low:.3g} to {high:.3g})"


def _remarks(result: Result, plan: Plan) -> list[str]:
    """What the rows need to be understood."""
    job, remarks = result.job, []
    if copies := job.of(MEMCPY, "copy_seconds"):
        rate = result.state_bytes / 1e9
        remarks.append(
            f"memcpy into a mapped, touched tmpfs file: {_seconds(copies)}, "
            f"{rate / sorted(copies)[len(copies) // 2]:.1f} GB/s in each process, both at once"
        )
    if sealed := job.of(OURS, "save_sealed_seconds"):
        rate = result.state_bytes / 1e9 / sorted(sealed)[len(sealed) // 2]
        if bound := Spread.of_ratios(job.of(ORBAX, "save_sealed_seconds"), job.of(MEMCPY, "copy_seconds")):
            remarks.append(
                f"the bare memcpy is {_ratio(bound)} times as fast as Orbax's save: no save that copies can be "
                "faster on this machine"
            )
        remarks.append(f"emergency_ckpt seals at {rate:.1f} GB/s in each process")
    if bare := job.of(NO_SAVES, "loop_seconds"):
        remarks.append(
            f"train loop: {plan.loop_steps} steps of {_seconds([t / plan.loop_steps for t in bare])} without "
            "saves; the wait for the last save counts"
        )
        if copies := job.of(MEMCPY, LENGTHENING):
            bound = Spread.of_ratios(job.of(ORBAX, LENGTHENING), copies)
            remarks.append(
                f"a bare copy after each step makes it longer by {_seconds(copies)}, Orbax by {_ratio(bound)} "
                "times as much: no save that copies can do better on this machine"
            )
        for name in (OURS, ORBAX):
            missing = sum(job.of(name, "loop_incomplete_saves"))
            total = plan.loop_steps * len(job.of(name, "loop_incomplete_saves"))
            remarks.append(f"{name}: {total - missing:.0f} of {total} saves in the loop are complete")
    if job.of(OURS, "slice_lost_fetched_bytes"):
        moved = [sum(job.of(OURS, f"{name}_fetched_bytes")) / MIB for name in ("intact", "slice_lost")]
        remarks.append(
            f"over the network in a restart in which nothing was lost: {moved[0]:.0f} MiB; with one of two "
            f"slices lost, which had {result.state_bytes / MIB:.0f} MiB: {moved[1]:.0f} MiB"
        )
    if job.of(ORBAX, "save_complete_seconds"):
        remarks.append(
            "Orbax keeps a local copy in one slice only and has no checksums; sealed is complete there"
        )
    return remarks


def to_json(result: Result, plan: Plan, facts: dict[str, Any], command: str) -> dict[str, Any]:
    """Everything that was measured, with medians and spreads, raw samples, and where they come from."""
    summary = {
        contender: {
            measurement: {"median": spread.median, "low": spread.low, "high": spread.high}
            for measurement in measurements
            if (spread := Spread.of(result.job.of(contender, measurement)))
        }
        for contender, measurements in result.job.values.items()
    }
    ratios = {
        measurement: {"median": spread.median, "low": spread.low, "high": spread.high}
        for _, measurement in _ROWS
        if (spread := Spread.of_ratios(result.job.of(ORBAX, measurement), result.job.of(OURS, measurement)))
    }
    return {
        "command": command,
        "environment": facts,
        "processes": PROCESSES,
        "state_bytes_per_process": result.state_bytes,
        "repeats": plan.repeats,
        "loop_steps": plan.loop_steps,
        "sections": list(plan.sections),
        "seconds": result.seconds,
        "summary": summary,
        "orbax_over_emergency_ckpt": ratios,
        "targets": [_target_to_json(each) for each in judge(result.job)],
        "samples_of_the_job": result.job.values,
        "samples_by_process": [each.values for each in result.processes],
    }


def _target_to_json(judged: Judged) -> dict[str, Any]:
    def plain(spread: Spread | None) -> dict[str, float] | None:
        return dataclasses.asdict(spread) if spread else None

    return {
        "target": judged.target.title,
        "at_most" if judged.target.at_most else "at_least": judged.target.limit,
        "steady_state": plain(judged.steady),
        "first_use": plain(judged.first),
        "reached": judged.reached,
    }


def _seconds(values: list[float]) -> str:
    spread = Spread.of(values)
    if spread is None:
        return ""
    unit, factor = _unit(spread.median)
    return f"{spread.median * factor:.3g} {unit} ({spread.low * factor:.3g} to {spread.high * factor:.3g})"


def _unit(seconds: float) -> tuple[str, float]:
    if abs(seconds) < 1e-3:
        return "µs", 1e6
    return ("ms", 1e3) if abs(seconds) < 1 else ("s", 1.0)


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.2g} ({spread.low:.2g} to {spread.high:.2g})"
