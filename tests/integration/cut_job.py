"""A job that restores onto another shape and is to be killed while its hosts seal the new cut."""

from __future__ import annotations

import errno
import sys
import time
from typing import Any

import jax

from emergency_ckpt import CheckpointManager
from tests.integration.training_job import check_state, make_config, make_mesh, make_state

AT_THE_SEAL = {"os.rename": "stands before the manifest", "os.remove": "stands before the first byte"}
"""Two moments of sealing, by what is about to be done to a manifest: the slot is written and not sealed, or it
has its old one still."""


def restore_and_stay(
    root: str, slices: int, flags: dict[str, Any], late: list[int], moment: str, saves: int = 0
) -> None:
    """Restores the newest step, checks it, says so and stays; `late` processes stand still in sealing it.

    `saves`: a step that is saved then. The late processes fail to seal what was restored, and stand in that.
    """
    flags = dict(flags)
    mesh = make_mesh(slices, flags.pop("cut", "fsdp"))
    state = make_state(mesh, 0)
    manager = CheckpointManager.from_config(make_config(root, flags), mesh, state)
    if jax.process_index() in late:
        sys.addaudithook(_standing_before(moment, fails=saves > 0))
    restored = manager.restore_or_init(lambda: state)
    check_state(restored.state, mesh, restored.step or 0)
    print(f"restored {restored.step}", flush=True)
    if saves:
        manager.save(saves, make_state(mesh, saves))
    _stay()


def _standing_before(moment: str, fails: bool) -> Any:
    failures = [OSError(errno.ENOSPC, "no room for the first one")] if fails else []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == moment and str(arguments[event == "os.rename"]).endswith(".manifest"):
            if failures:
                raise failures.pop()
            print(AT_THE_SEAL[moment], flush=True)
            _stay()

    return hook


def _stay() -> None:
    while True:
        time.sleep(1)
