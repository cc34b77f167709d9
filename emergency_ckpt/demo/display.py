"""What a person sees while the demo runs and at its end: progress bars on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from emergency_ckpt.demo.agreement import Check
from emergency_ckpt.demo.summary import Summary

_LINE_EVERY_STEPS = 10


class RunDisplay:
    """Follows one run: the newest step with its loss, and what happens to the job."""

    def __init__(self, console: Console, progress: Progress | None, name: str, steps: int) -> None:
        self._console, self._progress, self._name, self._steps = console, progress, name, steps
        self._bar: TaskID | None = None
        if progress is not None:
            self._bar = progress.add_task(name, total=steps, state="starting, compiling")
        else:
            console.print(f"{name}: starting, compiling")

    def step(self, step: int, loss: float | None) -> None:
        state = "" if loss is None else f"loss {loss:.3f}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, state=state)
        elif step % _LINE_EVERY_STEPS == 0 or step == self._steps:
            self._console.print(f"{self._name}: step {step} of {self._steps}  {state}")

    def event(self, seconds: float, text: str, style: str = "") -> None:
        """Something happened to the job, `seconds` after its begin."""
        line = f"{self._name}: {text}, after {seconds:.1f} s"
        self._console.print(f"[{style}]{escape(line)}[/]" if style else escape(line), highlight=False)

    def state(self, text: str) -> None:
        """What the job is at, where no step tells it."""
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, state=text)


@contextlib.contextmanager
def run_display(console: Console, name: str, steps: int) -> Iterator[RunDisplay]:
    """The display of one run, while it runs."""
    if not console.is_terminal:
        yield RunDisplay(console, None, name, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield RunDisplay(console, progress, name, steps)


def show_summary(console: Console, summary: Summary) -> None:
    """The end of the demo: what was lost, what came back, and whether everything agrees."""
    console.print()
    console.print(Panel(_story(summary), title="What happened", box=box.ROUNDED, expand=False))
    show_checks(console, summary.checks)
    if summary.agrees:
        console.print(
            "[bold green]The interrupted run came to the same end as the uninterrupted one, bit for bit.[/]"
        )
    else:
        console.print("[bold red]The interrupted run did not come to the same end as the uninterrupted one.[/]")


def _story(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in story(summary):
        table.add_row(name, escape(text))
    return table


def story(summary: Summary) -> list[tuple[str, str]]:
    """The summary as (what, words) pairs."""
    lost = summary.time_lost
    job = summary.job
    persistent = summary.failure.persistent_step
    return [
        (
            "failure",
            f"slice {summary.failure.slice_index} killed ({_processes(summary.failure.processes)}), its "
            "ramdisks wiped",
        ),
        ("step reached", f"{summary.step_reached} of {job.steps}"),
        (
            "step restored",
            "none: from scratch" if summary.step_restored is None else str(summary.step_restored),
        ),
        ("why", summary.reason or "nothing was there to restore"),
        ("sources", _sources(summary.sources)),
        ("restored", f"{summary.restored_bytes / 1e6:.1f} MB in {lost.restoring:.2f} s"),
        (
            "steps lost",
            f"{summary.steps_lost} (saved locally every {job.local_period} steps); with persistent checkpoints "
            f"only, every {job.persistent_period} steps: {summary.steps_lost_persistent_only}, from "
            f"{'scratch' if persistent is None else f'step {persistent}'}",
        ),
        (
            "time lost",
            f"{lost.total:.1f} s: {lost.down:.1f} s until all processes were started again, "
            f"{lost.starting:.1f} s start and compilation, {lost.restoring:.1f} s restore, "
            f"{lost.retraining:.1f} s retraining",
        ),
        ("loss", f"{summary.first_loss:.3f} at the first step, {summary.final_loss:.3f} at the last"),
    ]


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """In what a run that something happened to agrees with the one in peace."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("compared with the uninterrupted run", "", "value"):
        table.add_column(column)
    for check in checks:
        if check.agrees:
            table.add_row(check.name, "[green]equal[/]", escape(check.found))
        else:
            values = f"uninterrupted: {check.expected}\ninterrupted: {check.found}"
            table.add_row(check.name, "[bold red]DIFFERENT[/]", escape(values))
    console.print(table)


def _sources(sources: Sequence[str]) -> str:
    """Which processes got their shards from where."""
    by_source: dict[str, list[int]] = {}
    for process, source in enumerate(sources):
        by_source.setdefault(source, []).append(process)
    return "; ".join(f"{_processes(processes)}: {source}" for source, processes in by_source.items())


def _processes(indices: Sequence[int]) -> str:
    return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, indices))}"
