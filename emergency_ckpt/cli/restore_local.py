"""`emergency-ckpt restore-local`: `sync` on its way back, into a directory of this machine."""

from __future__ import annotations

import argparse

from emergency_ckpt.cli import sync
from emergency_ckpt.core.locations import is_url
from emergency_ckpt.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand: those of `sync`."""
    sync.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Copies; returns the exit status."""
    if is_url(args.target):
        raise ConfigError(
            f"{args.target} is no directory of this machine; emergency-ckpt sync copies into buckets"
        )
    return sync.run(args)
