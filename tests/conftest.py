"""What every test gets: CPU devices for in-process JAX, a directory in memory, no stray processes."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from tests.integration.forking import end_sources
from tests.servers.shared_ceph import S3Server, s3_server_of_run

# Before anything imports jax: eight devices, so that meshes with a replica axis fit into one process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# A runner in the background is started with some signals ignored, and what is ignored stays so in every process
# that the tests start; tests that send signals need them to have their usual effect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests assert no times, so neither does hypothesis; in CI its examples are the same at every run.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


_ROOMS_OF_JOBS = {"integration", "demo", "maxtext"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that are marked as long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Further cases of what the suite shows once are for `make long`: the suite has a quarter of an hour."""
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items[:] = _mixed(items)


def _mixed(items: list[pytest.Item]) -> list[pytest.Item]:
    """File by file, such that those that run jobs come evenly among the others, which mostly wait.

    Workers that take files in this order run few jobs at a time; those of several processes fill the machine.
    """
    rooms: dict[bool, dict[Path, list[pytest.Item]]] = {True: {}, False: {}}
    for item in items:
        runs_jobs = item.path.parent.name in _ROOMS_OF_JOBS
        rooms[runs_jobs].setdefault(item.path, []).append(item)
    placed = [(at / len(files), of) for files in rooms.values() for at, of in enumerate(files.values())]
    return [item for _, of in sorted(placed, key=lambda each: each[0]) for item in of]


@pytest.fixture
def ramdisk() -> Iterator[Path]:
    """A fresh directory in memory, removed afterwards."""
    with fresh_ramdisk() as path:
        yield path


@contextlib.contextmanager
def fresh_ramdisk() -> Iterator[Path]:
    """A directory in memory where the machine has one (/dev/shm), removed in the end."""
    root = Path("/dev/shm")
    parent = root if root.is_dir() and os.access(root, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="emergency-ckpt-test-", dir=parent))
    try:
        yield path
    finally:
        remove_tree(path)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> S3Server:
    """A real S3 server (Ceph's), one for the whole run; see `tests.servers.environment` for how to use it."""
    return s3_server_of_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the session when a test leaves a process behind, and ends it.

    Agents stay behind on purpose, until their directory is removed or nobody has needed them for a while.
    """
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    end_sources()
    _end_agents(tmp_path_factory.getbasetemp())
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    _, left = psutil.wait_procs(left, timeout=10)
    described = [f"{p.pid}: {' '.join(p.cmdline())}" for p in left if p.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not described, f"processes that tests started are still running: {described}"


def _end_agents(root: Path) -> None:
    """Those that serve directories below `root`."""
    agents = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "emergency_ckpt.agent" in words and "--local-directory" in words:
            served = words[words.index("--local-directory") + 1]
            if Path(served).is_relative_to(root):
                process.terminate()
                agents.append(process)
    _, left = psutil.wait_procs(agents, timeout=10)
    assert not left, f"agents do not end when they are told to: {left}"
