"""Layouts that ramdisks still hold steps of and that are not the job's: each is sent to process 0 once.

Inventories name layouts by hash. Where a job starts with another state or shape, the first process to find a
layout publishes it; where nothing changed, nothing is sent.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from datetime import timedelta

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.jaxio.layouts import describe_mismatch
from emergency_ckpt.local.store import LocalStore


def publish_layouts(coordinator: Coordinator, key: str, local: LocalStore, holdings: Iterable[Holding]) -> None:
    """Puts the layouts of these holdings beneath `key`, but for the job's own and those that are there already.

    Every process calls it before it contributes its inventory.
    """
    for layout_hash in sorted({holding.layout for holding in holdings} - {local.layout.hash}):
        if coordinator.increment(f"{key}/{layout_hash}/finders") == 1:
            content = zlib.compress(local.saved_layout(layout_hash).to_bytes())
            coordinator.put(f"{key}/{layout_hash}/layout", content)


def fetch_layouts(
    coordinator: Coordinator, key: str, inventories: Iterable[Inventory], wanted: Layout, timeout: timedelta
) -> dict[str, OtherLayout]:
    """What was published beneath `key`, compared with the layout that is wanted; the keys are deleted.

    Process 0 calls it when it has all inventories.
    """
    named = {holding.layout for inventory in inventories for holding in inventory.holdings} - {wanted.hash}
    found: dict[str, OtherLayout] = {}
    for layout_hash in sorted(named):
        content = coordinator.get(f"{key}/{layout_hash}/layout", timeout)
        layout = Layout.from_bytes(zlib.decompress(content))
        found[layout_hash] = OtherLayout(layout, tuple(describe_mismatch(layout, wanted)))
    if named:
        coordinator.delete(key)
    return found
