"""What every kind of store does alike: a file system, a real S3 server (Ceph's RGW), and a fake of GCS."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
import tensorstore as ts

from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.arrays import new_context, ocdbt
from emergency_ckpt.persistent.files import Entry, LocalFiles, ObjectFiles
from emergency_ckpt.persistent.object_store.probe import Honoured, probe_conditional_puts
from tests.persistent.object_store.conftest import Place

pytestmark = pytest.mark.server

_T = TypeVar("_T")
NAMES = [
    "plain",
    "with space",
    "per%cent%41",
    "plus+sign",
    "ümlaut-Ж-火-🔥",
    "a=b&c",
    "~tilde'(x)!",
    "d.o.t",
    "@:,;$",
]


def at_once(count: int, call: Callable[[int], _T]) -> list[_T]:
    """What `call` returns in that many threads, which begin together."""
    start = threading.Barrier(count)

    def begin(number: int) -> _T:
        start.wait(30)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def keys_below(place: Place, prefix: str = "") -> list[str]:
    begin = place.prefix + prefix
    return sorted(i.key[len(begin) :] for page in place.store.list_pages(begin) for i in page.objects)


def test_what_was_put_is_read_whole_and_in_ranges(place: Place) -> None:
    store, key = place.store, f"{place.prefix}a/b"
    version = store.put(key, b"0123456789")
    found = store.head(key)
    assert found is not None
    assert (found.key, found.size, found.version) == (key, 10, version)
    assert store.read(key) == b"0123456789"
    ranges = [(0, 10), (0, 1), (3, 7), (9, 10), (4, None), (8, 20), (10, 12), (12, None), (5, 5), (0, 0)]
    for start, stop in ranges:
        assert store.read(key, start, stop) == b"0123456789"[start:stop], (start, stop)
    newer = store.put(key, b"other bytes")
    assert newer != version
    assert store.read(key) == b"other bytes"
    store.put(key, b"")
    assert store.read(key) == b""
    empty = store.head(key)
    assert empty is not None
    assert empty.size == 0
    store.check()


def test_what_is_not_there_is_told_as_that(place: Place) -> None:
    store, key = place.store, f"{place.prefix}absent"
    assert store.head(key) is None
    for start, stop in ((0, None), (0, 5), (5, 5)):
        with pytest.raises(FileNotFoundError):
            store.read(key, start, stop)
    store.delete(key)
    store.delete_many([key, f"{key}/deeper"])
    assert keys_below(place) == []
    assert store.put_if_unchanged(key, b"x", "1") is None


def test_keys_come_back_letter_by_letter(place: Place) -> None:
    for name in NAMES:
        place.store.put(f"{place.prefix}{name}/{name}", name.encode())
    assert keys_below(place) == sorted(f"{name}/{name}" for name in NAMES)
    for name in NAMES:
        assert place.store.read(f"{place.prefix}{name}/{name}") == name.encode()
        assert keys_below(place, f"{name}/") == [name]
    place.store.delete_many(f"{place.prefix}{name}/{name}" for name in NAMES[1:])
    place.store.delete(f"{place.prefix}{NAMES[0]}/{NAMES[0]}")
    assert keys_below(place) == []


@pytest.mark.parametrize("key", ["", "/a", "a//b", "a/", "../a", "a/./b", "a\0b", "a\nb", "\ud800", "x" * 1025])
def test_hostile_keys_are_refused_before_anything_is_asked(place: Place, key: str) -> None:
    store = place.store
    calls = [
        store.head,
        store.read,
        store.delete,
        lambda k: store.put(k, b""),
        lambda k: store.delete_many([k]),
    ]
    calls += [lambda k: store.put_if_absent(k, b""), lambda k: store.put_if_unchanged(k, b"", "1")]
    for call in calls:
        with pytest.raises(PersistentStoreError, match="no object may be called"):
            call(key)


def test_of_many_threads_that_create_one_object_one_does(place: Place) -> None:
    for key in (f"{place.prefix}{number}" for number in range(5)):
        created = at_once(8, lambda n, k=key: place.store.put_if_absent(k, f"writer {n}".encode()))
        (winner,) = [n for n, version in enumerate(created) if version is not None]
        assert place.store.read(key) == f"writer {winner}".encode()
        assert place.store.put_if_absent(key, b"late") is None


CREATING = """
import sys
from emergency_ckpt.persistent.object_store.opening import open_files
files = open_files(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(*(n for n in range(20) if files.create(str(n), f"process {sys.argv[2]}".encode())))
"""


def test_of_many_processes_that_create_one_object_one_does(place: Place) -> None:
    url = f"{place.url}/{place.prefix}"
    command = [sys.executable, "-c", CREATING, url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(n)], **pipes) for n in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = at_once(4, lambda n: processes[n].communicate("go\n", timeout=60)[0])
    created = {n: [int(key) for key in text.split()] for n, text in enumerate(said)}
    assert sorted(itertools.chain(*created.values())) == list(range(20))
    for process, keys in created.items():
        for key in keys:
            assert place.store.read(f"{place.prefix}{key}") == f"process {process}".encode()


def test_of_many_that_replace_an_object_unless_it_changed_one_does(place: Place) -> None:
    store, key = place.store, f"{place.prefix}record"
    first = store.put_if_absent(key, b"first")
    assert first is not None
    replaced = at_once(8, lambda n: store.put_if_unchanged(key, f"writer {n}".encode(), first))
    (winner,) = [n for n, version in enumerate(replaced) if version is not None]
    assert store.read(key) == f"writer {winner}".encode()
    assert store.put_if_unchanged(key, b"stale", first) is None
    newer = replaced[winner]
    assert newer is not None
    assert store.put_if_unchanged(key, b"last", newer) is not None
    assert store.read(key) == b"last"


def test_a_listing_of_more_than_one_page_has_everything_and_all_of_it_is_deleted(place: Place) -> None:
    names = [f"{number // 100:02d}/{number:05d}" for number in range(1050)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: place.store.put(place.prefix + name, b"x"), names))
    assert keys_below(place) == names
    if not place.url.startswith("/"):
        assert len(list(place.store.list_pages(place.prefix))) > 1
    pages = list(place.store.list_pages(place.prefix, "/"))
    prefixes = [prefix for page in pages for prefix in page.prefixes]
    assert prefixes == [f"{place.prefix}{n:02d}/" for n in range(11)]
    assert all(not page.objects for page in pages)
    place.store.delete_many(place.prefix + name for name in names)
    assert keys_below(place) == []


def test_a_listing_with_a_delimiter_tells_names_of_one_level(place: Place) -> None:
    for name in ("a", "b/c", "b/d/e", "b.txt", "z"):
        place.store.put(place.prefix + name, b"1")
    (page,) = place.store.list_pages(place.prefix, "/")
    assert [i.key for i in page.objects] == [place.prefix + name for name in ("a", "b.txt", "z")]
    assert page.prefixes == (f"{place.prefix}b/",)
    (page,) = place.store.list_pages(f"{place.prefix}b/", "/")
    assert [i.key for i in page.objects] == [f"{place.prefix}b/c"]
    assert page.prefixes == (f"{place.prefix}b/d/",)


def test_a_large_object_arrives_as_it_was(place: Place) -> None:
    data = np.random.default_rng(0).bytes(64 * 1024**2)
    key = f"{place.prefix}large"
    assert place.store.put_if_absent(key, data) is not None
    assert place.store.read(key) == data
    assert place.store.read(key, 33_000_000, 33_000_100) == data[33_000_000:33_000_100]
    place.store.delete(key)


def test_a_store_that_keeps_its_word_is_found_to(place: Place) -> None:
    found = probe_conditional_puts(place.store, place.prefix)
    assert found.found is Honoured.YES, found.description
    assert found.can_create
    assert found.can_replace
    assert place.store.locate(place.prefix) in found.description
    assert keys_below(place) == []


def test_files_in_a_bucket_and_on_a_file_system_are_used_alike(place: Place) -> None:
    local = place.url.startswith("/")
    files = LocalFiles(place.url).below(place.prefix) if local else ObjectFiles(place.store, place.prefix[:-1])
    assert files.entries() == []
    files.make_directory("step/items")
    assert files.create("step/items/x", b"one")
    assert not files.create("step/items/x", b"two")
    files.write("step/marker", b"done")
    files.write("step/marker", b"done again")
    assert files.entries("step") == [Entry("items", True), Entry("marker", False)]
    assert files.entries() == [Entry("step", True)]
    step = files.below("step")
    assert step.read("items/x") == b"one"
    assert step.locate("items/x") == f"{place.url}/{place.prefix}step/items/x"
    assert files.entries("nothing") == []
    with pytest.raises(FileNotFoundError):
        step.read("absent")
    files.write("stepping", b"has a name that begins the same")
    files.delete_tree("step")
    files.delete_tree("step")
    assert files.entries() == [Entry("stepping", False)]


def test_tensorstore_and_we_see_the_same_objects(place: Place) -> None:
    kvstore = ts.KvStore.open(place.store.kvstore(place.prefix), context=new_context()).result(timeout=60)
    for name in NAMES:
        kvstore.write(f"theirs/{name}", name.encode()).result(timeout=60)
        place.store.put(f"{place.prefix}ours/{name}", name.encode())
    for name in NAMES:
        assert place.store.read(f"{place.prefix}theirs/{name}") == name.encode()
        assert kvstore.read(f"ours/{name}").result(timeout=60).value == name.encode()
    assert sorted(key.decode() for key in kvstore.list().result(timeout=60)) == keys_below(place)


def test_single_writer_array_stores_are_merged_into_one_that_reads_back(place: Place) -> None:
    files = ObjectFiles(place.store, place.prefix[:-1])
    context = new_context()
    rows = np.arange(4 * 300_000, dtype=np.float32).reshape(4, -1)
    spec = {
        "driver": "zarr3",
        "metadata": {
            "shape": list(rows.shape),
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 300_000]}},
        },
    }
    for part in range(4):
        kvstore = {**ocdbt(files.kvstore(f"item/ocdbt.process_n{part}")), "path": "w/"}
        array = ts.open({**spec, "kvstore": kvstore}, create=True, open=True, context=context).result(60)
        array[part].write(rows[part]).result(60)
    parent = ts.KvStore.open(ocdbt(files.kvstore("item")), context=context).result(60)
    transaction = ts.Transaction(atomic=True)
    for part in range(4):
        child = ts.KvStore.open(ocdbt(files.kvstore(f"item/ocdbt.process_n{part}")), context=context).result(60)
        child.experimental_copy_range_to(parent.with_transaction(transaction)).result(60)
    transaction.commit_async().result(60)
    kvstore = {**ocdbt(files.kvstore("item")), "path": "w/"}
    again = ts.open({**spec, "kvstore": kvstore}, open=True, context=new_context()).result(60)
    np.testing.assert_array_equal(again.read().result(60), rows)
    assert "manifest.ocdbt" in [entry.name for entry in files.entries("item")]
