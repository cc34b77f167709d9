"""The spot demo as a user runs it, small: a notice by a metadata service, two machines, and equal ends."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from emergency_ckpt.cli.main import main
from emergency_ckpt.demo.metadata import SpotMetadata
from emergency_ckpt.demo.spot import SpotPlan, _Job
from emergency_ckpt.preemption.aws import SpotInterruption


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_job_leaves_its_machine_in_time_and_another_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--scenario", "spot", "--steps", "120", "--processes-per-slice", "1", "--kill-step", "3"]
    status = main([*words, "--directory", str(tmp_path / "runs"), "--json", str(tmp_path / "timeline.json")])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "bit for bit" in shown
    found = json.loads((tmp_path / "timeline.json").read_text())
    assert found["agrees"]
    names = [moment["name"] for moment in found["moments"]]
    assert names == ["announced", "notice", "decision", "durable", "gone", "back", "first step"]
    seconds = [moment["seconds"] for moment in found["moments"]]
    assert seconds == sorted(seconds)


def test_the_metadata_service_of_the_demo_is_understood_by_the_source_of_notices() -> None:
    with SpotMetadata() as metadata:
        source = SpotInterruption(environment={"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url})
        assert source.look() is None
        metadata.announce(90)
        notice = source.look()
        assert notice is not None
        assert (notice.kind, notice.detail) == ("terminate", "terminate")
        assert notice.deadline is not None
        assert 80 < notice.deadline - notice.received <= 90
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{metadata.url}/latest/meta-data/spot/instance-action", timeout=10)


@pytest.mark.parametrize(
    "words", [["--kill-step", "0"], ["--seconds-left", "1"], ["--processes-per-slice", "0"]]
)
def test_what_would_show_nothing_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--scenario", "spot", *words, "--directory", str(tmp_path)]) == 2
    assert capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_notice_is_that_of_whichever_process_hears_it_first_and_the_rest_is_of_process_0(
    tmp_path: Path,
) -> None:
    job = _Job(SpotPlan(steps=3, processes=2, notice_step=1, seconds_left=60.0), tmp_path, Console(quiet=True))
    job._notice_given = time.monotonic()
    heard = {"operation": "preemption", "source": "aws-spot", "message": "notice"}
    decided = {"operation": "preemption", "leaves": True, "message": "saved"}
    for process, said in ((1, decided), (1, heard), (0, heard), (0, decided)):
        job._hear("machine A", process, json.dumps(said))
    assert [moment.name for moment in job.moments] == ["notice", "decision"]
