"""The flags as a page of documentation, made of the schema and of the sections of the packaged base.yml."""

from __future__ import annotations

from collections.abc import Iterator

from emergency_ckpt.config import FLAGS, Config
from emergency_ckpt.config.describe import expected
from emergency_ckpt.config.load import PACKAGED_BASE
from emergency_ckpt.config.names import MAXTEXT_FLAGS

_SECTION = "# ---- "
_INTRODUCTION = """\
# Flags

Made by `make docs` from `emergency_ckpt/config/schema.py`; change it there. Flags come from a YAML file, the
environment (`M_<FLAG>` in upper case) and `key=value` words (`train.py my.yml run_name=r1`); later ones count.
`emergency-ckpt flags my.yml` prints what is in force and where each value was set. Defaults are those of a file
of your own that inherits nothing; `base_config: base.yml` also switches checkpointing on.

Those with an *M* are MaxText's as well and mean the same there. A MaxText program gets the others by
`EMERGENCY_CKPT_CONFIG` or `EMERGENCY_CKPT_FLAGS` ([maxtext.md](maxtext.md))."""


def flag_page() -> Iterator[str]:
    """The lines of docs/flags.md."""
    yield from _INTRODUCTION.splitlines()
    for title, flags in _sections():
        yield from ("", f"## {title}", "", "| flag | default | takes | |", "|---|---|---|---|")
        for flag in flags:
            field = Config.model_fields[flag]
            mark = " *M*" if flag in MAXTEXT_FLAGS else ""
            cells = (f"`{flag}`{mark}", _default(field.default), expected(field), field.description or "")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sections() -> Iterator[tuple[str, list[str]]]:
    """The titles in the packaged file, each with its flags; a flag that is missing there is in none."""
    title, flags = "", list[str]()
    for line in PACKAGED_BASE.read_text(encoding="utf-8").splitlines():
        if line.startswith(_SECTION):
            if flags:
                yield title, flags
            title, flags = line.strip("#- "), []
        elif (flag := line.partition(":")[0]) in FLAGS:
            flags.append(flag)
    yield title, flags


def _default(value: object) -> str:
    return "empty" if value == "" else f"`{value}`"
