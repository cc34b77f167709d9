"""Files of ours whose checksum is right and whose fields are not: damage with a path, never a raw error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from emergency_ckpt.core.lineage import Activation, Deletion, StepId
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import StepContent
from emergency_ckpt.persistent.files import LocalFiles
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.step_facts import read_step_facts
from emergency_ckpt.persistent.step_files import digest, seal, unseal
from emergency_ckpt.persistent.store import UNKNOWN_NONCE, PersistentStore
from emergency_ckpt.persistent.writer import read_part
from tests.persistent.saving import layout_of, read_shards, save, small_state, write_parts

DEEP = b"[" * 100_000


def sealed(body: bytes) -> bytes:
    return body + b"\n" + digest(body).encode() + b"\n"


NOT_OURS = [sealed(b"null"), sealed(b"[]"), sealed(b"3"), sealed(DEEP), sealed(b'{"format":[]}'), seal({})]


def changed(path: Path, **fields: Any) -> None:
    content = unseal(path.read_bytes(), str(path), "")
    path.write_bytes(seal({**content, **fields}))


@pytest.mark.parametrize(
    "content",
    [
        *NOT_OURS,
        seal({"generation": "2", "step": 5}),
        seal({"generation": 2, "step": "x"}),
        seal({"generation": 2, "step": True}),
        seal({"generation": 2, "step": -1}),
        seal({"generation": 3, "step": 5}),
        seal({"generation": 2}),
    ],
)
def test_an_activation_with_other_fields_is_damage_and_the_newest_does_not_count(
    tmp_path: Path, content: bytes
) -> None:
    store = PersistentStore(tmp_path)
    for activation in (Activation(1, None), Activation(2, 5)):
        store.record_activation(activation)
    path = tmp_path / "emergency_ckpt/activations/00000002.json"
    path.write_bytes(content)
    assert store.activations() == (Activation(1, None),)
    store.record_activation(Activation(3, 5))
    path.write_bytes(content)
    with pytest.raises(CorruptDataError) as damage:
        store.activations()
    assert str(path) in str(damage.value)


def test_the_message_of_a_damaged_record_says_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    for activation in (Activation(1, None), Activation(2, 5)):
        store.record_activation(activation)
    path = tmp_path / "emergency_ckpt/activations/00000001.json"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(
        CorruptDataError, match=f"{path} is damaged.*the record of a restore.*or delete it"
    ) as damage:
        store.activations()
    assert "The step is not usable" not in str(damage.value)
    path.unlink()
    assert store.activations() == (Activation(2, 5),)


@pytest.mark.parametrize(
    "content",
    [
        *NOT_OURS,
        seal({"number": "2", "nonce": "ab", "parent": None}),
        seal({"number": 2, "nonce": 7, "parent": None}),
        seal({"number": 2, "nonce": "ab", "parent": [1]}),
        seal({"number": 2, "nonce": "ab", "parent": {"a": 1, "b": 2}}),
        seal({"number": 1, "nonce": "ab", "parent": None}),
    ],
)
def test_a_generation_with_other_fields_is_passed_over(tmp_path: Path, content: bytes) -> None:
    store = PersistentStore(tmp_path)
    for _ in range(2):
        store.mint_generation(0, None)
    (tmp_path / "emergency_ckpt/generations/00000002.json").write_bytes(content)
    newest = store.newest_generation()
    assert newest is not None
    assert (newest.number, newest.nonce) == (2, UNKNOWN_NONCE)
    assert store.mint_generation(0, None).number == 3


@pytest.mark.parametrize(
    "content",
    [
        *NOT_OURS,
        seal({"upto": ["a", "b"], "newest": None}),
        seal({"upto": [1, 5], "newest": [1]}),
        seal({"upto": None, "newest": None}),
        seal({"upto": 5, "newest": None}),
    ],
)
def test_a_record_of_deletions_with_other_fields_does_not_count(tmp_path: Path, content: bytes) -> None:
    store = PersistentStore(tmp_path)
    store.record_deletion(Deletion(StepId(1, 5), None))
    path = tmp_path / "emergency_ckpt/deletion.json"
    path.write_bytes(content)
    assert store.deletion() is None
    store.record_deletion(None)
    store.record_deletion(Deletion(StepId(1, 6), None))
    assert store.deletion() == Deletion(StepId(1, 6), None)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    store = PersistentStore(tmp_path)
    attempt = Attempt(store.mint_generation(0, None), 3, "default")
    content = StepContent(values={"lr": 0.5}, metrics={"loss": 1.0})
    return Path(save(store, attempt, small_state(), content).location)


SIDE_FIELDS = [
    ("run_id", 5),
    ("step_id", [1, "3"]),
    ("step_id", None),
    ("nonce", None),
    ("item", "../default"),
    ("item", 3),
    ("layout_hash", None),
    ("max_chunk_bytes", "a"),
    ("max_chunk_bytes", -1),
    ("compression", 0),
    ("values", []),
    ("values", {"lr": "0.5"}),
    ("custom_metadata", None),
    ("metrics", [1]),
    ("digests", []),
    ("digests", None),
    ("digests", {"emergency_ckpt.layout.json": None}),
]


@pytest.mark.parametrize(("field", "content"), SIDE_FIELDS)
def test_a_side_file_with_other_fields_is_damage(step: Path, field: str, content: Any) -> None:
    (side,) = step.glob("emergency_ckpt.[0-9]*.json")
    changed(side, **{field: content})
    assert_damage(step, side)


@pytest.mark.parametrize("content", NOT_OURS)
def test_a_side_file_that_is_none_is_damage(step: Path, content: bytes) -> None:
    (side,) = step.glob("emergency_ckpt.[0-9]*.json")
    side.write_bytes(content)
    assert_damage(step, side)


def assert_damage(step: Path, side: Path) -> None:
    for read in (lambda: StepReader(step), lambda: read_step_facts(LocalFiles(step))):
        with pytest.raises(CorruptDataError) as damage:
            read()
        assert str(side) in str(damage.value)
    assert [held.step_id for held in PersistentStore(step.parent).steps()] == [StepId(1, 3)]


def test_a_side_file_under_the_name_of_another_generation_is_damage(step: Path) -> None:
    (side,) = step.glob("emergency_ckpt.[0-9]*.json")
    renamed = side.rename(step / "emergency_ckpt.7.abc.json")
    with pytest.raises(CorruptDataError, match=rf"{renamed} was saved by generation 1 \(.*renamed or copied"):
        StepReader(step)


@pytest.mark.parametrize("content", [b'{"format":1,"extras":[]}', b'{"format":1,"extras":{"a":""}}', DEEP])
def test_extras_with_other_fields_are_damage(step: Path, content: bytes) -> None:
    path = step / "emergency_ckpt.extras.json"
    path.write_bytes(sealed(content))
    (side,) = step.glob("emergency_ckpt.[0-9]*.json")
    digests = StepReader(step).side.digests  # type: ignore[union-attr]
    changed(side, digests={**digests, path.name: digest(path.read_bytes())})
    with pytest.raises(CorruptDataError, match=str(path)):
        _ = StepReader(step).extras


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("shards", 5),
        ("shards", [-1]),
        ("checksums", [["a"]]),
        ("checksums", []),
        ("nbytes", "1"),
        ("extras", None),
    ],
)
def test_a_part_marker_with_other_fields_is_damage(tmp_path: Path, field: str, content: Any) -> None:
    store, arrays = PersistentStore(tmp_path), small_state()
    attempt = Attempt(store.mint_generation(0, None), 3, "default")
    (report, *_) = write_parts(store, attempt, layout_of(arrays), arrays)
    assert read_part(store, attempt, 0) == report
    (marker,) = tmp_path.rglob("emergency_ckpt.parts/0.json")
    changed(marker, **{field: content})
    with pytest.raises(CorruptDataError, match=str(marker)):
        read_part(store, attempt, 0)


def of_plain_orbax(root: Path) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(root / "3/default", {"w": np.arange(4.0), "name": "run", "lr": 0.5})
    return root / "3"


READS: dict[str, Callable[[Path], object]] = {
    "default/_METADATA": lambda step: StepReader(step).leaves,
    "default/_strings.json": lambda step: StepReader(step).values(),
    "default/array_metadatas/process_0": lambda step: StepReader(step).key_implementations,
    "_CHECKPOINT_METADATA": lambda step: read_step_facts(LocalFiles(step)),
    "metrics/metrics": lambda step: read_step_facts(LocalFiles(step)),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("content", [DEEP, b"[]", b"3", b"\xff"])
def test_files_of_orbax_that_are_nested_without_end_or_of_another_kind_are_damage(
    tmp_path: Path, name: str, content: bytes
) -> None:
    step = of_plain_orbax(tmp_path)
    path = step / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(CorruptDataError, match=str(path)):
        READS[name](step)


@pytest.mark.parametrize("content", [DEEP, b"[]", b'{"custom_metadata":[1]}'])
def test_metadata_of_the_directory_that_is_of_another_kind_is_damage(tmp_path: Path, content: bytes) -> None:
    store = PersistentStore(tmp_path)
    store.create_root_metadata({"a": 1})
    (tmp_path / "metadata/_ROOT_METADATA").write_bytes(content)
    with pytest.raises(CorruptDataError, match="_ROOT_METADATA"):
        store.root_metadata()


def test_times_and_metadata_of_another_kind_are_none_or_damage(tmp_path: Path) -> None:
    step = of_plain_orbax(tmp_path)
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({"init_timestamp_nsecs": True, "commit_timestamp_nsecs": 10**40}))
    facts = read_step_facts(LocalFiles(step))
    assert (facts.started_nanoseconds, facts.committed_nanoseconds) == (None, None)
    path.write_text(json.dumps({"custom_metadata": [1]}))
    with pytest.raises(CorruptDataError, match=str(path)):
        read_step_facts(LocalFiles(step))


def test_what_was_not_changed_is_read_as_before(step: Path) -> None:
    reader = StepReader(step, directory_step=3)
    assert read_shards(reader).keys() == small_state().keys()
    assert dataclasses.asdict(read_step_facts(LocalFiles(step), 3))["metrics"] == {"loss": 1.0}
