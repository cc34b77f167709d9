"""`emergency-ckpt agent`: the agent of this host in the foreground, as a sidecar or under a supervisor."""

from __future__ import annotations

import argparse

from emergency_ckpt.agent import options

_DESCRIPTION = """\
Serves the shards on the ramdisk of this host to the other hosts of the job, so that they restore from here.
There is one agent per ramdisk directory; a manager finds it there, and starts one itself where none runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = _DESCRIPTION
    options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs until it is told to end."""
    from emergency_ckpt.agent.process import log_to_terminal, run_agent

    log_to_terminal()
    run_agent(args.local_directory, options.options_of(args))
    return 0
