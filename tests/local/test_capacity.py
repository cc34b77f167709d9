"""Room within a memory limit is what the kernel would give, not what is unused at the moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from emergency_ckpt.local.capacity import memory_limit_room


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.max": "1000", "memory.current": "700"}, 300),
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 9\ninactive_file 500\n"}, 800),
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 900\n"}, 1000),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "inactive_file 50\n"}, 0),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 500\n"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "700",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            500,
        ),
        ({}, None),
    ],
)
def test_reclaimable_page_cache_is_room(tmp_path: Path, files: dict[str, str], room: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit_room(tmp_path, tmp_path / "no groups") == room


def in_groups(root: Path, groups: str, files: dict[str, str]) -> int | None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "own groups").write_text(groups)
    return memory_limit_room(root, root / "own groups")


@pytest.mark.parametrize(
    ("groups", "files", "room"),
    [
        (
            "0::/pod/container\n",
            {
                "pod/container/memory.max": "9000",
                "pod/container/memory.current": "100",
                "pod/memory.max": "5000",
                "pod/memory.current": "4000",
                "memory.max": "max",
                "memory.current": "4000",
            },
            1000,
        ),
        ("0::/\n", {"memory.max": "900", "memory.current": "100"}, 800),
        # A path of the host's that cannot be seen inside the container: its own group is the root there.
        ("0::/kubepods/x\n", {"memory.max": "900", "memory.current": "100"}, 800),
        (
            "5:cpu:/a\n4:cpuset,memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "500",
                "memory/job/memory.usage_in_bytes": "200",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "7000",
            },
            300,
        ),
    ],
)
def test_the_limits_of_the_own_group_and_of_those_above_it_count(
    tmp_path: Path, groups: str, files: dict[str, str], room: int
) -> None:
    assert in_groups(tmp_path, groups, files) == room
