"""What lies on a ramdisk, for a person: the sealed slots of every process, as their manifests say.

Takes no lock, pins nothing and verifies no data, so that it may look while a job runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emergency_ckpt.core.extras import ProcessExtras
from emergency_ckpt.core.lineage import Activation, is_void
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.claim import directories
from emergency_ckpt.local.manifest import Manifest, read_manifest
from emergency_ckpt.local.recovery import data_path

_MANIFEST = re.compile(r"slot_(0|[1-9]\d{0,3})\.manifest")


@dataclasses.dataclass(frozen=True)
class SlotView:
    """One sealed slot.

    Attributes:
      complete: True where the slots here, or what a later one says, tell that all processes sealed the step;
        False where a shard of this slot is not good; None where it cannot be told from here.
      missing: how many of its shards are not good. `listed`: whether it counts as a local step.
      extras_of: the processes whose extras are kept with it.
      problem: why its manifest cannot be used; then nothing else is known.
    """

    path: str
    step: int = 0
    generation: int = 0
    run: str = ""
    position: int = 0
    processes: int = 0
    bytes: int = 0
    missing: int = 0
    listed: bool = True
    complete: bool | None = None
    void: bool = False
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    extras: Sequence[str] = ()
    extras_of: Sequence[int] = ()
    problem: str = ""


def view_slots(roots: Sequence[Path]) -> list[SlotView]:
    """The slots below these ramdisk directories, the oldest step first. Raises LocalDirectoryError."""
    read: list[tuple[Path, Manifest]] = []
    broken: list[SlotView] = []
    for path in (p for root in roots for _, d in sorted(directories(root).items()) for p in _manifests(d)):
        try:
            manifest = read_manifest(path)
        except CorruptDataError as error:
            broken.append(SlotView(str(path), problem=str(error)))
            continue
        if manifest is not None:  # Else it was taken for another step at this moment.
            read.append((path, manifest))
    manifests = [manifest for _, manifest in read]
    found = [_view(path, manifest, manifests) for path, manifest in read]
    return [*sorted(found, key=lambda v: (v.run, v.generation, v.step, v.position)), *broken]


def _manifests(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if _MANIFEST.fullmatch(path.name))
    except OSError as error:
        raise LocalDirectoryError(
            f"cannot list {directory}: {error.strerror}. Its owner, the user of the job, can."
        ) from error


def _view(path: Path, manifest: Manifest, others: Sequence[Manifest]) -> SlotView:
    number = _MANIFEST.fullmatch(path.name)
    assert number is not None
    try:
        nbytes = data_path(path.parent, int(number[1])).stat().st_size
    except OSError as error:
        return SlotView(str(path), problem=f"its data cannot be looked at: {error.strerror}")
    metadata = manifest.metadata
    return SlotView(
        path=str(path),
        step=manifest.step.step,
        generation=manifest.step.generation,
        run=manifest.run,
        position=manifest.position,
        processes=manifest.process_count,
        bytes=nbytes,
        missing=len(manifest.missing),
        listed=manifest.listed,
        complete=False if manifest.missing else _is_complete(manifest, others),
        void=is_void(manifest.step, _activations(manifest.run, others)),
        metrics=metadata.get("metrics") or {},
        custom_metadata=metadata.get("custom_metadata") or {},
        extras=_names_of(manifest),
        extras_of=sorted(manifest.extras),
    )


def _names_of(manifest: Manifest) -> list[str]:
    try:
        found = [ProcessExtras.from_text(text) for text in manifest.extras.values()]
    except CorruptDataError:
        return []
    return sorted({name for each in found for name in (*each.values, *each.items)})


def _is_complete(manifest: Manifest, others: Sequence[Manifest]) -> bool | None:
    same = [m for m in others if (m.run, m.step, m.nonce) == (manifest.run, manifest.step, manifest.nonce)]
    if any(m.run == manifest.run and m.promised == manifest.step for m in others):
        return True
    whole = {m.position for m in same if m.layout == manifest.layout and not m.missing}
    return True if len(whole) == manifest.process_count else None


def _activations(run: str, manifests: Sequence[Manifest]) -> list[Activation]:
    return [each for manifest in manifests if manifest.run == run for each in manifest.activations]
