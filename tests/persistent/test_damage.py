"""Damage at rest: every flipped bit, cut or missing file of a step is either detected or without effect."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emergency_ckpt.core.shards import Box
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.orbax_metadata import layout_metadata_files
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import StepContent
from emergency_ckpt.persistent.files import LocalFiles
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.step_facts import read_step_facts
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import assert_same, layout_of, read_shards, read_whole, save

VALUES = {"lr": 0.5, "name": "run"}
ARRAYS = {
    "w": np.random.default_rng(0).standard_normal((32, 20)).astype(np.float32),
    "ones": np.ones((4, 4), np.float32),
    "count": np.asarray(7, np.int32),
}
# Files that only Orbax reads: damage there does not touch what we read.
ORBAX_ONLY = (
    "_METADATA",
    "_sharding",
    "process_0",
    "_strings.json",
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact")
    store = PersistentStore(root)
    state = {name: jnp.asarray(array) for name, array in ARRAYS.items()}
    files = layout_metadata_files({**state, **VALUES}, "default")
    layout = layout_of(ARRAYS, tuple(VALUES), metadata_files=files)
    content = StepContent(VALUES, {}, {"loss": 1.0})
    options = WriteOptions(max_chunk_bytes=600)
    attempt = Attempt(store.mint_generation(0, None), 3, "default")
    return Path(save(store, attempt, ARRAYS, content, layout, options).location)


def damaged_steps(intact: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """(what was done, step) for flips over the length of each file, each file cut, and each file missing."""
    for original in sorted(path for path in intact.rglob("*") if path.is_file()):
        name = str(original.relative_to(intact))
        content = original.read_bytes()
        places = {int(i) for i in np.linspace(0, len(content) - 1, 24)} if content else set()
        cases = [
            (f"bit {at % 8} of byte {at} of {name} flipped", _flipped(content, at)) for at in sorted(places)
        ]
        cases += [(f"{name} cut to half", content[: len(content) // 2]), (f"{name} missing", None)]
        target = scratch / name
        for what, data in cases:
            target.unlink()
            if data is not None:
                target.write_bytes(data)
            yield what, scratch
            target.write_bytes(content) if data is not None else shutil.copy(original, target)


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]


def test_damage_of_any_file_is_detected_or_without_effect(intact: Path, tmp_path: Path) -> None:
    scratch = Path(shutil.copytree(intact, tmp_path / "3"))
    detected: dict[str, int] = {}
    messages = []
    for what, step in damaged_steps(intact, scratch):
        try:
            reader = StepReader(step)
            assert reader.verified, what
            whole = {name: read_whole(reader, name) for name in reader.leaves}
            shards = read_shards(reader)
            values = reader.values()
        except CorruptDataError as error:
            file = what.split(" of ")[-1].split(" ")[0]
            detected[file] = detected.get(file, 0) + 1
            messages.append(str(error))
        else:
            assert_same(whole, ARRAYS)
            assert_same(shards, ARRAYS)
            assert values == VALUES, what
    assert not [message for message in messages if str(scratch) not in message]
    assert not [file for file in detected if file.endswith(ORBAX_ONLY)]
    for ours in ("emergency_ckpt.layout.json", "emergency_ckpt.checksums"):
        assert detected[ours] >= 24, f"damage to {ours} went unnoticed"
    for file in detected:
        assert "/d/" in file or file.startswith("emergency_ckpt") or file.endswith("/manifest.ocdbt"), file


def test_every_flip_within_array_data_is_detected_for_whole_shards_and_for_parts_of_them(
    tmp_path: Path,
) -> None:
    store = PersistentStore(tmp_path)
    attempt = Attempt(store.mint_generation(0, None), 3, "default")
    scratch = Path(save(store, attempt, {"w": ARRAYS["w"]}).location)
    needle = ARRAYS["w"].tobytes()[:20]
    (holder,) = [path for path in scratch.rglob("d/*") if needle in path.read_bytes()]
    content = holder.read_bytes()
    at = content.index(needle)
    for offset in range(20):
        holder.write_bytes(_flipped(content, at + offset))
        for box in (Box((0, 0), (16, 20)), Box((0, 0), (1, 1)), Box((0, 0), (32, 20))):
            with pytest.raises(
                CorruptDataError, match=rf"reading w\[0:.* of step 3 \(generation 1\) .*{scratch}"
            ):
                StepReader(scratch).read_box("w", box, np.empty(box.shape, np.float32))


def ours(root: Path) -> Path:
    store = PersistentStore(root)
    attempt = Attempt(store.mint_generation(0, None), 3, "default")
    return Path(save(store, attempt, {"w": ARRAYS["w"]}).location)


def of_plain_orbax(root: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "3/default", {"w": jnp.asarray(ARRAYS["w"])})
    return root / "3"


@pytest.mark.parametrize("saved", [ours, of_plain_orbax])
@pytest.mark.parametrize("kind", ["root", "nodes"])
def test_every_flip_in_the_tree_of_the_array_database_is_damage_and_no_outage(
    tmp_path: Path, saved: Callable[[Path], Path], kind: str
) -> None:
    """An outage is waited for and ends the start; damage costs a step."""
    step = saved(tmp_path)
    # Of a step of ours the nodes of the merged tree lie in a store of their own.
    where = ["manifest.ocdbt"] if kind == "root" else ["d/*", "ocdbt.process_*merged/d/*"]
    files = [path for pattern in where for path in (step / "default").glob(pattern)]
    assert files
    for file in sorted(files):
        content = file.read_bytes()
        for at in np.linspace(0, len(content) - 1, min(len(content), 400)).astype(int).tolist():
            file.write_bytes(_flipped(content, at))
            with pytest.raises(CorruptDataError, match=str(step)):
                read_whole(StepReader(step), "w")
        file.write_bytes(content)
        for left in (0, 1, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:left])
            with pytest.raises(CorruptDataError, match=str(step)):
                read_whole(StepReader(step), "w")
        file.write_bytes(content)
    assert_same({"w": read_whole(StepReader(step), "w")}, {"w": ARRAYS["w"]})


def test_a_valid_shard_in_the_place_of_another_is_detected(tmp_path: Path) -> None:
    """Bytes that are intact in themselves, but of another generation: chunk checksums cannot tell."""
    store = PersistentStore(tmp_path)
    generation = store.mint_generation(0, None)
    arrays = {"w": ARRAYS["w"]}
    other = {"w": ARRAYS["w"] + 1}
    for step, state in ((1, arrays), (2, other)):
        save(store, Attempt(generation, step, "default"), state)
    shutil.rmtree(tmp_path / "1/default")
    shutil.copytree(tmp_path / "2/default", tmp_path / "1/default")
    with pytest.raises(CorruptDataError, match="block 0 does not match its checksum"):
        read_shards(StepReader(tmp_path / "1"))


def test_plain_orbax_refuses_our_checkpoint_with_a_flipped_bit(tmp_path: Path) -> None:
    state = {"w": jnp.asarray(ARRAYS["w"])}
    store = PersistentStore(tmp_path)
    layout = build_layout(state, Topology.single_process(), layout_metadata_files(state, "default"))
    save(store, Attempt(store.mint_generation(0, None), 1, "default"), {"w": ARRAYS["w"]}, layout=layout)
    needle = ARRAYS["w"].tobytes()
    (holder,) = [path for path in tmp_path.rglob("d/*") if needle in path.read_bytes()]
    content = holder.read_bytes()
    holder.write_bytes(_flipped(content, content.index(needle) + 100))
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(Exception) as error:  # noqa: PT011
        checkpointer.restore(tmp_path / "1/default")
    assert "Digest mismatch" in str(error.value.__cause__)


def test_a_step_that_is_deleted_between_listing_and_reading_is_no_raw_error(tmp_path: Path) -> None:
    """A link that leads nowhere is listed like a file, and is not there when it is read."""
    step = ours(tmp_path)
    (side,) = step.glob("emergency_ckpt.[0-9]*.json")
    side.unlink()
    side.symlink_to(tmp_path / "nowhere")
    assert [held.step_id.step for held in PersistentStore(tmp_path).steps()] == [3]
    for read in (lambda: StepReader(step), lambda: read_step_facts(LocalFiles(step))):
        with pytest.raises(CorruptDataError, match=f"{side} was listed and cannot be opened"):
            read()
