"""JAX's preemption sync point: all processes learn of a notice at one and the same step.

A signal is seen by JAX itself. Any other notice is told to the service in the very words in which JAX tells a
signal, by a key that is written once, so that both lead to the same step. What the notice says is written
before it, for all processes to read.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import threading
from typing import Any, ClassVar

import jax
from jax.experimental import multihost_utils

from emergency_ckpt.errors import PeerFailedError
from emergency_ckpt.jaxio.coordination import Coordinator, JaxCoordinator, SingleProcess

# What XLA's preemption sync manager writes when a signal comes, and what it waits for on all processes.
_KEY = "RECEIVED_PREEMPTION_NOTICE"
_DIRECTORY = "ckpt_notices"
_MOST_KEPT = 16
"""Notices of one process that stand at a time; a later one takes the place of the oldest."""


class _Process:
    """Several managers of one process ask one service."""

    has_asked = False
    ordinals = itertools.count()
    written: ClassVar[dict[int, str]] = {}  # the keys of this process, by the ordinal of the query


_process = _Process()


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """What the processes of the job have told each other.

    Attributes:
      signalled: the time in JAX's own key, where JAX wrote it for a signal; None: there is none.
      notices: (process, notice) in the words of `announce`.
    """

    signalled: str | None
    notices: tuple[tuple[int, bytes], ...]


class PreemptionQuery:
    """Asks JAX's preemption service once per step; a second question for the same step gets the same answer.

    The service matches step numbers exactly, so it has to be asked at every step. It runs in every job that
    called `jax.distributed.initialize`, also of one process. A process that did not, and is alone, agrees with
    itself; there only what is announced is reached.
    All processes must construct theirs in the same order.
    """

    def __init__(self) -> None:
        self._runs, self._coordinator = _service()
        self._step: int | None = None
        self._reached = False
        self._announced = threading.Event()
        self._guard = threading.Lock()
        self._count = 0
        self._ordinal = next(_process.ordinals)
        self._directory = f"{_DIRECTORY}/{self._ordinal}"
        # Others may still read what was said in the one before.
        for ordinal in [known for known in _process.written if known < self._ordinal - 1]:
            self._coordinator.delete(_process.written.pop(ordinal))

    @property
    def service_runs(self) -> bool:
        """Whether JAX's service takes part: then a SIGTERM, too, is told to all processes by it."""
        return self._runs

    @property
    def process_index(self) -> int:
        return jax.process_index()

    @property
    def process_count(self) -> int:
        return jax.process_count()

    def begin_after(self, step: int) -> None:
        """Training goes on after `step`. Does nothing once a step was asked about.

        Without it a notice that comes before the first question (during the first compilation, say) is lost:
        the service names the step after the newest one that was asked about, and 1 where none was.
        """
        if self._runs and not _process.has_asked:
            multihost_utils.reached_preemption_sync_point(step)

    def reached(self, step: int) -> bool:
        """Whether `step` is the step at which all processes agreed to react to a notice."""
        if step != self._step:
            self._step = step
            if self._runs:
                _process.has_asked = True
                self._reached = multihost_utils.reached_preemption_sync_point(step)
            else:
                self._reached = self._announced.is_set()
                self._announced.clear()
        return self._reached

    def announce(self, notice: bytes) -> str:
        """Tells all processes of a notice, as a signal would. From any thread. Returns what comes of it."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        try:
            # Whoever sees JAX's key finds what it is about.
            self._write(now, notice)
            if self._runs:
                if self._coordinator.put_once(_KEY, now.encode()) == now.encode():
                    return "all processes agree on a step to react at"
                return "a step was agreed on before, for another notice"
        except PeerFailedError as error:
            return f"no step is agreed on, because the coordination service does not answer: {error}"
        if self.process_count > 1:
            return "no step is agreed on, because JAX's preemption service does not run"
        self._announced.set()
        return "this process reacts at its next step"

    def told(self) -> Told:
        """What was announced until now, here and elsewhere. One or two small requests.

        Raises PeerFailedError where the coordination service cannot be reached.
        """
        standing = self._coordinator.try_get(_KEY) if self._runs else None
        if self._runs and standing is None:
            return Told(None, ())
        found = self._coordinator.entries(self._directory)
        times, notices = set[bytes](), list[tuple[int, bytes]]()
        for key, value in sorted(found.items()):
            time, _, notice = value.partition(b"\n")
            times.add(time)
            notices.append((int(key.partition("/")[0]), notice))
        signalled = None if standing is None or standing in times else standing.decode("ascii", "replace")
        return Told(signalled, tuple(notices))

    def _write(self, time: str, notice: bytes) -> None:
        mine = f"{self._directory}/{self.process_index}"
        with self._guard:
            number, self._count = self._count, self._count + 1
            _process.written[self._ordinal] = mine
        self._coordinator.put(f"{mine}/{number % _MOST_KEPT}", time.encode() + b"\n" + notice)


def _service() -> tuple[bool, Coordinator]:
    """Whether the preemption service runs, and the channel between the processes."""
    from jax._src import distributed

    state: Any = distributed.global_state
    if state.client is None:
        return False, SingleProcess()
    coordinator = JaxCoordinator(state.client, jax.process_index(), jax.process_count())
    return state.preemption_sync_manager is not None, coordinator
