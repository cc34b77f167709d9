"""The engine of one manager: which step was saved or restored last, and which life of the run this is.

It drives the save pipeline, the drains and the restore session. All processes make the same calls in the same
order, and every answer on which a later collective call depends is the same on all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import jax

from emergency_ckpt.core.lineage import Activation, Deletion, StepId, is_void
from emergency_ckpt.core.retrying import Pauses
from emergency_ckpt.core.schedule import NOTHING_DUE, Due
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import (
    CoordinationTimeoutError,
    CorruptDataError,
    EmergencyCheckpointError,
    LocalDirectoryError,
    NoRestorableStepError,
    PeerFailedError,
    PersistentStoreError,
    StateMismatchError,
)
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.calls import Calls
from emergency_ckpt.runtime.catalog import Catalog
from emergency_ckpt.runtime.extras import WantedExtras
from emergency_ckpt.runtime.persisted import Persisted
from emergency_ckpt.runtime.restoring import Restored
from emergency_ckpt.runtime.saving import SaveContent
from emergency_ckpt.runtime.settings import Settings
from emergency_ckpt.runtime.start import mint_generation, start_job, work_on
from emergency_ckpt.runtime.wanted import Wanted
from emergency_ckpt.runtime.workers import Workers

_FINISH_TRIES = 2
# What is not deleted by then is a leftover to the next life of the run.
_DELETION_PATIENCE = timedelta(seconds=30)
# Of what is kept free at the end: agents go on with what is sealed.
_SEAL_PATIENCE = timedelta(seconds=1)

Prepare = Callable[[], SaveContent]
Remaining = Callable[[], timedelta | None]
"""How long something may still take; None: nothing limits it."""
Loaded = TypeVar("Loaded")


class Engine:
    """Saves and restores of one process of a job.

    Attributes:
      job: what all parts share. catalog: the saved steps. survey: what was found restorable last.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: jax.sharding.Mesh,
        abstract_state: Any,
        on_notice: Callable[[Notice], None] | None = None,
    ) -> None:
        """Collective. Raises what `runtime.start.start_job` raises. `on_notice`: see `Peers`."""
        self._settings = settings
        self.job, self._restorer, self.survey = start_job(settings, mesh, abstract_state, on_notice)
        self.catalog = Catalog(self.job)
        self._binder = StateBinder(
            abstract_state, self.job.saved_layout, self.job.process, settings.host_platforms
        )
        self._survey_is_fresh = True
        # The newest step that was restorable at the start, or was restored.
        self._base: StepId | None = self.survey.newest
        # The step that was restored on request although newer ones are there: they stay until the next save.
        self._chosen: StepId | None = None
        # The newest step that this generation was asked to save.
        self._requested: StepId | None = None
        self._began = False  # whether this generation has a beginning that all agreed on
        # Whether a restore of this generation failed when its activation may have been recorded already.
        self._doubtful = False
        self._calls = Calls(self.job)
        self._persisted = Persisted(self.job, self.catalog, self._calls)
        self._errors: list[EmergencyCheckpointError] = []
        self._closed = False
        self._start_workers()
        self._restorer.begin_early(self.survey, "start")

    # What there is. Local.

    @property
    def base(self) -> StepId | None:
        """The newest step that was restorable at the start, or was restored."""
        return self._base if self._chosen is None else self.survey.newest

    @property
    def began(self) -> bool:
        """Whether this life of the run goes on from a step for good: what came after that one is void."""
        return self._began

    @property
    def newest_complete(self) -> StepId | None:
        """The newest step of this generation that all processes agreed to be complete."""
        return self._workers.pipeline.newest_complete

    @property
    def newest(self) -> StepId | None:
        """The newest step that can be restored.

        Without a local tier a step of this generation can be once it is committed, and the store is asked.
        """
        found = [self.base, self.newest_complete]
        if self._settings.local_directory is None:
            committed = (held.step_id for held in self.catalog.persistent())
            found = [self.base, *(s for s in committed if s.generation == self.job.generation.number)]
        return max((step for step in found if step is not None), default=None)

    @property
    def newest_on_ramdisks(self) -> StepId | None:
        """The newest complete step of this life that this process has in a slot."""
        found = self.job.local.complete_steps()
        return max((step for step in found if step.generation == self.job.generation.number), default=None)

    @property
    def newest_persistent(self) -> StepId | None:
        """The newest committed step as far as this process knows, without asking the store."""
        drain = self._workers.drain
        known = [self._newest_persistent(), drain.newest_committed if drain is not None else None]
        return max((step for step in known if step is not None), default=None)

    @property
    def underway(self) -> tuple[StepId, float] | None:
        """The newest step that is being drained, or waits for it, and for how many seconds it has been run."""
        return None if self._workers.drain is None else self._workers.drain.underway

    def is_old(self, step: int) -> bool:
        """Whether `step` is not newer than every step that is there or was asked for."""
        return any(known is not None and step <= known.step for known in (self._base, self._requested))

    def is_newest(self, step: int) -> bool:
        """Whether `step` is the newest of those that are there or were asked for."""
        return self.is_old(step) and not self.is_old(step + 1)

    def step_numbers(self) -> list[int]:
        """Restorable step numbers, ascending.

        The newest is among them wherever it lies: also in slots that are no saves of the local tier, and wait
        for a drain, or for another one after it failed.
        """
        newest = self.newest
        return self.catalog.numbers(
            [*(() if self._began else self.survey.restorable), *([newest] if newest else [])]
        )

    # Saving.

    def due(self, step: int, *, preempted: bool = False, force: bool = False) -> Due:
        """What `step` is due for. Local, unless a policy has to be asked: then all processes call it.

        Raises what the policy raises, on process 0; PeerFailedError on the others; CoordinationTimeoutError.
        """
        schedule = self._settings.schedule
        return schedule.due(
            step,
            local_first=self._base is None and not self._asked_for.local,
            persistent_first=not (self._has_persistent or self._asked_for.persistent),
            preempted=preempted,
            force=force,
            told=self._told(step, preempted) if schedule.asks and not force else NOTHING_DUE,
        )

    def _told(self, step: int, preempted: bool) -> Due:
        """What process 0 decided about `step`. As in Orbax no policy is asked about a step that is old."""
        if self.is_old(step) and (self._requested is None or step != self._requested.step):
            return NOTHING_DUE
        return self._workers.decisions.of(step, lambda: self._workers.history.decide(step, preempted))

    def save(
        self, step: int, due: Due, prepare: Prepare, slot_wait: timedelta, limit: timedelta | None = None
    ) -> bool:
        """Saves a step that is due; the way depends on what became of the same step before.

        `limit`: how long a synchronous save waits for its outcome at most.
        """
        self._check_open()
        if self.is_old(step) and not self._may_save_again(step, due):
            return False
        current = StepId(self.job.generation.number, step)
        if self.newest_complete == current:
            return self._drain_again(current)
        if not self._began and self._doubtful:
            self._begin_generation(self._calls.begin("save"))
            current = StepId(self.job.generation.number, step)
        if not self._began and not self._begin_without_restore():
            return False
        self._restorer.end_early()  # Training goes on without that step: the slot is wanted.
        self._requested = current
        self._asked_for = Due(
            self._asked_for.local or due.local, self._asked_for.persistent or due.persistent, "asked for"
        )
        self._survey_is_fresh = False

        def prepare_and_note() -> SaveContent:
            content = prepare()
            self._workers.history.note(step, due, content.metadata.get("metrics") or {})
            return content

        return self._workers.pipeline.save(step, due, prepare_and_note, slot_wait, limit)

    def is_saved(self, step: int) -> bool:
        """Whether `step` is committed; without a persistent tier, whether it is restorable. Collective.

        Waits for what is on its way: that may be this very step.
        """
        self._check_open()
        key = self._calls.begin("saved")
        with self._calls.quiet(key, self._workers):
            if self._settings.schedule.persistent is not None:
                return self._persisted.has(step, key)
            return self._calls.tell(f"{key}/local", lambda: step in self.step_numbers())

    def finish(self, step: int, due: Due, prepare: Prepare) -> None:
        """Saves the last step to the persistent tier, with all the patience that a drain may need. Collective.

        Raises PersistentStoreError on all processes when it did not get there.
        """
        call = self._calls.begin("finish")
        deadline = time.monotonic() + self._settings.drain_timeout.total_seconds()
        for tries in itertools.count(1):
            current = StepId(self.job.generation.number, step)
            if tries == 1 or self.newest_complete != current:
                self.save(step, due, prepare, self._settings.drain_timeout)
            else:
                self._drain_again(current)
            key = f"{call}/{tries}"
            with self._calls.quiet(key, self._workers):
                if self._persisted.has_for_sure(step, key, self._workers.drain):
                    return
                if not self._calls.tell(f"{key}/again", lambda tries=tries: self._goes_on(tries, deadline)):
                    self._workers.give_up_drains(f"{step} is the last one, and could not be drained")
                    break
        raise PersistentStoreError(
            f"the last step {step} did not reach the persistent tier: {self._why_not_committed()}"
        )

    def _why_not_committed(self) -> str:
        drain = self._workers.drain
        failure = drain.last_failure if drain is not None else None
        causes = "; ".join(map(str, self.take_errors())) or (failure.reason if failure is not None else "")
        return causes or "its save was abandoned, or its drain failed on another process"

    def _goes_on(self, tries: int, deadline: float) -> bool:
        """Whether the last step is to be drained once more, after a pause: a store may be away for a while."""
        drain = self._workers.drain
        failure = drain.last_failure if drain is not None else None
        passing = failure is not None and failure.cause in ("unreachable", "throttled")
        if not passing or time.monotonic() > deadline:
            return tries < _FINISH_TRIES
        pause = Pauses(self._settings.drain_retry.total_seconds()).before(tries, "unreachable", 0.5)
        time.sleep(min(pause, self._settings.coordination_timeout.total_seconds() / 2))
        return True

    def _may_save_again(self, step: int, due: Due) -> bool:
        """Whether a step that is not newer than all others still has something to be saved.

        The answer is the same on all processes: it depends on agreed outcomes, and on what process 0 finds.
        """
        newest = max(known for known in (self._base, self._requested) if known is not None)
        if step != newest.step:
            if due.is_urgent:
                self.job.log.warning("save", step, f"not saved: step {newest.step} was saved already")
            return False
        if newest == self._requested:
            self._workers.wait_for_saves()
            if self.newest_complete != newest:
                return self._agree_to_repeat(newest)  # It was abandoned.
        if not due.persistent:
            return False
        key = self._calls.begin("persistent")
        with self._calls.quiet(key, self._workers):
            return not self._persisted.has_for_sure(step, key, self._workers.drain)

    def _agree_to_repeat(self, step: StepId) -> bool:
        """Whether all processes repeat an abandoned save. One that repeats it alone would be out of step."""
        key = f"repeat/{step.generation}/{self._workers.pipeline.next_ordinal}"

        def decide(steps: list[int]) -> None:
            if len(set(steps)) > 1:
                raise PeerFailedError(f"processes repeat different steps: {steps}")
            deletion = self.job.persistent.deletion()
            if deletion is not None and step <= deletion.upto:
                self.job.persistent.record_deletion(None)  # It comes back, and would be missed.

        try:
            self._calls.agree(key, lambda: step.step, decide)
        except EmergencyCheckpointError as error:
            self._errors.append(error)
            self.job.log.error("save", step.step, f"the abandoned save is not repeated by all: {error}")
            return False
        return True

    def _drain_again(self, step: StepId) -> bool:
        """A step that is complete on all ramdisks goes to the persistent tier from there, with no snapshot."""
        if self._workers.drain is None:
            return False
        # The attempts of all processes are counted alike, so that a process which lost the step takes part.
        try:
            slot = self.job.local.pin(step)
        except (LocalDirectoryError, CorruptDataError) as error:
            self.job.log.error("drain", step.step, str(error))
            slot = None
        self._workers.drain.drain(step, slot.index if slot else None)
        return True

    def persistent_numbers(self) -> list[int]:
        """Numbers of the committed steps as process 0 knows them; empty where it cannot know. Collective."""
        return self._persisted.numbers(self._workers.retention)

    def _begin_without_restore(self) -> bool:
        """Agrees that this generation goes on from the newest step although its state was not restored here.

        False, on all processes, when that cannot be recorded now: the next save tries again. Raises
        CoordinationTimeoutError when it is not known what the others did.
        """
        job, parent = self.job, self._chosen or self.survey.newest
        activation = Activation(job.generation.number, parent.step if parent else None)

        def decide(_: list[Any]) -> None:
            job.persistent.record_activation(activation)

        try:
            self._calls.agree(self._calls.begin("begin"), lambda: None, decide)
        except CoordinationTimeoutError:
            raise  # Others may have gone on: nothing that this process did now would be in step with them.
        except EmergencyCheckpointError as error:
            self._errors.append(error)
            job.log.error("save", None, f"not saved, this life of the run could not be recorded: {error}")
            return False
        job.local.activate([activation])
        if parent is not None:
            job.local.settle(parent, Outcome.COMPLETE)
        self._took_effect(activation)
        return True

    def _took_effect(self, activation: Activation) -> None:
        """All processes know from which step this generation goes on."""
        self._began, self._chosen = True, None
        work_on(self.job)
        self._workers.retention.forget_steps()  # Some are void from now on.
        self._look_at_persistent(activation)
        if self._workers.backups is not None and self.job.leads:
            newest = self._newest_persistent(activation)
            self._workers.backups.go_on_after(newest.step if newest else None, self._age_of(newest))

    def _age_of(self, step: StepId | None) -> float:
        """Seconds since a persistent step was committed; 0 where nobody can tell, or wants to know."""
        backups = self._settings.backups
        if step is None or backups is None or backups.seconds is None:
            return 0.0
        return self._persisted.age_of(step)

    # Leaving.

    def tell_all(self, kind: str, make: Callable[[], Any]) -> Any:
        """What `make` gives on process 0, on all processes. Collective."""
        return self._calls.tell(self._calls.begin(kind), make)

    def spare(self, step: int, leaving: tuple[int, ...]) -> None:
        """These processes write of `step`, which is not saved yet, as little as they can. All call it."""
        if self._workers.drain is not None:
            self._workers.drain.spare(StepId(self.job.generation.number, step), leaving)

    def drain_complete(self, step: int, limit: timedelta) -> None:
        """A step of this life that is complete goes to the persistent tier as it is. All processes call it."""
        self._workers.pipeline.wait(limit)  # Drains begin in the order of their saves.
        current = StepId(self.job.generation.number, step)
        if self._workers.drain is not None and self._workers.drain.newest_committed != current:
            self._drain_again(current)

    def wait_a_while(self, limit: timedelta) -> bool:
        """Waits until saves and drains have ended; False where the limit came first. Local."""
        deadline = time.monotonic() + limit.total_seconds()
        if not self._workers.pipeline.wait(limit):
            return False
        drain = self._workers.drain
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.0))
        return drain is None or (drain.wait(left) and not drain.busy)

    def on_all(self, here: bool) -> bool:
        """Whether something holds on all processes. Collective."""
        return bool(self._calls.agree(self._calls.begin("on_all"), lambda: here, all))

    # Restoring.

    def restore(self, wanted: int | None, beside: WantedExtras) -> Restored:
        """Restores the newest restorable step, or step `wanted`. Collective.

        Where `wanted` is not the newest one, those after it stay restorable until this generation saves a step.

        Raises NoRestorableStepError, and ExtrasError where something wanted beside the arrays is not there.
        """
        self._check_open()
        key = self._calls.begin("restore")
        if self._began or self._doubtful:
            self._begin_generation(key)
        elif not self._survey_is_fresh:
            self.survey = self._restorer.survey(key)
        self._survey_is_fresh = False
        later = [] if wanted is None else self._given_up_by(wanted)
        begins = None if later else self.job.generation
        try:
            restored = self._restorer.restore(self.survey, wanted, begins, beside, key)
        except NoRestorableStepError:
            # What turned out to be damaged is not there any more; training may go on from the rest.
            remaining = self._restorer.remaining
            lost = None if remaining else self.survey.lost or self.survey.newest
            self.survey = dataclasses.replace(self.survey, restorable=remaining, lost=lost)
            self._base = self._chosen or self.survey.newest
            raise
        except EmergencyCheckpointError:
            # If the activation is in the store, it stands: all processes held the state. Which it is, a new
            # generation finds out.
            self._doubtful = begins is not None
            raise
        self._base = StepId(restored.report.generation, restored.report.step)
        if later:
            self._chosen = self._base
            self.job.log.info(
                "restore",
                self._base.step,
                f"the later steps {[step.step for step in later]} stay restorable until the next save, which "
                "makes them void",
            )
            return restored
        self._took_effect(Activation(self.job.generation.number, self._base.step))
        for step in self.survey.restorable:
            if step <= self._base:
                self.job.local.settle(step, Outcome.COMPLETE)  # All agreed that it is whole.
        return restored

    def _given_up_by(self, wanted: int) -> list[StepId]:
        """The restorable steps that are void once this generation goes on from step `wanted`."""
        goes_on = Activation(self.job.generation.number, wanted)
        return [step for step in self.survey.restorable if goes_on.voids(step)]

    def load(self, read: Callable[[], Loaded]) -> Loaded:
        """What `read` gives; raises on all processes when it fails on one. Collective."""
        loaded: list[Loaded] = []
        limit = self._settings.coordination_timeout + self._settings.drain_timeout
        self._calls.agree(self._calls.begin("load"), lambda: loaded.append(read()), limit=limit)
        return loaded[0]

    def restore_part(self, step: int | None, make_wanted: Callable[[], Wanted]) -> Restored:
        """Reads a part of the newest restorable step, or of `step`; nothing else changes. Collective.

        `make_wanted` says which part; all processes must want the same. Raises what it raises, and what
        `Restorer.restore_part` does.
        """
        self._check_open()
        key, wanted = self._calls.begin("part"), None

        def mine() -> str:
            nonlocal wanted
            wanted = make_wanted()
            return wanted.fingerprint

        def decide(fingerprints: list[str]) -> None:
            odd = [p for p, found in enumerate(fingerprints) if found != fingerprints[0]]
            if odd:
                raise StateMismatchError(
                    f"processes {odd} ask for another part of the state than process 0; all processes must "
                    "give restore() the same leaves with the same shardings"
                )

        self._calls.agree(f"{key}/wanted", mine, decide)
        assert wanted is not None
        # A save or a drain in the background could take a slot, or delete a step, that is being read.
        with self._calls.quiet(key, self._workers):
            survey = self.survey if self._survey_is_fresh else self._restorer.survey(key)
            return self._restorer.restore_part(survey, step, wanted, key)

    def reload(self) -> None:
        """Looks again at what can be restored. Collective."""
        self._check_open()
        key = self._calls.begin("reload")
        with self._calls.quiet(key, self._workers):
            self._look_again(key)
        if self._survey_is_fresh:
            self._restorer.begin_early(self.survey, key)

    def delete(self, step: int) -> None:
        """Deletes `step` on all tiers. Collective. Raises NoRestorableStepError when it is on none."""
        self._check_open()
        self._restorer.end_early()
        key = self._calls.begin("delete")
        with self._calls.quiet(key, self._workers):
            self._delete(step, key)

    def _delete(self, step: int, key: str) -> None:
        def remove() -> list[int] | None:
            """Deletes the step if it is there; otherwise says which steps are."""
            numbers = self.step_numbers()
            if step not in numbers:
                return numbers
            self.catalog.delete_persistent(step)
            self._workers.retention.forget_steps()
            return None

        def remove_here() -> None:
            self._workers.give_up_drains("it is deleted", step)
            self.job.local.delete(step)

        numbers = self._calls.tell(f"{key}/persistent", remove)
        if numbers is not None:
            raise NoRestorableStepError(f"step {step} is on no tier; the steps that are: {numbers}")
        self._calls.agree(f"{key}/local", remove_here)
        before = self.newest
        self._look_again(key)
        self._workers.pipeline.forget(step, self.survey.newest)
        self._record_deletion(key, before)

    def _record_deletion(self, key: str, before: StepId | None) -> None:
        """The next start must not miss what was deleted. Comes last: until then, too much is missed at most."""
        if before is None:
            return
        deletion = Deletion(before, self.survey.newest)
        self._calls.tell(f"{key}/record", lambda: self.job.persistent.record_deletion(deletion))
        self.survey = dataclasses.replace(self.survey, lost=None)

    def _look_again(self, key: str) -> None:
        self.survey = self._restorer.survey(key)
        self._survey_is_fresh = not self._began
        self._base = self._chosen or self.survey.newest
        complete = self._workers.pipeline.newest_complete
        if complete is not None and complete not in self.survey.restorable:
            # It was lost everywhere meanwhile.
            self._workers.pipeline.forget(complete.step, self.survey.newest)
        self._look_at_persistent()

    def _look_at_persistent(self, *begun: Activation) -> None:
        """Whether the persistent tier holds a step that is not void; the same on all processes."""
        self._has_persistent = self._newest_persistent(*begun) is not None

    def _newest_persistent(self, *begun: Activation) -> StepId | None:
        """The newest step of the persistent tier that is not void, as all processes found it last."""
        known = [*self.survey.activations, *begun]
        return max((step for step in self.survey.persistent if not is_void(step, known)), default=None)

    def _begin_generation(self, key: str) -> None:
        """Finishes all saves and begins a new generation, for a restore in the middle of a run. Collective."""
        with self._calls.quiet(key, self._workers):
            self._end_generation(key)

    def _end_generation(self, key: str) -> None:
        job = self.job
        # Nothing is given up until the new generation exists: if this fails, the old one goes on.
        survey = self._restorer.survey(key)
        generation = mint_generation(job, key, survey.highest_generation, survey.newest)
        self._workers.pipeline.release_unresolved()
        self._collect_errors()
        self._workers.close()
        if job.leads:
            # All have taken part in the survey: nobody waits for a decision.
            with contextlib.suppress(EmergencyCheckpointError):  # The others go on, whether keys stay or not.
                self._workers.decisions.forget_generation()
        job.begin_generation(generation)
        work_on(job)
        self.survey = survey
        self._base, self._requested, self._began, self._chosen = survey.newest, None, False, None
        self._doubtful = False
        self._start_workers()

    def _start_workers(self) -> None:
        self._asked_for = NOTHING_DUE
        self._look_at_persistent()
        self._workers = Workers(self.job, self.catalog, self._binder, self._base)

    # Ending.

    def wait(self) -> None:
        """Waits until every save has its outcome and every drain has ended, within their own time limits.

        Steps that retention gives up are out of sight then; that their bytes are there nobody notices.
        """
        self._workers.wait()
        self.job.deletions.wait_hidden(_DELETION_PATIENCE)

    def await_drains(self, remaining: Remaining) -> list[EmergencyCheckpointError]:
        """Waits until every drain has ended; the errors of drains since the last call, oldest first.

        A drain ends alike on all processes, so that the call stays in step with them whatever comes of it.
        Where the time is over before, which each process finds out by itself, there are no errors yet.
        """
        if not self._workers.wait_for_drains(lambda: remaining() == timedelta(0)):
            return []
        return self._workers.drain.take_errors() if self._workers.drain is not None else []

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors in the background since the last call, oldest first."""
        self._collect_errors()
        errors, self._errors = self._errors, []
        return errors

    def close(self, remaining: Remaining = lambda: None) -> None:
        """Finishes saves and drains and gives back the ramdisk directory. Idempotent.

        `remaining`: how long that may take, asked again and again. What is not done by then is left to the
        agents of the hosts.
        """
        if self._closed:
            return
        self._closed = True
        done = False
        try:
            self._restorer.end_early()
            done = self._wait_within(remaining)
        finally:
            self._workers.close()
            limit = remaining()
            self.job.deletions.close(_DELETION_PATIENCE if limit is None else min(limit, _DELETION_PATIENCE))
            self.job.peers.close(is_done=done, limit=remaining())
            self.job.local.close()

    def _wait_within(self, remaining: Remaining) -> bool:
        """As `wait`; False where the time was over before. There may be a limit from one moment on."""
        if remaining() is None and self._workers.wait(lambda: remaining() is not None):
            self.job.deletions.wait_hidden(_DELETION_PATIENCE)
            return True
        limit = remaining()
        done = limit is None or self.wait_a_while(min(limit, self._workers.patience))
        if not done:
            self._workers.pipeline.wait(_SEAL_PATIENCE)
        return done

    def _collect_errors(self) -> None:
        self._errors += self._workers.take_errors()

    def _check_open(self) -> None:
        if self._closed:
            raise EmergencyCheckpointError("this manager was closed; make a new one")
