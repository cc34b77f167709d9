"""`python -m emergency_ckpt.agent`: an agent that a manager starts, in the background and for itself.

It tells by one line on the descriptor `--ready-fd` how its start went: `ready`, `another` (one runs already) or
`failed: ` and why. Whoever started it need not wait for its end.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> int:
    """Runs an agent in a process of its own; returns its exit status."""
    # Before anything is imported that starts threads. The one who started this process is not to be its parent:
    # he would have to wait for its end.
    if os.fork():
        os._exit(0)
    # Imports take most of an agent's start. What they make stays, so that looking for garbage in it is in vain;
    # and numpy would start threads for linear algebra, which turn in circles while they wait.
    gc.disable()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import argparse
    import logging.handlers
    from pathlib import Path

    from emergency_ckpt.agent.options import add_arguments, options_of
    from emergency_ckpt.agent.process import log_to, run_agent
    from emergency_ckpt.agent.record import LOG, AnotherAgentError, agent_directory
    from emergency_ckpt.errors import EmergencyCheckpointError

    gc.freeze()
    gc.enable()
    parser = argparse.ArgumentParser(prog="python -m emergency_ckpt.agent")
    add_arguments(parser)
    parser.add_argument("--ready-fd", type=int, required=True)
    args = parser.parse_args()
    root: Path = args.local_directory

    def tell(line: str) -> None:
        try:
            os.write(args.ready_fd, f"{' '.join(line.split())}\n".encode())
        except BrokenPipeError:
            logging.getLogger("emergency_ckpt.agent").warning("whoever started this agent did not wait for it")
        os.close(args.ready_fd)

    try:
        log_to(
            logging.handlers.RotatingFileHandler(
                agent_directory(root) / LOG, maxBytes=1024 * 1024, backupCount=1, delay=True
            )
        )
        run_agent(root, options_of(args), ready=lambda: tell("ready"))
        return 0
    except AnotherAgentError:
        tell("another")
        return 1
    except EmergencyCheckpointError as error:
        logging.getLogger("emergency_ckpt.agent").error("%s", error)
        tell(f"failed: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
