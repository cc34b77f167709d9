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
