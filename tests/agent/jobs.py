"""A run with a persistent root, of which a ramdisk holds steps, and trainers of it that are killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.agent.draining import destination_of
from emergency_ckpt.agent.order_client import OrderClient
from emergency_ckpt.agent.orders import Destination, Registration, Share, registration_to_json
from emergency_ckpt.agent.record import LOG, AgentRecord, agent_directory, read_record
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.store import PersistentStore
from tests.agent.served import RUN, Ramdisk, run_python, start

WAIT = timedelta(seconds=5)
TRAINER = """
import json, os, sys, dataclasses
from pathlib import Path
from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.orders import registration_from_json
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.progress import Progress
from emergency_ckpt.core.stalls import StallLimits

def hear(notice):
    print("notice", notice.source, notice.kind, flush=True)

def tell(step=None, seconds=0.0, median=None, phase="training", last_call=True, floor=0.0, restart=0.0):
    namespace, limits = os.stat("/proc/self/ns/pid").st_ino, StallLimits(10.0, floor, restart)
    said = Progress(step, phase, seconds, median, os.getpid(), namespace, limits, last_call)
    agent.tell_progress(said)
    print("told", flush=True)

agent = HostAgent(Path(sys.argv[1]), AgentOptions(bind="127.0.0.1", idle_seconds=120), hear)
registration = registration_from_json(json.loads(sys.argv[2]))
agents = list(registration.agents)
agents[registration.process] = agent.connect()
agent.register(dataclasses.replace(registration, agents=tuple(agents)))
print("registered", flush=True)
for line in sys.stdin:
    exec(line)
"""


@dataclasses.dataclass
class Job:
    """A ramdisk, the persistent root of its run, and where drains go."""

    disk: Ramdisk
    store: PersistentStore
    destination: Destination

    @property
    def nonce(self) -> str:
        return self.destination.life.nonce

    @property
    def log(self) -> str:
        return (agent_directory(self.disk.root) / LOG).read_text()

    @property
    def committed(self) -> list[StepId]:
        return [step.step_id for step in self.store.steps()]

    @property
    def record(self) -> AgentRecord:
        start(self.disk.root)
        record = read_record(agent_directory(self.disk.root))
        assert record is not None
        return record

    @property
    def owner(self) -> OrderClient:
        return OrderClient.of_this_host(self.record)

    def save(self, step: int, *, generation: int | None = None, nonce: str | None = None) -> None:
        """Seals a step of the life that drains go out in, or of another one."""
        number = self.destination.life.generation if generation is None else generation
        self.disk.save(StepId(number, step), nonce=nonce or self.nonce)

    def share(self, step: int, *holders: int, position: int = 0) -> Share:
        """Of a drain that process 0 commits."""
        return Share(step, 0, self.disk.layout.hash, position, holders or (0,), position == 0)

    def registration(self, *, flush: bool = True) -> Registration:
        return Registration(self.destination, 0, (None,), flush)

    @contextlib.contextmanager
    def trainer(
        self, *, flush: bool = True, registration: Registration | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """A process that has registered, as the only trainer or as it is said here; killed in the end."""
        said = json.dumps(registration_to_json(registration or self.registration(flush=flush)))
        with run_python(TRAINER, str(self.disk.root), said) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "registered\n"
                yield process
            finally:
                process.kill()

    def tell(self, trainer: subprocess.Popen[str], call: str) -> None:
        """Has a trainer say how far it is: `tell(…)` of its program."""
        self.run_in(trainer, call)
        self.read_line(trainer, "told")

    @staticmethod
    def run_in(trainer: subprocess.Popen[str], call: str) -> None:
        """Has a trainer do something."""
        assert trainer.stdin is not None
        trainer.stdin.write(f"{call}\n")
        trainer.stdin.flush()

    @staticmethod
    def read_line(trainer: subprocess.Popen[str], line: str) -> None:
        """Waits until a trainer prints a line."""
        assert trainer.stdout is not None
        for printed in trainer.stdout:
            if printed == f"{line}\n":
                return
        raise AssertionError(f"the trainer ended without printing {line!r}")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"nothing came of it\n{self.log}"
            time.sleep(0.02)


def make_job(disk: Ramdisk, bucket: Path | str, *, tidies: bool = True, seconds: float = 30.0) -> Job:
    """The next life of the run."""
    store = PersistentStore(bucket)
    with contextlib.suppress(FileExistsError):
        store.files.create("emergency_ckpt/run_id", f"{RUN}\n".encode())
    newest = store.newest_generation()
    minted = store.mint_generation(newest.number if newest else 0, None)
    destination = destination_of(
        store, RUN, minted, "default", WriteOptions(), seconds, tidies=tidies, max_to_keep=2
    )
    return Job(disk, store, destination)
