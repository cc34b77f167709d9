"""The `emergency-ckpt` command: finds the subcommand and hands over.

Only the module of the subcommand that was asked for is imported, so that `--help` starts without jax. Each
module has `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from emergency_ckpt.errors import ConfigError, EmergencyCheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class Subcommand:
    """One subcommand. With `takes_command`, the words after `--` are handed over as `args.command`."""

    module: str
    help: str
    takes_command: bool = False


SUBCOMMANDS = {
    "flags": Subcommand(
        "emergency_ckpt.cli.flags",
        "show the configuration that a file and overrides give, and where it came from",
    ),
    "plan": Subcommand(
        "emergency_ckpt.cli.plan",
        "say how large ramdisks have to be, how often to save and what to expect, and simulate failures",
    ),
    "launch": Subcommand(
        "emergency_ckpt.cli.launch",
        "start the processes of a JAX job on this machine, restart them when one dies, inject failures",
        takes_command=True,
    ),
    "agent": Subcommand(
        "emergency_ckpt.cli.agent",
        "serve the shards on the ramdisk of this host to the other hosts of a job",
    ),
    "run": Subcommand(
        "emergency_ckpt.cli.run",
        "run a command, and end only when the agents on this host have drained what it left",
        takes_command=True,
    ),
    "save-now": Subcommand(
        "emergency_ckpt.cli.save_now",
        "ask the job on this host for a save at its next step",
    ),
    "doctor": Subcommand(
        "emergency_ckpt.cli.doctor",
        "try out a persistent directory, in a bucket or on a file system, and say what to mend",
    ),
    "show": Subcommand(
        "emergency_ckpt.cli.show",
        "show the checkpoints in a directory or bucket, or on a ramdisk, with their training state",
    ),
    "sync": Subcommand(
        "emergency_ckpt.cli.sync",
        "copy the persistent checkpoints of a run to another place, resumable and verified",
    ),
    "restore-local": Subcommand(
        "emergency_ckpt.cli.restore_local",
        "copy the persistent checkpoints of a run from a bucket into a directory of this machine",
    ),
    "deploy": Subcommand(
        "emergency_ckpt.cli.deploy",
        "write the commands or manifests that bring a job onto a cluster",
    ),
    "demo": Subcommand(
        "emergency_ckpt.cli.demo",
        "train a small model, lose a slice, restore, and compare with an undisturbed run",
    ),
}

_FAILED = 1
_USAGE = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the words after the program's name, those of this process if None; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, command = _split_command(words)
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = _parser(chosen)
    args, left = parser.parse_known_args(words)
    if left:
        # argparse gives a list of words only what stands together; `FILE --option x key=value` means one list.
        unknown = [word for word in left if word.startswith("-") or not hasattr(args, "words")]
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.words += left
    if command is not None:
        if not SUBCOMMANDS[args.subcommand].takes_command:
            parser.error(f"{args.subcommand} takes no command after --")
        args.command = command
    try:
        status = importlib.import_module(SUBCOMMANDS[args.subcommand].module).run(args)
        sys.stdout.flush()  # so that a reader that went away is noticed here and not at exit
        return status
    except EmergencyCheckpointError as error:
        print(f"emergency-ckpt {args.subcommand}: {error}", file=sys.stderr)
        return _USAGE if isinstance(error, ConfigError) else _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # `emergency-ckpt flags | head`: nobody reads on. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED


def _split_command(words: list[str]) -> tuple[list[str], list[str] | None]:
    """The words before the first `--` and those after it; None where there is none."""
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emergency-ckpt", description="Checkpoints for JAX jobs that lose hosts, slices and clusters."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('emergency_ckpt')}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=subcommand.help, description=_sentence(subcommand.help))
        if name == chosen:
            importlib.import_module(subcommand.module).add_arguments(subparser)
        if subcommand.takes_command:
            subparser.set_defaults(command=[])
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    sys.exit(main())
