"""Items in a job of several processes: those that one process writes for all, and those of each process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.items_job import save_and_lose, save_datasets_of_unequal_size
from tests.integration.processes import run_job
from tests.servers.environment import use_gcs
from tests.servers.fake_gcs import FakeGcs, running


def test_every_process_gets_its_items_back_whatever_was_lost(tmp_path: Path) -> None:
    told = run_job(save_and_lose, 4, str(tmp_path))
    for process, lives in enumerate(told):
        for life, step in (("slice_lost", 12), ("all_lost", 10)):
            found = lives[life]
            assert found["step"] == step
            assert found["about"] == {"step": step}
            assert found["position"] == 100 * step + process
            assert found["dataset"] == {"data": step}
        # The restore that failed on one process had made the slots of slice 0 whole again.
        assert lives["slice_lost"]["source"] == "own slot"
        assert lives["all_lost"]["source"].startswith(("persistent", "broadcast"))
    errors = [lives["error"] for lives in told]
    assert errors[1].startswith("ExtrasError: item 'position' cannot be restored: its handler")
    for process in (0, 2, 3):
        assert errors[process].startswith("PeerFailedError: process 1: item 'position' cannot be restored")
    item = tmp_path / "bucket/10/position"
    assert sorted(path.name for path in item.iterdir()) == [f"process_{p}.txt" for p in range(4)]


def test_a_dataset_that_is_too_large_on_one_process_only_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(server := FakeGcs("datasets")):
        use_gcs(monkeypatch, server.endpoint)
        places = {"in-files": str(tmp_path / "datasets"), "in-a-bucket": "gs://datasets/of-this-run"}
        told = run_job(save_datasets_of_unequal_size, 2, str(tmp_path), places)
        objects = server.buckets.objects("datasets")
    for place in places:
        assert [found[place]["dataset"] for found in told] == [1000, 1001]
        assert [found[place]["latest"] for found in told] == [12, 12]
        assert all("Elsewhere it is kept for the steps [10]" in found[place]["error"] for found in told)
    names = ["_CHECKPOINT_METADATA", "commit_success.txt", "default/process_0.txt", "default/process_1.txt"]
    assert sorted(objects) == [f"of-this-run/10/{name}" for name in names]
