"""The measurements, as one process of the job takes part in them.

In every round each contender has its turn, and the turns change order, so that what happens on the machine
meanwhile meets all alike. Before every turn all processes wait for each other.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from benchmarks.contenders import PERIOD, Contender, Ours, make_contenders
from benchmarks.memory import measure_memory
from benchmarks.plan import Plan
from benchmarks.samples import Samples
from benchmarks.workload import State, Workload, require_same_bits, shard_views

PROGRESS = "benchmark> "
"""How a line of output begins that the user should see while the job runs."""

_IDLE_CALLS = {"emergency_ckpt": 900, "orbax": 20}


class Measurements:
    """All sections of one run in one process; `samples` has what was measured."""

    def __init__(self, plan: Plan, workload: Workload, ramdisk: Path) -> None:
        self.samples = Samples()
        self._plan = plan
        self._workload = workload
        self._ramdisk = ramdisk
        self._step = 0
        self._state: State = jax.block_until_ready(workload.init())
        self._contenders: Sequence[Contender] = ()

    def run(self) -> None:
        """Everything that the plan asks for."""
        with contextlib.ExitStack() as cleanup:
            shared = Path(self._plan.directory) / "persistent"
            if set(self._plan.sections) - {"memcpy", "memory"}:
                self._contenders = make_contenders(self._workload, self._ramdisk, shared)
                for contender in self._contenders:
                    self._first_use(contender)
                    cleanup.callback(contender.close)
            if {"memcpy", "save"} & set(self._plan.sections):
                self._measure_saves()
            if "idle" in self._plan.sections:
                self._measure_idle()
            if "loop" in self._plan.sections:
                self._measure_loop()
            if "restore" in self._plan.sections:
                self._measure_restores()
            if "lost" in self._plan.sections:
                self._measure_losses()
        if "memory" in self._plan.sections:
            measure_memory(
                self._workload.mesh, self._plan.memory_saves, self._ramdisk, shared, self.samples, self._say
            )

    # The parts of a save.

    def _first_use(self, contender: Contender) -> None:
        """The first manager and the first save: nothing is touched, allocated or compiled."""
        self._say(f"first save of {contender.name}")
        # The step comes first, so that the save follows at once: no slot is prepared while XLA compiles.
        self._train()
        self._meet()
        with self._timed(contender.name, "first_open_seconds"):
            contender.open()
        self._time_save(contender, "first_save", first=True)

    def _measure_saves(self) -> None:
        """Saves one at a time of a state that is there, beside bare copies of the same bytes."""
        with contextlib.ExitStack() as cleanup:
            copying = "memcpy" in self._plan.sections
            target = None
            if copying:
                target = cleanup.enter_context(_mapped_file(self._ramdisk / "memcpy", self._state))
                self._copy(target, "first_copy_seconds")
            for turn in self._rounds("save"):
                if target is not None:
                    self._copy(target, "copy_seconds")
                for contender in self._in_turn(turn) if "save" in self._plan.sections else ():
                    self._train()
                    self._meet()
                    self._time_save(contender, "save")

    def _copy(self, target: np.ndarray, measurement: str) -> None:
        sources = shard_views(self._state)
        self._meet()
        with self._timed("memcpy", measurement):
            _copy_views(sources, target)

    def _time_save(self, contender: Contender, name: str, *, first: bool = False) -> None:
        step = self._next_step()
        began = time.perf_counter()
        contender.save(step, self._state)
        blocked = time.perf_counter() - began
        contender.wait()
        complete = sealed = time.perf_counter() - began
        if logged := contender.logged(step):
            sealed = logged.sealed_seconds
            # The first save goes to the persistent tier too, and the wait was for that as well.
            complete = logged.complete_seconds if first else complete
        for part, seconds in (("blocked", blocked), ("sealed", sealed), ("complete", complete)):
            self.samples.add(contender.name, f"{name}_{part}_seconds", seconds)

    # Steps.

    def _measure_idle(self) -> None:
        """Calls at steps where nothing is due, one after the other."""
        for turn in self._rounds("idle"):
            for contender in self._in_turn(turn):
                calls, base = _IDLE_CALLS[contender.name], self._next_step()
                self._meet()
                began = time.perf_counter()
                for step in range(base + 1, base + 1 + calls):
                    contender.save(step, self._state)
                self.samples.add(contender.name, "idle_call_seconds", (time.perf_counter() - began) / calls)
                contender.wait()

    def _measure_loop(self) -> None:
        """Train steps without saves, and with one after each; the wait for the last save counts.

        Beside them, what a bare copy of the state after each step costs: the least that any save can.
        """
        steps = self._plan.loop_steps
        for turn in self._rounds("loop"):
            self._measure_loop_of_copies(steps)
            for contender in (None, *self._in_turn(turn)):
                name = contender.name if contender else "no_saves"
                done_before = contender.complete_saves() if contender else 0
                self._meet()
                with self._timed(name, "loop_seconds"):
                    for _ in range(steps):
                        self._state = self._workload.step(self._state)
                        if contender is not None:
                            contender.save(self._next_step(), self._state)
                    jax.block_until_ready(self._state)
                    if contender is not None:
                        contender.wait()
                if contender is not None:
                    done = contender.complete_saves() - done_before
                    self.samples.add(name, "loop_incomplete_saves", float(steps - done))

    def _measure_loop_of_copies(self, steps: int) -> None:
        path = self._ramdisk / "memcpy"
        with _mapped_file(path, self._state) as target, ThreadPoolExecutor(1) as pool:
            self._copy(target, "loop_first_copy_seconds")  # Touches the memory.
            self._meet()
            with self._timed("memcpy", "loop_seconds"):
                copied: Future[None] | None = None
                for _ in range(steps):
                    self._state = self._workload.step(self._state)
                    views = shard_views(self._state)  # Waits for the step, as a save does.
                    if copied is not None:
                        copied.result()
                    copied = pool.submit(_copy_views, views, target)
                    del views
                jax.block_until_ready(self._state)
                if copied is not None:
                    copied.result()

    # Coming back.

    def _measure_restores(self) -> None:
        """A new manager on the directories of the last one, and the newest step from the local tier."""
        for turn in self._rounds("restore", first_use=True):
            first = "first_" if turn == 0 else ""
            for contender in self._in_turn(turn):
                contender.save(self._next_step(), self._state)
                contender.wait()
                contender.close()
                self._meet()
                began = time.perf_counter()
                contender.open()
                opened = time.perf_counter() - began
                self._meet()
                began = time.perf_counter()
                found = jax.block_until_ready(contender.restore())
                restored = time.perf_counter() - began
                require_same_bits(found, self._state, contender.name)
                del found
                self.samples.add(contender.name, f"{first}reopen_seconds", opened)
                self.samples.add(contender.name, f"{first}restore_seconds", restored)
                self.samples.add(contender.name, f"{first}restart_seconds", opened + restored)

    def _measure_losses(self) -> None:
        """How many bytes come over the network when nothing was lost, and when one of the two slices was."""
        ours = next(contender for contender in self._contenders if isinstance(contender, Ours))
        for name, has_lost in (("intact", False), ("slice_lost", jax.process_index() == 1)):
            self._say(f"lost, {name}")
            ours.save(self._next_step(), self._state)
            ours.wait()
            ours.close()
            self._meet()
            if has_lost:
                ours.lose()
            self._meet()
            with self._timed(ours.name, f"{name}_restart_seconds"):
                ours.open()
                found = jax.block_until_ready(ours.restore())
            require_same_bits(found, self._state, ours.name)
            fetched, needed = ours.fetched_bytes(), self._workload.nbytes if has_lost else 0
            self.samples.add(ours.name, f"{name}_fetched_bytes", float(fetched))
            self.samples.add(ours.name, f"{name}_fetched_beside_bytes", float(abs(fetched - needed)))

    # Small things.

    def _train(self) -> None:
        """One step, so that there is a new state to save, and a wait until it is there."""
        self._state = jax.block_until_ready(self._workload.step(self._state))

    def _next_step(self) -> int:
        """The next step at which a save is due."""
        self._step += PERIOD
        return self._step

    def _rounds(self, section: str, *, first_use: bool = False) -> Iterator[int]:
        rounds = self._plan.repeats + first_use
        for number in range(rounds):
            self._say(f"{section}, round {number + 1} of {rounds}")
            yield number

    def _in_turn(self, number: int) -> Sequence[Contender]:
        return self._contenders if number % 2 == 0 else self._contenders[::-1]

    def _meet(self) -> None:
        """All processes have come here, and none collects garbage right after."""
        gc.collect()
        multihost_utils.sync_global_devices("benchmark")

    @contextlib.contextmanager
    def _timed(self, contender: str, measurement: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.samples.add(contender, measurement, time.perf_counter() - began)

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(f"{PROGRESS}{text}", flush=True)


def _copy_views(sources: Sequence[np.ndarray], target: np.ndarray) -> None:
    at = 0
    for source in sources:
        np.copyto(target[at : at + source.nbytes], source)
        at += source.nbytes


@contextlib.contextmanager
def _mapped_file(path: Path, state: State) -> Iterator[np.ndarray]:
    """A file with room for the state, mapped and not yet touched, gone at the end."""
    nbytes = sum(view.nbytes for view in shard_views(state))
    with path.open("w+b") as file:
        path.unlink()
        file.truncate(nbytes)
        yield np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)
