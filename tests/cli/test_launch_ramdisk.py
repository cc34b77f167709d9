"""The default ramdisk goes with its job, and with the next job when its own was killed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from emergency_ckpt.cli.launcher.ramdisk import temporary_ramdisk


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
