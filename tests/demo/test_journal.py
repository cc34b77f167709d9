"""Journals keep every fact that was written whole, whenever the process was killed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.demo.journal import Finished, Journal, Life, Restored, Started, Trained, read_lives

STARTED = Started(1.5, process=2, attempt=1)
RESTORED = Restored(2.5, 10, "why", "own slot", 0.25, 1000)
FINISHED = Finished(9.5, 12, {"w[0:2]": "ab"}, {"next_index": 12})


def write(directory: Path, *facts: Started | Restored | Trained | Finished, process: int = 2) -> Path:
    before = set(directory.glob("*"))
    journal = Journal(directory, process)
    for fact in facts:
        journal.write(fact)
    journal.close()
    (path,) = set(directory.glob("*")) - before
    return path


def test_a_life_is_read_as_it_was_written(tmp_path: Path) -> None:
    steps = (Trained(3.0, 11, 0.1 + 0.2), Trained(4.0, 12, 1e-300))
    write(tmp_path / "new", STARTED, RESTORED, *steps, FINISHED)
    assert read_lives(tmp_path / "new") == (Life(STARTED, RESTORED, steps, FINISHED),)


def test_each_start_has_a_journal_of_its_own_and_the_oldest_comes_first(tmp_path: Path) -> None:
    write(tmp_path, Started(20.0, 0, 1), process=0)
    write(tmp_path, Started(10.0, 0, 0), process=0)
    write(tmp_path, process=1)
    assert [life.started.attempt for life in read_lives(tmp_path)] == [0, 1]


def test_no_directory_yet_means_no_lives(tmp_path: Path) -> None:
    assert read_lives(tmp_path / "none") == ()


@given(data=st.data())
def test_a_journal_cut_anywhere_holds_the_facts_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    trained = [Trained(float(step), step, math.pi * step) for step in range(1, 4)]
    path = write(directory, STARTED, RESTORED, *trained)
    whole = path.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(cut)
    lives = read_lives(directory)
    lines = cut.count(b"\n")
    if lines == 0:
        assert lives == ()
    else:
        assert lives[0].restored == (RESTORED if lines > 1 else None)
        assert list(lives[0].trained) == trained[: max(0, lines - 2)]
