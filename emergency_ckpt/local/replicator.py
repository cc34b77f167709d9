"""Files that GKE's checkpoint replicator, or Orbax for it, keeps in the local directory of a multi-tier volume.

Where it begins to work on a directory it removes what it does not know, our slots too: nothing of ours may
begin there. The file names are those of GoogleCloudPlatform/checkpoint-replicator and of Orbax's
multi-tier initialization.
"""

from __future__ import annotations

import re
from pathlib import Path

from emergency_ckpt.errors import LocalDirectoryError

# What asks the replicator to work here, and what it answers.
_OWN_FILES = {
    "replicator.yaml",
    "replicator.yaml.tmp",
    "replicator.prerestore",
    "replicator.errors",
    "replicator.failed",
}
_CHECKPOINT = re.compile(r".+-s\d+-n\d+-w\d+(\.\w+)?")


def refuse_replicator(directory: Path) -> None:
    """Raises LocalDirectoryError where files of the replicator lie in `directory`, naming them."""
    found = sorted(path.name for path in directory.iterdir() if _is_of_replicator(path))
    if not found:
        return
    raise LocalDirectoryError(
        f"{directory} is in use by GKE's checkpoint replicator: it holds {', '.join(found[:5])}"
        f"{f' and {len(found) - 5} more' if len(found) > 5 else ''}. The replicator removes what it does not "
        "know there, and backups are made here by this package's agents. Let nothing start it for this job "
        "(Orbax's initialize_multi_tier_checkpointing does, and MaxText's own multi-tier start: call "
        "emergency_ckpt.initialize_distributed instead), and remove these files; or go on with Orbax's "
        "ReplicatorCheckpointManager. The checkpoints among them are the replicator's: this package does not "
        "read them."
    )


def _is_of_replicator(path: Path) -> bool:
    # Orbax renames the link to a checkpoint that the replicator has restored to the number of its step.
    is_restored = path.name.isdecimal() and path.is_symlink()
    return path.name in _OWN_FILES or is_restored or _CHECKPOINT.fullmatch(path.name) is not None
