"""The drain worker of a trainer: sealed steps go to the persistent tier one after the other, in the background.

A drain is carried out by a runner, in this process or in the agent of this host, by the same code
(`agent.draining`). Here the processes of the job tell each other how it ended, and the trainer is told.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from emergency_ckpt.agent.draining import Stop, carry_out
from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.orders import Destination, Share
from emergency_ckpt.agent.worker import Worker
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import (
    AgentStartError,
    CoordinationTimeoutError,
    CorruptDataError,
    EmergencyCheckpointError,
    LocalDirectoryError,
    PeerUnavailableError,
    PersistentStoreError,
    StaleGenerationError,
)
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.telemetry.events import DrainEvent, DrainResult
from emergency_ckpt.telemetry.log import CheckpointLogger


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a drain ended, as said by one process and believed by all."""

    result: DrainResult
    reason: str = ""


class VerdictBoard(Protocol):
    """Where the processes of a job tell each other how a drain ended. Written once per attempt."""

    def announce(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """Gives this process's verdict; returns the one that stands, whoever was first."""
        ...

    def wait(self, attempt: Attempt, timeout: timedelta) -> Verdict:
        """The verdict on this attempt; raises CoordinationTimeoutError when nobody gave one."""
        ...

    def peek(self, attempt: Attempt) -> Verdict | None:
        """The verdict, if one stands already."""
        ...


class Runner(Protocol):
    """Where the share of this process in a drain is carried out."""

    def run(self, share: Share, slot: SealedSlot, stop: Stop) -> int:
        """Carries it out from `slot`, which is pinned in this process; returns the bytes of its part.

        Raises what `draining.carry_out` raises.
        """
        ...


class InProcess:
    """Drains within the trainer: they end with it."""

    def __init__(self, persistent: PersistentStore, destination: Destination) -> None:
        self._persistent = persistent
        self._destination = destination

    def run(self, share: Share, slot: SealedSlot, stop: Stop) -> int:
        return carry_out(self._persistent, self._destination, share, slot, stop)


class ByAgent:
    """Drains by the agent of this host: they outlive the trainer. Without an agent they run here."""

    def __init__(
        self, agent: HostAgent, destination: Destination, otherwise: Runner, log: CheckpointLogger
    ) -> None:
        self._agent = agent
        self._destination = destination
        self._otherwise = otherwise
        self._log = log

    def run(self, share: Share, slot: SealedSlot, stop: Stop) -> int:
        try:
            return self._agent.drain(self._destination, share, stop)
        except (AgentStartError, LocalDirectoryError, PeerUnavailableError) as error:
            self._log.error(
                "drain",
                share.step,
                f"the agent of this host does not drain the step, the trainer does it itself: {error}",
            )
            return self._otherwise.run(share, slot, stop)


@dataclasses.dataclass(frozen=True)
class DrainJob:
    """What a drain worker works on: fixed for one generation of one process.

    Attributes:
      runner: carries out what this process has to do.
      committer: the process that commits (every process names the same).
      on_commit: called in the committer after each commit, for retention.
      after_commit: the user's, called in every process after each commit.
    """

    local: LocalStore
    runner: Runner
    generation: Generation
    item: str
    process: int
    committer: int
    timeout: timedelta
    board: VerdictBoard
    log: CheckpointLogger
    on_commit: Callable[[], None]
    after_commit: Callable[[], None] | None = None


@dataclasses.dataclass(frozen=True)
class _Request:
    attempt: Attempt
    slot: int | None  # pinned once for this drain; None where the step is not here any more

    @property
    def step(self) -> StepId:
        return self.attempt.step_id


class DrainWorker(Worker[_Request]):
    """Drains pinned slots one after the other in a thread of its own."""

    def __init__(self, job: DrainJob) -> None:
        self._job = job
        self._ordinals = itertools.count()
        self._newest_committed: StepId | None = None
        self._running: tuple[StepId, float] | None = None
        super().__init__("drain", self._do)

    @property
    def newest_committed(self) -> StepId | None:
        """The step whose drain was the last to be committed; None before the first."""
        return self._newest_committed

    @property
    def underway(self) -> tuple[StepId, float] | None:
        """The step that is being drained, and for how many seconds."""
        running = self._running
        return None if running is None else (running[0], time.monotonic() - running[1])

    def drain(self, step: StepId, slot: int | None) -> None:
        """Drains the sealed `step` from `slot`, which the caller has pinned; the worker unpins it.

        Where this process has lost the step (`slot` None), the attempt fails, and the others are told.
        All processes drain the same steps in the same order (what is complete is agreed), so that counting
        gives each attempt a number of its own; a step whose drain failed may be drained again.
        """
        attempt = Attempt(self._job.generation, step.step, self._job.item, next(self._ordinals))
        self.submit(_Request(attempt, slot))

    def _do(self, request: _Request) -> None:
        started = time.monotonic()
        self._running = (request.step, started)
        try:
            verdict, nbytes = self._drain(request)
        except EmergencyCheckpointError as error:
            verdict, nbytes = self._failed(request.attempt, error), 0
        except Exception as error:  # The others wait for a verdict, whatever it was.
            wrapped = PersistentStoreError(f"draining {request.step} failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            verdict, nbytes = self._failed(request.attempt, wrapped), 0
        self._job.log.emit(
            DrainEvent(
                step=request.step.step,
                bytes=nbytes,
                seconds=time.monotonic() - started,
                result=verdict.result,
                reason=verdict.reason,
            )
        )
        self._running = None
        if verdict.result == "committed":
            self._newest_committed = request.step
            self._call_back(request.step)

    def _drain(self, request: _Request) -> tuple[Verdict, int]:
        job = self._job
        if request.slot is None:
            raise CorruptDataError(f"{request.step} is not on this ramdisk any more")
        attempt = request.attempt
        try:
            slot = job.local.sealed(request.step)
            if slot is None or slot.index != request.slot:
                raise CorruptDataError(f"{request.step} is no longer sealed in slot {request.slot}")
            share = Share(
                step=attempt.step,
                ordinal=attempt.ordinal,
                layout=slot.layout.hash,
                position=job.process,
                holders=tuple(range(slot.layout.process_count)),
                commits=job.process == job.committer,
            )
            # Only the committer waits for others, and so for their failures.
            stop = (lambda: self._given_up(attempt)) if share.commits else (lambda: None)
            nbytes = job.runner.run(share, slot, stop)
            if share.commits:
                self._tidy(request.step)
                return job.board.announce(attempt, Verdict("committed")), nbytes
        finally:
            # Others may write on; this slot is not needed any more.
            job.local.unpin(request.slot)
        return self._await_verdict(attempt), nbytes

    def _given_up(self, attempt: Attempt) -> str | None:
        stands = self._job.board.peek(attempt)
        return stands.reason if stands else None

    def _tidy(self, step: StepId) -> None:
        """Retention after a commit; that it fails does not undo the commit."""
        try:
            self._job.on_commit()
        except (EmergencyCheckpointError, OSError) as error:
            told = PersistentStoreError(f"after the commit of {step}, old steps could not be deleted: {error}")
            self._note_after_commit("retention", step, told, error)

    def _call_back(self, step: StepId) -> None:
        """The user's callback after a commit; whatever it raises, the commit stands."""
        if self._job.after_commit is None:
            return
        try:
            self._job.after_commit()
        except Exception as error:
            told = EmergencyCheckpointError(
                f"{step} was committed, but the callback after it failed: {type(error).__name__}: {error}"
            )
            self._note_after_commit("drain", step, told, error)

    def _note_after_commit(
        self, operation: str, step: StepId, told: EmergencyCheckpointError, cause: Exception
    ) -> None:
        told.__cause__ = cause
        self._job.log.error(operation, step.step, str(told))
        self.note(told)

    def _await_verdict(self, attempt: Attempt) -> Verdict:
        # The committer gives up after its own time limit and says so; a margin lets that be heard.
        verdict = self._job.board.wait(attempt, self._job.timeout + timedelta(seconds=30))
        if verdict.result == "failed":
            raise PersistentStoreError(f"{attempt} failed: {verdict.reason}")
        return verdict

    def _failed(self, attempt: Attempt, error: EmergencyCheckpointError) -> Verdict:
        """Tells the others, so that nobody waits, and keeps the error for `check_for_errors`."""
        superseded = isinstance(error, StaleGenerationError)
        if not superseded:
            told = PersistentStoreError(f"{attempt.step_id} did not reach the persistent tier: {error}")
            told.__cause__ = error
            self.note(told)
        result: DrainResult = "superseded" if superseded else "failed"
        said = Verdict(result, f"process {self._job.process}: {error}")
        if isinstance(error, CoordinationTimeoutError):
            return said
        try:
            return self._job.board.announce(attempt, said)
        except EmergencyCheckpointError as unheard:
            return Verdict(result, f"{said.reason} (and the others could not be told: {unheard})")
