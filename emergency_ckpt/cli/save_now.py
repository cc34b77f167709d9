"""`emergency-ckpt save-now`: a person asks the trainers of this host for a save at the next step that fits.

It goes through the agent of the host, whose key only the owner of the ramdisk directory can read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.errors import AgentStartError, ConfigError, PeerUnavailableError

_ASK = timedelta(seconds=10)

_DESCRIPTION = """\
Asks the job on this host to save at the next step that its processes agree on, and to make that step persistent
(enable_autocheckpoint). The job goes on; a train loop that asks
`manager.reached_preemption(step)`, and not `manager.should_exit`, learns of it as of a preemption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "which",
        metavar="RUN_OR_LOCAL_DIRECTORY",
        help="the ramdisk directory of the job, or the id of its run (then the directory is looked for where "
        "--local-directory or the variables of `emergency-ckpt run` say)",
    )
    parser.add_argument(
        "--local-directory",
        type=Path,
        action="append",
        metavar="DIR",
        help="where to look for the run; repeatable",
    )
    parser.add_argument("--detail", default="", metavar="TEXT", help="why, for the log of the job")


def run(args: argparse.Namespace) -> int:
    """Tells the trainers; 1 where none listens. Raises ConfigError, AgentStartError, PeerUnavailableError."""
    from emergency_ckpt.agent.order_client import OrderClient
    from emergency_ckpt.agent.record import agent_directory, living_record
    from emergency_ckpt.preemption.notice import new_id

    told, wish = 0, new_id()
    for root in _roots(args.which, args.local_directory):
        record = living_record(agent_directory(root))
        if record is None:
            raise AgentStartError(
                f"no agent runs for {root}, so that nobody can be told there: is the job running?"
            )
        told += OrderClient.of_this_host(record, _ASK).request_save(args.detail, wish)
    print(f"trainers that are told: {told}" if told else "no trainer listens: is enable_autocheckpoint=True?")
    return 0 if told else 1


def _roots(which: str, given: Sequence[Path] | None) -> list[Path]:
    if Path(which).is_dir():
        return [Path(which)]
    found = [root for root in _candidates(given) if which in _runs(root)]
    if not found:
        raise ConfigError(
            f"{which!r} is no directory here, and no agent of the directories that are known has slots of a "
            "run of this id; give the ramdisk directory of the job"
        )
    return found


def _candidates(given: Sequence[Path] | None) -> Iterator[Path]:
    from emergency_ckpt.cli.run import DIRECTORY_VARIABLES

    yield from given or [Path(os.environ[name]) for name in DIRECTORY_VARIABLES if os.environ.get(name)]


def _runs(root: Path) -> list[str]:
    """The runs that the agent of a directory has slots of; none where there is no agent."""
    from emergency_ckpt.agent.client import PeerClient
    from emergency_ckpt.agent.record import agent_directory, living_record

    record = living_record(agent_directory(root))
    if record is None:
        return []
    try:
        with PeerClient(record.endpoint, _ASK, record.dial) as client:
            return [str(run) for run in client.status().get("runs", ())]
    except PeerUnavailableError:
        return []
