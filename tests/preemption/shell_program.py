"""A program that says whether a shell stands in its way, and then which signals reach it."""

from __future__ import annotations

import os
import signal

from emergency_ckpt.preemption.command_form import shell_in_the_way

if __name__ == "__main__":
    numbers = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    way = shell_in_the_way()
    os.write(1, f"{os.getpid()} {way or 'clear'}\n".encode())
    got = signal.sigtimedwait(numbers, 60)
    os.write(1, f"got {signal.Signals(got.si_signo).name if got else 'nothing'}\n".encode())
