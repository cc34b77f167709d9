"""Gathering: the shards that a restore plan takes out of slots, own and others', in parallel into their places.

A shard counts as gathered only when every block that was read for it was verified. A source that fails is
struck; what the others gave stays.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from emergency_ckpt.agent.client import Blocks
from emergency_ckpt.agent.slot_source import SlotSource
from emergency_ckpt.core.checksums import checksum_blocks, shard_seed
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import Strike, Take
from emergency_ckpt.core.shards import BLOCK_BYTES, Box, covers, dtype_of
from emergency_ckpt.errors import CorruptDataError, CorruptShardsError, PeerUnavailableError
from emergency_ckpt.local.manifest import Manifest

STREAMS = 8
_TASK_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the shards of one process go.

    Attributes:
      step: which step. layout: the layout whose shards are wanted.
      needed: indices into its shards.
      place: flat uint8 memory of each of them.
    """

    step: StepId
    layout: Layout
    needed: Collection[int]
    place: Callable[[int], np.ndarray]


class Course:
    """A gathering on its way, as other threads see it: what has arrived, and a way to stop it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_stopped = False
        self._nbytes = 0
        self._sources: list[SlotSource] = []

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    @property
    def nbytes(self) -> int:
        """How many bytes have arrived and were verified."""
        return self._nbytes

    def stop(self) -> None:
        """Nothing more is wanted: what is being read ends soon, and nothing else begins."""
        with self._guard:
            self._is_stopped = True
            sources = list(self._sources)
        for source in sources:
            source.interrupt()

    def arrived(self, nbytes: int) -> None:
        with self._guard:
            self._nbytes += nbytes

    def opened(self, source: SlotSource) -> None:
        """A source that is to be interrupted when all is stopped."""
        with self._guard:
            self._sources.append(source)
            is_stopped = self._is_stopped
        if is_stopped:
            source.interrupt()

    def closed(self, source: SlotSource) -> None:
        with self._guard:
            self._sources.remove(source)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What came of it.

    Attributes:
      checksums: block checksums of the shards that are in their places, by index into the wanted layout.
      strikes: what turned out bad.
      unreachable: processes whose agents are gone or late, or have the slot no longer, and why.
      manifests: of the sources that could be opened, by process: what is the same in all, and their extras.
      sources: per process, how many shards and bytes were read from its slots.
    """

    checksums: Mapping[int, tuple[int, ...]]
    strikes: tuple[Strike, ...]
    unreachable: Mapping[int, str]
    manifests: Mapping[int, Manifest]
    sources: Mapping[int, tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Copy:
    """A box that goes from a shard of a source into a wanted shard of another cut."""

    wanted: int
    box: Box


@dataclasses.dataclass(frozen=True)
class _Read:
    """One shard of a source: straight into the place of a wanted one, or in memory of its own for copies."""

    source: SlotSource
    shard: int
    direct: int | None = None
    copies: tuple[_Copy, ...] = ()

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks that are needed for copies: first, and how many."""
        layout = self.source.layout
        of = layout.shards[self.shard]
        itemsize = dtype_of(layout.leaf[of.leaf].dtype).itemsize
        first, last = _flat_range(of.box, (copy.box for copy in self.copies))
        begin = first * itemsize // BLOCK_BYTES
        return begin, -(-last * itemsize // BLOCK_BYTES) - begin

    @property
    def nbytes(self) -> int:
        nbytes = self.source.layout.shard_nbytes[self.shard]
        if self.direct is not None:
            return nbytes
        first, count = self.blocks
        return min((first + count) * BLOCK_BYTES, nbytes) - first * BLOCK_BYTES

    def into(self, data: np.ndarray) -> Blocks:
        """What is to be fetched; `data`: memory of the whole shard."""
        if self.direct is not None:
            return Blocks(self.shard, data)
        first, count = self.blocks
        return Blocks(self.shard, data[first * BLOCK_BYTES :][: self.nbytes], first, count)


def gather(
    target: Target,
    takes: Iterable[Take],
    open_source: Callable[[Take], SlotSource],
    streams: int = STREAMS,
    course: Course | None = None,
) -> Gathered:
    """Carries out the takes of one process.

    Args:
      open_source: opens the slot that a take names; raises PeerUnavailableError or CorruptDataError.
      streams: how many requests run at a time.
      course: lets others watch and stop it; what it says of sources is of no use once it was stopped.

    Nothing is raised for sources that fail: they are struck or unreachable, and their shards are missing.
    """
    return _Gathering(target, open_source, streams, course or Course()).run(list(takes))


class _Gathering:
    def __init__(
        self, target: Target, open_source: Callable[[Take], SlotSource], streams: int, course: Course
    ) -> None:
        self._target = target
        self._open_source = open_source
        self._streams = streams
        self._course = course
        self._guard = threading.Lock()
        self._opened: list[SlotSource] = []
        self._strikes: dict[tuple[int, frozenset[int] | None], Strike] = {}
        self._dead: set[int] = set()
        self._unreachable: dict[int, str] = {}
        self._lost: set[int] = set()  # wanted shards of which something could not be read
        self._sources: dict[int, list[int]] = collections.defaultdict(lambda: [0, 0])

    def run(self, takes: Sequence[Take]) -> Gathered:
        with ThreadPoolExecutor(self._streams, thread_name_prefix="emergency_ckpt gather") as pool:
            try:
                opened = [each for each in pool.map(self._open, takes) if each is not None]
                reads = self._plan(opened)
                for _ in pool.map(self._read, _tasks(reads)):
                    pass
            except BaseException:
                self._course.stop()
                raise
            finally:
                # Others may be opening or reading still; what they have opened is closed as well.
                pool.shutdown(wait=True, cancel_futures=True)
                self._close()
        checksums = self._checksums(reads)
        manifests = {take.process: source.manifest for source, take in opened}
        sources = {process: (shards, nbytes) for process, (shards, nbytes) in sorted(self._sources.items())}
        strikes = tuple(self._strikes.values())
        return Gathered(checksums, strikes, dict(sorted(self._unreachable.items())), manifests, sources)

    def _open(self, take: Take) -> tuple[SlotSource, Take] | None:
        if self._course.is_stopped:
            return None
        try:
            source = self._open_source(take)
            with self._guard:
                self._opened.append(source)
            self._course.opened(source)
            return source, take
        except (PeerUnavailableError, CorruptDataError) as error:
            self._give_up(take.process, error)
            return None

    def _close(self) -> None:
        with contextlib.ExitStack() as closing:
            for source in self._opened:
                closing.callback(source.close)
                closing.callback(self._course.closed, source)

    def _plan(self, opened: Sequence[tuple[SlotSource, Take]]) -> list[_Read]:
        """What is to be read; shards that the wanted layout has as they are go straight to their places."""
        wanted, needed = self._target.layout, set(self._target.needed)
        direct: dict[int, _Read] = {}
        others: list[tuple[SlotSource, int]] = []
        for source, take in opened:
            same = source.layout.hash == wanted.hash
            for shard in take.shards:
                place = shard if same else wanted.shard_index.get(source.layout.shards[shard])
                if place in needed and place not in direct:
                    direct[place] = _Read(source, shard, direct=place)
                else:
                    others.append((source, shard))
        composed: dict[str, list[int]] = collections.defaultdict(list)
        for place in sorted(needed - set(direct)):
            composed[wanted.shards[place].leaf].append(place)
        reads = list(direct.values())
        for source, shard in others:
            of = source.layout.shards[shard]
            copies = tuple(
                _Copy(place, box)
                for place in composed[of.leaf]
                if (box := of.box.intersect(wanted.shards[place].box)) is not None
            )
            if copies:
                reads.append(_Read(source, shard, copies=copies))
        return reads

    def _read(self, task: Sequence[_Read]) -> None:
        source = task[0].source
        if source.process in self._dead or self._course.is_stopped:
            self._lose(task)
            return
        memory = [self._memory(read) for read in task]
        try:
            source.fetch([read.into(data) for read, data in zip(task, memory, strict=True)])
            bad: Collection[int] = ()
        except CorruptShardsError as error:
            bad = set(error.shards)
            self._strike(source.process, frozenset(bad), str(error), source.layout)
        except (PeerUnavailableError, CorruptDataError) as error:
            self._give_up(source.process, error)
            self._lose(task)
            return
        good = [(read, data) for read, data in zip(task, memory, strict=True) if read.shard not in bad]
        self._lose([read for read in task if read.shard in bad])
        for read, data in good:
            self._copy(read, data)
        nbytes = sum(read.nbytes for read, _ in good)
        with self._guard:
            self._sources[source.process][0] += len(good)
            self._sources[source.process][1] += nbytes
        self._course.arrived(nbytes)

    def _memory(self, read: _Read) -> np.ndarray:
        if read.direct is not None:
            return self._target.place(read.direct)
        # Pages that nothing is read into take no memory.
        return np.empty(read.source.layout.shard_nbytes[read.shard], np.uint8)

    def _copy(self, read: _Read, data: np.ndarray) -> None:
        """Puts the boxes of a shard into wanted shards of another cut."""
        layout, wanted = read.source.layout, self._target.layout
        for copy in read.copies:
            given = layout.typed(read.shard, data)
            taken = wanted.typed(copy.wanted, self._target.place(copy.wanted))
            from_box = copy.box.relative_to(layout.shards[read.shard].box)
            to_box = copy.box.relative_to(wanted.shards[copy.wanted].box)
            taken[to_box.slices()] = given[from_box.slices()]

    def _lose(self, reads: Iterable[_Read]) -> None:
        with self._guard:
            for read in reads:
                self._lost.update(copy.wanted for copy in read.copies)
                if read.direct is not None:
                    self._lost.add(read.direct)

    def _checksums(self, reads: Iterable[_Read]) -> dict[int, tuple[int, ...]]:
        """Of every shard that is in its place: those of its source, or of what was put together."""
        wanted, found = self._target.layout, dict[int, tuple[int, ...]]()
        boxes: dict[int, list[Box]] = collections.defaultdict(list)
        for read in reads:
            if read.direct is not None and read.direct not in self._lost:
                found[read.direct] = read.source.checksums(read.shard)
            for copy in read.copies:
                boxes[copy.wanted].append(copy.box)
        for place, parts in boxes.items():
            if place not in self._lost and covers(parts, wanted.shards[place].box):
                seed = shard_seed(self._target.step.generation, wanted, place)
                found[place] = checksum_blocks(self._target.place(place), seed)
        return found

    def _give_up(self, process: int, error: PeerUnavailableError | CorruptDataError) -> None:
        """Asks a source for nothing more."""
        self._dead.add(process)
        if isinstance(error, CorruptDataError):
            self._strike(process, None, str(error))
            return
        with self._guard:
            self._unreachable.setdefault(process, str(error))

    def _strike(
        self, process: int, shards: frozenset[int] | None, why: str, layout: Layout | None = None
    ) -> None:
        named = None if shards is None or layout is None else frozenset(layout.shards[s] for s in shards)
        with self._guard:
            self._strikes.setdefault((process, shards), Strike(self._target.step, process, named, why))


def _flat_range(outer: Box, boxes: Iterable[Box]) -> tuple[int, int]:
    """From which element to which (exclusive), in C order, an array of box `outer` holds these boxes."""
    if not outer.start:
        return 0, 1
    firsts, lasts = [], []
    for box in boxes:
        within = box.relative_to(outer)
        firsts.append(int(np.ravel_multi_index(within.start, outer.shape)))
        lasts.append(int(np.ravel_multi_index(tuple(stop - 1 for stop in within.stop), outer.shape)) + 1)
    return min(firsts), max(lasts)


def _tasks(reads: Iterable[_Read]) -> list[list[_Read]]:
    """Reads of one source and of a bounded size each, the sources in turn."""
    by_source: dict[int, list[_Read]] = collections.defaultdict(list)
    for read in reads:
        by_source[id(read.source)].append(read)
    queues = [list(_chunks(each)) for each in by_source.values()]
    return [task for round_ in itertools.zip_longest(*queues) for task in round_ if task is not None]


def _chunks(reads: Iterable[_Read]) -> Iterator[list[_Read]]:
    task: list[_Read] = []
    nbytes = 0
    for read in reads:
        if task and nbytes + read.nbytes > _TASK_BYTES:
            yield task
            task, nbytes = [], 0
        task.append(read)
        nbytes += read.nbytes
    if task:
        yield task
