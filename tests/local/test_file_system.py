"""Slots that do not lie in memory are said once at start, by the name of the file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.local.file_system import file_system_type, slow_warning
from tests.local.namespaces import run_in_namespace
from tests.local.test_store import Directory, save


def mounts(tmp_path: Path, *lines: tuple[str, str, str]) -> Path:
    """A file like /proc/self/mountinfo: (device, mount point, type) per line."""
    text = [
        f"{i} 1 {device} / {point} rw,relatime shared:1 - {kind} none rw\n"
        for i, (device, point, kind) in enumerate(lines, 30)
    ]
    path = tmp_path / "mountinfo"
    path.write_text("".join(text))
    return path


@pytest.fixture
def device(tmp_path: Path) -> str:
    status = os.stat(tmp_path)
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"


def test_the_deepest_mount_of_the_directorys_own_device_counts(tmp_path: Path, device: str) -> None:
    table = mounts(
        tmp_path,
        (device, "/", "ext4"),
        (device, str(tmp_path.parent), "xfs"),
        (device, str(tmp_path.parent), "tmpfs"),
        ("9:99", str(tmp_path), "hidden"),
        (device, str(tmp_path / "below"), "nfs4"),
    )
    assert file_system_type(tmp_path, table) == "tmpfs"


def test_mount_points_with_spaces_are_understood(tmp_path: Path, device: str) -> None:
    spaced = tmp_path / "a b"
    spaced.mkdir()
    table = mounts(tmp_path, (device, "/", "ext4"), (device, str(spaced).replace(" ", "\\040"), "tmpfs"))
    assert file_system_type(spaced, table) == "tmpfs"


def test_a_table_that_says_nothing_gives_no_warning(tmp_path: Path) -> None:
    assert file_system_type(tmp_path, tmp_path / "absent") is None
    (tmp_path / "odd").write_text("\n1 2 3\nno fields - x\n")
    assert file_system_type(tmp_path, tmp_path / "odd") is None


def test_the_warning_names_the_file_system_and_what_it_means(tmp_path: Path) -> None:
    kind = file_system_type(tmp_path)
    if kind in ("tmpfs", "ramfs", None):
        pytest.skip(f"temporary files lie on {kind} here")
    held = Directory(tmp_path)
    save(held.open(), StepId(1, 1))
    save(held.open(), StepId(1, 2))
    held.close()
    assert len(held.messages) == 2, "once per start"
    assert f"lies on {kind}, not on a tmpfs" in held.messages[0]
    assert "outlive a reboot" in held.messages[0]


def in_memory(root: Path) -> None:
    from namespaces import mount_tmpfs

    for kind in ("tmpfs", "ramfs"):
        mount_tmpfs(root, "mode=0700", kind)
        assert slow_warning(root) is None


def test_there_is_no_warning_in_memory(ramdisk: Path) -> None:
    run_in_namespace(in_memory, ramdisk)
