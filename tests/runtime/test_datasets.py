"""Orbax's own manager of datasets, where it does not come to an end."""

from __future__ import annotations

import threading
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.runtime.datasets import DatasetDirectory


def test_nobody_waits_without_a_limit_for_a_save_of_a_dataset_that_hangs(tmp_path: Path) -> None:
    ends = threading.Event()

    def hang() -> None:
        ends.wait()

    options = orbax_emergency.CheckpointManagerOptions(
        async_options=ocp.options.AsyncOptions(timeout_secs=1, post_finalization_callback=hang)
    )
    datasets = DatasetDirectory(tmp_path / "datasets", options, None, None)
    datasets.save(5, ocp.args.JsonSave({"position": 5}), None, [])
    for call, what in (
        (datasets.wait, "waiting for Orbax to save"),
        (datasets.close, "closing Orbax's manager"),
    ):
        with pytest.raises(PersistentStoreError, match=f"{what} .*{tmp_path}/datasets: no answer within 1 s"):
            call()
    ends.set()
    datasets.wait()
    assert list(datasets.steps) == [5]
    datasets.close()
