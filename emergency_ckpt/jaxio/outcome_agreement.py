"""One agreed outcome per save, without a barrier: an atomic counter and a write-once key per save.

Invariant 2: the outcome is written once and read alike by all. `complete` is written by the process whose seal
was the last to be counted; `abandoned` by any process that cannot seal or has waited too long.
"""

from __future__ import annotations

import datetime
import threading

from emergency_ckpt.core.outcomes import OutcomeRecord, Progress
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import CoordinationTimeoutError
from emergency_ckpt.jaxio.coordination import Coordinator


class OutcomeAgreement:
    """The part of one process in agreeing on the saves of one generation, numbered 0, 1, 2, …

    Every process creates one per generation and takes part in every save: it calls `report_sealed` or `abandon`
    once, and `await_outcome` always, save after save. Reports and waits may come from different threads.
    Costs per save and process: two small writes and one wait; a few keys per process in all, however long
    the job runs.
    """

    def __init__(self, coordinator: Coordinator, generation: int) -> None:
        self._coordinator = coordinator
        self._prefix = f"outcome/{generation}"
        self._progress = Progress()
        # Held while this process reports, so that it never claims to know an outcome while its report on that
        # save is still under way: process 0 would delete the keys and the report would bring them back.
        self._reporting = threading.Lock()

    def keys_of(self, save: int) -> str:
        """The prefix of all keys of a save.

        What a caller puts beneath it, under names of its own, is deleted with it: once every process knows
        the outcome.
        """
        return f"{self._prefix}/save/{save}"

    def report_sealed(self, save: int) -> None:
        """This process has sealed `save` (its slot and whatever else the save needs are in place).

        A seal that comes after the save was abandoned changes nothing.
        Raises ValueError when the outcome of an earlier save is not known here yet.
        """
        with self._reporting:
            if not self._progress.may_report(save):
                return
            # Counted at most once even if the call fails midway: a second count could stand for a process
            # that has not sealed.
            self._progress = self._progress.report(save)
            self._publish(save)
            if self._coordinator.increment(f"{self.keys_of(save)}/sealed") == self._coordinator.process_count:
                record = OutcomeRecord(
                    Outcome.COMPLETE, self._coordinator.process_index, "every process sealed"
                )
                self._coordinator.put_once(self._outcome_key(save), record.to_bytes())

    def abandon(self, save: int, reason: str) -> None:
        """This process cannot seal `save`, so nobody waits for it any longer; an outcome that stands, stands.

        Raises ValueError when the outcome of an earlier save is not known here yet, or after `report_sealed`.
        """
        with self._reporting:
            if self._progress.may_report(save):
                self._progress = self._progress.report(save)
                self._publish(save)
                self._write_abandoned(save, reason)

    def await_outcome(self, save: int, timeout: datetime.timedelta) -> OutcomeRecord:
        """The outcome of `save`. After `timeout` this process abandons the save itself and returns what stands.

        The reason of a save that was abandoned so names the processes that had not reported on it.
        Raises ValueError when the outcome of an earlier save is not known here yet, or for a second call.
        """
        self._progress.check_next(save)
        try:
            record = OutcomeRecord.from_bytes(self._coordinator.get(self._outcome_key(save), timeout))
        except CoordinationTimeoutError:
            record = self._write_abandoned(save, self._who_is_missing(save, timeout))
        with self._reporting:
            self._progress = self._progress.learn(save)
            self._remove_old(save, record.outcome)
        return record

    def discard(self) -> None:
        """Deletes all keys of this generation. One process calls it, once no process takes part any longer."""
        self._coordinator.delete(self._prefix)

    def _publish(self, save: int) -> None:
        """Says that this process has reported on `save`; the same key each time, so nothing grows."""
        self._coordinator.put(f"{self._prefix}/reported/{self._coordinator.process_index}", str(save).encode())

    def _newest_reports(self) -> dict[int, int]:
        """Per process, the newest save it reported on (-1: none yet)."""
        found = self._coordinator.entries(f"{self._prefix}/reported")
        return {p: int(found.get(str(p), b"-1")) for p in range(self._coordinator.process_count)}

    def _outcome_key(self, save: int) -> str:
        return f"{self.keys_of(save)}/outcome"

    def _write_abandoned(self, save: int, reason: str) -> OutcomeRecord:
        record = OutcomeRecord(Outcome.ABANDONED, self._coordinator.process_index, reason)
        return OutcomeRecord.from_bytes(self._coordinator.put_once(self._outcome_key(save), record.to_bytes()))

    def _who_is_missing(self, save: int, timeout: datetime.timedelta) -> str:
        missing = [p for p, newest in self._newest_reports().items() if newest < save]
        return (
            f"process {self._coordinator.process_index} waited {timeout.total_seconds():g} s for every process "
            f"to seal; processes that had not reported: {missing}"
        )

    def _remove_old(self, save: int, outcome: Outcome) -> None:
        """Process 0 deletes the keys of saves whose outcome every process is known to have read."""
        if self._coordinator.process_index != 0:
            return
        if outcome is Outcome.COMPLETE:
            old = self._progress.removable([save])  # every process reported on this one
        elif save - self._progress.removed >= _ABANDONED_PER_REMOVAL and save % _ABANDONED_PER_REMOVAL == 0:
            old = self._progress.removable(self._newest_reports().values())
        else:
            return
        for each in old:
            self._coordinator.delete(self.keys_of(each))
        self._progress = self._progress.remove(old)


# After so many saves without a complete one, process 0 asks what everyone has read.
_ABANDONED_PER_REMOVAL = 64
