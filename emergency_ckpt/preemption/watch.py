"""Watches sources, each in a thread of its own, and delivers each distinct notice once.

A look that fails is repeated, later and later; nothing that a source does ends the watch. Of the same trouble
one line is logged, and one of a source that is switched off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from emergency_ckpt.core.jitter import JITTER
from emergency_ckpt.core.trouble import Trouble
from emergency_ckpt.preemption.notice import Known, Notice
from emergency_ckpt.preemption.source import NotHereError, Source, SourceError

CLOSE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0
_log = logging.getLogger("emergency_ckpt.preemption")


class Watch:
    """Begins at construction, and ends with `close`.

    Args:
      deliver: called with each notice, by the thread of its source; one at a time. It raises nothing.
      first_pause_seconds: after the first failure of a source; the pause doubles with each that follows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        deliver: Callable[[Notice], None],
        first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
    ) -> None:
        self._sources = tuple(sources)
        self._deliver = deliver
        self._first_pause_seconds = first_pause_seconds
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._known = Known()
        self._watched = len(self._sources)
        self._threads = [
            threading.Thread(
                target=self._watch, args=(source,), name=f"emergency_ckpt {source.name}", daemon=True
            )
            for source in self._sources
        ]
        if self._sources:
            _log.info("notices are watched for: %s", ", ".join(source.name for source in self._sources))
        for thread in self._threads:
            thread.start()

    @property
    def watched(self) -> int:
        """How many sources were not switched off."""
        with self._guard:
            return self._watched

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Ends the looks that are running and waits for them; False where that took too long. Idempotent."""
        self._stop.set()
        for source in self._sources:
            source.close()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in self._threads if thread.is_alive()]
        if left:
            _log.warning("%s did not end within %g s", ", ".join(left), seconds)
        return not left

    def _watch(self, source: Source) -> None:
        trouble = Trouble()
        failures = 0
        while not self._stop.is_set():
            try:
                notice = source.look()
            except NotHereError as error:
                if not self._stop.is_set():
                    _log.info("%s is not watched: %s", source.name, error)
                break
            except Exception as error:  # Whatever a source does, it is looked at again.
                said = str(error) if isinstance(error, SourceError) else f"{type(error).__name__}: {error}"
                if trouble.is_new(said) and not self._stop.is_set():
                    _log.warning("%s: %s; it is tried again", source.name, said)
                pause = min(_LONGEST_PAUSE_SECONDS, self._first_pause_seconds * 2 ** min(failures, 10))
                failures += 1
            else:
                if trouble.is_over():
                    _log.info("%s answers again", source.name)
                failures, pause = 0, source.period_seconds
                if notice is not None:
                    self._tell(notice)
            self._stop.wait(pause * JITTER.uniform(0.8, 1.2))
        with self._guard:
            self._watched -= 1

    def _tell(self, notice: Notice) -> None:
        with self._guard:
            if not self._stop.is_set() and self._known.is_new(notice):
                self._deliver(notice)
