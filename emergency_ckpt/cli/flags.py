"""`emergency-ckpt flags`: what a file and overrides come to, as YAML that can be loaded again."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from emergency_ckpt.cli.flag_page import flag_page
from emergency_ckpt.config import FLAGS, Config, advice, inactive_flags, load_config
from emergency_ckpt.config.describe import expected
from emergency_ckpt.config.load import check_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE key=value",
        help="a YAML file and overrides, as for a training program; without a file, the packaged base.yml",
    )
    listing = parser.add_mutually_exclusive_group()
    listing.add_argument(
        "--other",
        action="store_true",
        help="list the keys that belong to other programs, and where they were set",
    )
    listing.add_argument("--doc", action="store_true", help="explain every flag")
    listing.add_argument("--page", action="store_true", help="explain every flag, as Markdown")


def run(args: argparse.Namespace) -> int:
    """Prints what was asked for; returns the exit status."""
    if args.doc:
        lines = _documentation()
    elif args.page:
        lines = flag_page()
    else:
        check_words(args.words)
        config = load_config(args.words)
        lines = _other_keys(config) if args.other else effective_lines(config)
    for line in lines:
        print(line)
    return 0


def effective_lines(config: Config) -> Iterator[str]:
    """Every flag with its value and where it was set, then what deserves a note, as lines of YAML."""
    settings = [f"{flag}: {_yaml(value)}" for flag, value in config.flags().items()]
    width = max(map(len, settings))
    for flag, setting in zip(FLAGS, settings, strict=True):
        yield f"{setting:<{width}}  # {config.source_of(flag)}"
    for note in (*inactive_flags(config), *advice(config)):
        yield f"# Note: {note}"
    if config.other_keys:
        yield f"# {len(config.other_keys)} keys of other programs are kept aside; --other lists them."


def _other_keys(config: Config) -> Iterator[str]:
    # Names only: among the values there may be access tokens.
    for key in sorted(config.other_keys):
        yield f"{key}  # {config.source_of(key)}"


def _documentation() -> Iterator[str]:
    for flag in FLAGS:
        field = Config.model_fields[flag]
        yield f"{flag}: {_yaml(field.default)}"
        for text in (field.description or "", f"Takes {expected(field)}."):
            yield from textwrap.wrap(text, width=100, initial_indent="    ", subsequent_indent="    ")
        yield ""


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf).strip()
    return str(value)
