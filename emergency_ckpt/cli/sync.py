"""`emergency-ckpt sync`: the persistent checkpoints of a run to another place, by hand."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from emergency_ckpt.errors import ConfigError, EmergencyCheckpointError, NoRestorableStepError

_DESCRIPTION = """\
Copies the committed steps of a run, and the records that say which of them count, from SOURCE to TARGET. Each
is s3://bucket/prefix, gs://bucket/prefix or a directory: the one whose entries are the steps. At TARGET a step
is seen only when all of it is there and has been read back: arrays against the checksums of the save, other
files byte by byte. What is there already is not copied again, so that a copy that was cut short goes on when it
is repeated. The newest step is copied first. A job may be writing at SOURCE; none may run at TARGET.

The exit code is 0 when all steps are at TARGET, else 1."""
_MOST_STREAMS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="where the checkpoints are")
    parser.add_argument("target", metavar="TARGET", help="where they are to be as well")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="this step only (default: all that count)")
    which.add_argument("--latest", action="store_true", help="the newest step only")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--delete", action="store_true", help="delete committed steps at TARGET that are not at SOURCE"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the steps that are at TARGET already, and mend them"
    )
    parser.add_argument(
        "--streams", type=int, default=8, metavar="N", help="files at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-mib",
        type=int,
        default=1024,
        metavar="N",
        help="file content in memory at a time; into a bucket at least one whole file (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Copies; returns the exit status."""
    if not 1 <= args.streams <= _MOST_STREAMS:
        raise ConfigError(f"--streams {args.streams}: expected 1 to {_MOST_STREAMS}")
    if args.memory_mib < 1:
        raise ConfigError(f"--memory-mib {args.memory_mib}: expected at least 1")
    if args.delete and (args.latest or args.step is not None):
        raise ConfigError(
            "--delete makes TARGET hold what SOURCE holds: it does not go with --step or --latest"
        )
    # So that --help starts without TensorStore.
    from emergency_ckpt.cli.ramdisks import slot_directories
    from emergency_ckpt.persistent.transfer.objects import Copying
    from emergency_ckpt.persistent.transfer.runs import Wanted, copy_run

    wanted = Wanted(args.step, args.latest, args.verify, args.delete, args.dry_run)
    copying = Copying(args.streams, args.memory_mib * 1024**2)
    try:
        outcome = copy_run(args.source, args.target, wanted, copying, _say)
    except NoRestorableStepError as error:
        if slot_directories(args.source):
            raise EmergencyCheckpointError(
                f"{args.source} is a ramdisk directory: what it holds are slots, which agents drain into the"
                f" persistent directory of the job (emergency-ckpt agent --local-directory {args.source})."
                " Give the persistent directory."
            ) from error
        raise
    if args.json:
        print(json.dumps(asdict(outcome), indent=2))
    would = "would be " if args.dry_run else ""
    _say(
        f"{len(outcome.copied)} steps {would}copied ({', '.join(map(str, sorted(outcome.copied))) or '-'}),"
        f" {len(outcome.there)} were there, {len(outcome.mended)} {would}mended, {len(outcome.deleted)}"
        f" {would}deleted, {len(outcome.failed)} failed, in {outcome.seconds:.1f} s"
    )
    return 1 if outcome.failed else 0


def _say(text: str) -> None:
    print(f"[sync] {text}", file=sys.stderr, flush=True)
