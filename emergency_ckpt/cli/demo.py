"""`emergency-ckpt demo`: train, lose a slice or the machine, and compare with an undisturbed run."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import ConfigError, EmergencyCheckpointError

if TYPE_CHECKING:
    from rich.console import Console

STEPS = 60
SPOT_STEPS = 200

_NEEDED = ("flax", "grain", "optax", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument(
        "--scenario",
        choices=("slice", "spot"),
        default="slice",
        help="slice: a slice is killed and its ramdisks are lost; spot: a notice says that the machine goes "
        "away, the job leaves in time, and another machine goes on from the bucket (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary as JSON, too")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"steps to train (default: {STEPS}; spot: {SPOT_STEPS})"
    )
    parser.add_argument(
        "--slices", type=int, default=2, metavar="S", help="slices (default: %(default)s; spot has one)"
    )
    parser.add_argument(
        "--processes-per-slice",
        type=int,
        default=2,
        metavar="P",
        help="processes of each (default: %(default)s)",
    )
    parser.add_argument(
        "--kill-step",
        type=int,
        metavar="K",
        help="step after which the last slice is killed (default: seven tenths of the steps), or after which "
        "the notice comes (a tenth)",
    )
    parser.add_argument(
        "--seconds-left",
        type=float,
        default=60.0,
        metavar="T",
        help="of spot: how long the machine stays after the notice (default: %(default)g)",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="a new or empty directory for checkpoints, journals and logs, kept afterwards (default: a "
        "temporary one, removed when all went well)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory in any case")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 when the two runs agree in every bit, 1 otherwise."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EmergencyCheckpointError(
            f"The demo needs {', '.join(missing)}; install it with: pip install 'emergency_ckpt[demo]'"
        )
    from rich.console import Console

    show = _spot_demo(args) if args.scenario == "spot" else _slice_demo(args)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json} cannot be written: there is no directory {args.json.parent}")
    directory = _working_directory(args.directory)
    console, remove = Console(), False
    try:
        summary = show(directory, console)
        if args.json is not None:
            args.json.write_text(json.dumps(summary.to_json(), indent=2) + "\n")
        remove = summary.agrees and args.directory is None and not args.keep
    finally:
        # What failed stays, so that one can look at it.
        if remove:
            remove_tree(directory)
        else:
            console.print(f"Checkpoints, journals and logs of both runs: {directory}", soft_wrap=True)
    return 0 if summary.agrees else 1


class _Summary(Protocol):
    """What a scenario found out."""

    @property
    def agrees(self) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...


_Show = Callable[[Path, "Console"], _Summary]


def _slice_demo(args: argparse.Namespace) -> _Show:
    from emergency_ckpt.demo.run import DemoPlan, run_demo

    steps = STEPS if args.steps is None else args.steps
    plan = DemoPlan(
        steps=steps,
        slices=args.slices,
        processes_per_slice=args.processes_per_slice,
        kill_step=steps * 7 // 10 if args.kill_step is None else args.kill_step,
    )
    return functools.partial(run_demo, plan)


def _spot_demo(args: argparse.Namespace) -> _Show:
    from emergency_ckpt.demo.spot import SpotPlan, run_spot_demo

    steps = SPOT_STEPS if args.steps is None else args.steps
    plan = SpotPlan(
        steps=steps,
        processes=args.processes_per_slice,
        notice_step=steps // 10 if args.kill_step is None else args.kill_step,
        seconds_left=args.seconds_left,
    )
    return functools.partial(run_spot_demo, plan)


def _working_directory(wanted: Path | None) -> Path:
    """Where the runs write: the directory that is wanted, new or empty, or a temporary one."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="emergency-ckpt-demo-"))
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ConfigError(f"--directory {wanted} is in use; name a new directory or an empty one")
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted.absolute()
