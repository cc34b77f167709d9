"""`emergency-ckpt doctor`: tries out a persistent directory, and says what to mend before a job finds out."""

from __future__ import annotations

import argparse
import json

from emergency_ckpt.errors import ConfigError

_DESCRIPTION = """\
Tries out a persistent directory as a job would use it: rights, listing, reading parts, replacing, conditional
puts, arrays through TensorStore, deleting, encryption, those settings of the bucket that matter, clock and
throughput. What it writes lies below DIRECTORY/emergency_ckpt, and is removed again. No secrets are shown.
Run it where the job runs, with the same environment. The exit code is 1 where something failed, else 0."""
_MOST_MEGABYTES = 65536
_MOST_STREAMS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "directory",
        metavar="DIRECTORY",
        help="s3://bucket/prefix, gs://bucket/prefix or the path of a directory",
    )
    parser.add_argument(
        "--megabytes",
        type=int,
        default=64,
        metavar="N",
        help="MiB that are written and read to measure the throughput; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--streams", type=int, default=8, metavar="N", help="objects at a time meanwhile (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; returns the exit status."""
    if not 0 <= args.megabytes <= _MOST_MEGABYTES:
        raise ConfigError(f"--megabytes {args.megabytes}: expected 0 to {_MOST_MEGABYTES}")
    if not 1 <= args.streams <= _MOST_STREAMS:
        raise ConfigError(f"--streams {args.streams}: expected 1 to {_MOST_STREAMS}")
    from emergency_ckpt.persistent.object_store.examination import examine

    report = examine(args.directory, args.megabytes, args.streams)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        for line in report.lines():
            print(line)
    return 1 if report.failed else 0
