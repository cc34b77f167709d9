"""`CheckpointManager`: what a train step calls.

It speaks Orbax's and MaxText's language to the outside and hands everything else to `runtime.engine`. All
processes of the job make the same calls in the same order.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import jax
import orbax.checkpoint as ocp
from etils import epath, epy
from orbax.checkpoint.checkpoint_manager import RootMetadata, StepMetadata
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt.core.copies import Survivable, survivable
from emergency_ckpt.core.schedule import Due
from emergency_ckpt.errors import (
    ConfigError,
    CorruptDataError,
    EmergencyCheckpointError,
    NoRestorableStepError,
    PersistentStoreError,
)
from emergency_ckpt.jaxio.state import without_arrays
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.agreed_steps import AgreedSteps
from emergency_ckpt.runtime.arguments import plain_metadata, step_number
from emergency_ckpt.runtime.declared_extras import GlobalExtras as GlobalExtras
from emergency_ckpt.runtime.declared_extras import ReshardedExtras as ReshardedExtras
from emergency_ckpt.runtime.engine import Engine
from emergency_ckpt.runtime.existing import StepAlreadyExistsError
from emergency_ckpt.runtime.extras import WantedExtras, capture
from emergency_ckpt.runtime.failures import failures_of, raise_together
from emergency_ckpt.runtime.items import DATASET, STATE, ItemHandlers, split_items
from emergency_ckpt.runtime.leaving import Leaving
from emergency_ckpt.runtime.loading import load_parameters, load_state
from emergency_ckpt.runtime.notices import Notices
from emergency_ckpt.runtime.own_datasets import OwnDatasets
from emergency_ckpt.runtime.policies import Ranking
from emergency_ckpt.runtime.progress import ProgressTeller, TrainingProgress
from emergency_ckpt.runtime.restored_state import RestoredState
from emergency_ckpt.runtime.restoring import Restored, RestoreReport
from emergency_ckpt.runtime.saving import SaveContent
from emergency_ckpt.runtime.settings import Settings, settings_from_config, settings_from_orbax
from emergency_ckpt.runtime.wanted import asks_for_part, part_of_state, whole_in_another_tree

if TYPE_CHECKING:
    from emergency_ckpt.config import Config

PyTree = Any
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _without_progress(method: _Method) -> _Method:
    """For methods that take their time: no step is expected meanwhile."""

    @functools.wraps(method)
    def call(self: CheckpointManager, *args: Any, **kwargs: Any) -> Any:
        with self._progress.paused():
            return method(self, *args, **kwargs)

    return cast(_Method, call)


class CheckpointManager(ocp.AbstractCheckpointManager, epy.ContextManager):
    """Two-tier checkpoints for a JAX training job: ramdisk often, persistent storage rarely.

    Use::

        manager = CheckpointManager.from_config(load_config(sys.argv), mesh, abstract_state)
        restored = manager.restore_or_init(init, extras={"data": iterator})
        state = restored.state
        for step in range((restored.step or 0) + 1, steps + 1):
            state = train_step(state, next(iterator))
            manager.save(step, state, extras={"data": iterator})
        manager.finish(step, state, extras={"data": iterator})
        manager.close()

    Every process of the job constructs it and makes the same calls in the same order; a call at a step where
    nothing is due costs microseconds. Code written for Orbax's emergency manager works with it as well.
    """

    def __init__(
        self,
        local_directory: epath.PathLike | None,
        persistent_directory: epath.PathLike,
        global_mesh: jax.sharding.Mesh,
        abstract_state: PyTree,
        *,
        options: orbax_emergency.CheckpointManagerOptions | None = None,
        metadata: dict[str, Any] | None = None,
        logger: Any = None,
        item_handlers: Any = None,
        handler_registry: Any = None,
        persistent_non_replicated_directory: epath.PathLike | None = None,
    ) -> None:
        """Starts the manager; finds out what can be restored. Collective.

        Args:
          local_directory: ramdisk directory of this host; it must exist. None: no local tier.
          persistent_directory: root of the persistent tier, reached by all processes; made if missing.
          global_mesh: the job's mesh, over all processes.
          abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings (or a state itself).
          options: Orbax's option object.
          metadata: JSON about the whole run. Kept in the persistent directory where Orbax keeps it; the first
            manager of the run that gives some wins.
          logger: Orbax's `AbstractLogger`; its `log_entry` gets a dict per event (save, drain, restore, start).
          item_handlers, handler_registry: Orbax's handlers of items other than the state.
          persistent_non_replicated_directory: where the item `dataset` of persistent steps goes as well, in a
            plain Orbax checkpoint of its own; for items that are too large for the step's commit. A directory
            that all processes reach, or a `gs://` or `s3://` URL.

        Raises ConfigError for options that are not supported, TopologyError, UnsupportedStateError,
        LocalDirectoryError, LocalCapacityError, ForeignRunError or PersistentStoreError; PeerFailedError when
        another process failed so.
        """
        settings = settings_from_orbax(
            None if local_directory is None else str(local_directory),
            str(persistent_directory),
            options,
            metadata,
            logger,
        )
        self._start(settings, global_mesh, abstract_state, ItemHandlers(item_handlers, handler_registry))
        if persistent_non_replicated_directory is None:
            return
        try:
            self._datasets = OwnDatasets.at(
                persistent_non_replicated_directory,
                self._engine,
                options,
                self._handlers,
                (item_handlers, handler_registry),
                settings.drain_timeout,
            )
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, config: Config, mesh: jax.sharding.Mesh, abstract_state: PyTree) -> CheckpointManager:
        """The manager that the flags ask for; with `enable_checkpointing=False` an idle one. Collective.

        Raises what the constructor raises.
        """
        from emergency_ckpt.config import advice, inactive_flags
        from emergency_ckpt.disabled import DisabledCheckpointManager
        from emergency_ckpt.telemetry.log import write_json_lines_bare

        if not config.enable_checkpointing:
            return DisabledCheckpointManager(mesh, config.preemption_exit_code)
        if config.checkpoint_log_format == "json":
            write_json_lines_bare()
        manager = cls.from_settings(settings_from_config(config), mesh, abstract_state)
        manager._load_full_state_path = config.load_full_state_path
        manager._load_parameters_path = config.load_parameters_path
        manager._save_on_completion = config.save_checkpoint_on_completion
        for sentence in [*inactive_flags(config), *advice(config)]:
            manager._engine.job.log.warning("start", None, sentence)
        return manager

    @classmethod
    def from_settings(
        cls, settings: Settings, mesh: jax.sharding.Mesh, abstract_state: PyTree
    ) -> CheckpointManager:
        """The manager that works as these settings say. Collective. Raises what the constructor raises."""
        manager = cls.__new__(cls)
        manager._start(settings, mesh, abstract_state)
        return manager

    def _start(
        self,
        settings: Settings,
        mesh: jax.sharding.Mesh,
        abstract_state: PyTree,
        handlers: ItemHandlers | None = None,
    ) -> None:
        abstract_state = without_arrays(abstract_state)  # It is kept, and their memory must not be.
        self._settings = settings
        self._mesh = mesh
        self._abstract_state = abstract_state
        self._load_full_state_path = ""
        self._load_parameters_path = ""
        self._save_on_completion = True
        self._handlers = handlers or ItemHandlers()
        self._notices = Notices(settings.signals, settings.preemption_grace)
        listens = settings.save_on_preemption
        self._progress = TrainingProgress(settings.stalls, last_call=listens)
        self._teller = ProgressTeller(self._progress)
        if listens:
            self._notices.listen()
        try:
            self._engine = Engine(settings, mesh, abstract_state, self._notices.hear if listens else None)
        except BaseException:
            self._notices.close()
            raise
        job = self._engine.job
        self._datasets = OwnDatasets(self._engine)
        self._steps = AgreedSteps(job.coordinator, settings.coordination_timeout)
        self._leaving = Leaving(self._engine, self._steps)
        if listens:
            self._notices.begin(self._steps, job.process, job.peers.host, settings.notice_sources, job.log)
        self._expect_steps_after(self.latest_step() if self._engine.base is not None else None)
        self._progress.begin_anew()
        self._teller.begin(job.peers.host, job.log)
        self._last_restore: RestoreReport | None = None

    # What there is.

    @property
    def directory(self) -> epath.Path:
        """Root of the persistent tier."""
        return epath.Path(self._settings.persistent_directory)

    @property
    def global_mesh(self) -> jax.sharding.Mesh:
        return self._mesh

    @property
    def in_primary_slice(self) -> bool:
        """Whether this process is in slice 0. Every slice does the same here; for Orbax's callers."""
        return self._engine.job.topology.slice_index == 0

    @property
    def last_restore(self) -> RestoreReport | None:
        """What the last restore of this manager did."""
        return self._last_restore

    @property
    def run_id(self) -> str:
        return self._engine.job.run

    @property
    def generation(self) -> int:
        """The number of this life of the run."""
        return self._engine.job.generation.number

    def survivable_losses(self) -> Survivable:
        """How many hosts and slices may be lost, whichever, without losing a complete step on the ramdisks."""
        return survivable(self._engine.job.layout)

    def metrics_snapshot(self) -> dict[str, float]:
        """Counters of this process by name (see `telemetry.metrics`)."""
        return self._engine.job.log.metrics.snapshot()

    def all_steps(self, read: bool | None = None) -> Sequence[int]:
        """Step numbers that are restorable on any tier, ascending. Local; reads the persistent directory."""
        del read
        return self._engine.step_numbers()

    def latest_step(self) -> int | None:
        """The newest step that can be restored, on any tier. Local; may read the persistent directory."""
        newest = self._engine.newest
        return newest.step if newest else None

    def latest_complete_step(self) -> int | None:
        """The newest step saved in this generation that all processes agreed to be complete. Local."""
        newest = self._engine.newest_complete
        return newest.step if newest else None

    def best_step(self, metric: str | None = None, mode: Literal["max", "min"] = "max") -> int | None:
        """The best restorable step, on any tier; the newest of those that are equally good. Local.

        By the `metric` of that name that was saved with the steps, `mode` saying whether the highest or the
        lowest value is best. Without a name: by the `BestN` among the persistent preservation policies; where
        there is none, the newest step. Steps without the metric do not count; None where no step has it.
        """
        if mode not in ("max", "min"):
            raise ConfigError(f"best_step: mode is {mode!r}; expected 'max' or 'min'")
        if metric is not None:
            ranking = Ranking(operator.itemgetter(metric), mode == "min")
        elif self._settings.ranking is not None:
            ranking = self._settings.ranking
        else:
            return self.latest_step()
        return self._engine.catalog.best(self._engine.step_numbers(), ranking)

    def should_save(self, step: int) -> bool:
        """Whether `save(step, …)` would save: something is due and the step is newer than all saved ones.

        With a save-decision policy that depends on more than the step, all processes ask about the same steps.
        """
        step = step_number(step)
        return bool(self._due(step, force=False)) and not self._engine.is_old(step)

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to react to a preemption notice at `step`. Ask at every step."""
        step = step_number(step)
        self._progress.note(step)
        return self._leaving.reached(step)

    @property
    def should_exit(self) -> bool:
        """Whether the job is to leave now, because hosts of it go away. Ask after `save`, on all processes.

        False without a word to the others as long as no step was reached at which all react to such a notice.
        At that step it waits until what was decided to be saved is durable, or until the time is over that the
        host has, and is true on all processes. Close the manager then, and end with `exit_code`.
        """
        with self._progress.paused():
            return self._leaving.should_exit()

    @property
    def exit_code(self) -> int:
        """With which the program is to end after a preemption, so that it is started again."""
        return self._settings.exit_code

    @property
    def notices(self) -> tuple[Notice, ...]:
        """The notices that this process heard of, oldest first, with their deadlines. Local.

        A signal that JAX's own handler takes is not among them, nor is what other processes heard.
        """
        return self._notices.heard

    def _expect_steps_after(self, step: int | None) -> None:
        if step is not None:
            self._steps.begin_after(step)

    # Saving.

    def save(
        self,
        step: int,
        args: PyTree,
        *,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        extras: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Saves `step` on the tiers for which it is due. All processes call it at every step.

        Returns when the state may be changed or donated: after the copy from the device, or, on CPU, at once.
        Where nothing is due it costs microseconds. With `enable_async_checkpointing=False` (the flag
        `async_checkpointing`) it returns when the step is complete on all ramdisks, and committed where it is
        due for the persistent tier.

        Args:
          step: the step number, larger than that of every save before.
          args: the state, or Orbax's `Composite(state=PyTreeSave(state), …)`. Further items are saved by their
            handlers, in the same commit as the arrays; together with the extras at most 1 MiB per process. All
            processes give the same items.
          force: save on every tier, due or not. A step that is on all of them is an error, as with Orbax.
          custom_metadata: JSON that is kept with the step.
          extras: small state of this process, at most 1 MiB: plain data, or objects with `get_state()` such as
            a grain iterator. Give extras on all processes or on none. What is the same on all of them goes into
            `GlobalExtras`, and then comes back on any number of processes.
          metrics: JSON numbers of the step.

        Returns whether this process saves; False where nothing is due, and where the save had to be skipped
        because no slot became free in time (it is then abandoned on all processes, logged and counted); a
        synchronous save returns False on all processes where one of them could not save.
        Raises StateMismatchError, UnsupportedStateError or ExtrasError for what cannot be saved, and
        StepAlreadyExistsError, on all processes, for a forced save of a step that is there. Errors in the
        background are raised by `check_for_errors`; a synchronous save raises those of its commit itself, on
        all processes, and may be repeated: the step is on the ramdisks.
        """
        step = step_number(step)
        due = self._due(step, force)
        if not due:
            return False

        def prepare() -> SaveContent:
            return self._content(args, extras, custom_metadata, metrics)

        is_new = not self._engine.is_old(step)
        if force and not is_new and self._engine.is_saved(step):
            raise StepAlreadyExistsError(
                f"step {step} is saved already, on every tier that it would go to; delete({step}) comes first "
                "where it is to be saved anew. Without force=True such a call returns False"
            )
        with self._progress.paused():
            saved = self._engine.save(step, due, prepare, self._settings.slot_wait, self._leaving.remaining())
            self._datasets.delete_void()
            if due.persistent:
                self._datasets.save(step, args, custom_metadata, is_new)
            if saved and due.persistent and not self._settings.asynchronous:
                raise_together(self._engine.await_drains(self._leaving.remaining))
        return saved

    def _content(
        self,
        args: PyTree,
        extras: Mapping[str, Any] | None,
        custom_metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> SaveContent:
        state, items = split_items(args)
        given = bool(items)
        self._datasets.take_whole_checkpoints(items)
        written = {name: self._handlers.save(name, item) for name, item in items.items()}
        self._datasets.take_large(written)
        return SaveContent(
            state, capture(extras, written, always=given), plain_metadata(custom_metadata, metrics)
        )

    @_without_progress
    def finish(self, step: int, state: PyTree, *, extras: Mapping[str, Any] | None = None) -> None:
        """Call after the last step: saves it persistently if the flags say so, and waits. Collective.

        `state` is what `save` takes as `args`.

        Raises PersistentStoreError on all processes when the step did not reach the persistent tier. What else
        failed in the background, before or meanwhile, `check_for_errors` and `close` raise.
        """
        self._progress.end()
        if self._leaving.should_exit():
            return  # What was to be saved is, as far as there was time for it.
        if not (self._save_on_completion and self._settings.schedule.persistent):
            self._engine.wait()
            self._datasets.wait()
            return

        def prepare() -> SaveContent:
            return self._content(state, extras)

        step = step_number(step)
        is_new = not self._engine.is_old(step)
        self._engine.finish(step, self._engine.due(step, force=True), prepare)
        self._datasets.delete_void()
        self._datasets.save(step, state, None, is_new)
        self._datasets.wait()

    @_without_progress
    def persist_newest(self) -> None:
        """Takes the newest complete step of this life to the persistent tier, and waits for that. Collective.

        For programs that end without `finish`. Nothing is done where it is there already, and where nothing was
        saved since the start or the restore. Raises what `wait_until_finished` raises.
        """
        self._engine.wait()
        newest = self._engine.newest_complete
        if newest is not None and self._settings.schedule.persistent is not None:
            self._engine.drain_complete(newest.step, self._settings.coordination_timeout)
        self.wait_until_finished()

    def _due(self, step: int, force: bool) -> Due:
        self._progress.note(step)
        preempted = self._settings.save_on_preemption and self._leaving.reached(step)
        due = self._engine.due(step, preempted=preempted, force=force)
        return self._leaving.narrowed(due) if preempted and not force else due

    # Restoring.

    @_without_progress
    def restore(self, step: int | None, args: Any = None) -> ocp.args.Composite:
        """Restores `step`, or the newest restorable step, as `Composite(state=…)`. Collective.

        With None, damaged steps are passed over until one is whole. With an older step the newer ones stay
        restorable until the next save: that is when training goes on from the older one for good.

        The arrays have the shapes, dtypes and shardings of the abstract state that the manager was made with,
        whatever `args` says of the state; other items that `args` (a `Composite`) names are restored by their
        handlers.

        With `Composite(state=PyTreeRestore(item, restore_args, partial_restore=True))`, or where leaves of the
        item are `orbax.checkpoint.PLACEHOLDER`, only the other leaves of the item are read, with its shardings
        (those of the abstract state where it names none), and nothing else changes: no step becomes void, and
        training goes on as if it had not been called. It waits for saves and drains that are running. One that
        names all leaves as the manager's state has them is a whole restore, though, as long as nothing was
        restored or saved: so MaxText asks for the state from which it goes on.

        Raises NoRestorableStepError, with the reasons and the newest restorable step, when there is none; for
        a part also StateMismatchError, naming every leaf that is not there as it is wanted; ExtrasError
        on all processes when an item is not there or its handler fails, and nothing is void then.
        """
        step = None if step is None else step_number(step)
        items = dict(args.items()) if isinstance(args, ocp.args.Composite) else {STATE: args}
        asked = items.pop(STATE, None)
        beside = WantedExtras({}, items, self._datasets.elsewhere, self._handlers)
        is_part = asks_for_part(asked)
        tree = self._tree_to_go_on_from(asked, beside) if is_part and not self._engine.began else None
        restored = (
            self._restore_part(step, asked, beside) if is_part and tree is None else self._restore(step, beside)
        )
        state = restored.state if tree is None else tree(restored.state)
        found = dict(restored.received.items)
        self._datasets.add_missing(restored.report.step, items, found)
        return ocp.args.Composite(state=state, **found)

    @_without_progress
    def restore_or_init(
        self, init: Callable[[], PyTree], extras: Mapping[str, Any] | None = None
    ) -> RestoredState:
        """The newest restorable state, or what `init()` makes where there is none. Collective.

        Args:
          init: makes a fresh state, with the shapes and shardings of the abstract state.
          extras: objects with `set_state()` by name: those saved under the same name are put back into them.
            Where another number of processes saved them, that takes `GlobalExtras` when they are saved or
            `ReshardedExtras` here.

        Raises NoRestorableStepError when there were complete steps and none of them is whole any more, and
        ExtrasError, on all processes, where extras that are wanted cannot be had.
        """
        survey = self._engine.survey
        if self._engine.base is not None:
            restored = self._restore(None, WantedExtras(extras or {}))
            report = restored.report
            self._progress.expect()
            return RestoredState(restored.state, report.step, restored.received.values, report.source)
        self._steps.begin_after(-1)
        if lost := survey.lost:
            raise NoRestorableStepError(
                f"{lost} was complete once, and now nothing can be restored: {survey.reason}. To start "
                "from scratch all the same, use another run_name, or empty the persistent directory "
                f"{self._settings.persistent_directory} and the ramdisks."
            )
        state, source = self._fresh_state(init)
        self._engine.job.log.info("restore", None, f"starting from {source}: {survey.reason}")
        self._progress.expect()
        return RestoredState(state, None, {}, source)

    def _fresh_state(self, init: Callable[[], PyTree]) -> tuple[PyTree, str]:
        topology, read_bytes = self._engine.job.topology, self._settings.read_bytes
        if path := self._load_full_state_path:
            return self._engine.load(lambda: load_state(path, self._abstract_state, topology, read_bytes)), path
        if path := self._load_parameters_path:
            into = self._engine.load(lambda: load_parameters(path, self._abstract_state, topology, read_bytes))
            return into(init()), f"the parameters of {path}"
        return init(), "scratch"

    def _tree_to_go_on_from(self, asked: Any, beside: WantedExtras) -> Callable[[PyTree], PyTree] | None:
        """Makes the caller's tree of the whole state, where all processes ask for all of it; None otherwise."""
        job = self._engine.job
        try:
            tree = whole_in_another_tree(asked, self._abstract_state, job.needed_layout, job.topology, beside)
        except EmergencyCheckpointError:
            tree = None  # It is told when the part is restored.
        return tree if self._engine.on_all(tree is not None) else None

    def _restore_part(self, step: int | None, asked: Any, beside: WantedExtras) -> Restored:
        job = self._engine.job
        read = self._engine.restore_part(
            step, lambda: part_of_state(asked, self._abstract_state, job.needed_layout, job.topology, beside)
        )
        self._last_restore = read.report
        return read

    def _restore(self, wanted: int | None, beside: WantedExtras) -> Restored:
        try:
            restored = self._engine.restore(wanted, beside)
        except BaseException:
            self._steps.may_begin_anew()
            raise
        self._last_restore = restored.report
        self._progress.begin_anew()
        self._expect_steps_after(restored.report.step)
        self._datasets.note_restored(restored.report.step)
        return restored

    @_without_progress
    def reload(self) -> None:
        """Looks again at what can be restored, on all tiers. Collective."""
        try:
            self._engine.reload()
        finally:
            self._steps.may_begin_anew()

    @_without_progress
    def delete(self, step: int) -> None:
        """Deletes `step` on all tiers. Collective. Raises NoRestorableStepError when it is on none."""
        step = step_number(step)
        try:
            self._engine.delete(step)
        finally:
            self._steps.may_begin_anew()
        self._datasets.delete(step)

    # What is known about saved steps.

    def metrics(self, step: int) -> PyTree | None:
        """The metrics that were saved with `step`, None if there were none. Local."""
        return self._engine.catalog.saved_with(step_number(step)).get("metrics") or None

    def metadata(self, step: int | None = None) -> Any:
        """Orbax's `StepMetadata` of `step`, or `RootMetadata` for None. Local.

        The commit time is that of the persistent tier; a step on ramdisks alone has none. The state of a step
        whose tree cannot be read is None among its items.
        """
        if step is None:
            return RootMetadata(custom_metadata=self._engine.job.persistent.root_metadata() or {})
        step = step_number(step)
        saved = self._engine.catalog.facts(step)
        try:
            items = self.item_metadata(step)
        except (CorruptDataError, PersistentStoreError) as error:
            self._engine.job.log.warning("metadata", step, f"what the state is made of is not known: {error}")
            items = ocp.args.Composite(**dict.fromkeys([STATE, *saved.handlers]))
        return StepMetadata(
            item_handlers=dict(saved.handlers),
            item_metadata=items,
            metrics=dict(saved.metrics),
            custom_metadata=dict(saved.custom_metadata),
            commit_timestamp_nsecs=saved.committed_nanoseconds,
            init_timestamp_nsecs=saved.started_nanoseconds,
        )

    def item_metadata(self, step: int) -> Any:
        """`Composite(state=…)` of what `step` holds, and None for each item beside the state. Local.

        Arrays are `jax.ShapeDtypeStruct`s, other leaves as they were saved. A leaf that agrees with that of the
        manager's abstract state has its sharding; any other has none, and typed keys are then the integers that
        are stored. Raises NoRestorableStepError, CorruptDataError or PersistentStoreError.
        """
        step = step_number(step)
        contents = self._engine.catalog.contents(step)
        beside = [*contents.items, *([DATASET] if step in self._datasets.steps else [])]
        return ocp.args.Composite(state=contents.state(self._abstract_state), **dict.fromkeys(beside))

    # Ending.

    @_without_progress
    def wait_until_finished(self) -> None:
        """Waits until every save has its outcome and every drain has ended, then does as `check_for_errors`.

        Local. Everything is waited for, whatever fails. CoordinationTimeoutError when something takes
        longer than its own time limits.
        """
        failures = failures_of(self._datasets.wait, self._engine.wait)
        raise_together([*failures, *self._engine.take_errors()])

    def check_for_errors(self) -> None:
        """Raises the first error that saves or drains in the background met since the last call. Local.

        The others are its notes. An error is raised once, here or by `wait_until_finished`, `finish`, `close`.
        """
        raise_together([*failures_of(self._datasets.check_for_errors), *self._engine.take_errors()])

    @_without_progress
    def close(self) -> None:
        """Finishes saves and drains and gives back the ramdisk directory. The data stays. Idempotent.

        Raises the errors that nobody has asked for, when everything is released.
        """
        self._leaving.begin_to_end()
        remaining = self._leaving.remaining
        failures = failures_of(self._notices.leave)
        try:
            failures += failures_of(lambda: self._datasets.close(remaining()))
        finally:  # Also when somebody interrupts the waiting.
            try:
                failures += failures_of(
                    lambda: self._teller.close(remaining()), lambda: self._engine.close(remaining)
                )
            finally:  # Until now a signal that the process is to end has limited the waiting.
                failures += failures_of(lambda: self._notices.close(remaining()), self._handlers.close)
        raise_together([*failures, *self._engine.take_errors()])

    def __contextmanager__(self) -> Any:
        try:
            yield self
        except BaseException as error:
            for late in failures_of(self.close):
                error.add_note(f"and, when the checkpoint manager was closed: {late}")
            raise
        self.close()


# So that `isinstance(manager, emergency.CheckpointManager)` holds, which MaxText asks.
orbax_emergency.CheckpointManager.register(CheckpointManager)
