"""What one process saves beside the arrays, as one JSON text: plain values, and the files of small items.

The text is opaque to whoever carries it (manifests, partners, the persistent tier) until it is read back here.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from emergency_ckpt.errors import CorruptDataError

_FILE_PATH = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*")


@dataclasses.dataclass(frozen=True)
class Item:
    """One item as its handler wrote it in this process: file contents by path below the item's directory.

    Attributes:
      handler: name of the handler's class, for the step's metadata.
      files: empty where the handler leaves the writing to another process.
    """

    handler: str
    files: Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class ProcessExtras:
    """The extras of one process.

    Attributes:
      values: plain values (JSON) by name. items: by name.
      same_everywhere: the names of values that are the same on all processes.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    items: Mapping[str, Item] = dataclasses.field(default_factory=dict[str, Item])
    same_everywhere: frozenset[str] = frozenset()

    def to_text(self) -> str:
        items = {
            name: {"handler": item.handler, "files": {p: _to_text(data) for p, data in item.files.items()}}
            for name, item in self.items.items()
        }
        said = {"global": sorted(self.same_everywhere)} if self.same_everywhere else {}
        return json.dumps({"values": dict(self.values), "items": items, **said}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> ProcessExtras:
        """Raises CorruptDataError for what `to_text` did not write, paths that leave the item included."""
        try:
            raw = json.loads(text)
            items = {
                str(name): Item(
                    str(item["handler"]), {_path(p): _from_text(t) for p, t in item["files"].items()}
                )
                for name, item in raw["items"].items()
            }
            values = dict(raw["values"])
            same = frozenset(map(str, raw.get("global", ())))
            if not same <= values.keys():
                raise ValueError(f"{sorted(same - values.keys())[:3]} are said to be global and are not there")
            return cls(values, items, same)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptDataError(f"saved extras are damaged or of another version: {error}") from error


def joined_items(parts: Iterable[ProcessExtras]) -> dict[str, Item]:
    """The items of several processes as one directory each; of files with one path, the first one counts."""
    joined: dict[str, Item] = {}
    for part in parts:
        for name, item in part.items.items():
            earlier = joined.get(name)
            files = {**item.files, **earlier.files} if earlier else dict(item.files)
            joined[name] = Item(earlier.handler if earlier else item.handler, files)
    return joined


def _path(path: str) -> str:
    if not _FILE_PATH.fullmatch(path) or ".." in path.split("/"):
        raise ValueError(f"{path!r} is no path below an item's directory")
    return path


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _from_text(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
