"""The default ramdisk goes with its job, and with the next job when its own was killed."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from emergency_ckpt.cli.launcher.ramdisk import remove_tree, temporary_ramdisk


def test_a_ramdisk_is_gone_after_use_also_after_an_error(tmp_path: Path) -> None:
    with temporary_ramdisk(tmp_path) as path:
        (path / "process_0").mkdir()
    with pytest.raises(KeyError), temporary_ramdisk(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_ramdisk_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    abandoned = tmp_path / "emergency-ckpt-ramdisk-old"
    (abandoned / "process_0").mkdir(parents=True)
    of_others = tmp_path / "something-else"
    of_others.mkdir()
    with temporary_ramdisk(tmp_path) as first, temporary_ramdisk(tmp_path) as second:
        assert {first, second, of_others} == set(tmp_path.iterdir())


def test_launchers_that_start_together_do_not_take_each_others_ramdisk(tmp_path: Path) -> None:
    wrong = []

    def use() -> None:
        for _ in range(200):
            with temporary_ramdisk(tmp_path) as path:
                (path / "mine").touch()
                if [entry.name for entry in path.iterdir()] != ["mine"]:
                    wrong.append(path)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def test_a_tree_is_removed_while_others_add_and_remove_files_in_it(tmp_path: Path) -> None:
    for number in range(30):
        tree = tmp_path / f"tree_{number}"
        (tree / "inner").mkdir(parents=True)
        started = threading.Event()

        def come_and_go(inner: Path = tree / "inner", started: threading.Event = started) -> None:
            for file in range(400):
                with contextlib.suppress(OSError):
                    (inner / str(file)).touch()
                    (inner / str(file - 3)).unlink()
                started.set()

        other = threading.Thread(target=come_and_go)
        other.start()
        try:
            assert started.wait(10)
            remove_tree(tree)
        finally:
            other.join()
        assert not tree.exists()


def test_a_tree_that_is_not_there_or_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remove_tree(tmp_path / "nothing")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError):
        remove_tree(file)
