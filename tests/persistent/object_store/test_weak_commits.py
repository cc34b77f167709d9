"""Whole commits on servers without conditional puts worth the name: what a start finds out is made use of."""

from __future__ import annotations

import logging
import threading
import uuid

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.object_store.probe import Honoured
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.runtime.trying import try_directory
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics
from tests.persistent.object_store.conftest import BUCKET
from tests.persistent.object_store.test_probe import WEAKNESSES
from tests.persistent.object_store.test_steps import content_of
from tests.persistent.saving import layout_of, save, small_state, write_parts
from tests.servers.environment import use_s3
from tests.servers.fake_gcs import running
from tests.servers.proxy import WeakS3
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server

WEAK = (Honoured.IGNORED, Honoured.REFUSED, Honoured.NOT_ATOMIC)


@pytest.mark.parametrize("weakness", WEAK, ids=lambda weakness: weakness.name)
def test_what_a_start_found_is_used_by_commits_and_none_of_them_leaves_a_mixture(
    s3_with_bucket: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    weakness: Honoured,
) -> None:
    caplog.set_level(logging.INFO)
    keys = s3_with_bucket.users["owner"]
    weak = WeakS3(s3_with_bucket.endpoint, keys, WEAKNESSES[weakness])
    use_s3(monkeypatch, weak.endpoint, keys)
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with running(weak):
        try_directory(url, 20.0, CheckpointLogger(LogContext(None, None, 0, 0), Metrics()))
        assert f"conditional puts at {url} are {weakness.value}: " in caplog.text
        assert "committed by looking first and reading back" in caplog.text
        weak.requests.clear()
        commit_twice(PersistentStore(url))
        conditions = {name.lower() for put in weak.requests if put.method == "PUT" for name in put.headers}
        assert conditions.isdisjoint(("if-match", "if-none-match"))


def commit_twice(store: PersistentStore) -> None:
    """Two committers at once, and one after them if there is no step then."""
    generation = store.mint_generation(0, None)
    layout = layout_of(small_state())
    attempts = [Attempt(generation, 20, "default", ordinal) for ordinal in range(2)]
    parts = [write_parts(store, attempt, layout, small_state(3)) for attempt in attempts]
    begin = threading.Barrier(2)

    def race(number: int) -> None:
        begin.wait(60)
        try:
            commit(store, attempts[number], layout, parts[number])
        except (PersistentStoreError, CorruptDataError):
            store.abandon(attempts[number])

    threads = [threading.Thread(target=race, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        found = content_of(store)
    except CorruptDataError:  # Both were at it to the last moment: told, and never taken for a step.
        store.delete_step(store.steps()[0])
        found = content_of(store)
    if found != {StepId(1, 20): 3}:
        assert found == {}
        save(store, Attempt(generation, 20, "default", 2), small_state(4))
        assert content_of(store)[StepId(1, 20)] == 4
