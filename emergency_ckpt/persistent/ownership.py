"""Whose an attempt is: of several that carry out the committer's share of one attempt, who may give it up.

It is the first that began, until one of them has the claim; then it is that one. Only he abandons it.
"""

from __future__ import annotations

import uuid

from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.step_files import CLAIM_FILE, PARTS_DIRECTORY
from emergency_ckpt.persistent.store import PersistentStore

# It goes with the markers of the parts.
_OWNER_FILE = f"{PARTS_DIRECTORY}/owner"


class Ownership:
    """One who carries out the committer's share. `claim`: what `commit` is given, so that it is known as his.

    All of it raises PersistentStoreError.
    """

    def __init__(self, store: PersistentStore, attempt: Attempt) -> None:
        self.claim = uuid.uuid4().hex.encode()
        self._records = store.attempt_records(attempt)
        self._is_first = self._records.create(_OWNER_FILE, self.claim)

    def is_mine(self) -> bool:
        """Whether this one may abandon the attempt."""
        try:
            return self._records.read(CLAIM_FILE) == self.claim
        except FileNotFoundError:
            return self._is_first
