"""MaxText with this package's manager: the function that MaxText calls, and how its programs are run with it.

Nothing of MaxText is imported but by `install`, and nothing of it is changed on disk.
"""

from emergency_ckpt.maxtext.managers import create_orbax_emergency_checkpoint_manager
from emergency_ckpt.maxtext.program import install, leave, run_program

__all__ = ["create_orbax_emergency_checkpoint_manager", "install", "leave", "run_program"]
