"""Merging the stores of an attempt's writers into the one array store that a step has.

Only the parts' trees are copied, not their data, into an empty store, in one transaction: nothing of another
attempt can fill a hole. Its root is made in memory: the committer decides when, and over what, it is put.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorstore as ts

from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.arrays import ocdbt, settle
from emergency_ckpt.persistent.attempts import Attempt, part_store_name
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.step_files import OCDBT_MANIFEST

_NODES = ("value_data_prefix", "btree_node_data_prefix", "version_tree_node_data_prefix")


class Merge:
    """The merged store of one attempt. `context` is new: the root lies in its memory."""

    def __init__(self, files: Files, attempt: Attempt, context: ts.Context, timeout_seconds: float) -> None:
        self._files = files
        self._attempt = attempt
        self._context = context
        self._timeout_seconds = timeout_seconds
        self._root = {"driver": "memory", "path": OCDBT_MANIFEST}
        # Parts and the whole must be of one store for TensorStore to copy trees.
        self._base: dict[str, Any] = {
            "driver": "kvstack",
            "layers": [
                {"base": files.kvstore(attempt.item)},
                {"exact": OCDBT_MANIFEST, "base": self._root},
            ],
        }
        nodes = f"{part_store_name(attempt, 'merged')}/d/"
        self._spec = ocdbt(self._base) | dict.fromkeys(_NODES, nodes)

    def merge(self, stores: Sequence[str]) -> bytes:
        """Merges the stores of these names; returns the root of the result.

        Raises CorruptDataError, PersistentStoreError.
        """
        what = f"merging {len(stores)} parts of {self._attempt}"
        children, target, transaction = self._open(stores, what)
        copies = [child.experimental_copy_range_to(target) for child in children]
        settle(copies, what, self._timeout_seconds)
        settle([transaction.commit_async()], what, self._timeout_seconds)
        memory = settle([ts.KvStore.open(self._root, context=self._context)], what, self._timeout_seconds)[0]
        found = settle([memory.read("")], what, self._timeout_seconds)[0]
        if found.state != "value":
            raise PersistentStoreError(f"{what}: TensorStore has made no {OCDBT_MANIFEST}")
        return found.value

    def check(self, expected: int) -> None:
        """Counts the keys: every chunk and every array's metadata must have arrived."""
        what = f"checking the merged {self._attempt}"
        merged = settle([ts.KvStore.open(self._spec, context=self._context)], what, self._timeout_seconds)[0]
        keys = settle([merged.list()], what, self._timeout_seconds)[0]
        if len(keys) != expected:
            raise CorruptDataError(
                f"{self._attempt}: {self._files.locate(self._attempt.item)} holds {len(keys)} chunks and array"
                f" descriptions, expected {expected}. Write the step again with another attempt."
            )

    def _open(self, stores: Sequence[str], what: str) -> tuple[list[Any], Any, Any]:
        opened = settle(
            (
                ts.KvStore.open(spec, context=self._context)
                for spec in (
                    self._spec,
                    *(ocdbt({**self._base, "path": f"{name}/"}) for name in stores),
                )
            ),
            what,
            self._timeout_seconds,
        )
        transaction = ts.Transaction(atomic=True)
        return opened[1:], opened[0].with_transaction(transaction), transaction
