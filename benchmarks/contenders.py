"""What is compared: this package's manager and Orbax's, behind one interface with the same options.

Steps that are multiples of PERIOD are due, on the local tier alone. (Ours also drains the very first one to the
persistent tier, as it always does; that happens after the save and is not measured.)
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import orbax.checkpoint as ocp
from absl import flags
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from benchmarks.workload import State, Workload
from emergency_ckpt import CheckpointManager, Config
from emergency_ckpt.cli.launcher.ramdisk import remove_tree

PERIOD = 1000


@dataclasses.dataclass(frozen=True)
class LoggedSave:
    """Seconds from the call until this process's bytes were safe, and until it knew that everybody's were."""

    sealed_seconds: float
    complete_seconds: float


class Contender(Protocol):
    """One manager. All processes make the same calls."""

    name: str

    def open(self) -> None:
        """Constructs the manager upon what its directories hold."""
        ...

    def save(self, step: int, state: State) -> None:
        """One call of the manager's `save`; nothing is due unless `step` is a multiple of PERIOD."""
        ...

    def wait(self) -> None:
        """Waits until everything that was begun is finished; raises what went wrong in the background."""
        ...

    def logged(self, step: int) -> LoggedSave | None:
        """What the manager itself says about a save that is finished; None for one that says nothing."""
        ...

    def complete_saves(self) -> int:
        """Saves since the manager was opened that all processes completed."""
        ...

    def restore(self) -> State:
        """The newest step."""
        ...

    def close(self) -> None: ...


class Ours:
    """`emergency_ckpt.CheckpointManager`."""

    name = "emergency_ckpt"

    def __init__(self, workload: Workload, ramdisk: Path, shared: Path) -> None:
        local = ramdisk / self.name
        local.mkdir()
        self._workload = workload
        self._config = Config(
            run_name="benchmark",
            base_output_directory=str(shared / self.name),
            enable_checkpointing=True,
            enable_emergency_checkpoint=True,
            local_checkpoint_directory=str(local),
            local_checkpoint_period=PERIOD,
            checkpoint_period=10**9,
            # Orbax asks for a preemption at every step as well.
            enable_autocheckpoint=True,
            checkpoint_log_format="json",
        )
        # The manager writes one line about each save; when it was sealed cannot be seen from outside.
        self._lines = _SaveLines()
        self._logger = logging.getLogger("absl")
        self._logger.addHandler(self._lines)

    def open(self) -> None:
        manager = CheckpointManager.from_config(
            self._config, self._workload.mesh, self._workload.abstract_state
        )
        assert isinstance(manager, CheckpointManager)
        self._manager = manager

    def save(self, step: int, state: State) -> None:
        # Only until the save is finished, so that Orbax's many lines cost it nothing.
        self._logger.setLevel(logging.INFO)
        self._manager.save(step, state)

    def wait(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._logger.setLevel(logging.WARNING)

    def logged(self, step: int) -> LoggedSave | None:
        return self._lines.saves[step]

    def complete_saves(self) -> int:
        return int(self._manager.metrics_snapshot()["saves_complete"])

    def restore(self) -> State:
        return self._manager.restore(None)["state"]

    def fetched_bytes(self) -> int:
        """What came from other processes since the manager was opened."""
        return int(self._manager.metrics_snapshot()["fetched_bytes"])

    def lose(self) -> None:
        """Everything that this process has on its ramdisk, as with its host. The manager is closed."""
        directory = Path(self._config.local_checkpoint_directory)
        remove_tree(directory)
        directory.mkdir()

    def close(self) -> None:
        self._manager.close()


class Orbax:
    """`orbax.checkpoint.experimental.emergency.checkpoint_manager.CheckpointManager`."""

    name = "orbax"

    def __init__(self, workload: Workload, ramdisk: Path, shared: Path) -> None:
        # Its restore reads an absl flag, which programs that do not run under absl.app have to permit; and its
        # manager cannot tell processes apart before the two calls, which all processes make.
        flags.FLAGS.mark_as_parsed()
        ocp.multihost.initialize_runtime_to_distributed_ids()
        ocp.multihost.initialize_distributed_to_device_ids()
        self._workload = workload
        self._local, self._persistent = ramdisk / self.name, shared / self.name
        for directory in (self._local, self._persistent):
            directory.mkdir(parents=True, exist_ok=True)
        self._complete = 0

    def open(self) -> None:
        self._manager = orbax_emergency.CheckpointManager(
            self._local,
            self._persistent,
            self._workload.mesh,
            self._workload.abstract_state,
            options=orbax_emergency.CheckpointManagerOptions(
                local=orbax_emergency.LocalCheckpointOptions(save_interval_steps=PERIOD, max_to_keep=1),
                persistent=orbax_emergency.PersistentCheckpointOptions(should_save_fn=_never),
            ),
        )
        self._complete = 0

    def save(self, step: int, state: State) -> None:
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state))
        self._complete += self._manager.save(step, args)

    def wait(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def logged(self, step: int) -> LoggedSave | None:
        return None

    def complete_saves(self) -> int:
        return self._complete

    def restore(self) -> State:
        return self._manager.restore(self._manager.latest_step())["state"]

    def close(self) -> None:
        self._manager.close()


class _SaveLines(logging.Handler):
    """Picks the manager's saves out of its log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.saves: dict[int, LoggedSave] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("{") and '"sealed_seconds"' in message:
            line: dict[str, Any] = json.loads(message)
            self.saves[line["step"]] = LoggedSave(line["sealed_seconds"], line["outcome_seconds"])


def _never(step: int, newest: int | None) -> bool:
    return False


def make_contenders(workload: Workload, ramdisk: Path, shared: Path) -> list[Contender]:
    """Both, in directories of their own. All processes call it."""
    return [Ours(workload, ramdisk, shared), Orbax(workload, ramdisk, shared)]
