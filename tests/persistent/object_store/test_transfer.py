"""Run directories copied between file systems, Ceph and a fake GCS: whole, verified, resumable."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emergency_ckpt.cli.main import main
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import ConfigError, ForeignRunError, NoRestorableStepError
from emergency_ckpt.persistent.attempts import TEMPORARY, Attempt
from emergency_ckpt.persistent.committer import StepContent
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.step_files import Mark, digest
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.transfer.objects import Copying
from emergency_ckpt.persistent.transfer.runs import Outcome, Wanted, copy_run
from tests.persistent.object_store.conftest import Place
from tests.persistent.saving import assert_same, read_shards, save, small_state
from tests.servers.environment import use_s3

CONTENT = StepContent(custom_metadata={"stage": "sft", "epoch": 2}, metrics={"loss": 0.5})


S3_LATER = pytest.mark.parametrize(
    "place",
    [
        "file system",
        pytest.param("gcs", marks=pytest.mark.server),
        pytest.param("s3", marks=[pytest.mark.server, pytest.mark.long]),
    ],
    indirect=True,
)


def run_directory(root: str, steps: tuple[int, ...] = (10, 20)) -> PersistentStore:
    """A run with these steps, of a first life."""
    store = PersistentStore(root)
    generation = store.mint_generation(0, None)
    store.record_activation(Activation(generation.number, None))
    for step in steps:
        save(store, Attempt(generation, step, "default"), small_state(step), CONTENT)
    store.create_root_metadata({"model": "small"})
    store.run_id()
    return store


def seeds(root: str) -> dict[StepId, int]:
    """By step the seed of the state that it holds, every checksum used."""
    store = PersistentStore(root)
    found = {}
    for step in store.steps():
        arrays = read_shards(store.open_step(step))
        found[step.step_id] = int(arrays["count"])
        assert_same(arrays, small_state(found[step.step_id]))
    return found


def copied(source: str, target: str, **wanted: object) -> Outcome:
    said: list[str] = []
    outcome = copy_run(source, target, Wanted(**wanted), Copying(4, 1024**2), said.append)  # type: ignore[arg-type]
    assert not outcome.failed, said
    return outcome


def content(root: str) -> dict[str, bytes]:
    """Every file below a directory, but for who was at work and the server's own record."""
    files = open_files(root)
    inside = files.inside()
    keys = [info.key for page in files.store.list_pages(inside) for info in page.objects]
    skipped = ("emergency_ckpt.committer", "conditional_puts.json", "latest.json")
    return {key[len(inside) :]: files.store.read(key) for key in keys if not key.endswith(skipped)}


@S3_LATER
def test_a_run_goes_to_a_bucket_and_back_and_a_job_goes_on_at_either_place(
    place: Place, tmp_path: Path
) -> None:
    """Markers are made for each kind of store: back on a file system every byte is as it was."""
    first, bucket, back = (
        str(tmp_path / "first"),
        f"{place.url}/{place.prefix}run",
        str(tmp_path / "back"),
    )
    run_directory(first)
    assert sorted(copied(first, bucket, dry_run=True).copied) == [10, 20]
    assert open_files(bucket).entries() == []
    assert copied(first, bucket, latest=True).copied == [20]
    assert sorted(copied(first, bucket).there) == [20]
    assert seeds(bucket) == {StepId(1, 10): 10, StepId(1, 20): 20}
    assert sorted(copied(bucket, back, verify=True).copied) == [10, 20]
    assert content(back) == content(first)

    # Another machine goes on from step 10 in the bucket: step 20 is void there, and replaced.
    store = PersistentStore(bucket)
    second = store.mint_generation(1, StepId(1, 10))
    store.record_activation(Activation(2, 10))
    save(store, Attempt(second, 20, "default"), small_state(21), CONTENT)
    save(store, Attempt(second, 30, "default"), small_state(30), CONTENT)
    assert copied(first, bucket).there == [10], "its step 20 is of a life that was left behind"
    outcome = copied(bucket, back)
    assert (sorted(outcome.copied), outcome.there) == ([20, 30], [10])
    assert seeds(back) == {StepId(1, 10): 10, StepId(2, 20): 21, StepId(2, 30): 30}
    # A life in the copy: it is a run directory like any other, and goes the other way.
    store = PersistentStore(back)
    third = store.mint_generation(2, StepId(2, 30))
    store.record_activation(Activation(3, 30))
    save(store, Attempt(third, 40, "default"), small_state(40), CONTENT)
    for step in store.steps()[:2]:
        store.delete_step(step)
    assert copied(back, bucket).copied == [40]
    assert sorted(copied(back, bucket, delete=True).deleted) == [10, 20]
    assert seeds(bucket) == {StepId(2, 30): 30, StepId(3, 40): 40}
    store = PersistentStore(bucket)
    left = store.remove_leftovers(store.mint_generation(3, StepId(3, 40)))
    assert all(name.startswith("emergency_ckpt/removed/") for name in left), "what made way for step 20"
    for step in store.steps():
        store.delete_step(step)
    assert not [entry for entry in store.files.entries() if entry.name.isdigit()]


@S3_LATER
def test_a_copy_that_is_killed_again_and_again_shows_whole_steps_only_and_comes_to_its_end(
    place: Place, tmp_path: Path
) -> None:
    source, target = str(tmp_path / "first"), f"{place.url}/{place.prefix}run"
    store = PersistentStore(source)
    generation = store.mint_generation(0, None)
    store.record_activation(Activation(generation.number, None))
    arrays = {
        step: {"w": np.random.default_rng(step).integers(0, 256, (24, 1024**2), np.uint8)} for step in (10, 20)
    }
    for step, state in arrays.items():
        save(store, Attempt(generation, step, "default"), state)
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "sync", source, target]
    chance = random.Random()
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = process.stderr.readline()  # It begins.
        time.sleep(chance.random() * 0.5 if killed else 0.0)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for step in PersistentStore(target).steps():
            assert_same(read_shards(PersistentStore(target).open_step(step)), arrays[step.step_id.step])
    assert killed, said
    subprocess.run(words, check=True, capture_output=True)
    found = PersistentStore(target).steps()
    assert [step.step_id.step for step in found] == [10, 20]
    for step in found:
        assert_same(read_shards(PersistentStore(target).open_step(step)), arrays[step.step_id.step])


@S3_LATER
def test_what_a_copy_that_was_cut_short_has_left_is_seen_by_nobody_and_made_use_of(
    place: Place, tmp_path: Path
) -> None:
    """Some files are not there, one is short, and a large one has its size and not its bytes."""
    source, target = str(tmp_path / "first"), f"{place.url}/{place.prefix}run"
    arrays = {"w": np.random.default_rng(3).integers(0, 256, (8, 1024**2), np.uint8)}
    store = PersistentStore(source)
    save(store, Attempt(store.mint_generation(0, None), 10, "default"), arrays)
    copied(source, target)
    (side,) = (Path(source) / "10").glob("emergency_ckpt.1.*.json")
    left = "10" if open_files(target).is_bucket else f"10{TEMPORARY}-copy-{digest(side.read_bytes())}"
    if left == "10":
        open_files(target).store.delete(f"{open_files(target).inside()}10/commit_success.txt")
    else:
        (Path(target) / "10").rename(Path(target) / left)
    files = open_files(target).below(left)
    paths = [path for path in content(f"{target}/{left}") if "commit_success" not in path]
    large = [path for path in paths if len(files.read(path)) > 1024**2]
    assert len(large) == 2
    files.store.delete_many([files.inside() + path for path in paths[::3] if path not in large])
    files.write(side.name, side.read_bytes()[:-9])
    files.write(large[0], bytes(len(files.read(large[0]))))
    files.write("default/what no other step has", b"x")
    assert PersistentStore(target).steps() == []
    assert copied(source, target).copied == [10]
    store = PersistentStore(target)
    assert_same(read_shards(store.open_step(store.steps()[0])), arrays)
    assert content(f"{target}/10").keys() == content(f"{source}/10").keys()

    # A committed step that has lost a file, or in which one has rotted, is made whole in place.
    files = store.files.below("10")
    assert isinstance(files, ObjectFiles)
    files.store.delete(files.inside() + large[1])
    assert copied(source, target).mended == [10]
    files.write(large[1], bytes(len(files.read(large[1]))))
    assert (copied(source, target).there, copied(source, target, verify=True).mended) == ([10], [10])
    assert copied(source, target, verify=True).there == [10]


@pytest.mark.server
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_step_goes_to_s3_and_comes_back_as_it_was(place: Place, tmp_path: Path) -> None:
    first, bucket, back = str(tmp_path / "first"), f"{place.url}/{place.prefix}run", str(tmp_path / "back")
    run_directory(first, (10,))
    assert copied(first, bucket).copied == [10]
    mark = Mark.read(PersistentStore(bucket).files.below("10"))
    assert mark is not None
    assert mark.step_id == StepId(1, 10)
    assert copied(bucket, back).copied == [10]
    assert content(back) == content(first)

    # One that plain Orbax wrote has no marker on a file system, and is none to anybody in a bucket without.
    plain = {
        f"7/{path}": path.encode() for path in ("_CHECKPOINT_METADATA", "default/_METADATA", "default/d/x")
    }
    for path, data in plain.items():
        open_files(str(tmp_path / "plain")).write(path, data)
    assert copied(str(tmp_path / "plain"), f"{bucket}2").copied == [7]
    assert [step.name for step in PersistentStore(f"{bucket}2").steps()] == ["7"]
    markers = {"7/commit_success.txt", "7/default/commit_success.txt"}
    assert content(f"{bucket}2").keys() == {*plain, *markers}
    assert copied(str(tmp_path / "plain"), f"{bucket}2", verify=True).there == [7]


def test_forks_damage_and_what_is_in_the_way_are_refused_with_what_to_do(tmp_path: Path) -> None:
    first, second, other = (str(tmp_path / name) for name in ("first", "second", "other"))
    run_directory(first)
    copied(first, second)
    run_directory(other)
    with pytest.raises(ForeignRunError, match="a job has begun there by itself"):
        copied(first, other)
    for root in first, second:
        PersistentStore(root).mint_generation(1, StepId(1, 20))
    with pytest.raises(ForeignRunError, match="a job has gone on at each of the two places"):
        copied(first, second)
    with pytest.raises(ConfigError, match="one is in the other"):
        copied(first, f"{first}/10")
    with pytest.raises(NoRestorableStepError, match="committed steps: 10, 20"):
        copied(first, str(tmp_path / "third"), step=15)

    # One damaged step costs itself: the other is copied, and nobody ever sees the damaged one.
    for data in (Path(first) / "20/default").rglob("d/*"):
        data.write_bytes(bytes(byte ^ 255 for byte in data.read_bytes()))
    outcome = copy_run(first, str(tmp_path / "third"), Wanted(), Copying(2), lambda _: None)
    assert (list(outcome.failed), outcome.copied) == ([20], [10])
    assert first in outcome.failed[20]
    assert seeds(str(tmp_path / "third")) == {StepId(1, 10): 10}


def test_a_server_that_never_answers_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        use_s3(monkeypatch, endpoint, {"access_key": "none", "secret_key": "none"})
        assert main(["show", "s3://bucket/run", "--timeout", "1"]) == 1
    assert "s3://bucket/run" in capsys.readouterr().err
