"""How fast shards come from another host's agent: `python -m benchmarks.fetching [--size-mib 256]`.

A real agent serves a sealed slot over loopback, and the shards are gathered into a mapped file on the ramdisk,
as a restore does it, hashing included. Beside it, round by round, a bare copy of the same bytes on as many
streams: another process sends with `sendfile`, this one receives with `recv_into` into such a file, without and
with hashing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.samples import Samples, Spread
from emergency_ckpt.agent.ending import end_agent
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.gather import STREAMS, Target, gather
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.slot_source import PeerSlot
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.core.checksums import copy_and_checksum, shard_seed
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.store import LocalStore, StoreOptions

MIB = 1024 * 1024
SHARD_BYTES = {"64 MiB": 64 * MIB, "2 MiB": 2 * MIB, "100 kB": 100_000}
OURS, BARE, HASHED = "fetch", "bare copy", "bare copy, hashed"
_RUN, _STEP = "0f6a1c1e-2b7b-4a53-9d07-5a8f6b1f2c3d", StepId(1, 100)
_PIECE_BYTES = MIB
_RANGE = struct.Struct("<QQ")


def make_layout(shard_bytes: int, nbytes: int) -> Layout:
    """Shards of one size, about `nbytes` in all, held by both processes of two slices."""
    names = [f"layers.{number:05}.w" for number in range(max(1, nbytes // shard_bytes))]
    held = [Shard(name, Box((0,), (shard_bytes,))) for name in names]
    return Layout.build([LeafSpec(n, (shard_bytes,), "uint8") for n in names], {0: held, 1: held}, (0, 1))


class Place:
    """A mapped file on the ramdisk, as long as the slot that is fetched."""

    def __init__(self, path: Path, nbytes: int) -> None:
        with path.open("w+b") as file:
            file.truncate(nbytes)
            self._mapped = mmap.mmap(file.fileno(), nbytes)
        self.data = np.frombuffer(self._mapped, np.uint8)
        self.data[:] = 1  # Every page is there before anything is measured.


@contextlib.contextmanager
def served_slot(root: Path, layout: Layout) -> Iterator[tuple[Endpoint, Path]]:
    """An agent that serves one sealed slot, and the slot's file."""
    store = LocalStore(StoreOptions(root, 1, 2, 2), _RUN, layout, 0, lambda _: None)
    try:
        slot, reason = store.begin(_STEP, timedelta(0))
        if slot is None:
            raise RuntimeError(reason)
        slot.wait_ready()
        made = np.random.default_rng(1)
        checksums = [
            copy_and_checksum(
                made.integers(0, 256, e.nbytes, np.uint8),
                slot.data[e.offset : e.offset + e.nbytes],
                shard_seed(_STEP.generation, layout, e.shard),
            )
            for e in layout.slot_entries(0)
        ]
        store.seal(slot, Manifest(_RUN, "n", _STEP, layout.hash, 0, 2, tuple(checksums)))
        sealed = store.sealed(_STEP)
        assert sealed is not None
        assert store.directory is not None
        endpoint = ensure_agent(root, AgentOptions(bind="127.0.0.1", idle_seconds=60), timedelta(seconds=60))
        try:
            yield endpoint, store.directory / f"slot_{sealed.index}.data"
        finally:
            end_agent(root, 10.0)
    finally:
        store.close()


def fetch(endpoint: Endpoint, layout: Layout, place: Place, streams: int) -> None:
    """As a restore does it."""
    entries = {e.shard: place.data[e.offset : e.offset + e.nbytes] for e in layout.slot_entries(1)}
    target = Target(_STEP, layout, set(entries), entries.__getitem__)
    take = Take(0, layout.hash, 0, tuple(sorted(entries)))
    slot = SlotId(_RUN, _STEP, layout.hash, 0)
    gathered = gather(target, [take], lambda _: PeerSlot(0, endpoint, slot, layout), streams)
    if gathered.checksums.keys() != entries.keys():
        raise RuntimeError(f"not all came: {gathered.strikes} {gathered.unreachable}")


class BareServer:
    """A process that sends ranges of a file with `sendfile` to whoever asks."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.fetching", "--serve", str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> BareServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


def serve(path: Path) -> None:
    """Sends until standard input ends."""
    file = os.open(path, os.O_RDONLY)
    listening = socket.create_server(("127.0.0.1", 0))

    def send(connection: socket.socket) -> None:
        with connection:
            while asked := connection.recv(_RANGE.size, socket.MSG_WAITALL):
                at, end = _RANGE.unpack(asked)
                while at < end:
                    at += os.sendfile(connection.fileno(), file, at, end - at)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=send, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


def copy_bare(port: int, place: Place, streams: int, hashes: bool) -> None:
    """The whole file, a part of it on each stream."""
    part = -(-len(place.data) // streams)

    def receive(begin: int) -> None:
        end = min(begin + part, len(place.data))
        view = place.data[begin:end].data
        digest = xxhash.xxh3_64()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(_RANGE.pack(begin, end))
            for at in range(0, len(view), _PIECE_BYTES):
                piece = view[at : at + _PIECE_BYTES]
                done = 0
                while done < len(piece):
                    count = connection.recv_into(piece[done:])
                    if not count:
                        raise RuntimeError("the bare copy ended early")
                    done += count
                if hashes:
                    digest.update(piece)

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(receive, range(0, len(place.data), part)))


def measure(
    root: Path, shard_bytes: int, nbytes: int, rounds: int, streams: Sequence[int]
) -> tuple[dict[int, Samples], int]:
    """Per number of streams, seconds per contender and round, after one that is not counted; and the bytes."""
    layout = make_layout(shard_bytes, nbytes)
    size = layout.data_bytes(1)
    ours, bare = Place(root / "ours", size), Place(root / "bare", size)
    found: dict[int, Samples] = {}
    with served_slot(root / "slots", layout) as (endpoint, path), BareServer(path) as server:
        for count in streams:
            ways: dict[str, Callable[[], None]] = {
                OURS: functools.partial(fetch, endpoint, layout, ours, count),
                BARE: functools.partial(copy_bare, server.port, bare, count, False),
                HASHED: functools.partial(copy_bare, server.port, bare, count, True),
            }
            samples = found[count] = Samples()
            for number in range(rounds + 1):
                order = list(ways)[number % 3 :] + list(ways)[: number % 3]
                for name in order:
                    began = time.perf_counter()
                    ways[name]()
                    if number:
                        samples.add(name, "seconds", time.perf_counter() - began)
    return found, sum(layout.shard_nbytes)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one size of shards and one number of streams came to."""

    shards: str
    streams: int
    nbytes: int
    samples: Samples

    def seconds(self, way: str) -> list[float]:
        return self.samples.of(way, "seconds")

    def part_of(self, way: str) -> Spread | None:
        """The speed of the fetch in relation to another way."""
        return Spread.of_ratios(self.seconds(way), self.seconds(OURS))

    def to_json(self) -> dict[str, Any]:
        seconds = {way: self.seconds(way) for way in (OURS, BARE, HASHED)}
        return {"shards": self.shards, "bytes": self.nbytes, "streams": self.streams, "seconds": seconds}


def measure_all(
    directory: Path, size_mib: int, rounds: int, streams: Sequence[int], shards: Sequence[str]
) -> list[Figures]:
    """Every size of shards with every number of streams."""
    found: list[Figures] = []
    for name in shards:
        shard_bytes = SHARD_BYTES[name]
        with tempfile.TemporaryDirectory(prefix="emergency-ckpt-bench-", dir=directory) as root:
            (Path(root) / "slots").mkdir()
            nbytes = max(size_mib * MIB, shard_bytes)
            by_streams, fetched = measure(Path(root), shard_bytes, nbytes, rounds, streams)
        found += [Figures(name, count, fetched, samples) for count, samples in by_streams.items()]
    return found


def as_table(figures: Sequence[Figures]) -> Table:
    """For people."""
    table = Table(title="shards from another host's agent, over loopback", title_justify="left")
    for heading in ("shards", "streams", "fetch", "bare", "bare, hashed", "of bare", "of bare, hashed"):
        table.add_column(heading, justify="right")
    for each in figures:
        ways = (OURS, BARE, HASHED)
        rates = [Spread.of([each.nbytes / s / 1e9 for s in each.seconds(way)]) for way in ways]
        table.add_row(
            each.shards,
            f"{each.streams}",
            *(f"{rate.median:.2f} GB/s" if rate else "-" for rate in rates),
            *(_shown(each.part_of(way)) for way in (BARE, HASHED)),
        )
    return table


def main(argv: Sequence[str]) -> int:
    """Measures and prints what came of it, with the target for large shards."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetching", description=__doc__)
    parser.add_argument("--size-mib", type=int, default=256, help="how much is fetched (default: 256)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument(
        "--streams", default=f"{STREAMS}", help=f"one or more, 1,2,4,8 say (default: {STREAMS})"
    )
    parser.add_argument("--shards", default=",".join(SHARD_BYTES), help="default: 64 MiB,2 MiB,100 kB")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="default: /dev/shm")
    parser.add_argument("--json", action="store_true", help="one line of JSON per figure instead of a table")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve is not None:
        serve(args.serve)
    streams = tuple(map(int, args.streams.split(",")))
    figures = measure_all(args.directory, args.size_mib, args.rounds, streams, args.shards.split(","))
    if args.json:
        for each in figures:
            print(json.dumps(each.to_json()))
    else:
        table = as_table(figures)
        table.caption = f"{args.size_mib} MiB, {args.rounds} rounds: medians, with the smallest and largest"
        table.caption_justify = "left"
        Console(width=130, highlight=False).print(table)
    return 0


def _shown(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
