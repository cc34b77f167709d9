"""Whatever lies in the directory: the store opens, holds nothing that does not verify, and can be used.

A directory with three sealed steps is damaged at random: bytes flipped, files cut, grown, swapped, copied,
fields edited with a checksum that fits. What was not touched must still be there, whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import EmergencyCheckpointError, LocalDirectoryError
from emergency_ckpt.local.manifest import FORMAT, Manifest
from tests.local.test_store import Directory, content, make_layout, save

SIZE = 9_000
STEPS: tuple[int, ...] = (1, 2, 3)
_COMPLETE = Outcome.COMPLETE
Change = Callable[[Path], set[int]]


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A directory with steps 1, 2 and 3 in slots 0, 1 and 2."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="emergency-ckpt-test-", dir=root))
    held = Directory(path / "template")
    held.path.mkdir()
    store = held.open(make_layout(SIZE))
    for number in STEPS:
        save(store, StepId(1, number), outcome=None)
    held.close()
    yield path
    shutil.rmtree(path)


def slot(root: Path, index: int, kind: str) -> Path:
    return root / f"emergency_ckpt/0/slot_{index}.{kind}"


def content_of(path: Path) -> bytes:
    """Raises IndexError for a file that another change made enormous: its zeros are not to be read."""
    if path.stat().st_size > 2**20:
        raise IndexError(f"{path} is too large")
    return path.read_bytes()


def layout_file(root: Path) -> Path:
    return next(root.glob("emergency_ckpt/0/layout_*.json"))


def with_checksum(body: bytes) -> bytes:
    return f"{FORMAT} {xxhash.xxh3_128_hexdigest(body)}\n".encode() + body


# Each change says which steps it may cost.


def flipped(index: int, kind: str, at: float, mask: int) -> Change:
    def change(root: Path) -> set[int]:
        path = slot(root, index, kind)
        data = bytearray(content_of(path))
        data[int(at * (len(data) - 1))] ^= mask
        path.write_bytes(data)
        return {index + 1}

    return change


def resized(index: int, kind: str, nbytes: int) -> Change:
    def change(root: Path) -> set[int]:
        os.truncate(slot(root, index, kind), nbytes)
        return {index + 1}

    return change


def swapped(a: int, b: int, kind: str) -> Change:
    def change(root: Path) -> set[int]:
        first, second = slot(root, a, kind), slot(root, b, kind)
        one, other = content_of(first), content_of(second)
        first.write_bytes(other)
        second.write_bytes(one)
        return {a + 1, b + 1} if a != b else set()

    return change


def copied(a: int, target: str, kind: str) -> Change:
    """Over another slot's file, or under a name that no slot has."""

    def change(root: Path) -> set[int]:
        (root / f"emergency_ckpt/0/slot_{target}.{kind}").write_bytes(content_of(slot(root, a, kind)))
        return {int(target) + 1} if target in ("0", "1", "2") and target != str(a) else set()

    return change


def edited(index: int, field: str, value: Any) -> Change:
    def change(root: Path) -> set[int]:
        path = slot(root, index, "manifest")
        raw = json.loads(content_of(path).partition(b"\n")[2])
        raw[field] = value
        path.write_bytes(with_checksum(json.dumps(raw).encode()))
        # A manifest that was forged as another step's makes both doubtful.
        return {index + 1} | (
            {value[1]} if field == "step" and isinstance(value, list) and value[1:] else set()
        )

    return change


def removed(index: int, kind: str) -> Change:
    def change(root: Path) -> set[int]:
        slot(root, index, kind).unlink()
        return {index + 1}

    return change


def layout_flipped(at: float, mask: int) -> Change:
    def change(root: Path) -> set[int]:
        path = layout_file(root)
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= mask
        path.write_bytes(data)
        return set(STEPS)

    return change


def layout_edited(index: int, field: str, value: Any) -> Change:
    """Another layout under the name that its content asks for, and a manifest that names it."""

    def change(root: Path) -> set[int]:
        raw = json.loads(layout_file(root).read_bytes())
        raw[field] = value
        data = json.dumps(raw, separators=(",", ":")).encode()
        name = xxhash.xxh3_128_hexdigest(data)
        (root / f"emergency_ckpt/0/layout_{name}.json").write_bytes(data)
        return edited(index, "layout", name)(root)

    return change


indices = st.sampled_from([0, 1, 2])
kinds = st.sampled_from(["manifest", "data"])
places = st.floats(0, 1)
masks = st.integers(1, 255)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**30, -1, 0, 1, 7, "0" * 32, "../../../etc/passwd"]),
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
fields = st.sampled_from(
    [
        "run",
        "nonce",
        "step",
        "layout",
        "position",
        "process_count",
        "checksums",
        "values",
        "extras",
        "listed",
        "activations",
        "metadata",
        "promised",
        "missing",
    ]
)
steps = st.tuples(st.integers(0, 3), st.integers(0, 10**20)).map(list)
changes = st.one_of(
    st.builds(flipped, indices, kinds, places, masks),
    st.builds(resized, indices, kinds, st.sampled_from([0, 1, 100, 4096, 20_000, 2**40])),
    st.builds(swapped, indices, indices, kinds),
    st.builds(copied, indices, st.sampled_from(["0", "1", "2", "3", "01", "60", "9999", "99999999999"]), kinds),
    st.builds(edited, indices, fields, anything),
    st.builds(edited, indices, st.sampled_from(["step", "promised"]), steps),
    st.builds(edited, indices, st.just("activations"), st.lists(steps, max_size=2)),
    st.builds(edited, indices, st.just("missing"), st.lists(st.integers(-1, 2), max_size=3)),
    st.builds(removed, indices, kinds),
    st.builds(layout_flipped, places, masks),
    st.builds(
        layout_edited,
        indices,
        st.sampled_from(
            ["leaves", "cuts", "shards", "process_kinds", "process_slice", "format", "metadata_files"]
        ),
        anything,
    ),
    st.builds(
        layout_edited,
        indices,
        st.just("leaves"),
        st.integers(-5, 10**30).map(lambda n: [["a", [n], "uint8"], ["b", [3, 5], "float32"]]),
    ),
)


def assert_usable(held: Directory, layout: Layout, untouched: set[int], run: str = "run-a") -> None:
    store = held.open(layout, run=run)
    holdings = store.verify()
    for holding in holdings:
        sealed = store.sealed(holding.step)
        assert sealed is not None
        assert sealed.find_damage() is None
    found = {holding.step for holding in holdings}
    for number in untouched:
        assert StepId(1, number) in found
        sealed = store.sealed(StepId(1, number))
        assert sealed is not None
        for shard in sealed.layout.process_shards[0]:
            nbytes = sealed.layout.shard_nbytes[shard]
            assert (sealed.shard(shard) == content(sealed.layout.shards[shard], number, nbytes)).all()
    generation = store.highest_generation() + 1
    store.settle(max(found, default=StepId(1, 1)), _COMPLETE)
    for number in (10, 11, 12):
        assert save(store, StepId(generation, number), run=run)
    assert StepId(generation, 12) in {h.step for h in held.open(layout, run=run).verify()}
    assert held.store is not None
    assert held.store.slot_count <= 4


def restored_template(template: Path) -> Directory:
    path = template / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template / "template", path)
    return Directory(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(done=st.lists(changes, min_size=1, max_size=3), size=st.sampled_from([SIZE, SIZE, SIZE // 2, 3 * SIZE]))
@example(done=[edited(0, "step", [1, 2])], size=SIZE)
@example(done=[copied(1, "0", "manifest"), copied(1, "0", "data")], size=SIZE)
@example(done=[copied(1, "9999", "manifest"), copied(1, "9999", "data")], size=SIZE)
@example(done=[resized(0, "data", 2**40)], size=SIZE)
@example(done=[edited(0, "activations", [[1, float("inf")]])], size=SIZE)
@example(done=[edited(0, "extras", [1])], size=SIZE)
@example(done=[edited(0, "run", "run-z"), resized(0, "data", 2**40)], size=SIZE)
@example(done=[layout_edited(0, "leaves", [["a", [10**18], "uint8"], ["b", [3, 5], "float32"]])], size=SIZE)
def test_damaged_directories_open_and_hold_nothing_that_does_not_verify(
    template: Path, done: list[Change], size: int
) -> None:
    held = restored_template(template)
    touched: set[int] = set()
    try:
        for change in done:
            touched |= change(held.path)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, IndexError, TypeError):
        return  # The changes do not go together.
    voiding = any(h for h in _activations(held.path))
    untouched: set[int] = set() if voiding else set(STEPS) - touched
    try:
        assert_usable(held, make_layout(size), untouched)
    finally:
        held.close()


def _activations(root: Path) -> list[Any]:
    """Activations that somebody wrote into a manifest: they make steps void, as they say."""
    found: list[Any] = []
    for path in root.glob("emergency_ckpt/0/slot_*.manifest"):
        try:
            found += Manifest.from_bytes(content_of(path), "test").activations
        except (EmergencyCheckpointError, IndexError):
            continue
    return found


@pytest.mark.parametrize("name", ["slot_1.manifest", "slot_1.data", "slot_1.tmp", "layout"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link"])
def test_what_is_no_file_is_refused_by_name_and_never_waited_for(template: Path, name: str, kind: str) -> None:
    held = restored_template(template)
    path = layout_file(held.path) if name == "layout" else held.path / "emergency_ckpt/0" / name
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    found: set[StepId] = set()
    try:
        found = {h.step for h in held.open(make_layout(SIZE)).verify()}
    except LocalDirectoryError as error:
        said = str(error)
    else:
        said = ""
    finally:
        held.close()
    assert str(path) in said or StepId(1, 1) in found or name == "layout"


_BYTES = Manifest(
    "run-a", "n", StepId(1, 1), "0" * 32, 0, 1, ((1, 2), ()), promised=StepId(1, 0), missing=(1,)
).to_bytes()


@given(st.binary(max_size=200) | st.builds(lambda b: with_checksum(b), st.binary(max_size=100)))
def test_bytes_that_are_no_manifest_are_damage_and_nothing_else(data: bytes) -> None:
    with pytest.raises(EmergencyCheckpointError, match="test"):
        Manifest.from_bytes(data, "test")


@given(field=fields, value=anything)
def test_a_field_of_a_wrong_kind_is_damage_and_nothing_else(field: str, value: Any) -> None:
    raw = json.loads(_BYTES.partition(b"\n")[2])
    raw[field] = value
    try:
        again = Manifest.from_bytes(with_checksum(json.dumps(raw).encode()), "test")
    except EmergencyCheckpointError:
        return
    assert Manifest.from_bytes(again.to_bytes(), "test").to_bytes() == again.to_bytes()


@given(
    st.sampled_from(["leaves", "cuts", "shards", "process_kinds", "process_slice", "value_leaves"]), anything
)
def test_a_layout_with_a_field_of_a_wrong_kind_is_damage_and_nothing_else(field: str, value: Any) -> None:
    raw = json.loads(make_layout(SIZE).to_bytes())
    raw[field] = value
    try:
        layout = Layout.from_bytes(json.dumps(raw).encode())
    except EmergencyCheckpointError:
        return
    assert layout.data_bytes(0) >= 0 if layout.process_count else True
