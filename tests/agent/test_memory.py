"""What an agent knew outlives it: the next agent of the directory goes on, whoever starts it and whenever."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.memory import MEMORY, Memory, Order
from emergency_ckpt.agent.orders import Destination, Life, Registration, Share
from emergency_ckpt.agent.presence import Presence, condition_of, sweep, trainer_lives
from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.agent.trainers import Registered
from emergency_ckpt.core.lineage import StepId
from tests.agent.jobs import Job, make_job
from tests.agent.served import RUN, Ramdisk, pid_of, start, wait_until_gone

ID = "0" * 31 + "a"


@pytest.fixture
def job(disk: Ramdisk, tmp_path: Path) -> Job:
    return make_job(disk, tmp_path / "bucket")


def kill_agent(job: Job) -> None:
    pid = pid_of(job.disk.root)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)


def test_an_agent_that_was_killed_with_its_trainer_flushes_when_it_is_started_anew(job: Job) -> None:
    """Where others know it: at its port, with its token. Then nothing is left to be remembered."""
    job.save(7)
    with job.trainer():
        endpoint = start(job.disk.root)
        kill_agent(job)
    assert job.committed == []
    assert start(job.disk.root) == endpoint
    job.wait_for(lambda: job.committed == [StepId(1, 7)])
    job.wait_for(lambda: not (agent_directory(job.disk.root) / MEMORY).exists())
    assert f"the agent before left 1 trainers (generation 1 of run {RUN}) and 0 drains" in job.log
    assert endpoint.token not in job.log


def test_a_trainer_that_lives_is_waited_for_by_an_agent_that_it_has_never_spoken_to(job: Job) -> None:
    job.save(7)
    with job.trainer() as trainer:
        kill_agent(job)
        with PeerClient(start(job.disk.root, idle_seconds=0.2)) as client:
            # Longer than the agent would stay, or wait for it to come back, if it were gone.
            assert not _ends_within(pid_of(job.disk.root), 3)
            assert client.status()["trainers"] == 1
            assert client.status()["flushes"] == 0
        pid = pid_of(job.disk.root)
        trainer.kill()
        trainer.wait()
    wait_until_gone(pid)
    assert job.committed == [StepId(1, 7)]


def test_a_drain_that_was_asked_for_goes_on_after_its_agent_and_trainer_were_killed(job: Job) -> None:
    """Its part is there already; the other process's comes only now."""
    job.save(7)
    with job.trainer(flush=False):
        job.owner.begin(job.destination, job.share(7, 0, 1))
        job.wait_for(lambda: bool(list(Path(job.store.files.locate()).glob("7*/emergency_ckpt.parts/0.json"))))
        kill_agent(job)
    start(job.disk.root)
    job.wait_for(lambda: "once more" in job.log)
    _write_other_part(job)
    job.wait_for(lambda: job.committed == [StepId(1, 7)])
    job.wait_for(lambda: not (agent_directory(job.disk.root) / MEMORY).exists())
    assert [path.name for path in Path(job.store.files.locate()).iterdir() if path.name.startswith("7")] == [
        "7"
    ]


def test_a_drain_that_ended_in_the_middle_of_its_commit_is_done_by_another_attempt(job: Job) -> None:
    job.save(7)
    start(job.disk.root)
    _remember(job, Order(job.destination, job.share(7)))
    # What a commit that was begun leaves: the claim.
    attempt = Path(job.store.files.locate()) / f"7.orbax-checkpoint-tmp-g1-{job.nonce}-0"
    attempt.mkdir()
    (attempt / "emergency_ckpt.committer").touch()
    start(job.disk.root)
    job.wait_for(lambda: job.committed == [StepId(1, 7)])


def test_a_trainer_that_lives_does_itself_what_its_agent_was_asked_for(job: Job) -> None:
    job.save(7)
    with job.trainer() as trainer:
        job.owner.begin(job.destination, job.share(7, 0, 1))
        kill_agent(job)
        with PeerClient(start(job.disk.root)) as client:
            assert client.status()["drains"] == 1
            assert "once more" not in job.log
            assert trainer.stdin is not None
            trainer.stdin.write("agent.connect()\nprint('again', flush=True)\n")
            trainer.stdin.flush()
            job.wait_for(lambda: client.status()["trainers"] == 2 or client.status()["drains"] == 0)


def test_an_agent_that_is_told_to_end_leaves_what_it_could_not_finish_to_the_next_one(job: Job) -> None:
    job.save(7)
    start(job.disk.root, finish_seconds=0.1)
    with job.trainer(flush=False):
        job.owner.begin(job.destination, job.share(7, 0, 1))
        job.wait_for(lambda: bool(list(Path(job.store.files.locate()).glob("7*/emergency_ckpt.parts/0.json"))))
        pid = pid_of(job.disk.root)
        os.kill(pid, signal.SIGTERM)
        wait_until_gone(pid)
    start(job.disk.root)
    job.wait_for(lambda: "once more" in job.log)
    _write_other_part(job)
    job.wait_for(lambda: job.committed == [StepId(1, 7)])


def test_a_goodbye_that_no_agent_heard_is_found_by_the_next_one(job: Job) -> None:
    job.save(7)
    with job.trainer() as trainer:
        kill_agent(job)
        assert trainer.stdin is not None
        trainer.stdin.write("agent.close()\n")
        trainer.stdin.close()
        trainer.wait(30)
    start(job.disk.root)
    job.wait_for(lambda: not (agent_directory(job.disk.root) / MEMORY).exists())
    assert "died" not in job.log
    assert job.committed == []
    assert not list(agent_directory(job.disk.root).glob("agent.trainer.*"))


def test_a_run_that_the_slots_do_not_hold_is_forgotten(job: Job) -> None:
    with job.trainer():
        kill_agent(job)
    start(job.disk.root)
    job.wait_for(lambda: not (agent_directory(job.disk.root) / MEMORY).exists())
    assert f"generation 1 of run {RUN} is forgotten: the slots here hold nothing of it" in job.log
    assert "died" not in job.log


def test_children_of_a_trainer_do_not_keep_it_alive(job: Job) -> None:
    """A data loader's process that was forked outlives it for a while, with all that it inherited."""
    job.save(7)
    with job.trainer() as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        trainer.stdin.write("import os, time; child = os.fork()\n")
        trainer.stdin.write("print(child, flush=True) if child else time.sleep(600)\n")
        trainer.stdin.flush()
        child = int(trainer.stdout.readline())
        try:
            trainer.kill()
            trainer.wait()
            job.wait_for(lambda: job.committed == [StepId(1, 7)])
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_memory_is_for_its_owner_only_and_no_trainer_leaves_files(job: Job) -> None:
    job.save(7)
    with job.trainer() as trainer:
        directory = agent_directory(job.disk.root)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.glob("agent.*")}
        assert set(modes.values()) == {0o600}
        assert MEMORY in modes
        trainer.kill()
        trainer.wait()
        job.wait_for(lambda: job.committed == [StepId(1, 7)])
        kill_agent(job)
        start(job.disk.root)
        job.wait_for(lambda: not list(directory.glob("agent.trainer.*")))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize(
    "put",
    [
        _fifo,
        _link,
        _socket,
        Path.mkdir,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 100),
        lambda path: path.write_bytes(b"emergency_ckpt agent memory 3 0\n{}"),
        lambda path: path.write_bytes(b"emergency_ckpt agent memory 2 0\n{}"),
        lambda path: path.write_bytes(_sealed(b"[" * 100_000)),
        lambda path: path.write_bytes(_sealed(b'{"port": 1e999}')),
        lambda path: path.write_bytes(_sealed(b'{"port":1,"token":"t","trainers":[[0,0,0]],"drains":[]}')),
        lambda path: path.write_bytes(_sealed(b'{"port":true,"token":"t","trainers":[],"drains":[]}')),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**33),
    ],
)
def test_whatever_lies_in_its_place_is_ignored_with_one_line(job: Job, put: Callable[[Path], object]) -> None:
    directory = agent_directory(job.disk.root)
    directory.mkdir(exist_ok=True)
    put(directory / MEMORY)
    with PeerClient(start(job.disk.root)) as client:
        assert client.status()["trainers"] == 0
    assert job.log.count("what an agent before this one left is ignored, and replaced") == 1
    with job.trainer():
        assert "will not know" not in job.log or (directory / MEMORY).is_dir()
        kill_agent(job)
    start(job.disk.root)


def test_a_file_of_another_user_is_not_believed(job: Job) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    start(job.disk.root)
    _remember(job, Order(job.destination, job.share(7)))
    path = agent_directory(job.disk.root) / MEMORY
    os.chown(path, 65534, 65534)
    start(job.disk.root)
    assert "belongs to user 65534" in job.log


lives = st.builds(
    Life, st.just(RUN), st.integers(1, 2**40), st.text("0123456789abcdef", min_size=1, max_size=9)
)
destinations = st.builds(
    lambda life, seconds, keep: Destination(
        life, "/a", "default", None, None, 1, 1, "none", None, seconds, True, keep, None
    ),
    lives,
    st.floats(0.001, 1e8),
    st.none() | st.integers(0, 9),
)
endpoints = st.none() | st.builds(Endpoint, st.just("h"), st.integers(1, 65535), st.just("t" * 16))
registrations = st.builds(
    lambda to, agents, flush: Registration(to, 0, tuple(agents), flush),
    destinations,
    st.lists(endpoints, min_size=1, max_size=3),
    st.booleans(),
)
trainers = st.dictionaries(
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.builds(Registered, registrations, st.sampled_from(["alive", "gone"])),
    min_size=1,
    max_size=3,
)
shares = st.builds(
    lambda step, of: Share(step, 0, "0" * 32, 0, (0,), True, of), st.integers(0, 9), st.none() | lives
)


@given(trainers, st.lists(st.builds(Order, destinations, shares), max_size=3), st.data())
def test_what_is_kept_is_recalled_and_no_other_bytes_are(
    tmp_path_factory: pytest.TempPathFactory,
    known: dict[str, Registered],
    orders: list[Order],
    data: st.DataObject,
) -> None:
    directory = tmp_path_factory.mktemp("memory")
    Memory(directory).keep(7, "token", known, orders)
    found = Memory(directory).recall()
    assert found is not None
    assert (found.port, found.token, found.trainers, list(found.orders)) == (7, "token", known, orders)
    written = bytearray((directory / MEMORY).read_bytes())
    at = data.draw(st.integers(0, len(written) - 1))
    if data.draw(st.booleans()):
        written[at] ^= data.draw(st.integers(1, 255))
    else:
        del written[at:]
    (directory / MEMORY).write_bytes(written)
    assert Memory(directory).recall() is None


def test_presence_is_there_as_long_as_its_holder(tmp_path: Path) -> None:
    assert not trainer_lives(tmp_path, ID)
    held = Presence(tmp_path, ID)
    assert trainer_lives(tmp_path, ID)
    sweep(tmp_path)
    assert condition_of(tmp_path, ID) == "alive"
    assert held.is_current()
    held.close(told=False)
    held.close()
    assert not trainer_lives(tmp_path, ID)
    assert condition_of(tmp_path, ID) == "left"
    sweep(tmp_path)
    assert condition_of(tmp_path, ID) == "gone"
    with pytest.raises(ValueError, match="not the id"):
        trainer_lives(tmp_path, "../" + ID)


def _sealed(body: bytes) -> bytes:
    return b"emergency_ckpt agent memory 2 %s\n%s" % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def _remember(job: Job, order: Order) -> None:
    """Leaves an order to the next agent, in place of the one that runs."""
    record = read_record(agent_directory(job.disk.root))
    assert record is not None
    kill_agent(job)
    Memory(agent_directory(job.disk.root)).keep(record.endpoint.port, record.endpoint.token, {}, [order])


def _write_other_part(job: Job) -> None:
    from emergency_ckpt.agent.draining import carry_out

    other = job.disk.other_slot(StepId(1, 7), job.nonce)
    carry_out(job.store, job.destination, job.share(7, 0, 1, position=1), other)


def _ends_within(pid: int, seconds: float) -> bool:
    from tests.agent.served import has_ended

    return has_ended(pid, seconds)
