"""Directories of a store, copied to a directory of this host: for handlers of Orbax's, which read files.

One file is in memory at a time.
"""

from __future__ import annotations

from pathlib import Path

from emergency_ckpt.persistent.files import Files


def download_tree(files: Files, path: str, into: Path) -> bool:
    """Copies all that is below `path` into a directory; False where there is nothing.

    Raises FileNotFoundError for a file that vanishes meanwhile, and what `files.read` raises.
    """
    entries = files.entries(path)
    for entry in entries:
        if entry.is_directory:
            download_tree(files, f"{path}/{entry.name}".lstrip("/"), into / entry.name)
        else:
            into.mkdir(parents=True, exist_ok=True)
            (into / entry.name).write_bytes(files.read(f"{path}/{entry.name}".lstrip("/")))
    return bool(entries)
