"""Stands between the launcher and the command of one process, for the moment before the command begins.

Asks the kernel (Linux) to kill this process when the launcher dies, however it dies, and then becomes the
command. Run as a file with `python -I -S`: it imports nothing of ours, so that it starts in milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"emergency-ckpt launch: prctl failed: {os.strerror(ctypes.get_errno())}")
    # The launcher may have died before the kernel was asked; then somebody else is the parent by now.
    if os.getppid() != launcher:
        sys.exit("emergency-ckpt launch: the launcher is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"emergency-ckpt launch: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        # As a shell would: 127 for a command that is not there, 126 for one that cannot be run.
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
