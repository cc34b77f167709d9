"""Uploads of which nothing arrives are cut and can be made anew, and only so many of them are left behind."""

from __future__ import annotations

import pytest
import tensorstore as ts

from emergency_ckpt.errors import StoreUnreachableError
from emergency_ckpt.persistent import uploads
from emergency_ckpt.persistent.arrays import WriteOptions, new_context
from emergency_ckpt.persistent.uploads import check_cut, settle_upload
from tests.persistent.object_store.conftest import Failing
from tests.servers.proxy import Fault, Kind

pytestmark = pytest.mark.server


def test_a_stalled_upload_is_cut_long_before_its_time_limit_and_the_next_one_succeeds(
    failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_cut", [])
    monkeypatch.setattr(uploads, "_MOST_CUT", 2)
    options = WriteOptions(stall_seconds=0.2, timeout_seconds=600)
    kvstore = ts.KvStore.open(failing.store.kvstore("stalls/"), context=new_context()).result(timeout=30)
    failing.proxy.fail(Fault(Kind.STALLED, 10**6))
    for name in ("a", "b"):
        check_cut()
        with pytest.raises(StoreUnreachableError, match="uploading: nothing arrived for"):
            settle_upload([kvstore.write(name, b"bytes")], "uploading", options, 5, in_bucket=True)
    with pytest.raises(StoreUnreachableError, match="2 uploads that were cut"):
        check_cut()
    failing.proxy.fail()
    patient = WriteOptions(stall_seconds=30)
    settle_upload([kvstore.write("c", b"bytes")], "uploading", patient, 5, in_bucket=True)
    assert failing.store.read("stalls/c") == b"bytes"
