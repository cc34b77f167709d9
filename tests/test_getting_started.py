"""The first page of the documentation does what it says: program, file and command are taken from it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "getting-started.md"


@pytest.mark.long
def test_the_program_of_the_first_page_comes_back_from_the_ramdisks(tmp_path: Path) -> None:
    page = PAGE.read_text()
    program, flags = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    assert program is not None
    assert flags is not None
    (tmp_path / "train.py").write_text(program[1])
    (tmp_path / "my.yml").write_text(flags[1].replace("/tmp/jobs", str(tmp_path / "jobs")))
    command = re.search(r"^    emergency-ckpt (launch .*?)\n\n", page, re.DOTALL | re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, "-m", "emergency_ckpt.cli.main", *words],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {int(step) for step in re.findall(r"going on from step (\d+) \(", done.stdout)} - {0}
    # On a busy machine it is killed some steps later, and the newest save may not have been complete.
    assert len(steps) == 1, done.stdout
    assert min(steps) in range(120, 201, 10), done.stdout
    assert "step 500: " in done.stdout
    committed = {path.name for path in (tmp_path / "jobs" / "first" / "checkpoints").iterdir()}
    assert "500" in committed  # of those before, what a quick job overtakes is left out
