"""What the persistent directory of a run holds, for a person: every committed step with what it says of itself.

Reads small files only, many steps at a time, and ends in time: what cannot be read is told instead of raised.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from emergency_ckpt.core.extras import ProcessExtras
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.run_directories import FoundStep, RunDirectory
from emergency_ckpt.persistent.step_facts import read_step_facts
from emergency_ckpt.persistent.step_files import EXTRAS_FILE, LAYOUT_FILE

_AT_ONCE = 16
_MOST_LAYOUT_BYTES = 64 * 1024**2
_MOST_EXTRAS_BYTES = 256 * 1024**2


@dataclasses.dataclass(frozen=True)
class StepView:
    """One committed step.

    Attributes:
      generation: 0 for a step of another program or run; `run`: the run that saved it, "" if unknown.
      void: a restore left it behind.
      started, committed: Unix times in seconds, None where the step does not say.
      bytes, files: of all that lies in its directory; None where they could not be told.
      processes, arrays: of the job that saved it; None where that cannot be told.
      item: the directory of the state in it; `items`: others, by name the handler that Orbax has for them.
      metrics, custom_metadata: what was given to the save.
      extras: names of what processes saved beside the state; None where they were not asked for.
      problem: what is wrong with it, or could not be read; empty if nothing.
    """

    step: int
    generation: int
    run: str
    directory: str
    item: str
    void: bool
    started: float | None = None
    committed: float | None = None
    bytes: int | None = None
    files: int | None = None
    processes: int | None = None
    arrays: int | None = None
    items: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    extras: Sequence[str] | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class RunView:
    """One persistent directory.

    Attributes:
      known: the numbers of its committed steps, oldest first, without void ones; `steps`: those wanted.
      uncommitted: what is named like a step or an attempt, and is none.
    """

    location: str
    run: str
    generation: int
    metadata: Mapping[str, Any]
    known: Sequence[int]
    steps: Sequence[StepView]
    uncommitted: Sequence[str]


def view_run(location: str, seconds: float, step: int | Literal["latest"] | None = None) -> RunView:
    """What there is to see; with `step` only that one, and more of it. Ends within about twice the time.

    Raises ConfigError, PersistentStoreError, CorruptDataError where nothing can be told at all.
    """
    until = time.monotonic() + seconds
    run = RunDirectory(location, Limits(min(seconds, 20.0), seconds, attempts=4))
    steps = run.steps()
    known = [each.step for each in steps if not each.void]
    wanted = known[-1] if step == "latest" and known else step
    chosen = [each for each in steps if wanted in (None, each.step)]
    looking = _Looking(run, step is not None)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "emergency_ckpt looking") as pool:
        asked = [pool.submit(looking.at, each) for each in chosen]
        concurrent.futures.wait(asked, max(until - time.monotonic(), 0.0))
        late = f"not read within {seconds:g} s"
        # Those that have begun end within the limits of the store's operations.
        found = [_begun(e, late) if a.cancel() else a.result() for e, a in zip(chosen, asked, strict=True)]
    newest = run.store.newest_generation()
    return RunView(
        run.location,
        run.run_id(),
        newest.number if newest else 0,
        run.store.root_metadata() or {},
        known,
        found,
        run.uncommitted(steps),
    )


class _Looking:
    """Looks at steps of one run, from several threads. Steps that share a layout have it read once."""

    def __init__(self, run: RunDirectory, closely: bool) -> None:
        self._run = run
        self._closely = closely
        self._guard = threading.Lock()
        self._layouts: dict[str, tuple[int, int]] = {}

    def at(self, step: FoundStep) -> StepView:
        view = _begun(step, "")
        try:
            sizes = self._run.sizes(step.name)
            view = dataclasses.replace(view, bytes=sum(sizes.values()), files=len(sizes))
            files = self._run.files.below(step.name)
            facts = read_step_facts(files, step.step)
            view = dataclasses.replace(
                view,
                started=_seconds(facts.started_nanoseconds),
                committed=_seconds(facts.committed_nanoseconds),
                metrics=facts.metrics,
                custom_metadata=facts.custom_metadata,
                items={name: handler for name, handler in facts.handlers.items() if name != view.item},
            )
            return self._with_contents(view, StepReader(files, view.item, directory_step=step.step), sizes)
        except (CorruptDataError, PersistentStoreError, FileNotFoundError) as error:
            return dataclasses.replace(view, problem=str(error))

    def _with_contents(self, view: StepView, reader: StepReader, sizes: Mapping[str, int]) -> StepView:
        if reader.side is None:
            return dataclasses.replace(view, arrays=len(reader.saved_arrays) if self._closely else None)
        extras: Sequence[str] | None = None
        if self._closely and sizes.get(EXTRAS_FILE, 0) <= _MOST_EXTRAS_BYTES:
            extras = _names_of(reader.extras)
        processes, arrays = self._shape_of(reader, reader.side.layout_hash, sizes)
        return dataclasses.replace(
            view, run=reader.side.run_id, processes=processes, arrays=arrays, extras=extras
        )

    def _shape_of(
        self, reader: StepReader, layout_hash: str, sizes: Mapping[str, int]
    ) -> tuple[int | None, int | None]:
        """Processes and arrays of the job that saved the step."""
        with self._guard:
            known = self._layouts.get(layout_hash)
        if known is None:
            if sizes.get(LAYOUT_FILE, 0) > _MOST_LAYOUT_BYTES and not self._closely:
                return None, None
            layout: Layout | None = reader.layout
            assert layout is not None
            known = (layout.process_count, len(layout.leaves))
            with self._guard:
                self._layouts[layout_hash] = known
        return known


def _begun(step: FoundStep, problem: str) -> StepView:
    held = step.held
    return StepView(
        step.step, held.step_id.generation, "", held.location, held.item, step.void, problem=problem
    )


def _names_of(extras: Mapping[str, bytes]) -> list[str]:
    found = [ProcessExtras.from_text(data.decode()) for data in extras.values()]
    return sorted({name for each in found for name in (*each.values, *each.items)})


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
