"""What was found out about a persistent directory, and how that is shown. Nothing is asked of a store here."""

from __future__ import annotations

import dataclasses
import enum
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 96


class Level(enum.Enum):
    """How a finding is to be taken. UNKNOWN: it was not allowed to look, or the server does not tell."""

    OK = "ok"
    UNKNOWN = "?"
    WARN = "warn"
    FAIL = "FAIL"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried or looked at.

    Attributes:
      check: what it was, in a word or two.
      said: what was found. fix: what to do about it.
      figures: measured numbers by name, with units in the names.
    """

    check: str
    level: Level
    said: str
    fix: str = ""
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """All findings about one directory. `server` and `credentials` say where and how, without secrets."""

    location: str
    server: str
    credentials: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        return any(finding.level is Level.FAIL for finding in self.findings)

    @property
    def verdict(self) -> str:
        counts = {level: sum(f.level is level for f in self.findings) for level in Level}
        if self.failed:
            return f"{counts[Level.FAIL]} of {len(self.findings)} checks FAILED: a job cannot rely on it"
        warned = f", {counts[Level.WARN]} with a warning" if counts[Level.WARN] else ""
        unknown = f", {counts[Level.UNKNOWN]} could not be looked at" if counts[Level.UNKNOWN] else ""
        return f"{len(self.findings)} checks, none failed{warned}{unknown}"

    def to_json(self) -> dict[str, Any]:
        return {
            "location": self.location,
            "server": self.server,
            "credentials": self.credentials,
            "ok": not self.failed,
            "verdict": self.verdict,
            "findings": [
                {
                    "check": finding.check,
                    "level": finding.level.value,
                    "said": finding.said,
                    "fix": finding.fix,
                    "figures": dict(finding.figures),
                }
                for finding in self.findings
            ],
        }

    def lines(self) -> Iterator[str]:
        """A table for people."""
        at = f" at {self.server}" if self.server else ""
        by = f", credentials: {self.credentials}" if self.credentials else ""
        yield f"{self.location}{at}{by}"
        width = max((len(finding.check) for finding in self.findings), default=0)
        for finding in self.findings:
            head = f"{finding.level.value:<4}  {finding.check:<{width}}  "
            told = textwrap.wrap(finding.said, _WIDTH, break_long_words=False) or [""]
            told += textwrap.wrap(finding.fix, _WIDTH, initial_indent="-> ", subsequent_indent="   ")
            for number, line in enumerate(told):
                yield (head if number == 0 else " " * len(head)) + line
        yield self.verdict
