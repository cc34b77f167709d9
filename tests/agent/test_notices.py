"""What an agent hears of preemption, and whom it tells."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from datetime import timedelta

import pytest

from emergency_ckpt.agent.attachment import attach
from emergency_ckpt.agent.connection import PeerConnection
from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.order_client import OrderClient
from emergency_ckpt.agent.record import LOG, AgentRecord, agent_directory, read_record
from emergency_ckpt.cli.main import main
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PeerUnavailableError
from tests.agent.served import LOCAL, RUN, Ramdisk, pid_of, wait_until_gone
from tests.preemption.watching import Heard
from tests.servers import imds
from tests.servers.imds import fake_imds

LIMIT = timedelta(seconds=60)


def record_of(disk: Ramdisk) -> AgentRecord:
    record = read_record(agent_directory(disk.root))
    assert record is not None
    return record


def test_trainers_hear_of_files_clouds_and_people_also_from_the_next_agent(
    disk: Ramdisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = disk.root / "notice"
    options = dataclasses.replace(LOCAL, preemption_sources="aws-spot", preemption_file=file)
    heard, later = Heard(), Heard()
    with fake_imds() as fake:
        fake.pages[imds.SPOT_ACTION] = b'{"action": "stop", "time": "2031-09-18T08:22:00Z"}'
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", fake.url)
        agent = HostAgent(disk.root, options, heard.hear)
        agent.connect()
        assert heard.kinds(1) == [("aws-spot", "terminate")]
        with attach(record_of(disk).endpoint):  # It listens to nothing, and is not told.
            for _ in range(2):
                assert main(["save-now", str(disk.root), "--detail", "now"]) == 0
                assert capsys.readouterr().out == "trainers that are told: 1\n"
        for notice in heard.wait(3)[1:]:
            assert (notice.source, notice.kind, notice.detail) == ("request", "save", "now")
        file.write_text("soon")
        heard.wait(4)
        file.write_text("soon")
        heard.wait(5)
        assert len({notice.key for notice in heard.notices}) == 5, "each is an event of its own"
        # One that comes later hears what still stands, as the same ones; a wish for a save does not.
        with attach(record_of(disk).endpoint, on_notice=later.hear):
            assert later.kinds(3) == [("aws-spot", "terminate"), *[("file", "terminate")] * 2]
            assert {notice.key for notice in later.notices} < {notice.key for notice in heard.notices}
        pid = pid_of(disk.root)
        os.kill(pid, 9)
        wait_until_gone(pid)
        agent.hold_on(starts=False)
        assert len(heard.notices) == 5
        deadline = time.monotonic() + LIMIT.total_seconds()
        while len(heard.notices) < 7 and time.monotonic() < deadline:  # As trainers do: it may not know yet.
            agent.hold_on(starts=True)
            time.sleep(0.05)
        # The next agent finds both again: they are the same ones, as the trainer sees by their keys.
        keys = {notice.key for notice in heard.wait(7)}
        assert len(keys) == 5
        agent.close()
    log = (agent_directory(disk.root) / LOG).read_text()
    assert "notices are watched for: aws-spot, file" in log
    assert "aws-spot: this host goes away, at 2031-09-18T08:22:00+00:00: stop; told to " in log


def test_only_the_owner_of_the_host_may_ask_for_a_save(
    disk: Ramdisk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = HostAgent(disk.root, LOCAL)
    endpoint = agent.connect()
    with pytest.raises(PeerUnavailableError, match="not_of_this_host"):
        OrderClient(endpoint).request_save("from elsewhere")
    owner = dataclasses.replace(endpoint, token=record_of(disk).owner)
    hostile = [
        b"",
        b"[]",
        b"[" * 4000,
        b"x" * 10_000,
        json.dumps({"kind": "explode"}).encode(),
        json.dumps({"kind": ["save"]}).encode(),
        json.dumps({"kind": "save", "detail": "\n"}).encode(),
        json.dumps({"kind": "save", "deadline": "soon"}).encode(),
        json.dumps({"kind": "save", "source": "aws-spot"}).encode(),
        json.dumps({"kind": "save", "id": ["x"]}).encode(),
        json.dumps({"kind": "save", "id": "x" * 1000}).encode(),
    ]
    for body in hostile:
        connection = PeerConnection(owner, LIMIT)
        with pytest.raises(PeerUnavailableError, match=r"malformed|too_large"):
            connection.read_json("POST", "/v1/notices", body)
        connection.close()
    connection = PeerConnection(endpoint, LIMIT)
    assert connection.read_json("GET", "/v1/notices") == []
    connection.close()
    # Nobody listens. A run is found by its slots.
    monkeypatch.setenv("M_LOCAL_CHECKPOINT_DIRECTORY", str(disk.root))
    assert main(["save-now", RUN]) == 2
    disk.save(StepId(1, 7))
    assert main(["save-now", RUN]) == 1
    assert "no trainer listens" in capsys.readouterr().out
    agent.close()


def test_without_an_agent_nobody_can_be_asked(disk: Ramdisk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["save-now", str(disk.root)]) == 1
    assert "no agent runs" in capsys.readouterr().err
