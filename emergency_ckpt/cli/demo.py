"""`emergency-ckpt demo`: train, lose a slice, restore, and compare with a run that nothing happened to."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path

from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import ConfigError, EmergencyCheckpointError

STEPS = 60

_NEEDED = ("flax", "grain", "optax", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary as JSON, too")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="steps to train (default: %(default)s)"
    )
    parser.add_argument("--slices", type=int, default=2, metavar="S", help="slices (default: %(default)s)")
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
        help="step after which the last slice is killed (default: seven tenths of the steps)",
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

    from emergency_ckpt.demo.run import DemoPlan, run_demo

    plan = DemoPlan(
        steps=args.steps,
        slices=args.slices,
        processes_per_slice=args.processes_per_slice,
        kill_step=args.steps * 7 // 10 if args.kill_step is None else args.kill_step,
    )
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json} cannot be written: there is no directory {args.json.parent}")
    directory = _working_directory(args.directory)
    console, remove = Console(), False
    try:
        summary = run_demo(plan, directory, console)
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


def _working_directory(wanted: Path | None) -> Path:
    """Where the runs write: the directory that is wanted, new or empty, or a temporary one."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="emergency-ckpt-demo-"))
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ConfigError(f"--directory {wanted} is in use; name a new directory or an empty one")
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted.absolute()
