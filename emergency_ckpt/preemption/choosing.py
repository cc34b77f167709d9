"""Which sources are watched on this machine: those that were named, or those that seem to be there.

Finding out looks at a few small files and variables; nothing is asked for over a network.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.preemption import aws, gce
from emergency_ckpt.preemption.notice_file import NoticeFile
from emergency_ckpt.preemption.source import NotHereError, Source

AUTO, OFF = "auto", "off"
_GROUPS = {
    "aws": (aws.SPOT, aws.REBALANCE),
    "gce": (gce.PREEMPTED, gce.MAINTENANCE),
}
_SINGLE = (aws.SPOT, aws.REBALANCE, gce.PREEMPTED, gce.MAINTENANCE)
_log = logging.getLogger("emergency_ckpt.preemption")


@dataclasses.dataclass(frozen=True, slots=True)
class SourceOptions:
    """Which sources are wanted. Raises ConfigError, which names the option.

    Attributes:
      names: `auto` (what seems to be there), `off`, or any of `aws`, `gce`, `aws-spot`, `aws-rebalance`,
        `gce-preempted`, `gce-maintenance`.
      file: a file whose appearance is a notice; None: none is watched.
      version1: whether version 1 of Amazon's metadata service may be spoken where it gives no token.
    """

    names: tuple[str, ...] = (AUTO,)
    file: Path | None = None
    version1: aws.Version1 = "never"

    def __post_init__(self) -> None:
        known = (AUTO, OFF, *_GROUPS, *_SINGLE)
        for name in self.names:
            if name not in known:
                raise ConfigError(
                    f"preemption_sources names {name!r:.80}; expected any of {', '.join(known)}, separated by "
                    "commas"
                )
        if not self.names or (len(self.names) > 1 and {AUTO, OFF} & set(self.names)):
            raise ConfigError(
                f"preemption_sources is {','.join(self.names)!r}: {AUTO} and {OFF} stand alone, and at least "
                "one name is needed"
            )


def names_of(text: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def choose_sources(options: SourceOptions, environment: Mapping[str, str] = os.environ) -> list[Source]:
    """The sources to watch. Of each that was named and cannot be watched one line is logged."""

    def on_aws() -> bool:
        return aws.is_aws(environment)

    def on_gce() -> bool:
        return gce.is_gce(environment)

    makers: Sequence[tuple[str, str, Callable[[], bool], Callable[[], Source]]] = (
        ("aws", aws.SPOT, on_aws, lambda: aws.SpotInterruption(options.version1, environment)),
        ("aws", aws.REBALANCE, on_aws, lambda: aws.RebalanceRecommendation(options.version1, environment)),
        ("gce", gce.PREEMPTED, on_gce, lambda: gce.Preemption(environment)),
        ("gce", gce.MAINTENANCE, on_gce, lambda: gce.MaintenanceEvent(environment)),
    )
    sources: list[Source] = []
    for group, name, seems_there, make in makers:
        named = group in options.names or name in options.names
        if named or (options.names == (AUTO,) and seems_there()):
            try:
                sources.append(make())
            except NotHereError as error:
                _log.info("%s is not watched: %s", name, error)
    if options.file is not None and options.names != (OFF,):
        sources.append(NoticeFile(options.file))
    return sources
