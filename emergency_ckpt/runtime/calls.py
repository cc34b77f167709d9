"""Collective calls of one manager: each has keys of its own, and no process is ever a call ahead of the others.

Whatever a call comes to, it leaves all processes in step for the next one.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.runtime.agreement import agree, tell
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.workers import Workers


class Calls:
    """The calls that one process makes together with the others, in the same order as they."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._limit = job.settings.coordination_timeout
        self._made: collections.Counter[str] = collections.Counter()

    def begin(self, kind: str) -> str:
        """The prefix of the keys of one call that all processes make.

        It is taken before anything can fail, so that a process which fails on the way is in step with the
        others at the next call.
        """
        self._made[kind] += 1
        return f"{kind}/{self._made[kind]}"

    def agree(
        self,
        key: str,
        mine: Callable[[], Any],
        decide: Callable[[list[Any]], Any] = lambda _: None,
        limit: timedelta | None = None,
    ) -> Any:
        """As `agreement.agree`; `limit` None: the job's usual one."""
        return agree(self._job.coordinator, key, mine, decide, limit or self._limit)

    def tell(self, key: str, make: Callable[[], Any], limit: timedelta | None = None) -> Any:
        """As `agreement.tell`; `limit` None: the job's usual one."""
        return tell(self._job.coordinator, key, make, limit or self._limit)

    def tell_often(self, kind: str, make: Callable[[], Any]) -> Any:
        """As `tell`, for a call that is made at many steps: what was told before the last one is forgotten."""
        key, before = self.begin(kind), self._made[kind] - 2
        if self._job.leads and before > 0:
            with contextlib.suppress(EmergencyCheckpointError):
                self._job.coordinator.delete(f"{kind}/{before}")  # Nobody is two such calls behind.
        return self.tell(key, make)

    @contextlib.contextmanager
    def quiet(self, key: str, workers: Workers) -> Iterator[None]:
        """Waits on all processes, and lets no drain begin until the block ends; what failed is tried again.

        Where one of them waits in vain, all raise, and none goes on without it. All say first that they are
        here, so that nobody waits for a silent process as long as for a drain. Process 0 ends the quiet: where
        others need it, the block ends with something that all do together.
        """
        self.agree(f"{key}/here", lambda: None)
        limit = workers.patience + self._limit
        leads = self._job.leads

        def lead() -> int:
            workers.wait_for_saves()
            return workers.hold_drains()

        def wait() -> None:
            if not leads:
                workers.wait_for_saves()
            ended = self.tell(f"{key}/drains", lead, limit)
            if not leads:
                workers.await_held_drains(ended)

        try:
            self.agree(f"{key}/waited", wait, limit=limit)
            yield
        finally:
            workers.release_drains()
