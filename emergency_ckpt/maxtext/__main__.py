"""`python -m emergency_ckpt.maxtext -m MODULE WORDS…`: a program of MaxText with this package's manager."""

import sys

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.maxtext.program import run_program

if __name__ == "__main__":
    try:
        run_program(sys.argv[1:])
    except ConfigError as error:
        # Not 1, after which a job is started again: no restart mends it.
        print(f"emergency_ckpt.maxtext: {error}", file=sys.stderr)
        sys.exit(2)
