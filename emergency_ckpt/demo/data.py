"""The demo's data: the Python standard library's own sources, a byte a token, read through grain.

The batch of a step depends only on the seed, the step and the process's place among the processes, and the
iterator's `get_state()` is all that has to be saved to go on from there.
"""

from __future__ import annotations

import os
import pathlib
import sysconfig
from collections.abc import Iterator

import grain
import numpy as np

CORPUS_BYTES = 4 * 1024 * 1024

_LEFT_OUT = frozenset({"site-packages", "test", "tests", "idle_test"})


def read_corpus(
    directory: pathlib.Path | None = None, limit_bytes: int = CORPUS_BYTES
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The first `limit_bytes` of the Python sources under `directory`, in the order of their paths, as uint8.

    Args:
      directory: where to look; the standard library of this interpreter by default.
      limit_bytes: how much text is enough.
    Raises:
      FileNotFoundError: `directory` holds no Python source.
    """
    directory = directory or pathlib.Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in _sources(directory):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if not text:
        raise FileNotFoundError(f"no Python sources under {directory}: the demo has nothing to train on")
    return np.frombuffer(bytes(text[:limit_bytes]), np.uint8)


def _sources(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every Python source below `directory`, in one order everywhere; what is left out is not entered."""
    for folder, below, files in os.walk(directory):
        below[:] = sorted(set(below) - _LEFT_OUT)
        yield from (pathlib.Path(folder, name) for name in sorted(files) if name.endswith(".py"))


class Windows:
    """A grain data source: the text cut into windows of `length + 1` bytes that overlap by one.

    A window's first `length` bytes are the input of a prediction, its last `length` bytes the answer.
    """

    def __init__(self, text: np.ndarray[tuple[int], np.dtype[np.uint8]], length: int) -> None:
        self._text = text
        self._length = length
        if not len(self):
            raise ValueError(f"a text of {len(text)} bytes has no window of {length + 1} bytes")

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        at = index * self._length
        return self._text[at : at + self._length + 1]


def training_data(
    text: np.ndarray[tuple[int], np.dtype[np.uint8]],
    *,
    length: int,
    batch_size: int,
    process: int,
    process_count: int,
    seed: int,
) -> grain.DatasetIterator[np.ndarray]:
    """This process's share of every batch: uint8 of shape (batch_size / process_count, length + 1).

    All processes shuffle alike and each takes its own windows, so no window is read by two of them.
    It never ends: every epoch is shuffled anew.
    """
    if batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} windows does not divide over {process_count} processes")
    windows = grain.MapDataset.source(Windows(text, length)).seed(seed).shuffle().repeat()
    share = windows[process::process_count].batch(batch_size // process_count)
    return iter(share.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
