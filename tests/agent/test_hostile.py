"""An agent under attack: from the network without its token, and from whatever lies on its ramdisk."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import trustme

from emergency_ckpt.agent.block_ranges import Asked, BlockRange
from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.record import LOG, agent_directory, read_record
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import AgentStartError, PeerUnavailableError
from tests.agent.served import BIG, LIMIT, RUN, Ramdisk, has_ended, pid_of, raw, start, wait_until_gone
from tests.agent.test_counters import read

STEP = StepId(1, 7)
SLOT = f"/v1/runs/{RUN}/steps/1/7/slots/{'0' * 32}/0"
PAGES = ["/metrics", "/v1/status", "/v1/attach", "/v1/leave", "/v1/inventory", f"/v1/layouts/{'0' * 32}"]
PAGES += [f"{SLOT}/manifest", f"{SLOT}/shards", f"/v1/trainers/{'0' * 32}", "/v1/drains", "/v1/drains/a"]
PAGES += ["/v1/lives", "/v1/lives/drains", "/", "/nothing", "//healthz", "/healthz/", "/v1/../healthz"]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get"]
BOMB = gzip.compress(b"[" * 150_000_000, 1)


def exchange(endpoint: Endpoint, data: bytes) -> bytes:
    """Everything that comes back for these bytes, until the other side closes."""
    with socket.create_connection((endpoint.host, endpoint.port), 30) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                answer += more
        return answer


def log_of(disk: Ramdisk) -> str:
    return (agent_directory(disk.root) / LOG).read_text()


def test_no_method_of_any_page_is_there_without_the_token(served: tuple[Ramdisk, Endpoint]) -> None:
    """What is no HTTP at all is refused even before that, and the connection is closed either way."""
    _, endpoint = served
    statuses = set()
    for method, page in itertools.product(METHODS, PAGES):
        answer = exchange(endpoint, f"{method} {page} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        statuses.add((method, int(answer.split()[1])))
    refused = {(method, 401) for method in METHODS if method not in ("BREW", "get", "CONNECT")}
    assert refused <= statuses
    assert {status for _, status in statuses} <= {400, 401}


def test_a_request_behind_one_that_was_let_in_needs_the_token_as_well(served: tuple[Ramdisk, Endpoint]) -> None:
    _, endpoint = served
    head = "GET /v1/status HTTP/1.1\r\nHost: x\r\n"
    let_in = f"{head}Authorization: Bearer {endpoint.token}\r\n\r\n"
    answer = exchange(endpoint, f"{let_in}{head}\r\n{let_in}".encode())
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert answer.count(b"HTTP/1.1 401 Unauthorized") == 1


def test_what_is_no_http_is_counted_and_not_logged(disk: Ramdisk) -> None:
    """Else whoever reaches the port could rotate everything else out of the log."""
    endpoint = start(disk.root)
    before = log_of(disk)
    many = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000 + b"\r\n"
    for attack in (b"\0\xff\r\n\r\n", b"GET * HTTP/1.1\r\n\r\n", many):
        for _ in range(5):
            assert exchange(endpoint, attack)[:12] in (b"HTTP/1.0 400", b"")
    assert log_of(disk) == before
    _, samples = read(endpoint)
    # Of what does not even look like a request the server says nothing at all.
    assert samples["emergency_ckpt_agent_refusals_total", 'reason="no_http"'] >= 10


@pytest.mark.parametrize("page", [f"{SLOT}/shards", "/v1/lives", "/v1/lives/drains", "/v1/drains"])
def test_bombs_are_refused_before_they_take_memory(served: tuple[Ramdisk, Endpoint], page: str) -> None:
    disk, endpoint = served
    record = read_record(agent_directory(disk.root))
    assert record is not None
    agent = psutil.Process(record.pid)
    before = agent.memory_info().rss
    nested = b"[" * 900_000
    wide = b'{"life":[' + b"{}," * 300_000
    for body, more in ((BOMB, "Content-Encoding: gzip\r\n"), (nested, ""), (wide, "")):
        for token in (endpoint.token, record.owner):
            head = f"POST {page} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n"
            sized = f"{head}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
            assert int(exchange(endpoint, sized).split()[1]) in (400, 403)
            chunked = f"{head}{more}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body
            assert int(exchange(endpoint, chunked + b"\r\n0\r\n\r\n").split()[1]) in (400, 403)
    assert agent.memory_info().rss < before + 100 * 2**20


@pytest.mark.parametrize("encrypted", [False, True])
def test_more_connections_than_there_are_places_take_no_descriptors(
    disk: Ramdisk, tmp_path: Path, encrypted: bool
) -> None:
    """Opened at once by somebody who says nothing, not even a TLS greeting; they are cut, places are free."""
    options: dict[str, object] = {}
    if encrypted:
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
        both, authorities = tmp_path / "both.pem", tmp_path / "ca.pem"
        options = {"tls_certificate": both, "tls_key": both, "tls_ca": authorities}
    endpoint = start(disk.root, connections=20, stall_seconds=1.5, **options)
    agent = psutil.Process(pid_of(disk.root))
    before = agent.num_fds()
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((endpoint.host, endpoint.port), 30))
        most = max(agent.num_fds() for _ in range(200))
        # Without TLS those that are refused are open for a moment, to be told.
        assert most <= before + (30 if encrypted else 210)
        with PeerClient(endpoint, timedelta(seconds=60)) as client:
            _until_let_in(client)
    assert agent.num_fds() < before + 40
    if not encrypted:
        _, samples = read(endpoint)
        assert samples["emergency_ckpt_agent_refused_connections_total", ""] > 100


def test_an_agent_without_descriptors_left_serves_again_when_it_has_some(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    pid = pid_of(disk.root)
    with PeerClient(endpoint, LIMIT) as client:
        manifest = client.manifest(slot)
        # Not one more than there are.
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds(), limits[1]))
        with pytest.raises(PeerUnavailableError):
            client.fetch(slot, disk.layout, manifest, disk.places())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        client.fetch(slot, disk.layout, manifest, places := disk.places())
        disk.assert_content(STEP, places)


def test_files_that_are_no_files_or_lead_elsewhere_are_not_served(disk: Ramdisk, tmp_path: Path) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    agent = psutil.Process(pid_of(disk.root))
    directory = disk.store.directory
    assert directory is not None
    secret = tmp_path / "secret"
    secret.write_text("secret")
    data, layout = disk.data_file(STEP), directory / f"layout_{slot.layout}.json"
    kept_data, kept_layout = tmp_path / "data", tmp_path / "layout"
    shutil.copy(data, kept_data)
    shutil.copy(layout, kept_layout)
    asked = Asked([next(index for index, nbytes in enumerate(disk.layout.shard_nbytes) if nbytes)]).to_bytes()
    assert raw(endpoint, f"POST {slot.address}/shards", asked)[0] == 200
    before = agent.num_fds()
    for number, put in enumerate(_in_place_of_files(secret)):
        for path in (data, layout, directory / "slot_3.manifest"):
            _remove(path)
            put(path)
            for page in (f"POST {slot.address}/shards", f"GET /v1/layouts/{slot.layout}", "GET /v1/inventory"):
                status, _ = raw(endpoint, page, asked if page.startswith("POST") else b"")
                assert status in (200, 404), (number, path.name, page)
            assert b"secret" not in exchange(
                endpoint,
                f"GET /v1/layouts/{slot.layout} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Authorization: Bearer {endpoint.token}\r\n\r\n".encode(),
            )
            _remove(path)
            if path == data:
                shutil.copy(kept_data, data)
            elif path == layout:
                shutil.copy(kept_layout, layout)
    assert agent.num_fds() <= before + 2
    assert raw(endpoint, f"POST {slot.address}/shards", asked)[0] == 200


def test_a_slot_file_that_is_cut_while_it_is_sent_ends_the_answer_short(disk: Ramdisk) -> None:
    slot = disk.save(STEP)
    endpoint = start(disk.root)
    shard = next(index for index, nbytes in enumerate(disk.layout.shard_nbytes) if nbytes == BIG)
    asked = Asked([], [BlockRange(shard, 0, 3)] * 20).to_bytes()
    with socket.create_connection((endpoint.host, endpoint.port), 30) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        head = f"POST {slot.address}/shards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.token}\r\n"
        connection.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
        received = len(connection.recv(65536))
        os.truncate(disk.data_file(STEP), 4096)
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1024 * 1024):
                received += len(data)
    assert received < 20 * BIG
    with PeerClient(endpoint) as client:
        assert client.status()["pid"] == pid_of(disk.root)
    # The store must not write into what is not there any more.
    os.truncate(disk.data_file(STEP), disk.layout.data_bytes(0))


def test_tokens_are_nowhere_but_in_files_of_the_owner(disk: Ramdisk) -> None:
    before = os.umask(0)
    try:
        endpoint = start(disk.root)
    finally:
        os.umask(before)
    record = read_record(agent_directory(disk.root))
    assert record is not None
    asked = f"GET /v1/{endpoint.token} HTTP/1.1\r\nAuthorization: Bearer {record.owner}\r\n"
    exchange(endpoint, f"{asked}Connection: close\r\n\r\n".encode())
    process = Path(f"/proc/{record.pid}")
    seen = log_of(disk).encode() + (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    for token in (endpoint.token, record.owner):
        assert token.encode() not in seen
        assert token not in json.dumps(read(endpoint)[0])
    modes = [stat.S_IMODE(path.stat().st_mode) for path in agent_directory(disk.root).glob("agent*")]
    assert set(modes) == {0o600}
    assert stat.S_IMODE(agent_directory(disk.root).stat().st_mode) == 0o700


def test_a_directory_of_somebody_else_is_not_used(ramdisk: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    agent_directory(ramdisk).mkdir()
    os.chown(agent_directory(ramdisk), 65534, 65534)
    with pytest.raises(AgentStartError, match="belongs to user 65534"):
        start(ramdisk)


def test_the_hangup_of_a_terminal_lets_an_agent_end_in_order(disk: Ramdisk) -> None:
    start(disk.root)
    pid = pid_of(disk.root)
    os.kill(pid, signal.SIGHUP)
    wait_until_gone(pid)
    assert read_record(agent_directory(disk.root)) is None


def test_an_agent_whose_directory_was_replaced_leaves_the_new_one_alone(disk: Ramdisk) -> None:
    start(disk.root)
    pid = pid_of(disk.root)
    os.kill(pid, signal.SIGSTOP)
    aside = disk.root / "aside"
    agent_directory(disk.root).rename(aside)
    start(disk.root)
    new = pid_of(disk.root)
    os.kill(pid, signal.SIGCONT)
    wait_until_gone(pid)
    assert not has_ended(new, 0)
    assert pid_of(disk.root) == new


def _until_let_in(client: PeerClient) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client.status()
            return
        except PeerUnavailableError:
            assert time.monotonic() < deadline, "nobody is let in any more"


def _in_place_of_files(secret: Path) -> Iterator[Callable[[Path], object]]:
    yield lambda path: path.symlink_to(secret)
    yield os.mkfifo
    yield Path.mkdir
    yield lambda path: path.symlink_to("/dev/zero")
    yield lambda path: path.symlink_to(path)
    yield lambda path: path.write_bytes(b"")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
