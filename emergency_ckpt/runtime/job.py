"""What all parts of a running manager share: the job, its life, and how to reach the others."""

from __future__ import annotations

import dataclasses

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import Generation, PersistentStore
from emergency_ckpt.runtime.settings import Settings
from emergency_ckpt.telemetry.log import CheckpointLogger

LEADER = 0


@dataclasses.dataclass
class Job:
    """One process's view of the job. `generation` changes when a restore begins a new life of the run."""

    settings: Settings
    run: str
    item: str
    topology: Topology
    layout: Layout
    coordinator: Coordinator
    local: LocalStore
    persistent: PersistentStore
    generation: Generation
    log: CheckpointLogger

    @property
    def process(self) -> int:
        return self.topology.process_index

    @property
    def leads(self) -> bool:
        """Whether this process plans, mints generations and commits."""
        return self.process == LEADER

    def open_persistent(self, step: StepId) -> StepReader:
        """A reader of a step that was listed; raises PersistentStoreError when it is not there any more."""
        for held in self.persistent.steps():
            if held.step_id == step:
                return self.persistent.open_step(held)
        raise PersistentStoreError(
            f"{step} disappeared from {self.persistent.root} since it was listed; was it deleted by hand?"
        )

    def begin_generation(self, generation: Generation) -> None:
        self.generation = generation
        self.log = self.log.bind(run=self.run, generation=generation.number)
