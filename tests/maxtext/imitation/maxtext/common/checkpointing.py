"""An imitation of what MaxText's train loop does with its emergency manager; written anew, nothing is copied.

The order of the calls and their arguments are those of MaxText of 2025 and 2026 (`common/checkpointing.py` in
AI-Hypercomputer/maxtext): the newest step is asked for and restored with `partial_restore=True` and a sharding
per leaf; each step is saved with sizes of files; a preemption is asked about twice, and waited for.
"""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

FILE_BYTES = 2 * 1024**3


class StopTraining(Exception):
    """Ends the train loop as one that is done."""


def create_orbax_emergency_checkpoint_manager(*arguments: Any) -> Any:
    raise AssertionError(f"the original was called: {arguments}")


def create_orbax_emergency_replicator_checkpoint_manager(*arguments: Any) -> Any:
    raise AssertionError(f"the original was called: {arguments}")


def load_state_if_possible(manager: Any, abstract_state: Any) -> Any:
    """The state of the newest step, None where there is none."""
    step = manager.latest_step()
    if step is None:
        return None
    how = jax.tree.map(lambda leaf: ocp.type_handlers.ArrayRestoreArgs(sharding=leaf.sharding), abstract_state)
    wanted = ocp.args.PyTreeRestore(item=abstract_state, restore_args=how, partial_restore=True)
    assert isinstance(manager, orbax_emergency.CheckpointManager)
    state = manager.restore(step, args=ocp.args.Composite(state=wanted)).state
    print(f"restored {step}", flush=True)
    return state


def maybe_save_checkpoint(manager: Any, state: Any, period: int, step: Any = None) -> None:
    """After each step with its number; after the last one without."""
    number = int(state.step) - 1 if step is None else step
    if manager.latest_step() == number:
        return
    forced = step is None and number != -1 and number % period != 0
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=FILE_BYTES), state)
    args = ocp.args.PyTreeSave(item=state, save_args=save_args, ocdbt_target_data_file_size=FILE_BYTES)
    if manager.save(number, args=ocp.args.Composite(state=args), force=forced):
        print(f"saved {number}", flush=True)
    if forced or manager.reached_preemption(number):
        manager.wait_until_finished()
    if manager.reached_preemption(number):
        raise StopTraining("the job is preempted")
