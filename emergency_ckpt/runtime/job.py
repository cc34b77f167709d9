"""What all parts of a running manager share: the job, its life, and how to reach the others."""

from __future__ import annotations

import dataclasses
import functools

from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.slot_source import PeerSlot
from emergency_ckpt.core.arrangement import MeshPlace
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.storage import both, either
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.persistent.deletions import Deletions
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import Generation, PersistentStore
from emergency_ckpt.runtime.peers import Peers
from emergency_ckpt.runtime.settings import Settings
from emergency_ckpt.telemetry.log import CheckpointLogger

LEADER = 0


@dataclasses.dataclass
class Job:
    """One process's view of the job. `generation` changes when a restore begins a new life of the run.

    `layout` says what slots hold, and `device_layout` what devices do: shards that a process stores for others
    are in the first one only, and where slices share what all of them hold, some are in the second one only.
    Both have the same shards. `place` is where in the mesh this process stands. `deletions` is made use of by
    the leading process.
    """

    settings: Settings
    run: str
    item: str
    topology: Topology
    layout: Layout
    device_layout: Layout
    coordinator: Coordinator
    local: LocalStore
    peers: Peers
    persistent: PersistentStore
    generation: Generation
    log: CheckpointLogger
    place: MeshPlace
    deletions: Deletions = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.deletions = Deletions(
            self.persistent,
            lambda: self.generation,
            lambda step, text: self.log.info("retention", step, text),
            lambda step, text: self.log.warning("retention", step, text),
        )

    @property
    def process(self) -> int:
        return self.topology.process_index

    @property
    def leads(self) -> bool:
        """Whether this process plans, mints generations and commits."""
        return self.process == LEADER

    @functools.cached_property
    def needed_layout(self) -> Layout:
        """What each process has to get at a restore: for its devices, or for its slot."""
        return either(self.layout, self.device_layout)

    @functools.cached_property
    def saved_layout(self) -> Layout:
        """What each process stores of its own devices."""
        return both(self.device_layout, self.layout)

    @property
    def stores_all(self) -> bool:
        """Whether slots hold all that devices do; otherwise slices share it."""
        return self.needed_layout is self.layout

    def open_persistent(self, step: StepId) -> StepReader:
        """A reader of a step that was listed; raises PersistentStoreError when it is not there any more."""
        for held in self.persistent.steps():
            if held.step_id == step:
                return self.persistent.open_step(held)
        raise PersistentStoreError(
            f"{step} disappeared from {self.persistent.files.locate()} since it was listed; was it deleted by"
            " hand?"
        )

    def begin_generation(self, generation: Generation) -> None:
        self.generation = generation
        self.log = self.log.bind(run=self.run, generation=generation.number)


def open_peer_slot(job: Job, step: StepId, take: Take) -> PeerSlot:
    """The slot of another process that a take names. Raises PeerUnavailableError or CorruptDataError."""
    endpoint = job.peers.endpoint(take.process)
    known = (job.layout, job.needed_layout)
    layout = next((layout for layout in known if take.layout == layout.hash), None)
    return PeerSlot(take.process, endpoint, SlotId(job.run, step, take.layout, take.position), layout)
