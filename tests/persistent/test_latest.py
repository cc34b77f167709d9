"""The pointer to the newest step: whatever becomes of it, the steps that are there are found."""

from __future__ import annotations

import json
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.latest import LATEST, read_latest
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import save, small_state


def content(**changes: object) -> bytes:
    return json.dumps(
        {
            "format": 1,
            "step": 10,
            "generation": 1,
            "directory": "10",
            "time": "2026-01-01T00:00:00+00:00",
            **changes,
        }
    ).encode()


SAID = {
    "stale": (content(), StepId(1, 10)),
    "of a step that is gone": (content(step=99, directory="99"), None),
    "of another life": (content(generation=7), None),
    "of a directory elsewhere": (content(directory="../10"), None),
    "of fields of other kinds": (content(step="10"), None),
    "of another format": (content(format=2), None),
    "a list": (b"[]", None),
    "cut off": (content()[:20], None),
    "garbage": (b"\xff\x00\xfe", None),
    "empty": (b"", None),
    "missing": (None, None),
}


@pytest.mark.parametrize("case", SAID)
def test_a_pointer_of_any_kind_is_harmless(tmp_path: Path, case: str) -> None:
    store = PersistentStore(tmp_path)
    generation = store.mint_generation(0, None)
    for step in (10, 20):
        save(store, Attempt(generation, step, "default"), small_state(step))
    said = read_latest(store.files)
    assert said is not None
    assert (said.step_id, said.name) == (StepId(1, 20), "20")
    data, expected = SAID[case]
    if data is None:
        (tmp_path / LATEST).unlink()
    else:
        (tmp_path / LATEST).write_bytes(data)
    latest = store.latest()
    assert (latest.step_id if latest else None) == expected
    assert [held.step_id.step for held in PersistentStore(tmp_path).steps()] == [10, 20]
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(read_only=True)) as plain:
        assert sorted(plain.all_steps()) == [10, 20]
    save(store, Attempt(generation, 30, "default"), small_state(30))
    latest = store.latest()
    assert latest is not None
    assert latest.step_id == StepId(1, 30)
