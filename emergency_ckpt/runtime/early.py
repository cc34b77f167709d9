"""Early hydration: what a restore will have to fetch is fetched in the background before it is called.

It begins when a plan is agreed on, so that it overlaps with compilation. It takes nothing but a free slot or
the places of missing shards in the own one, seals nothing, and gives way to whoever needs the slot; whatever
fails is left to the restore, which goes on from what is there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from datetime import timedelta

from emergency_ckpt.agent.gather import Course
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import ProcessPlan, RestorePlan
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.filling import Filling
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.wanted import Wanted
from emergency_ckpt.telemetry.metrics import Metric
from emergency_ckpt.telemetry.units import format_bytes

# Reads end when their connections do; what does not end by then keeps its memory to itself.
_END_LIMIT = timedelta(seconds=1)


class EarlyHydration:
    """The early fetches of one process for one step, and on process 0 the plans of the others.

    Attributes:
      step: the step that will be restored, as far as anybody knows.
      ended: set when nothing more comes, whatever became of it.
    """

    def __init__(
        self, job: Job, wanted: Wanted, step: StepId, key: str, who: Collection[int], plan: RestorePlan | None
    ) -> None:
        """Begins. `who`: the processes that fetch; `plan`: on process 0, which tells each of them its part."""
        self.step = step
        self.ended = threading.Event()
        self._job = job
        self._wanted = wanted
        self._key = f"{key}/early"
        self._who = who
        self._plan = plan
        self._filling = Filling(job, step, wanted.part)
        self._course = Course()
        self._guard = threading.Lock()
        self._is_given_up = False
        self._thread = threading.Thread(target=self._run, name="emergency_ckpt early", daemon=True)
        job.local.gives_way(self.stop)
        self._thread.start()

    @property
    def ready_bytes(self) -> int:
        """How much has arrived and was verified."""
        return self._course.nbytes

    def adopt(self, ready_bytes: int) -> Filling:
        """The filling, for the restore of this step; `wait` comes before its use, and `end` after it.

        `ready_bytes`: what was there when the restore was called.
        """
        self._job.local.stays(self.stop)  # From now on somebody wants it.
        if self._job.process in self._who:
            still = "" if self.ended.is_set() else "; the rest is on its way"
            self._job.log.info(
                "restore",
                self.step.step,
                f"{format_bytes(ready_bytes)} had been fetched before the restore was called{still}",
            )
            self._job.log.metrics.add(Metric.EARLY_BYTES, ready_bytes)
        return self._filling

    def wait(self, limit: timedelta) -> bool:
        """Waits until nothing more comes; False when the time limit came first."""
        return self.ended.wait(limit.total_seconds())

    def stop(self) -> None:
        """Nobody wants it any more: what is being read ends soon, and the slot is given back then."""
        with self._guard:
            self._is_given_up = True
            has_ended = self.ended.is_set()
        self._course.stop()
        if has_ended:
            self._filling.close()

    def end(self, limit: timedelta = _END_LIMIT) -> None:
        """Stops it and gives the slot back, within `limit`. Repeating it is fine."""
        self._job.local.stays(self.stop)
        self.stop()
        self._thread.join(limit.total_seconds())
        if self._thread.is_alive():
            self._filling.abandon()
        if self.ended.is_set():  # Otherwise the thread does so in the end.
            self._filling.leave()

    # In the thread.

    def _run(self) -> None:
        try:
            self._fetch()
        except EmergencyCheckpointError as error:
            self._tell(f"left to the restore: {error}")
        except Exception as error:  # The restore meets it again, and raises it.
            self._tell(f"left to the restore: {type(error).__name__}: {error}")
        finally:
            with self._guard:
                self.ended.set()
                is_given_up = self._is_given_up
            if is_given_up:
                self._filling.close()
            self._filling.leave()

    def _fetch(self) -> None:
        own = self._own_plan()
        if own is None or self._course.is_stopped:
            return
        what = "shards begin to come from elsewhere before a restore is called"
        self._job.log.info("restore", self.step.step, what)
        if not self._filling.fetch_ahead(own, self._open_reader, self._course):
            self._tell("left to the restore: no slot is free for them")
        elif not self._course.is_stopped:
            fetched = format_bytes(self.ready_bytes)
            self._job.log.info("restore", self.step.step, f"{fetched} are there before a restore is called")

    def _own_plan(self) -> ProcessPlan | None:
        """Process 0 tells all others first, also when it needs nothing itself."""
        job = self._job
        if not job.leads:
            key = f"{self._key}/{job.process}"
            said = json.loads(job.coordinator.get(key, job.settings.coordination_timeout))
            job.coordinator.delete(key)
            return ProcessPlan.from_json(said)
        plan, self._plan = self._plan, None
        assert plan is not None
        for process in self._who:
            if process != job.process:
                job.coordinator.put(f"{self._key}/{process}", json.dumps(plan.process_json(process)).encode())
        return plan.processes[job.process] if job.process in self._who else None

    def _open_reader(self) -> StepReader:
        """As the restore opens it, which says what there is to be said of the step."""
        reader = self._job.open_persistent(self.step)
        reader.check_leaves(self._wanted.leaves, self._wanted.values, self._wanted.keys)
        return reader

    def _tell(self, what: str) -> None:
        if not self._course.is_stopped:
            self._job.log.info("restore", self.step.step, f"early fetches are {what}")
