"""A ramdisk with sealed slots and agents that serve it, as the tests of this room need them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Self

import numpy as np
import psutil

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.core.checksums import copy_and_checksum, shard_seed
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import BLOCK_BYTES, Box, Shard
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.local.store import LocalStore, StoreOptions

RUN = "0f6a1c1e-2b7b-4a53-9d07-5a8f6b1f2c3d"
LIMIT = timedelta(seconds=60)
BIG = 2 * BLOCK_BYTES + 12345
LOCAL = AgentOptions(bind="127.0.0.1", idle_seconds=120, stall_seconds=10)


def make_layout() -> Layout:
    """A shard of three blocks, a matrix in two shards, a scalar, an empty shard, and many small ones."""
    leaves = [
        LeafSpec("big", (BIG,), "uint8"),
        LeafSpec("empty", (0, 4), "float32"),
        LeafSpec("matrix/ä", (6, 5), "float32"),
        LeafSpec("scalar", (), "int32"),
        *(LeafSpec(f"small{i:03}", (i + 1,), "bfloat16") for i in range(200)),
    ]
    boxes = {leaf.name: [Box.whole(leaf.shape)] for leaf in leaves}
    boxes["matrix/ä"] = [Box((0, 0), (3, 5)), Box((3, 0), (6, 5))]
    shards = [Shard(name, box) for name, of in boxes.items() for box in of]
    return Layout.build(leaves, {0: shards, 1: shards[:1]}, (0, 1))


def content(step: StepId, layout: Layout, shard: int) -> np.ndarray:
    """The bytes of a shard as saved in a step."""
    generator = np.random.default_rng([step.generation, step.step, shard])
    return generator.integers(0, 256, layout.shard_nbytes[shard], dtype=np.uint8)


@dataclasses.dataclass
class Ramdisk:
    """A ramdisk directory with a store open on it."""

    root: Path
    layout: Layout
    store: LocalStore
    process: int = 0

    def save(self, step: StepId, outcome: Outcome | None = Outcome.COMPLETE, nonce: str = "n") -> SlotId:
        """Seals a step with the content that its name says."""
        slot, reason = self.store.begin(step, timedelta(0))
        assert slot is not None, reason
        slot.wait_ready()
        checksums = [
            copy_and_checksum(
                content(step, self.layout, entry.shard),
                slot.data[entry.offset : entry.offset + entry.nbytes],
                shard_seed(step.generation, self.layout, entry.shard),
            )
            for entry in self.layout.slot_entries(self.process)
        ]
        self.store.seal(slot, Manifest(RUN, nonce, step, self.layout.hash, self.process, 2, tuple(checksums)))
        if outcome:
            self.store.settle(step, outcome)
        return SlotId(RUN, step, self.layout.hash, self.process)

    def other_slot(self, step: StepId, nonce: str) -> SealedSlot:
        """What the other process of the job holds of a step."""
        data = np.zeros(self.layout.data_bytes(1), np.uint8)
        checksums = [
            copy_and_checksum(
                content(step, self.layout, entry.shard),
                data[entry.offset : entry.offset + entry.nbytes],
                shard_seed(step.generation, self.layout, entry.shard),
            )
            for entry in self.layout.slot_entries(1)
        ]
        manifest = Manifest(RUN, nonce, step, self.layout.hash, 1, 2, tuple(checksums))
        return SealedSlot(0, manifest, self.layout, data)

    def data_file(self, step: StepId) -> Path:
        """The data file of a sealed step."""
        sealed = self.store.sealed(step)
        assert sealed is not None
        assert self.store.directory is not None
        return self.store.directory / f"slot_{sealed.index}.data"

    def manifest_file(self, step: StepId) -> Path:
        """The manifest of a sealed step."""
        return self.data_file(step).with_suffix(".manifest")

    def places(self) -> list[tuple[int, np.ndarray]]:
        """A place for every shard of the slot."""
        return [(e.shard, np.zeros(e.nbytes, np.uint8)) for e in self.layout.slot_entries(0)]

    def assert_content(self, step: StepId, places: list[tuple[int, np.ndarray]]) -> None:
        """That the places hold what was saved, bit for bit."""
        for shard, place in places:
            np.testing.assert_array_equal(place, content(step, self.layout, shard))


@contextlib.contextmanager
def open_ramdisk(root: Path, process: int = 0) -> Iterator[Ramdisk]:
    """A ramdisk directory with three slots for `make_layout`, of one of its processes."""
    layout = make_layout()
    store = LocalStore(StoreOptions(root, 1, 3, 2), RUN, layout, process, lambda _: None)
    try:
        yield Ramdisk(root, layout, store, process)
    finally:
        store.close()


def agents_of(root: Path) -> list[psutil.Process]:
    """The processes of agents that serve a directory."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "--local-directory" in words and str(root) in words:
                found.append(process)
    return found


@contextlib.contextmanager
def ending_agents(root: Path) -> Iterator[None]:
    """Ends the agents of a directory afterwards, and waits for that."""
    try:
        yield
    finally:
        left = agents_of(root)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        stuck = [process for process in left if not has_ended(process.pid, 20)]
        for process in stuck:
            process.kill()
        assert not stuck, f"agents did not end: {stuck}"


def start(root: Path, **options: object) -> Endpoint:
    """An agent for a directory, on the loopback interface."""
    return ensure_agent(root, dataclasses.replace(LOCAL, **options), LIMIT)  # type: ignore[arg-type]


def pid_of(root: Path) -> int:
    """The process of the agent that serves a directory."""
    record = read_record(agent_directory(root))
    assert record is not None
    return record.pid


def has_ended(pid: int, seconds: float) -> bool:
    """Waits until a process has ended, whoever's child it is; False when the time limit came first."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def wait_until_gone(pid: int) -> None:
    """Waits until a process has ended."""
    assert has_ended(pid, 30), f"process {pid} is still there"


def raw(endpoint: Endpoint, head: str, body: bytes = b"", token: str | None = None) -> tuple[int, dict]:
    """One request as bytes on a socket of its own; status and JSON of the answer."""
    said = endpoint.token if token is None else token
    with socket.create_connection((endpoint.host, endpoint.port), 30) as connection:
        authorization = f"Authorization: Bearer {said}\r\n" if said else ""
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        connection.sendall(
            f"{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{authorization}{length}\r\n".encode() + body
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, content_of = answer.partition(b"\r\n\r\n")
    status = int(top.split()[1])
    try:
        return status, json.loads(content_of)
    except ValueError:
        return status, {}


class AcceptingServer:
    """Listens on a port of its own and deals with one connection at a time, until it is left."""

    def __init__(self) -> None:
        self._listening = self.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._listening.getsockname()[1]

    def listen(self) -> socket.socket:
        return socket.create_server(("127.0.0.1", 0))

    def deal_with(self, connection: socket.socket) -> None:
        """What becomes of one connection, which may fail at any time and is closed afterwards."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(30)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(30)
                self.deal_with(connection)


class CuttingProxy(AcceptingServer):
    """Passes one connection at a time on to an agent, and cuts the answer after a number of bytes."""

    def __init__(self, endpoint: Endpoint, cut_after: int) -> None:
        self._target = (endpoint.host, endpoint.port)
        self._cut_after = cut_after
        super().__init__()
        self.endpoint = dataclasses.replace(endpoint, port=self.port)

    def deal_with(self, connection: socket.socket) -> None:
        with socket.create_connection(self._target, 30) as target:
            asking = threading.Thread(target=self._ask, args=(connection, target))
            asking.start()
            try:
                left = self._cut_after
                while left and (data := target.recv(min(left, 65536))):
                    connection.sendall(data)
                    left -= len(data)
                if not left:
                    self.cut()
            finally:
                connection.shutdown(socket.SHUT_RDWR)
                asking.join(30)

    def cut(self) -> None:
        """Called when an answer has reached its limit, before the connection is cut."""

    def _ask(self, connection: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


class SayingServer(AcceptingServer):
    """Answers every connection with the same bytes, whatever it asks."""

    def __init__(self, answer: bytes, token: str = "t" * 16) -> None:
        self._answer = answer
        super().__init__()
        self.endpoint = Endpoint("127.0.0.1", self.port, token)

    def deal_with(self, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(self._answer)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)


def run_python(code: str, *words: str) -> subprocess.Popen[str]:
    """A fresh interpreter that sees this package; its standard output is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
