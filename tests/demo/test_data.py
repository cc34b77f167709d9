"""The data pipeline: the same batches for the same seed, disjoint shares, a position that can be put back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.demo.data import CORPUS_BYTES, Windows, read_corpus, training_data

TEXT = np.frombuffer(bytes(range(256)) * 8, np.uint8)


def batches(count: int, *, process: int = 0, process_count: int = 1, seed: int = 0, length: int = 7):
    data = training_data(
        TEXT, length=length, batch_size=8, process=process, process_count=process_count, seed=seed
    )
    return [next(data) for _ in range(count)]


def test_every_interpreter_brings_text_to_train_on() -> None:
    corpus = read_corpus()
    assert corpus.dtype == np.uint8
    assert len(corpus) == CORPUS_BYTES
    assert b"def " in corpus.tobytes()


def test_the_corpus_is_the_sources_in_the_order_of_their_paths_without_tests(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/test/skipped.py", "site-packages/other.py", "c.txt", "zz.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"[{name}]")
    assert read_corpus(tmp_path).tobytes() == b"[b.py][zz.py][a/z.py]"
    assert read_corpus(tmp_path, limit_bytes=8).tobytes() == b"[b.py][z"


def test_a_directory_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_corpus(tmp_path)


@given(size=st.integers(2, 300), length=st.integers(1, 40))
def test_windows_cut_the_text_without_gaps_and_overlap_by_one(size: int, length: int) -> None:
    text = np.arange(size).astype(np.uint8)
    if size < length + 1:
        with pytest.raises(ValueError, match="has no window"):
            Windows(text, length)
        return
    windows = Windows(text, length)
    pieces = [windows[i] for i in range(len(windows))]
    assert {len(piece) for piece in pieces} == {length + 1}
    joined = np.concatenate([pieces[0][:1], *(piece[1:] for piece in pieces)])
    assert np.array_equal(joined, text[: len(joined)])
    assert len(text) - len(joined) < length


def test_a_seed_gives_the_same_batches_and_another_one_others() -> None:
    first, again, other = batches(5, seed=3), batches(5, seed=3), batches(5, seed=4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_processes_share_every_batch_without_overlap() -> None:
    # One epoch: as many batches as there are windows for.
    windows = (len(TEXT) - 1) // 63
    shares = [batches(windows // 8, process=p, process_count=4, length=63) for p in range(4)]
    assert all(batch.shape == (2, 64) for share in shares for batch in share)
    seen = [batch_row.tobytes() for share in shares for batch in share for batch_row in batch]
    every = Windows(TEXT, 63)
    wanted = [every[i].tobytes() for i in range(windows)]
    assert len(seen) == windows // 8 * 8
    assert all(seen.count(window) <= wanted.count(window) for window in set(seen))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8 windows does not divide over 3"):
        batches(1, process_count=3)


@settings(max_examples=20)
@given(before=st.integers(0, 70), after=st.integers(1, 5))
def test_the_position_goes_through_json_and_brings_back_what_follows(before: int, after: int) -> None:
    def fresh():
        return training_data(TEXT, length=31, batch_size=4, process=1, process_count=2, seed=5)

    data = fresh()
    for _ in range(before):
        next(data)
    position = json.loads(json.dumps(data.get_state()))
    expected = [next(data) for _ in range(after)]
    restored = fresh()
    restored.set_state(position)
    assert np.array_equal([next(restored) for _ in range(after)], expected)
