"""The command finds its subcommand, splits off a command after `--`, and fails in one readable line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from emergency_ckpt.cli.main import SUBCOMMANDS, _split_command, main


def test_the_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\n    {name}\s", shown) for name in SUBCOMMANDS)


def test_a_missing_or_unknown_subcommand_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["flgas"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "invalid choice: 'flgas'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "own", "command"),
    [
        (["launch", "--slices", "2"], ["launch", "--slices", "2"], None),
        (["launch", "--", "python", "-u", "t.py"], ["launch"], ["python", "-u", "t.py"]),
        (["launch", "--", "sh", "--", "x"], ["launch"], ["sh", "--", "x"]),
        (["launch", "--"], ["launch"], []),
    ],
)
def test_everything_after_the_first_double_dash_is_the_command(
    words: list[str], own: list[str], command: list[str] | None
) -> None:
    assert _split_command(words) == (own, command)


def test_a_subcommand_that_starts_nothing_takes_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["flags", "--", "python"])
    assert ended.value.code == 2
    assert "flags takes no command after --" in capsys.readouterr().err


def test_an_error_in_the_flags_is_one_message_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "checkpoint_perod=5"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("emergency-ckpt flags: ")
    assert "Traceback" not in shown.err


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    # The pipe has no reader from the start, so the first flush finds it broken.
    script = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from emergency_ckpt.cli import main; "
    )
    done = subprocess.run(
        [sys.executable, "-c", script + "sys.exit(main.main(['flags', '--doc']))"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_only_the_module_of_the_chosen_subcommand_is_imported() -> None:
    script = (
        "import sys; from emergency_ckpt.cli.main import main; main(['flags', '--doc']); "
        "print(*[name for name in sys.modules if name.startswith('emergency_ckpt.cli.')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == [
        "emergency_ckpt.cli.main",
        "emergency_ckpt.cli.flag_page",
        "emergency_ckpt.cli.flags",
    ]
