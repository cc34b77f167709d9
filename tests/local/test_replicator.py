"""Files of GKE's replicator in the local directory are refused by name; ours, and the platform's, are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.replicator import refuse_replicator


@pytest.mark.parametrize(
    "name",
    [
        "replicator.yaml",
        "replicator.yaml.tmp",
        "replicator.prerestore",
        "replicator.errors",
        "replicator.failed",
        "my-run-s120-n3-w3.restore",
        "my-run-s120-n3-w3.data",
        "my-run-s120-n3-w3",
    ],
)
def test_each_file_of_the_replicator_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(LocalDirectoryError, match=f"it holds {name}.*initialize_distributed.*remove these"):
        refuse_replicator(tmp_path)


def test_a_checkpoint_that_it_restored_is_a_link_with_the_number_of_its_step(tmp_path: Path) -> None:
    (tmp_path / "120").mkdir()  # Orbax's emergency manager has directories.
    refuse_replicator(tmp_path)
    (tmp_path / "140").symlink_to("/repl/0/my-run-s140-n3-w3.data")
    with pytest.raises(LocalDirectoryError, match="it holds 140"):
        refuse_replicator(tmp_path)


def test_what_others_keep_there_is_not_taken_for_its_files(tmp_path: Path) -> None:
    for name in ("jax-init-info.txt", "notes.yaml", "my-run-s1", "a-n1-w2.restore", "lost+found"):
        (tmp_path / name).touch()
    (tmp_path / "emergency_ckpt").mkdir()
    refuse_replicator(tmp_path)
