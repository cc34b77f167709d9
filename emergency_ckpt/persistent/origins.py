"""Whether a committed directory is a step of this run, or one that somebody copied here from another run.

The nonce in its side file's name is that of one of this run's generations: then nothing is read. Otherwise the
side file says its run. A directory of which neither can be told is taken for what its name says.
"""

from __future__ import annotations

from absl import logging

from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.records import read_generation
from emergency_ckpt.persistent.step_files import read_side_info, side_file_name


class Origins:
    """What is known of the directories of one root. Each is looked into once. Thread-safe."""

    def __init__(self, files: Files, run_id_file: str, generations: str) -> None:
        """Where the run's id, and the records of its generations, lie in the root."""
        self._files = files
        self._run_id_file = run_id_file
        self._generations = generations
        self._nonces: dict[int, str] = {}
        self._foreign: dict[tuple[str, int, str], bool] = {}

    def is_foreign(self, directory: str, generation: int, nonce: str) -> bool:
        """Whether the step in `directory`, with this in its side file's name, is of another run.

        Raises PersistentStoreError.
        """
        if self._nonce_of(generation) == nonce:
            return False
        key = (directory, generation, nonce)
        if key not in self._foreign:
            saved_by, run = self._run_of(directory, generation, nonce), self._own_run()
            if saved_by is None or run is None:
                return False
            self._foreign[key] = saved_by != run
            if saved_by != run:
                logging.warning(
                    "%s is a step of the run %s, this directory is of the run %s: it counts as older than every"
                    " step of this run, as those of other programs do. Delete it if it is here by mistake.",
                    self._files.locate(directory),
                    saved_by,
                    run,
                )
        return self._foreign[key]

    def _nonce_of(self, generation: int) -> str | None:
        if generation not in self._nonces:
            path = f"{self._generations}/{generation:08d}.json"
            try:
                self._nonces[generation] = read_generation(self._files, path).nonce
            except (FileNotFoundError, CorruptDataError):
                return None
        return self._nonces[generation]

    def _run_of(self, directory: str, generation: int, nonce: str) -> str | None:
        try:
            side = read_side_info(self._files.below(directory), [side_file_name(generation, nonce)])
        except CorruptDataError:  # Whoever reads the step finds out, and says so.
            return None
        return side.run_id if side else None

    def _own_run(self) -> str | None:
        try:
            return self._files.read(self._run_id_file).decode(errors="replace").strip()
        except (FileNotFoundError, CorruptDataError):
            return None
