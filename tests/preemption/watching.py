"""A watch whose notices can be waited for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.source import Source
from emergency_ckpt.preemption.watch import Watch


class Heard:
    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self._changed = threading.Condition()

    def hear(self, notice: Notice) -> None:
        with self._changed:
            self.notices.append(notice)
            self._changed.notify_all()

    def wait(self, count: int = 1) -> list[Notice]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.notices) >= count, 20), self.notices
            return list(self.notices)

    def kinds(self, count: int) -> list[tuple[str, str]]:
        return sorted((notice.source, notice.kind) for notice in self.wait(count))


@contextlib.contextmanager
def watching(*sources: Source) -> Iterator[Heard]:
    heard = Heard()
    watch = Watch(sources, heard.hear, first_pause_seconds=0.02)
    try:
        yield heard
    finally:
        assert watch.close()


def wait_until_off(watch: Watch) -> None:
    """Waits until all sources of a watch are switched off."""
    deadline = time.monotonic() + 20
    while watch.watched:
        assert time.monotonic() < deadline
        time.sleep(0.02)
