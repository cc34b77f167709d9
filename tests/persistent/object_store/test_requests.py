"""How many requests a step takes: none for each leaf, or large jobs would exceed what stores answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.requests import kind_of
from emergency_ckpt.core.shards import Box
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.reader import BoxRequest
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.object_store.conftest import Failing
from tests.persistent.saving import assert_same, layout_of, write_parts

pytestmark = [pytest.mark.server, pytest.mark.parametrize("failing", ["s3"], indirect=True)]
LEAVES = 200


def test_leaves_cost_no_requests_of_their_own(failing: Failing) -> None:
    random = np.random.default_rng(1)
    arrays = {f"l{n:03}": random.integers(0, 256, 5000, np.uint8) for n in range(LEAVES)}
    layout = layout_of(arrays)
    store = PersistentStore(failing.store.locate("requests"), files=ObjectFiles(failing.store, "requests"))
    attempt = Attempt(store.mint_generation(0, None), 1, "default")

    def taken() -> Counter[str]:
        found = Counter(kind_of(request) for request in failing.proxy.requests)
        failing.proxy.requests.clear()
        return found

    taken()
    parts = write_parts(store, attempt, layout, arrays)
    written = taken()
    assert written["GET"] + written["HEAD"] <= 4 * len(parts)
    assert written["PUT"] <= 8 * len(parts)
    (step,) = [commit(store, attempt, layout, parts)]
    assert taken().total() < 80
    reader = store.open_step(step)
    found = {name: np.empty_like(array) for name, array in arrays.items()}
    reader.read_boxes([BoxRequest(name, Box.whole(out.shape), out) for name, out in found.items()])
    assert_same(found, arrays)
    assert taken().total() < LEAVES
