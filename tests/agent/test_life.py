"""One agent per ramdisk directory, there when it is needed and gone when it is not."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import trustme

from emergency_ckpt.agent.addresses import choose_addresses
from emergency_ckpt.agent.attachment import attach
from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.endpoint import FORMAT_VERSION
from emergency_ckpt.agent.options import TOKEN_VARIABLE, AgentOptions
from emergency_ckpt.agent.record import AgentLock, agent_directory, agent_lives, read_record
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import (
    AgentStartError,
    ConfigError,
    LocalDirectoryError,
    PeerUnavailableError,
)
from tests.agent.served import LIMIT, LOCAL, Ramdisk, agents_of, pid_of, run_python, start, wait_until_gone

NEXT_VERSION = """
import sys
from pathlib import Path
from emergency_ckpt.agent import endpoint
endpoint.FORMAT_VERSION += 1
from emergency_ckpt.agent import process, record
from emergency_ckpt.agent.options import AgentOptions
made = record.AgentRecord
process.AgentRecord = lambda *fields: made(*fields, format=endpoint.FORMAT_VERSION)
options = AgentOptions(bind="127.0.0.1", idle_seconds=120)
process.run_agent(Path(sys.argv[2]), options, ready=lambda: print("ready", flush=True))
"""


def test_all_who_ask_get_the_same_agent(disk: Ramdisk) -> None:
    first = start(disk.root)
    assert start(disk.root) == first
    assert len(agents_of(disk.root)) == 1


def test_of_many_that_are_started_at_once_one_survives(disk: Ramdisk) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        endpoints = set(pool.map(lambda _: start(disk.root), range(6)))
    assert len(endpoints) == 1
    with PeerClient(endpoints.pop()) as client:
        pid = client.status()["pid"]
    for process in agents_of(disk.root):
        if process.pid != pid:
            wait_until_gone(process.pid)
    assert [process.pid for process in agents_of(disk.root)] == [pid]


def test_an_agent_that_was_killed_is_replaced_and_its_record_does_not_mislead(disk: Ramdisk) -> None:
    slot = disk.save(StepId(1, 7))
    first = start(disk.root)
    pid = pid_of(disk.root)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    assert read_record(agent_directory(disk.root)) is not None
    second = start(disk.root)
    assert second.token != first.token
    with PeerClient(second) as client:
        assert [holding.id for holding in client.inventory()] == [slot]
    with PeerClient(first) as client, pytest.raises(PeerUnavailableError):
        client.status()


def test_a_record_that_is_nonsense_is_written_again(disk: Ramdisk) -> None:
    endpoint = start(disk.root)
    (agent_directory(disk.root) / "agent.json").write_text("{")
    assert start(disk.root) == endpoint


def test_sigterm_ends_an_agent_and_its_record_goes(disk: Ramdisk) -> None:
    start(disk.root)
    pid = pid_of(disk.root)
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(pid)
    assert read_record(agent_directory(disk.root)) is None
    assert not agent_lives(agent_directory(disk.root))
    assert "SIGTERM came" in (agent_directory(disk.root) / "agent.log").read_text()


def test_an_agent_of_another_format_is_asked_to_leave_and_replaced(disk: Ramdisk) -> None:
    with run_python(NEXT_VERSION, "--local-directory", str(disk.root)) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        record = read_record(agent_directory(disk.root))
        assert record is not None
        assert record.format == FORMAT_VERSION + 1
        endpoint = start(disk.root)
        assert other.wait(30) == 0
    with PeerClient(endpoint) as client:
        assert client.status()["format"] == FORMAT_VERSION
        assert client.status()["pid"] != other.pid


def test_an_agent_that_hangs_is_named_in_the_error(disk: Ramdisk) -> None:
    start(disk.root)
    pid = pid_of(disk.root)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(AgentStartError, match=f"process {pid} holds the lock"):
            ensure_agent(disk.root, LOCAL, timedelta(seconds=0.5))
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_agent_knows_its_trainers_and_leaves_when_there_are_none(disk: Ramdisk) -> None:
    endpoint = start(disk.root, idle_seconds=1.0)
    pid = pid_of(disk.root)
    with attach(endpoint) as first, PeerClient(endpoint) as client:
        second = attach(endpoint)
        assert client.status()["trainers"] == 2
        second.close()
        # Longer than it would stay without a trainer.
        assert not first.wait_lost(timedelta(seconds=2.5))
        assert client.status()["trainers"] == 1
    wait_until_gone(pid)
    assert "no trainer was attached" in (agent_directory(disk.root) / "agent.log").read_text()


def test_a_trainer_that_is_killed_is_noticed(disk: Ramdisk) -> None:
    endpoint = start(disk.root, idle_seconds=1.0)
    pid = pid_of(disk.root)
    code = """
import json, sys
from emergency_ckpt.agent.attachment import attach
from emergency_ckpt.agent.endpoint import Endpoint
held = attach(Endpoint.from_json(json.loads(sys.argv[1])))
print("attached", flush=True)
held.wait_lost(__import__("datetime").timedelta(seconds=60))
"""
    with run_python(code, json.dumps(endpoint.to_json())) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "attached\n"
        with PeerClient(endpoint) as client:
            assert client.status()["trainers"] == 1
        trainer.kill()
    wait_until_gone(pid)


def test_a_trainer_learns_that_its_agent_is_gone(disk: Ramdisk) -> None:
    endpoint = start(disk.root)
    with attach(endpoint) as held:
        assert held.lost is None
        os.kill(pid_of(disk.root), signal.SIGKILL)
        assert held.wait_lost(timedelta(seconds=30))
        assert held.lost is not None
    with pytest.raises(PeerUnavailableError):
        attach(endpoint)


def test_leaving_ends_attachments_in_order(disk: Ramdisk) -> None:
    endpoint = start(disk.root)
    pid = pid_of(disk.root)
    record = read_record(agent_directory(disk.root))
    assert record is not None
    with attach(endpoint) as held, PeerClient(endpoint) as client:
        with pytest.raises(PeerUnavailableError, match="not_of_this_host"):
            client.leave()
        with PeerClient(dataclasses.replace(endpoint, token=record.owner)) as of_this_host:
            of_this_host.leave()
        assert held.wait_lost(timedelta(seconds=30))
        assert held.lost is not None
        assert held.lost.code == "left"
    wait_until_gone(pid)


def test_an_agent_leaves_when_its_directory_is_taken_away(disk: Ramdisk) -> None:
    start(disk.root)
    pid = pid_of(disk.root)
    (agent_directory(disk.root) / "agent.lock").unlink()
    wait_until_gone(pid)
    with PeerClient(start(disk.root)) as client:
        assert client.status()["pid"] != pid


def test_a_record_that_is_removed_is_written_again(disk: Ramdisk) -> None:
    endpoint = start(disk.root)
    (agent_directory(disk.root) / "agent.json").unlink()
    assert start(disk.root) == endpoint


def test_files_are_for_their_owner_only(disk: Ramdisk) -> None:
    start(disk.root)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in agent_directory(disk.root).glob("agent.*")
    }
    assert modes == {"agent.json": 0o600, "agent.lock": 0o600, "agent.log": 0o600}


def test_the_agent_is_no_child_and_in_no_group_of_the_one_who_started_it(disk: Ramdisk) -> None:
    start(disk.root)
    pid = pid_of(disk.root)
    assert psutil.Process(pid).ppid() != os.getpid()
    assert os.getpgid(pid) != os.getpgid(0)
    assert os.getsid(pid) != os.getsid(0)


def test_the_agent_holds_no_lock_and_no_slot(disk: Ramdisk) -> None:
    slot = disk.save(StepId(1, 7))
    endpoint = start(disk.root)
    places = disk.places()
    with PeerClient(endpoint) as client:
        client.fetch(slot, disk.layout, client.manifest(slot), places)
        status = client.status()
    held = {file.path for file in psutil.Process(status["pid"]).open_files()}
    assert not [path for path in held if "slot_" in path or path.endswith("/lock")]


def test_a_token_may_be_given_and_must_be_one(disk: Ramdisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(AgentStartError, match="has no usable token"):
        start(disk.root)
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-that-is-long-enough")
    assert start(disk.root).token == "a-token-that-is-long-enough"


def test_what_keeps_an_agent_from_starting_is_told(disk: Ramdisk) -> None:
    with pytest.raises(AgentStartError, match="cannot listen on 192"):
        start(disk.root, bind="192.0.2.7")
    with pytest.raises(AgentStartError, match="cannot be read"):
        start(disk.root, token_file=disk.root / "nothing")
    (disk.root / "nothing").write_text("no certificate")
    with pytest.raises(AgentStartError, match="by which others are to verify"):
        start(disk.root, tls_ca=disk.root / "nothing", **_certificate(disk.root))
    for option, value in (
        ("tls_key", disk.root / "nothing"),
        ("port", 65536),
        ("connections", 0),
        ("idle_seconds", 0),
        ("stall_seconds", float("nan")),
        ("finish_seconds", -1),
    ):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
            start(disk.root, **{option: value})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AgentStartError, match=f"port {port}: Address already in use. Another program"):
            start(disk.root, port=port)
    with pytest.raises(LocalDirectoryError, match="does not exist"):
        start(disk.root / "nowhere")


def _certificate(directory: Path) -> dict[str, Path]:
    both = directory / "certificate.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(both)
    return {"tls_certificate": both, "tls_key": both}


def test_the_command_runs_an_agent_in_the_foreground(disk: Ramdisk) -> None:
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "agent"]
    words += ["--local-directory", str(disk.root), "--bind", "127.0.0.1", "--advertise", "host.example"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        line = agent.stderr.readline()
        assert "on 127.0.0.1 port" in line
        assert "advertises http://host.example:" in line
        assert "as given" in line
        endpoint = start(disk.root)
        assert endpoint.host == "host.example"
        assert endpoint.token not in line
        second = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert "runs for" in second.stderr
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == 0


def test_the_command_line_says_all_options() -> None:
    import argparse

    from emergency_ckpt.agent.options import add_arguments, options_of

    options = AgentOptions(
        bind="::1",
        port=7,
        advertise="a",
        reach="b:1",
        token_file=Path("/t"),
        tls_certificate=Path("/c"),
        tls_key=Path("/k"),
        tls_ca=Path("/ca"),
        idle_seconds=1.5,
        connections=3,
        stall_seconds=2.5,
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for said in (options, AgentOptions()):
        args = parser.parse_args(["--local-directory", "/x", *said.words()])
        assert options_of(args) == said


def test_addresses_are_chosen_for_a_reason() -> None:
    assert choose_addresses("10.1.2.3", None, None).advertise == "10.1.2.3"
    given = choose_addresses("0.0.0.0", "host", None)
    assert (given.advertise, given.dial, given.why) == ("host", "127.0.0.1", "as given")
    reached = choose_addresses(None, None, "127.0.0.1:4000")
    assert (reached.bind, reached.advertise) == ("127.0.0.1", "127.0.0.1")
    assert "that reaches 127.0.0.1:4000" in reached.why
    assert choose_addresses(None, None, None).bind == "0.0.0.0"
    with pytest.raises(ConfigError, match="no interface"):
        choose_addresses(None, None, "no.such.host.invalid")


def test_a_lock_that_somebody_only_looks_at_does_not_keep_an_agent_from_starting(ramdisk: Path) -> None:
    directory = agent_directory(ramdisk)
    directory.mkdir()
    AgentLock(directory).release()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            agent_lives(directory)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for _ in range(20):
                AgentLock(directory).release()
        finally:
            stop.set()
        looking.result(30)


def test_nothing_is_logged_by_a_client(disk: Ramdisk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), PeerClient(start(disk.root)) as client:
        client.status()
    assert not caplog.records


def test_limits_are_limits(disk: Ramdisk) -> None:
    with pytest.raises(AgentStartError, match="there is no agent"):
        ensure_agent(disk.root, dataclasses.replace(LOCAL, port=1), timedelta(0))
    assert ensure_agent(disk.root, LOCAL, LIMIT)
