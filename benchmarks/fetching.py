"""How fast shards come from another host's agent: `python -m benchmarks.fetching [--size-mib 256]`.

A real agent serves a sealed slot over loopback, and the shards are gathered into a mapped file on the ramdisk,
as a restore does it, hashing included. Beside it, round by round, a bare copy of the same bytes on as many
streams: another process sends with `sendfile`, this one receives with `recv_into` into such a file, without and
with hashing.
"""

from __future__ import annotations

import argparse
import contextlib
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
LARGE, LEAST = "64 MiB", 0.8
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


def measure(root: Path, shard_bytes: int, nbytes: int, rounds: int, streams: int) -> tuple[Samples, int]:
    """Seconds per contender and round, after one that is not counted; and the bytes of the slot."""
    layout = make_layout(shard_bytes, nbytes)
    samples = Samples()
    size = layout.data_bytes(1)
    ours, bare = Place(root / "ours", size), Place(root / "bare", size)
    with served_slot(root / "slots", layout) as (endpoint, path), BareServer(path) as server:
        ways: dict[str, Callable[[], None]] = {
            OURS: lambda: fetch(endpoint, layout, ours, streams),
            BARE: lambda: copy_bare(server.port, bare, streams, False),
            HASHED: lambda: copy_bare(server.port, bare, streams, True),
        }
        for number in range(rounds + 1):
            order = list(ways)[number % 3 :] + list(ways)[: number % 3]
            for name in order:
                began = time.perf_counter()
                ways[name]()
                if number:
                    samples.add(name, "seconds", time.perf_counter() - began)
    return samples, sum(layout.shard_nbytes)


def main(argv: Sequence[str]) -> int:
    """Measures and prints what came of it, with the target for large shards."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetching", description=__doc__)
    parser.add_argument("--size-mib", type=int, default=256, help="how much is fetched (default: 256)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"default: {STREAMS}")
    parser.add_argument("--shards", default=",".join(SHARD_BYTES), help="default: 64 MiB,2 MiB,100 kB")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="default: /dev/shm")
    parser.add_argument("--json", action="store_true", help="one line of JSON per figure instead of a table")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve is not None:
        serve(args.serve)
    title = f"{args.size_mib} MiB from an agent over loopback, {args.streams} streams, {args.rounds} rounds"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in ("shards", "fetch", "bare", "bare, hashed", "of bare", "of bare, hashed"):
        table.add_column(heading, justify="right")
    judged = "not measured"
    for name in args.shards.split(","):
        shard_bytes = SHARD_BYTES[name]
        with tempfile.TemporaryDirectory(prefix="emergency-ckpt-bench-", dir=args.directory) as root:
            (Path(root) / "slots").mkdir()
            nbytes = max(args.size_mib * MIB, shard_bytes)
            samples, fetched = measure(Path(root), shard_bytes, nbytes, args.rounds, args.streams)
        seconds = {way: samples.of(way, "seconds") for way in (OURS, BARE, HASHED)}
        rates = {way: Spread.of([fetched / s / 1e9 for s in each]) for way, each in seconds.items()}
        ratios = {way: Spread.of_ratios(seconds[way], seconds[OURS]) for way in (BARE, HASHED)}
        table.add_row(
            name,
            *(f"{_shown(rates[way])} GB/s" for way in (OURS, BARE, HASHED)),
            *(_shown(ratios[way]) for way in (BARE, HASHED)),
        )
        if name == LARGE and (ratio := ratios[BARE]) is not None:
            reached = "reached" if ratio.median >= LEAST else "missed"
            judged = f"{reached}: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        if args.json:
            print(json.dumps({"shards": name, "bytes": fetched, "streams": args.streams, "seconds": seconds}))
    target = f"target, shards of {LARGE}: at least {LEAST} of the speed of the bare copy: {judged}"
    if args.json:
        print(json.dumps({"target": LEAST, "of": BARE, "shards": LARGE, "judged": judged}))
    else:
        table.caption = f"medians, with the smallest and largest of the rounds\n{target}"
        Console(width=130, highlight=False).print(table)
    return 0


def _shown(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
