"""What says that a step is whole: not the same in a bucket and on a file system, and so made anew.

In a bucket the marker names the attempt and has the digests of its chief files; on a file system the name of
the directory is what counts, and the marker is a line of text. Steps of other programs keep theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import StoreOwner, parse_store_name
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.step_files import (
    OCDBT_MANIFEST,
    ORBAX_COMMIT_FILE,
    Mark,
    SideInfo,
    commit_text,
    digest,
    parse_side_file_name,
    side_file_name,
)

_OTHERS = b"The whole checkpoint was copied here.\n"


def markers_for(
    files: Files, side: SideInfo | None, paths: Collection[str], into_bucket: bool
) -> Mapping[str, bytes]:
    """The markers, by path, of the step whose files these are; that of the step itself comes last.

    `side` is None for a step of another program. Raises PersistentStoreError.
    """
    if side is None:
        return _markers_of_others(files, paths, into_bucket)
    data = _mark(files, side, paths).to_bytes() if into_bucket else commit_text(side.step_id)
    return {f"{side.item}/{ORBAX_COMMIT_FILE}".lstrip("/"): data, ORBAX_COMMIT_FILE: data}


def _markers_of_others(files: Files, paths: Collection[str], into_bucket: bool) -> Mapping[str, bytes]:
    if not into_bucket:
        return {ORBAX_COMMIT_FILE: files.read(ORBAX_COMMIT_FILE)} if ORBAX_COMMIT_FILE in paths else {}
    items = {path.partition("/")[0] for path in paths if "/" in path}
    needed = [*(f"{item}/{ORBAX_COMMIT_FILE}" for item in sorted(items)), ORBAX_COMMIT_FILE]
    return {path: files.read(path) if path in paths else _OTHERS for path in needed}


def _mark(files: Files, side: SideInfo, paths: Collection[str]) -> Mark:
    known = Mark.read(files) if ORBAX_COMMIT_FILE in paths else None
    if known is not None:
        return known
    side_name = side_file_name(side.step_id.generation, side.nonce)
    chief = [path for path in (side_name, f"{side.item}/{OCDBT_MANIFEST}".lstrip("/")) if path in paths]
    if len(chief) < 2:
        raise PersistentStoreError(
            f"{files.locate()} has no {OCDBT_MANIFEST}: the step is damaged. Copy another one."
        )
    digests = {path: digest(files.read(path)) for path in chief}
    return Mark(side.step_id, side.nonce, _ordinal(side, paths), digests)


def belongs(path: str, side: SideInfo, mark: Mark | None) -> bool:
    """Whether a file in a step's directory is of the attempt that became the step, and not left by another."""
    if "/" not in path:
        said = parse_side_file_name(path)
        return said is None or said == (side.step_id.generation, side.nonce)
    owner = _store_owner(path, side.item)
    if owner is None:
        return True
    mine = (owner.generation, owner.nonce) == (side.step_id.generation, side.nonce)
    return mine and (mark is None or owner.ordinal == mark.ordinal)


def is_in_array_store(path: str, item: str) -> bool:
    """Whether its name is of one attempt, so that no other content ever has it."""
    return _store_owner(path, item) is not None


def _store_owner(path: str, item: str) -> StoreOwner | None:
    inside = path.removeprefix(f"{item}/") if item else path
    return parse_store_name(inside.partition("/")[0])


def _ordinal(side: SideInfo, paths: Collection[str]) -> int:
    owners = (_store_owner(path, side.item) for path in paths if belongs(path, side, None))
    return max((owner.ordinal for owner in owners if owner is not None), default=0)
