"""What a trainer's drains need: who carries them out, and where the processes tell each other of them.

A drain is carried out by a runner, in this process or in the agent of this host, by the same code
(`agent.draining`). Which step is drained next, and when, is the affair of `agent.drain_schedule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Protocol

from emergency_ckpt.agent.draining import Stop, carry_out
from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.orders import Destination, Share
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import Pauses, StoreReason
from emergency_ckpt.errors import (
    AgentStartError,
    LocalDirectoryError,
    PeerUnavailableError,
    PersistentStoreError,
)
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.telemetry.events import DrainResult
from emergency_ckpt.telemetry.log import CheckpointLogger


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a drain ended, as said by one process and believed by all.

    `cause`: why the store failed, if so. `repeats`: whether it, or a newer step in its place, is tried again.
    """

    result: DrainResult
    reason: str = ""
    cause: StoreReason = "other"
    repeats: bool = False


OVER = StepId(0, 0)
"""In the place of a step: no further attempt begins."""


class VerdictBoard(Protocol):
    """Where the processes of a job tell each other which step they drain, and how that ended.

    Of each attempt both are written once. What could not be said may be said again.
    """

    def call(self, generation: int, ordinal: int, step: StepId) -> StepId:
        """Says in the committer which step is drained by the attempt with this number; returns what stands."""
        ...

    def await_call(self, generation: int, ordinal: int, timeout: timedelta) -> StepId:
        """Which step that is, or OVER; raises CoordinationTimeoutError where the committer has not said so."""
        ...

    def called(self, generation: int, ordinal: int) -> StepId | None:
        """The same, if he has said so already."""
        ...

    def end(self, generation: int, ordinal: int) -> None:
        """Says in the committer that neither the attempt with this number nor a later one begins."""
        ...

    def leave(self, generation: int, ordinal: int) -> None:
        """Says in another process that it takes no part in the attempt with this number, nor in later ones."""
        ...

    def left(self, generation: int) -> Mapping[int, int]:
        """The processes that said so, and from which number on."""
        ...

    def urge(self, generation: int, ordinal: int) -> None:
        """Asks the committer not to pause before the attempt with this number: somebody waits for it."""
        ...

    def is_urged(self, generation: int, ordinal: int) -> bool:
        """Whether somebody did."""
        ...

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
            if self._agent.closed:  # This process is about to end, and would end in the middle of it.
                raise PersistentStoreError(f"the agent of this host did not take the drain: {error}") from error
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
      timeout: how long others are waited for; margin: how much longer they wait for the committer's word.
      pauses: between a drain that failed and its next try.
      keeps_waiting: whether a step that waits for another one's drain keeps its slot. Where slots are a tier to
        restore from it does not: a save finds one, and a newer step is drained.
      on_commit: called in the committer after each commit, for retention.
      abandon: removes there what an attempt that failed has left.
      repeats: whether what failed is tried again; where saves are synchronous, whoever saves decides.
      lets_go: whether a step that waits for its next try has no slot of its own, because there are few.
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
    abandon: Callable[[Attempt], None] = lambda _: None
    pauses: Pauses = dataclasses.field(default_factory=Pauses)
    keeps_waiting: bool = False
    lets_go: bool = False
    repeats: bool = True
    after_commit: Callable[[], None] | None = None
    margin: timedelta = timedelta(seconds=30)

    @property
    def commits(self) -> bool:
        """Whether this process is the committer."""
        return self.process == self.committer
