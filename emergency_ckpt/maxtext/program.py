"""Running a program of MaxText with our manager, and ending it so that it is started again after a preemption.

MaxText looks its function up in a module when it makes the manager; that name is bound anew there. MaxText ends
a job that was told to leave as one that is done, with exit code 0, after which nothing would restart it.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.manager import CheckpointManager
from emergency_ckpt.maxtext.managers import create_orbax_emergency_checkpoint_manager

_MODULES = ("maxtext.common.emergency_checkpointing", "maxtext.common.checkpointing", "MaxText.checkpointing")
_MAKERS = ("create_orbax_emergency_checkpoint_manager", "create_emergency_checkpoint_manager")
_REPLICATOR_MAKERS = (
    "create_orbax_emergency_replicator_checkpoint_manager",
    "create_replicator_checkpoint_manager",
)

_made: list[CheckpointManager] = []


def install() -> tuple[str, ...]:
    """Lets MaxText make our manager where it made Orbax's emergency manager. Call it before its train loop.

    Returns the names that are bound anew, with their modules. Raises ConfigError where no MaxText can be
    imported that has such a function.
    """
    bound: list[str] = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue
            raise  # MaxText is there, and lacks something.
        bound += _bind(module, _MAKERS, _make) + _bind(module, _REPLICATOR_MAKERS, _refuse_replicator)
    if not bound:
        raise ConfigError(
            f"none of {', '.join(_MODULES)} can be imported with a function {_MAKERS[0]}. Start this where "
            "MaxText can be imported (PYTHONPATH=src in its checkout), or let its own code call "
            f"emergency_ckpt.maxtext.{_MAKERS[0]}."
        )
    return tuple(bound)


def run_program(words: Sequence[str]) -> NoReturn:
    """Runs `-m MODULE WORDS…` or `FILE WORDS…` as Python would, with our manager, and ends as `leave` says.

    Never returns. Raises ConfigError where nothing is named, or as `install` does.
    """
    words = list(words)
    as_module = words[:1] == ["-m"]
    if as_module:
        del words[0]
    if not words:
        raise ConfigError(
            "no program is named: python -m emergency_ckpt.maxtext -m MODULE WORDS…, or FILE WORDS…"
        )
    sys.argv = words
    if not as_module:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    install()
    try:
        if as_module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    sys.exit(leave())


def leave() -> int:
    """Closes the managers that MaxText made, and says with which code its program is to end. Collective.

    That is `preemption_exit_code` where the job left because hosts of it go away. Otherwise it is 0, and the
    newest step is made persistent: MaxText saves no last step that is on the ramdisks already. Raises what
    `CheckpointManager.persist_newest` and `close` raise.
    """
    code = 0
    while _made:
        manager = _made.pop()
        if manager.should_exit:
            code = manager.exit_code
        else:
            manager.persist_newest()
        manager.close()
    return code


def _bind(module: Any, names: Sequence[str], function: Callable[..., Any]) -> list[str]:
    found = [name for name in names if hasattr(module, name)]
    for name in found:
        setattr(module, name, function)
    return [f"{module.__name__}.{name}" for name in found]


def _make(*arguments: Any, **named: Any) -> CheckpointManager:
    manager = create_orbax_emergency_checkpoint_manager(*arguments, **named)
    _made.append(manager)
    return manager


def _refuse_replicator(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "enable_multi_tier_checkpointing=True makes MaxText use GKE's replicator, and its manager in place of "
        "this one. Set enable_multi_tier_checkpointing=False and enable_emergency_checkpoint=True: the agents "
        "of emergency_ckpt copy and back up what lies on the ramdisks. Backups by time or steps are flags of "
        "the file that EMERGENCY_CKPT_CONFIG names."
    )
