"""Servers that hang, break connections, or are busy: requests are cut and repeated, never for ever."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, cast

import pytest
import tensorstore as ts

from emergency_ckpt.errors import PersistentStoreError, StoreThrottledError, StoreUnreachableError
from emergency_ckpt.persistent.arrays import new_context, settle
from emergency_ckpt.persistent.object_store.operations import Limits, ObjectStore, Page
from tests.persistent.object_store.conftest import QUICK, Failing
from tests.servers.proxy import Fault, Kind, s3_error

pytestmark = pytest.mark.server

Operation = Callable[[ObjectStore, str], Any]
OPERATIONS: dict[str, Operation] = {
    "put": lambda store, key: store.put(key, b"new"),
    "put if absent": lambda store, key: store.put_if_absent(f"{key}.new", b"new"),
    "read": lambda store, key: store.read(key),
    "head": lambda store, key: store.head(key),
    "list": lambda store, key: list(store.list_pages(key)),
    "delete": lambda store, key: store.delete(key),
    "delete many": lambda store, key: store.delete_many([key]),
}
SLOW_DOWN = s3_error("SlowDown", 503, "Reduce your request rate.")


@pytest.fixture
def key(failing: Failing) -> str:
    """An object that is there."""
    key = f"{uuid.uuid4().hex}/object"
    failing.store.put(key, b"some content")
    return key


@pytest.mark.parametrize(
    "kind", [Kind.STALLED, Kind.RESET, Kind.ANSWER_LOST, Kind.ANSWERED], ids=lambda k: k.name
)
def test_what_fails_in_passing_is_repeated_until_it_succeeds(failing: Failing, key: str, kind: Kind) -> None:
    times = 1 if kind is Kind.STALLED else 2
    fault = Fault(kind, times, status=503, headers=SLOW_DOWN.headers, body=SLOW_DOWN.body)
    for name, operation in OPERATIONS.items():
        failing.store.put(key, b"some content")
        failing.proxy.fail(fault)
        result = operation(failing.store, key)
        assert len(failing.proxy.requests) > times, name
        assert name != "read" or result == b"some content"
        assert name != "put if absent" or result is not None
        if name == "list":
            pages = cast(list[Page], result)
            assert [i.key for page in pages for i in page.objects] == [key, f"{key}.new"]
        assert name not in ("delete", "delete many") or failing.store.head(key) is None
        failing.proxy.fail()


def test_what_never_stops_failing_ends_with_an_error_that_says_what_it_was(failing: Failing, key: str) -> None:
    cases = [
        (Fault(Kind.RESET, 100), StoreUnreachableError, r"no answer .*\(4 tries in"),
        (
            Fault(Kind.ANSWERED, 100, "", 503, SLOW_DOWN.headers, SLOW_DOWN.body),
            StoreThrottledError,
            "HTTP 503",
        ),
        (Fault(Kind.ANSWERED, 100, "", 500), PersistentStoreError, r"HTTP 500.*\(4 tries in"),
    ]
    for fault, expected, words in cases:
        for operation in OPERATIONS.values():
            failing.proxy.fail(fault)
            with pytest.raises(expected, match=words) as told:
                operation(failing.store, key)
            assert failing.store.locate(key) in str(told.value)
            assert failing.proxy.endpoint in str(told.value)


def test_a_server_that_hangs_ends_an_operation_after_its_total_time(failing: Failing, key: str) -> None:
    limits = Limits(attempt_seconds=0.3, total_seconds=1.0, attempts=50, pause_seconds=(0.01, 0.02))
    store = type(failing.store)(failing.store.bucket, limits)  # type: ignore[call-arg,attr-defined]
    failing.proxy.fail(Fault(Kind.STALLED, 1000))
    with pytest.raises(StoreUnreachableError, match=r"reading .* \(\d tries in"):
        store.read(key)
    assert 2 <= len(failing.proxy.requests) <= 6


def test_an_answer_that_breaks_off_is_not_taken_for_the_object(failing: Failing, key: str) -> None:
    failing.proxy.fail(Fault(Kind.ANSWER_CUT, 1, "GET"))
    assert failing.store.read(key) == b"some content"
    assert len(failing.proxy.requests) >= 2


def test_a_conditional_put_whose_answer_was_lost_counts_as_done_by_the_one_who_did_it(
    failing: Failing, key: str
) -> None:
    store = failing.store
    failing.proxy.fail(Fault(Kind.ANSWER_LOST))
    created = store.put_if_absent(f"{key}.created", b"x")
    found = store.head(f"{key}.created")
    assert created is not None
    assert found is not None
    assert created == found.version
    failing.proxy.fail(Fault(Kind.ANSWER_LOST))
    replaced = store.put_if_unchanged(f"{key}.created", b"y", created)
    found = store.head(f"{key}.created")
    assert found is not None
    assert replaced == found.version
    # With the same bytes, by somebody else.
    store.put(f"{key}.other", b"x")
    failing.proxy.fail(Fault(Kind.RESET))
    assert store.put_if_absent(f"{key}.other", b"x") is None


def test_tensorstore_repeats_what_fails_in_passing_and_its_waits_end(failing: Failing, key: str) -> None:
    kvstore = ts.KvStore.open(failing.store.kvstore(f"{key}/"), context=new_context()).result(timeout=30)
    for fault in (Fault(Kind.RESET, 2), Fault(Kind.ANSWERED, 2, "", 503, SLOW_DOWN.headers, SLOW_DOWN.body)):
        failing.proxy.fail(fault)
        settle([kvstore.write("tensor", b"bytes")], "writing", 60)
        assert failing.store.read(f"{key}/tensor") == b"bytes"
    failing.proxy.fail(Fault(Kind.STALLED, 100))
    with pytest.raises(PersistentStoreError, match=r"writing: no answer from the store within 0.5 s"):
        settle([kvstore.write("tensor", b"other bytes")], "writing", 0.5)


def test_the_limits_of_an_operation_are_checked() -> None:
    assert QUICK.attempts == 4
    wrong: list[dict[str, Any]] = [{"attempt_seconds": 0}, {"attempts": 0}, {"pause_seconds": (0, 1)}]
    for given in wrong:
        with pytest.raises(ValueError, match="limits must be positive"):
            Limits(**given)
