"""The demo's own keys: they stand in the same file as the checkpoint flags and are checked as those are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emergency_ckpt.errors import ConfigError

CONFIG_FILE = Path(__file__).with_name("demo.yml")

_PREFIX = "demo_"


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What to train; see demo.yml for what each key means."""

    steps: int
    batch_size: int
    seed: int
    journal_directory: Path

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> DemoOptions:
        """Reads the `demo_` keys among `Config.other_keys`; raises ConfigError for what is missing or wrong."""
        directory = _read(keys, "journal_directory", str)
        if not directory:
            raise ConfigError("demo_journal_directory is empty; name the directory for the processes' journals")
        options = cls(
            steps=_read(keys, "steps", int),
            batch_size=_read(keys, "batch_size", int),
            seed=_read(keys, "seed", int),
            journal_directory=Path(directory),
        )
        for name in ("steps", "batch_size"):
            if getattr(options, name) < 1:
                raise ConfigError(f"{_PREFIX}{name} is {getattr(options, name)}; it must be at least 1")
        return options


def _read(keys: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    key = _PREFIX + name
    if key not in keys:
        raise ConfigError(f"{key} is not set; start from {CONFIG_FILE}, which sets every key of the demo")
    value = keys[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; expected {'a whole number' if kind is int else 'text'}")
    return value
