"""Random numbers for pauses, so that those who wait for the same do not all come at the same moment.

Their generator is one of its own: the state of Python's belongs to the program, which may have seeded it.
"""

from __future__ import annotations

import os
import random

JITTER = random.Random()
"""Safe to use from any thread; forked processes draw other numbers."""

os.register_at_fork(after_in_child=JITTER.seed)
