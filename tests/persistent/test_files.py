"""What stands in place of a small file, or never answers, is an error that names it: nobody waits for ever."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import Activation
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.bounded import within
from emergency_ckpt.persistent.files import LocalFiles
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import UNKNOWN_NONCE, PersistentStore
from tests.persistent.saving import read_shards, save, small_state


@contextlib.contextmanager
def never_opened(path: Path) -> Iterator[None]:
    """Whoever opens the file waits, as for a server that is gone: the holder of a lease is asked first."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    holder = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(holder)
        signal.signal(signal.SIGIO, before)


def test_a_read_that_gets_no_answer_ends_with_an_error_that_names_file_and_limit(tmp_path: Path) -> None:
    LocalFiles(tmp_path).write("a/b", b"content")
    files = LocalFiles(tmp_path, answer_seconds=0.2)
    below = files.below("a")
    with never_opened(tmp_path / "a/b"):
        for look in (lambda: files.read("a/b"), lambda: below.read("b")):
            with pytest.raises(PersistentStoreError, match=rf"reading {tmp_path}/a/b: no answer within 0.2 s"):
                look()
    assert LocalFiles(tmp_path).read("a/b") == b"content"


def test_what_a_bounded_call_raises_is_not_taken_for_its_time_limit() -> None:
    def timed_out_by_the_server() -> None:
        raise TimeoutError("the server says so")

    with pytest.raises(TimeoutError, match="the server says so"):
        within(60, "asking", timed_out_by_the_server)
    assert within(60, "asking", lambda: 5) == 5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with two generations and a step of the second."""
    store = PersistentStore(tmp_path / "root")
    store.run_id()
    for number in (1, 2):
        generation = store.mint_generation(0, None)
        store.record_activation(Activation(number, None))
    save(store, Attempt(generation, 3, "default"), small_state())
    return Path(store.files.locate())


def pipe_in_place_of(path: Path) -> Path:
    path.unlink()
    os.mkfifo(path)
    return path


def test_a_pipe_in_place_of_a_record_is_damage_and_nobody_waits_for_it(root: Path) -> None:
    records = root / "emergency_ckpt"
    pipe_in_place_of(records / "generations/00000002.json")
    newest = PersistentStore(root).newest_generation()
    assert newest is not None
    assert (newest.number, newest.nonce) == (2, UNKNOWN_NONCE)
    pipe_in_place_of(records / "activations/00000002.json")
    assert PersistentStore(root).activations() == (Activation(1, None),)
    os.mkfifo(records / "deletion.json")
    assert PersistentStore(root).deletion() is None
    for name in ("activations/00000001.json", "run_id"):
        path = pipe_in_place_of(records / name)
        with pytest.raises(CorruptDataError, match=f"{path} should be a file and is none"):
            PersistentStore(root).activations() if name != "run_id" else PersistentStore(root).run_id()


@pytest.mark.parametrize(
    "pattern", ["emergency_ckpt.[0-9]*.json", "emergency_ckpt.layout.json", "emergency_ckpt.checksums"]
)
def test_a_pipe_in_place_of_a_file_of_a_step_is_damage(root: Path, pattern: str) -> None:
    (path,) = (root / "3").glob(pattern)
    pipe_in_place_of(path)
    (held,) = PersistentStore(root).steps()
    with pytest.raises(CorruptDataError, match=f"{path} should be a file and is none"):
        read_shards(StepReader(held.location))


@pytest.mark.parametrize("name", ["generations", "activations"])
def test_a_file_in_place_of_a_directory_of_records_is_an_error_that_names_it(root: Path, name: str) -> None:
    records = root / "emergency_ckpt"
    (records / name).rename(root / "aside")
    (records / name).touch()
    store = PersistentStore(root)
    calls = {
        "generations": [store.newest_generation, lambda: store.mint_generation(0, None)],
        "activations": [store.activations, lambda: store.record_activation(Activation(2, None))],
    }
    for call in calls[name]:
        with pytest.raises(PersistentStoreError, match=f"could not list {records / name}: Not a directory"):
            call()
    with pytest.raises(PersistentStoreError, match=f"could not create {records / name}/x"):
        store.files.create(f"emergency_ckpt/{name}/x", b"")
