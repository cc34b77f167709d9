"""Servers without conditional puts worth the name are found out before a commit relies on them."""

from __future__ import annotations

import pytest

from emergency_ckpt.persistent.object_store.probe import Honoured, probe_conditional_puts
from emergency_ckpt.persistent.object_store.s3 import S3Store
from tests.persistent.object_store.conftest import BUCKET, QUICK
from tests.servers.environment import use_s3
from tests.servers.fake_gcs import running
from tests.servers.proxy import WeakS3
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server

WEAKNESSES = {
    Honoured.IGNORED: WeakS3.ignores,
    Honoured.REFUSED: WeakS3.refuses,
    Honoured.NOT_ATOMIC: WeakS3.looks_first,
    Honoured.ONLY_IF_ABSENT: WeakS3.only_if_absent,
}


@pytest.mark.parametrize("expected", WEAKNESSES, ids=lambda expected: expected.name)
def test_what_a_server_makes_of_conditions_is_found_out(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, expected: Honoured
) -> None:
    keys = s3_with_bucket.users["owner"]
    weak = WeakS3(s3_with_bucket.endpoint, keys, WEAKNESSES[expected])
    use_s3(monkeypatch, weak.endpoint, keys)
    with running(weak):
        store = S3Store(BUCKET, QUICK)
        found = probe_conditional_puts(store, "probed/")
        assert found.found is expected, found.description
        assert found.can_create == (expected is Honoured.ONLY_IF_ABSENT)
        assert not found.can_replace
        assert f"at s3://{BUCKET}/probed are {expected.value}: " in found.description
        assert [page.objects for page in store.list_pages("probed/")] == [()]
