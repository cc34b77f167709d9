"""Starting a manager: run id, slots, what can be restored, and a new generation. All processes together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from emergency_ckpt.agent.drain import ByAgent, DrainJob, InProcess, Runner
from emergency_ckpt.agent.drain_worker import DrainWorker
from emergency_ckpt.agent.draining import Stop, destination_of
from emergency_ckpt.agent.orders import Destination, Share
from emergency_ckpt.core.copies import survivable
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import Pauses
from emergency_ckpt.core.storage import storage_layout
from emergency_ckpt.errors import ConfigError, NoRestorableStepError, PersistentStoreError, StateMismatchError
from emergency_ckpt.jaxio.coordination import Coordinator, open_coordinator, service_address
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.mesh_places import place_in
from emergency_ckpt.jaxio.orbax_metadata import layout_metadata_files
from emergency_ckpt.jaxio.topology import Topology, axis_position
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.local.store import LocalStore, StoreOptions
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.store import Generation, PersistentStore
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.agreement import agree, tell
from emergency_ckpt.runtime.board import CoordinatedBoard
from emergency_ckpt.runtime.directories import choose_directory
from emergency_ckpt.runtime.job import LEADER, Job
from emergency_ckpt.runtime.peers import Peers
from emergency_ckpt.runtime.restoring import Restorer
from emergency_ckpt.runtime.retention import Retention
from emergency_ckpt.runtime.settings import Settings
from emergency_ckpt.runtime.survey import Survey
from emergency_ckpt.runtime.trying import try_directory
from emergency_ckpt.telemetry.events import StartEvent
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metric, Metrics
from emergency_ckpt.telemetry.units import format_bytes

# Orbax's names for the item that holds the state: with several replicas, and with one.
_ITEM_OF_MANY, _ITEM_OF_ONE = "default", "state"


def start_job(
    settings: Settings,
    mesh: jax.sharding.Mesh,
    abstract_state: Any,
    on_notice: Callable[[Notice], None] | None = None,
) -> tuple[Job, Restorer, Survey]:
    """Everything up to the first restore or save. Collective. `on_notice`: see `Peers`.

    Raises TopologyError, UnsupportedStateError, LocalDirectoryError, LocalCapacityError, ForeignRunError,
    PersistentStoreError; on the processes that are not at fault, PeerFailedError naming the one that is. On all
    of them StateMismatchError or NoRestorableStepError when all there is to restore are ramdisk copies of
    another state or job shape.
    """
    started = time.monotonic()
    coordinator = open_coordinator()
    timeout = settings.coordination_timeout
    topology = Topology.from_mesh(mesh, settings.replica_axis)
    persistent = PersistentStore(
        settings.persistent_directory, settings.names, limits=Limits.of_stall(settings.stall.total_seconds())
    )
    context = LogContext(None, None, topology.process_index, topology.slice_index)
    log = CheckpointLogger(context, Metrics(), settings.log_format, settings.event_listener)

    def make_root() -> tuple[str, str]:
        try_directory(settings.persistent_directory, timeout.total_seconds(), log)
        _keep_root_metadata(persistent, settings.root_metadata, log)
        return persistent.run_id(), _item_name(persistent, mesh, settings.replica_axis)

    # So that nobody waits for a process 0 that is not there as long as for a store that does not answer.
    tell(coordinator, "start/begun", lambda: True, timeout)
    run, item = tell(coordinator, "start/run", make_root, 3 * timeout)
    device_layout = build_layout(abstract_state, topology, layout_metadata_files(abstract_state, item))
    layout = _storage_layout(device_layout, settings)
    log = log.bind(run=run)
    local = _open_local(coordinator, settings, run, layout, topology, log)
    peers = _meet_peers(coordinator, settings, topology, log, on_notice)
    generation = Generation(0, "")
    job = Job(
        settings,
        run,
        item,
        topology,
        layout,
        device_layout,
        coordinator,
        local,
        peers,
        persistent,
        generation,
        log,
        place_in(mesh, topology.process_index),
    )
    try:
        restorer = Restorer(job, abstract_state, mesh)
        survey = restorer.survey("start")
        _check_unusable(job, survey)
        job.begin_generation(mint_generation(job, "start", survey.highest_generation, survey.newest))
    except BaseException:
        peers.close()
        local.close()
        raise
    _tell_what_is_spread(job)
    _tell_what_survives(job)
    if survey.newest is not None and survey.newest not in survey.persistent:
        # If this life ends before it has saved anything, that step is the one to drain.
        work_on(job)
    if job.leads:
        _remove_leftovers(job)
        _warn_of_foreign_steps(job, survey)
    job.log.emit(
        StartEvent(
            step=survey.newest.step if survey.newest else None,
            local_directory=str(local.directory) if local.directory else None,
            persistent_directory=settings.persistent_directory,
            slots=local.slot_count,
            slot_bytes=layout.data_bytes(topology.process_index),
            process_count=topology.process_count,
            slice_count=topology.slice_count,
            seconds=time.monotonic() - started,
            reason=survey.reason,
        )
    )
    return job, restorer, survey


def _check_unusable(job: Job, survey: Survey) -> None:
    """A whole step that this job cannot use is not silently left behind: a start from scratch would void it."""
    unusable = survey.unusable
    if unusable is None:
        return
    step, why = unusable.step, unusable.describe()
    newest = survey.newest
    if newest is not None:
        if job.leads:
            job.log.warning("start", step.step, f"{step} on the ramdisks cannot be used and {newest} is: {why}")
        return
    saved_it = "the model configuration that saved it" if unusable.differences else unusable.shape
    message = (
        f"the ramdisks hold {step} and this job cannot use it: {why}. Nothing else can be restored. To go on "
        f"from it, start {saved_it}; to start from scratch, use another run_name, or empty the ramdisks and "
        f"the persistent directory {job.settings.persistent_directory}."
    )
    raise StateMismatchError(message) if unusable.differences else NoRestorableStepError(message)


def _warn_of_foreign_steps(job: Job, survey: Survey) -> None:
    """Steps of other programs are older than any of this run; somebody may expect otherwise."""
    newest = survey.newest
    if newest is None or newest.generation == 0:
        return
    later = [s.step for s in survey.restorable if s.generation == 0 and s.step > newest.step]
    if later:
        job.log.warning(
            "start",
            max(later),
            f"another program wrote steps {later} here; this run goes on from its own step {newest.step}. "
            f"To go on from one of them, call restore({max(later)})",
        )


def _keep_root_metadata(
    persistent: PersistentStore, metadata: Mapping[str, Any] | None, log: CheckpointLogger
) -> None:
    """Writes the user's metadata of the run. As with Orbax, what an earlier life wrote stays."""
    if metadata is None or persistent.create_root_metadata(metadata):
        return
    found = persistent.root_metadata()
    if found != metadata:
        log.warning("start", None, f"the directory keeps its metadata {found}; {dict(metadata)} is not written")


def _remove_leftovers(job: Job) -> None:
    """Tidies up after earlier lives, without keeping the job from starting: leftovers are invisible.

    What other programs left goes at once: nothing tells it from what processes of this job are going to write.
    """
    job.deletions.sweep(job.generation)
    try:
        if job.settings.remove_foreign_leftovers:
            for name in job.persistent.remove_foreign_leftovers():
                job.log.info("start", None, f"removed {name}, which another program left uncommitted")
    except (PersistentStoreError, OSError) as error:
        job.log.warning("start", None, f"leftovers of other programs could not be removed: {error}")


def mint_generation(job: Job, key: str, highest_seen: int, parent: StepId | None) -> Generation:
    """A new life of the run, the same on all processes. Collective."""

    def make() -> Any:
        minted = job.persistent.mint_generation(highest_seen, parent)
        return [minted.number, minted.nonce]

    number, nonce = tell(job.coordinator, f"{key}/generation", make, job.settings.coordination_timeout)
    return Generation(number, nonce, parent)


def work_on(job: Job) -> None:
    """Tells the agent of this host, in the background, what is left to do if this process dies."""
    if job.settings.schedule.persistent is not None:
        job.peers.work_on(destination(job), flush=job.settings.flush_on_trainer_exit)


def destination(job: Job) -> Destination:
    """Where the steps of the current generation are drained to."""
    seconds = job.settings.drain_timeout.total_seconds()
    return destination_of(
        job.persistent,
        job.run,
        job.generation,
        job.item,
        job.settings.write_options,
        seconds,
        stall_seconds=job.settings.stall.total_seconds(),
        tidies=job.settings.preservation is None,
        max_to_keep=job.settings.persistent_max_to_keep,
        keep_period=job.settings.persistent_keep_period,
    )


class _InFreeDirectories:
    """Drains by another runner, when nothing is deleted any more where the step is going to be."""

    def __init__(self, runner: Runner, job: Job) -> None:
        self._runner = runner
        self._job = job

    def run(self, share: Share, slot: SealedSlot, stop: Stop) -> int:
        self._job.deletions.make_free(self._job.persistent.names.name(share.step))
        return self._runner.run(share, slot, stop)


def start_drains(job: Job, retention: Retention) -> DrainWorker | None:
    """The drain worker of the current generation; None where nothing goes to the persistent tier."""
    if job.settings.schedule.persistent is None:
        return None
    where = destination(job)
    runner: Runner = InProcess(job.persistent, where)
    if job.peers.host is not None:
        runner = ByAgent(job.peers.host, where, runner, job.log)
    if job.leads:
        runner = _InFreeDirectories(runner, job)
    return DrainWorker(
        DrainJob(
            local=job.local,
            runner=runner,
            generation=job.generation,
            item=job.item,
            process=job.process,
            committer=LEADER,
            timeout=job.settings.drain_timeout,
            board=CoordinatedBoard(job.coordinator),
            log=job.log,
            on_commit=retention.apply,
            abandon=job.persistent.abandon,
            pauses=Pauses(job.settings.drain_retry.total_seconds()),
            keeps_waiting=job.settings.local_directory is None,
            repeats=job.settings.asynchronous,
            lets_go=job.local.slot_count < job.settings.wanted_slots,
            after_commit=job.settings.after_commit,
        )
    )


def _storage_layout(device_layout: Layout, settings: Settings) -> Layout:
    """What slots hold: what devices hold, or a slice's part of it, and copies of others' shards if needed."""
    if settings.local_directory is None:
        return device_layout
    layout = storage_layout(device_layout, settings.local_copies, settings.local_spread)
    if settings.agent is not None or layout is device_layout:
        return layout
    if storage_layout(device_layout, settings.local_copies, spreads=False) is not device_layout:
        raise ConfigError(
            f"local_checkpoint_copies={settings.local_copies} needs the agents of the hosts, which fetch the "
            "copies from each other: set checkpoint_agent=auto, or local_checkpoint_copies=1"
        )
    raise ConfigError(
        "local_checkpoint_spread=True needs the agents of the hosts, from which each slice gets at a restore "
        "what others keep: set checkpoint_agent=auto, or local_checkpoint_spread=False"
    )


def _tell_what_is_spread(job: Job) -> None:
    if not job.settings.local_spread or job.local.directory is None or not job.leads:
        return
    slices, copies = job.topology.slice_count, job.settings.local_copies
    if job.stores_all:
        why = f"{slices} slices" if slices > 1 else "one slice"
        why += f" and local_checkpoint_copies={copies}" if slices > 1 else ""
        job.log.info("start", None, f"with {why}, local_checkpoint_spread=True leaves every slot as it is")
        return
    stored, held = (layout.data_bytes(job.process) for layout in (job.layout, job.device_layout))
    job.log.info(
        "start",
        None,
        f"local_checkpoint_spread=True: each of {slices} slices keeps a part, every shard is in {copies} of "
        f"them, and a slot of this host has {format_bytes(stored)} instead of {format_bytes(held)}",
    )


def _tell_what_survives(job: Job) -> None:
    if job.local.directory is None:
        return
    told = survivable(job.layout)
    job.log.metrics.set(Metric.SURVIVES_HOST_LOSSES, told.hosts)
    job.log.metrics.set(Metric.SURVIVES_SLICE_LOSSES, told.slices)
    if not job.leads or job.topology.process_count == 1:
        return
    said = f"a complete step on the ramdisks {told.describe()}"
    if told.hosts:
        job.log.info("start", None, said)
    else:
        job.log.warning("start", None, f"{said}; local_checkpoint_copies=2 keeps a second one on another host")


def _meet_peers(
    coordinator: Coordinator,
    settings: Settings,
    topology: Topology,
    log: CheckpointLogger,
    on_notice: Callable[[Notice], None] | None,
) -> Peers:
    """The agents of the job; without other processes, and with nothing to drain, none is needed."""
    alone = topology.process_count == 1
    options = settings.agent if not alone or settings.schedule.persistent is not None else None
    if options is not None and alone and options.bind is None:
        options = dataclasses.replace(options, bind="127.0.0.1")
    elif options is not None and options.reach is None and (reach := service_address()):
        options = dataclasses.replace(options, reach=reach)
    return Peers(
        coordinator,
        settings.local_directory,
        options,
        log,
        settings.coordination_timeout,
        lazily=alone,
        on_notice=on_notice,
    )


def _open_local(
    coordinator: Coordinator,
    settings: Settings,
    run: str,
    layout: Layout,
    topology: Topology,
    log: CheckpointLogger,
) -> LocalStore:
    """Opens this process's slots; no process goes on before all have theirs and agree on the layout."""
    opened: list[LocalStore] = []
    root, timeout = settings.local_directory, settings.coordination_timeout
    ordinal = 0 if root is None else choose_directory(coordinator, "start/host", root, run, timeout)

    def mine() -> str:
        options = StoreOptions(
            ordinal=ordinal,
            directory=root,
            max_to_keep=settings.local_max_to_keep if root else 0,
            wanted_slots=settings.wanted_slots,
            least_slots=settings.least_slots,
            foreign_run=settings.foreign_run,
        )
        opened.append(
            LocalStore(
                options,
                run,
                layout,
                topology.process_index,
                lambda message: log.warning("local", None, message),
            )
        )
        return layout.hash

    def decide(hashes: list[str]) -> None:
        odd = [p for p, found in enumerate(hashes) if found != hashes[0]]
        if odd:
            raise StateMismatchError(
                f"processes {odd} have another state or sharding than process 0; all processes must give the "
                "same abstract state and mesh"
            )

    try:
        agree(coordinator, "start/local", mine, decide, timeout)
    except BaseException:
        for store in opened:
            store.close()
        raise
    return opened[0]


def _item_name(persistent: PersistentStore, mesh: jax.sharding.Mesh, replica_axis: int | str) -> str:
    """What the directory of the state is called in a step: as in the newest step, whoever wrote that.

    So whoever began the directory finds the state under the name that it knows, MaxText under `items`.
    """
    steps = persistent.steps()
    usual = _ITEM_OF_MANY if mesh.devices.shape[axis_position(mesh, replica_axis)] > 1 else _ITEM_OF_ONE
    return (steps[-1].item if steps else "") or usual
