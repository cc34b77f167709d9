"""The store of slots of one process: the slot state machine of `core.slots`, carried out on the ramdisk.

Effects follow the order that the machine is proven for: a slot's manifest is removed before its first byte is
overwritten, and appears by rename after the last one. Nothing here talks to other processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np

from emergency_ckpt.core.checksums import block_seed
from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.core.layout import Layout, SlotEntry
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.slots import Outcome, SlotTable
from emergency_ckpt.errors import (
    CorruptDataError,
    ForeignRunError,
    LocalDirectoryError,
)
from emergency_ckpt.local.capacity import measure_room, slots_that_fit
from emergency_ckpt.local.claim import Claim, claim_directory, directories
from emergency_ckpt.local.manifest import Manifest, find_damage, read_manifest, write_manifest
from emergency_ckpt.local.slot_file import SlotFile

READY_TIMEOUT = timedelta(minutes=10)
_SLOT_NAME = re.compile(r"slot_(\d+)\.(?:data|manifest|tmp)")


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How the slots of one process are kept.

    Attributes:
      directory: the ramdisk directory; None keeps the slots in anonymous memory (no local tier).
      ordinal: which of the directories below it this process should take (see `held_positions`).
      max_to_keep: complete steps that stay available locally; 0 without a local tier.
      wanted_slots: slots for full speed; least_slots: without these no step can be kept safely.
      foreign_run: what to do with another run's data in the directory: 'evict' it or raise an 'error'.
    """

    directory: Path | None
    max_to_keep: int
    wanted_slots: int
    least_slots: int
    foreign_run: Literal["evict", "error"] = "evict"
    ordinal: int = 0


@dataclasses.dataclass(frozen=True)
class OpenSlot:
    """A slot that is being written: `data` is its flat uint8 memory (ready once `wait_ready` returned)."""

    index: int
    step: StepId
    file: SlotFile

    @property
    def data(self) -> np.ndarray:
        return self.file.data

    def wait_ready(self) -> None:
        """Waits until all pages are allocated. Call before the first write."""
        self.file.wait_ready(READY_TIMEOUT)


@dataclasses.dataclass(frozen=True)
class SealedSlot:
    """A sealed slot for reading. Its bytes may change once it is reused: verify what you read, or pin it."""

    index: int
    manifest: Manifest
    layout: Layout
    data: np.ndarray

    def shard(self, shard_index: int) -> np.ndarray:
        """Flat uint8 view of one shard (an index into `layout.shards`)."""
        entry = self._entries[shard_index][1]
        return self.data[entry.offset : entry.offset + entry.nbytes]

    def checksums(self, shard_index: int) -> tuple[int, ...]:
        return self.manifest.checksums[self._entries[shard_index][0]]

    def seed(self, shard_index: int) -> int:
        """The block seed of this shard in the generation that saved it."""
        shard = self.layout.shards[shard_index]
        return block_seed(self.manifest.step.generation, shard, self.layout.leaf[shard.leaf].dtype)

    def find_damage(self) -> str | None:
        """Verifies all blocks; says in words what is wrong, None when nothing is."""
        seeds = {entry.shard: self.seed(entry.shard) for _, entry in self._entries.values()}
        return find_damage(self.manifest, self.layout, self.data, seeds)

    @functools.cached_property
    def _entries(self) -> dict[int, tuple[int, SlotEntry]]:
        """Per shard index its place among the entries, and the entry."""
        return {e.shard: (i, e) for i, e in enumerate(self.layout.slot_entries(self.manifest.position))}


class LocalStore:
    """Slots, manifests and what is known about the steps in them. Thread-safe.

    Raises at construction: LocalDirectoryError, LocalCapacityError, ForeignRunError.
    `log` receives one sentence per thing a person should know.
    """

    def __init__(
        self,
        options: StoreOptions,
        run: str,
        layout: Layout,
        process: int,
        log: Callable[[str], None],
    ) -> None:
        self.layout = layout
        self.process = process
        self._options = options
        self._run = run
        self._log = log
        self._changed = threading.Condition()
        self._layouts: dict[str, Layout] = {layout.hash: layout}
        self._slot_bytes = layout.data_bytes(process)
        self._claim: Claim | None = (
            claim_directory(options.directory, options.ordinal) if options.directory else None
        )
        try:
            found = self._find_manifests()
            count = max(self._count_slots(found), 1 + max((i for i, m in found.items() if m), default=-1))
            self._manifests: list[Manifest | None] = [found.get(i) for i in range(count)]
            self._files = [self._open_file(i) for i in range(count)]
            held = [m.step if m else None for m in self._manifests]
            activations = {a for m in self._manifests if m for a in m.activations}
            self._table = SlotTable.recovered(held, options.max_to_keep, activations)
            self._write_layout()
        except BaseException:
            if self._claim:
                self._claim.release()
            raise
        # Empty slots first: they are the ones that the first saves take.
        order = sorted(range(count), key=lambda i: self._manifests[i] is not None)
        self._preparer = threading.Thread(
            target=_prepare_all,
            args=([self._files[i] for i in order],),
            name="emergency_ckpt slots",
            daemon=True,
        )
        self._preparer.start()

    # What is there.

    @property
    def directory(self) -> Path | None:
        return self._claim.path if self._claim else None

    @property
    def slot_count(self) -> int:
        return len(self._files)

    @property
    def activations(self) -> tuple[Activation, ...]:
        return tuple(sorted(self._table.activations))

    def highest_generation(self) -> int:
        """The highest generation seen in this directory."""
        generations = [m.step.generation for m in self._manifests if m]
        generations += [a.generation for a in self._table.activations]
        return max(generations, default=0)

    def verify(self) -> tuple[Holding, ...]:
        """Verifies every sealed slot against its checksums; damaged ones are emptied, and said.

        Returns one holding per good slot of a known layout.
        """
        holdings = []
        for index, manifest in enumerate(self._manifests):
            if manifest is None or not self._table.slots[index].sealed:
                continue
            try:
                layout = self._layout(manifest.layout)
                manifest.check_against(layout, self._files[index].nbytes)
                damage = SealedSlot(index, manifest, layout, self._files[index].data).find_damage()
            except CorruptDataError as error:
                damage = str(error)
            if damage:
                self._log(
                    f"{manifest.step} in slot {index} of {self.directory} is damaged and given up: {damage}"
                )
                self.give_up(manifest.step)
                continue
            holdings.append(
                Holding(
                    manifest.step,
                    manifest.layout,
                    manifest.position,
                    manifest.digest,
                    tuple(sorted(manifest.extras)),
                )
            )
        return tuple(holdings)

    def sealed_steps(self, listed_only: bool = True) -> tuple[StepId, ...]:
        """Sealed steps that are neither void nor abandoned, oldest first."""
        with self._changed:
            listed = {m.step for m in self._manifests if m and (m.listed or not listed_only)}
            return tuple(step for step in self._table.sealed_steps() if step in listed)

    def complete_steps(self) -> tuple[StepId, ...]:
        """Local steps that are known to be complete and not void, oldest first."""
        with self._changed:
            complete = self._table.complete
        return tuple(step for step in self.sealed_steps() if step in complete)

    def sealed(self, step: StepId) -> SealedSlot | None:
        """The sealed slot of `step`, if it is here and its layout is known."""
        with self._changed:
            index = self._table.find(step)
            manifest = self._manifests[index] if index is not None else None
            if index is None or manifest is None:
                return None
            return SealedSlot(index, manifest, self._layout(manifest.layout), self._files[index].data)

    # Writing a step.

    def begin(self, step: StepId, timeout: timedelta, pins: int = 0) -> tuple[OpenSlot | None, str]:
        """Takes a slot for `step`, waiting up to `timeout` for one to become free.

        Returns the slot, or None and the reason why no slot may be overwritten.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        with self._changed:
            while True:
                if self._claim and self._claim.superseded:
                    raise LocalDirectoryError(
                        f"{self.directory} was taken over by a newer manager of this process; close this one"
                    )
                table, index, reason = self._table.begin(step, pins)
                if index is not None:
                    break
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._changed.wait(remaining):
                    table, index, reason = self._table.begin(step, pins)
                    if index is None:
                        return None, reason
                    break
            self._remove_manifest(index)
            self._table = table
            self._resize(index)
            return OpenSlot(index, step, self._files[index]), reason

    def seal(self, slot: OpenSlot, manifest: Manifest) -> None:
        """Puts the manifest of a completely written slot in place."""
        path = self._manifest_path(slot.index)
        if path:
            write_manifest(path, manifest)
        with self._changed:
            self._manifests[slot.index] = manifest
            self._table = self._table.seal(slot.index)
            self._changed.notify_all()

    def discard(self, slot: OpenSlot) -> None:
        """Gives up a slot that was begun and not sealed."""
        with self._changed:
            self._table = self._table.fail(slot.index)
            self._changed.notify_all()

    # What becomes of a step.

    def settle(self, step: StepId, outcome: Outcome) -> None:
        """Learns the agreed outcome; the slot of an abandoned step is emptied."""
        with self._changed:
            self._table = self._table.settle(step, outcome)
            self._changed.notify_all()
        if outcome is Outcome.ABANDONED:
            self.give_up(step)

    def give_up(self, step: StepId) -> None:
        """Empties the slot of `step`, if it is sealed here."""
        with self._changed:
            index = self._table.find(step)
            if index is not None and not self._table.slots[index].pins:
                self._remove_manifest(index)
                self._table = self._table.empty(index)
                self._changed.notify_all()

    def activate(self, activations: Iterable[Activation]) -> None:
        """Learns of restores that all processes hold; what they left behind no longer occupies slots."""
        with self._changed:
            for activation in activations:
                self._table = self._table.activate(activation)
            self._changed.notify_all()

    def pin(self, step: StepId) -> SealedSlot | None:
        """Keeps the slot of `step` from being overwritten until `unpin`; None where it is not sealed here."""
        with self._changed:
            index = self._table.find(step)
            if index is None:
                return None
            self._table = self._table.pin(index)
        return self.sealed(step)

    def unpin(self, index: int) -> None:
        with self._changed:
            self._table = self._table.unpin(index)
            self._changed.notify_all()

    def close(self) -> None:
        """Unmaps the slots and releases the directory. The data stays."""
        for file in self._files:
            file.close()
        self._preparer.join()
        if self._claim:
            self._claim.release()

    # Files.

    def _manifest_path(self, index: int) -> Path | None:
        return self._claim.path / f"slot_{index}.manifest" if self._claim else None

    def _remove_manifest(self, index: int) -> None:
        self._manifests[index] = None
        path = self._manifest_path(index)
        if path:
            path.unlink(missing_ok=True)

    def _open_file(self, index: int) -> SlotFile:
        if self._claim is None:
            return SlotFile(None, self._slot_bytes)
        path = self._claim.path / f"slot_{index}.data"
        kept = self._manifests[index] is not None and path.exists()
        return SlotFile(path, path.stat().st_size if kept else self._slot_bytes)

    def _resize(self, index: int) -> None:
        """Gives a slot that held a step of another job shape the size of this one."""
        if self._files[index].nbytes == self._slot_bytes:
            return
        self._files[index].close()
        self._files[index] = self._open_file(index)
        _start_preparing(self._files[index])

    def _find_manifests(self) -> dict[int, Manifest | None]:
        """Manifests of our run by slot number; removes foreign and damaged ones as the options say."""
        if self._claim is None:
            return {}
        found: dict[int, Manifest | None] = {}
        for path in sorted(self._claim.path.iterdir()):
            name = _SLOT_NAME.fullmatch(path.name)
            if not name:
                continue
            found.setdefault(int(name[1]), None)
            if path.suffix == ".tmp":
                path.unlink()
            elif path.suffix == ".manifest":
                found[int(name[1])] = self._accept(path)
        return found

    def _accept(self, path: Path) -> Manifest | None:
        try:
            manifest = read_manifest(path)
            if manifest is not None and manifest.run == self._run:
                self._layout(manifest.layout)
                return manifest
        except CorruptDataError as error:
            self._log(f"{error}")
            path.unlink()
            return None
        if manifest is None:
            return None
        if self._options.foreign_run == "error":
            raise ForeignRunError(
                f"{path} belongs to run {manifest.run}, this run is {self._run}. Empty the directory, choose "
                "another local_checkpoint_directory, or set local_checkpoint_foreign_run=evict."
            )
        self._log(f"evicting {manifest.step} of the foreign run {manifest.run} from {path.parent}")
        path.unlink()
        return None

    def _count_slots(self, found: dict[int, Manifest | None]) -> int:
        options = self._options
        if self._claim is None:
            return options.wanted_slots
        present = 0
        for index, manifest in found.items():
            path = self._claim.path / f"slot_{index}.data"
            if not path.exists():
                continue
            if manifest is None and index >= options.wanted_slots:
                path.unlink()
            else:
                present += path.stat().st_blocks * 512
        count = slots_that_fit(
            measure_room(self._claim.path),
            self._slot_bytes,
            present,
            options.wanted_slots,
            options.least_slots,
            self._claim.path,
        )
        if count < options.wanted_slots:
            self._log(
                f"the ramdisk has room for {count} slots of {self._slot_bytes} bytes instead of "
                f"{options.wanted_slots}: a save waits while the slot it needs is drained"
            )
        return count

    def _layout(self, layout_hash: str) -> Layout:
        layout = self._layouts.get(layout_hash)
        if layout is None:
            path = self._layout_path(layout_hash)
            if path is None or not path.is_file():
                raise CorruptDataError(
                    f"the layout {layout_hash} named by a manifest is missing in {self.directory}"
                )
            layout = Layout.from_bytes(path.read_bytes())
            if layout.hash != layout_hash:
                raise CorruptDataError(f"the layout file {path} does not have the content that its name says")
            self._layouts[layout_hash] = layout
        return layout

    def _layout_path(self, layout_hash: str) -> Path | None:
        if self._claim is None or not re.fullmatch(r"[0-9a-f]{32}", layout_hash):
            return None
        return self._claim.path / f"layout_{layout_hash}.json"

    def _write_layout(self) -> None:
        path = self._layout_path(self.layout.hash)
        if path is None:
            return
        for other in path.parent.glob("layout_*.json"):
            if other.stem.removeprefix("layout_") not in self._layouts:
                other.unlink()
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(self.layout.to_bytes())
        temporary.rename(path)


def held_positions(root: Path, run: str) -> dict[int, int | None]:
    """Per directory below `root`, the process index whose newest step of this run is in it. Takes no lock."""
    found: dict[int, int | None] = {}
    for ordinal, path in directories(root).items():
        newest: Manifest | None = None
        for candidate in path.glob("slot_*.manifest"):
            with contextlib.suppress(CorruptDataError):
                manifest = read_manifest(candidate)
                if manifest and manifest.run == run and (newest is None or manifest.step > newest.step):
                    newest = manifest
        found[ordinal] = newest.position if newest else None
    return found


def _prepare_all(files: list[SlotFile]) -> None:
    for file in files:
        file.prepare()


def _start_preparing(file: SlotFile) -> None:
    threading.Thread(target=file.prepare, name="emergency_ckpt slot", daemon=True).start()
