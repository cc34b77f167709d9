"""`emergency-ckpt agent`: the agent of this host in the foreground, as a sidecar or under a supervisor.

With `--check` it only says whether one runs: a container of the job must not start before its sidecar's agent,
because a manager that finds none starts its own.
"""

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
    parser.add_argument(
        "--check",
        action="store_true",
        help="start nothing; the exit code is 0 where an agent serves the directory, 1 where none does",
    )


def run(args: argparse.Namespace) -> int:
    """Runs until it is told to end."""
    if args.check:
        from emergency_ckpt.agent.record import agent_directory, agent_lives

        return 0 if agent_lives(agent_directory(args.local_directory)) else 1
    from emergency_ckpt.agent.process import log_to_terminal, run_agent

    log_to_terminal()
    run_agent(args.local_directory, options.options_of(args))
    return 0
