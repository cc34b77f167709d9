"""The error about a step that is there already: one of this package and one of Orbax's at once.

Programs written for Orbax catch theirs, those written for this package catch `EmergencyCheckpointError`.
"""

from orbax.checkpoint import checkpoint_manager as orbax_manager

from emergency_ckpt.errors import EmergencyCheckpointError


class StepAlreadyExistsError(EmergencyCheckpointError, orbax_manager.StepAlreadyExistsError):
    """A save was forced of a step that is saved already, on every tier that it would go to."""
