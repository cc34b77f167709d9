"""A training job whose right state at every step is known, run in each process of the tests' jobs.

The state at step n is a closed function of n, so whatever comes back can be checked bit for bit, on every
process, without a reference run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager, Config, arrange_mesh
from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import EmergencyCheckpointError, ExtrasError

ROWS = 16
COLUMNS = 300  # enough for shards that are not kept within the index of the persistent array database


def make_mesh(slices: int, cut: str = "fsdp") -> Mesh:
    """States on it are replicated over its first axis, or sharded over that one too (`cut`: "all").

    `cut` "columns": the weights are cut between columns instead of rows.
    """
    return Mesh(np.array(jax.devices()).reshape(slices, -1), ("replica", cut))


def make_weights(step: int, rows: int = ROWS) -> np.ndarray:
    return np.arange(rows * COLUMNS, dtype=np.float32).reshape(rows, COLUMNS) / 7 + np.float32(step)


def make_state(mesh: Mesh, step: int, rows: int = ROWS) -> dict[str, Any]:
    """The state after `step` steps."""
    _, cut = mesh.axis_names
    sharded = NamedSharding(mesh, P(mesh.axis_names) if cut == "all" else P(cut))
    cut_weights = NamedSharding(mesh, P(None, cut)) if cut == "columns" else sharded
    replicated = NamedSharding(mesh, P())
    weights = make_weights(step, rows)
    half = (np.arange(rows * 5) % 11 + step % 64).astype(jnp.bfloat16)
    values = {
        "params": {"w": (weights, cut_weights), "half": (half, sharded)},
        "count": (np.full((3,), step, np.int32), replicated),
    }
    return jax.tree.map(
        lambda pair: jax.make_array_from_callback(pair[0].shape, pair[1], lambda index: pair[0][index]),
        values,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def check_state(state: dict[str, Any], mesh: Mesh, step: int) -> None:
    """Every shard of this process has the bits that belong to `step`."""
    wanted = make_state(mesh, step)
    for (path, found), right in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True
    ):
        for a, b in zip(found.addressable_shards, right.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), (
                f"{jax.tree_util.keystr(path)}{a.index} does not belong to step {step}"
            )


def make_config(root: str, flags: dict[str, Any]) -> Config:
    """Flags of a job below `root`; each process has its own ramdisk directory there, or all share one.

    `on_process` has flags for one process; `{root}` in a flag is the job's root.
    """
    flags = {**flags, **flags.get("on_process", {}).get(str(jax.process_index()), {})}
    flags = {k: v.format(root=root) if isinstance(v, str) else v for k, v in flags.items() if k != "on_process"}
    shared = flags.pop("shared_ramdisk", False)
    local = Path(root) / ("ramdisk" if shared else f"ramdisk_{jax.process_index()}")
    local.mkdir(parents=True, exist_ok=True)
    defaults = {
        "run_name": "job",
        "base_output_directory": str(Path(root) / "bucket"),
        "enable_checkpointing": True,
        "enable_emergency_checkpoint": True,
        "local_checkpoint_directory": str(local),
        "local_checkpoint_period": 2,
        "local_checkpoint_slot_wait_seconds": 15,
        "checkpoint_period": 10,
        "checkpoint_coordination_timeout_seconds": 30,
        "checkpoint_drain_timeout_seconds": 60,
        "checkpoint_agent_idle_seconds": 20,
    }
    return Config(**{**defaults, **flags})


def train(
    root: str,
    slices: int,
    until: int,
    flags: dict[str, Any],
    wanted: int | None = None,
    refused_at: dict[str, int] | None = None,
    parts: Sequence[tuple[int, str]] = (),
    rows: int = ROWS,
    hold_commits_until: int = 0,
    loaded: int = 0,
) -> dict[str, Any]:
    """Restores (step `wanted`, or the newest), checks, trains to step `until`, and tells what happened.

    `hold_commits_until` keeps process 0 from committing any drain before it has trained to that step; a run
    that starts from scratch has the state of step `loaded`.
    """
    flags = dict(flags)
    mesh = make_mesh(slices, flags.pop("cut", "fsdp"))
    arranged = flags.pop("arranged", None)  # "slices", or "hosts" as well
    config = make_config(root, flags)
    if arranged is not None:
        mesh = arrange_mesh(
            mesh, config.local_directory, config.checkpoint_directory, move_hosts=arranged == "hosts"
        )
    process = jax.process_index()
    state = make_state(mesh, 0, rows)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    manager = CheckpointManager.from_config(config, mesh, abstract)
    listed, latest = list(manager.all_steps()), manager.latest_step()
    read = [read_part(manager, mesh, *asked) for asked in parts]
    heard = _Lines("arrange_mesh")
    absl_logging.get_absl_logger().addHandler(heard)
    if wanted is None:
        restored = manager.restore_or_init(lambda: state)
        state, start, extras = restored.state, restored.step or 0, dict(restored.extras)
    else:
        state, start, extras = manager.restore(wanted)["state"], wanted, {}
    absl_logging.get_absl_logger().removeHandler(heard)
    check_state(state, mesh, start or loaded)
    if extras:
        assert extras == {"data": {"position": 100 * start + process}}, extras
    step_fn = jax.jit(_step, donate_argnums=0)
    local = Path(root) / f"ramdisk_{process}"
    gate = _CommitGate(local) if hold_commits_until else None
    for step in range(start + 1, until + 1):
        if gate and step == hold_commits_until:
            gate.open()
        state = step_fn(state, _increments(mesh, step))
        if refused_at == {"process": process, "step": step}:
            with contextlib.suppress(ExtrasError):
                manager.save(step, state, extras={"data": object()})
                raise AssertionError("an object without a state was accepted")
            continue
        manager.save(step, state, extras={"data": {"position": 100 * step + process}})
        print(f"step {step} complete {manager.latest_complete_step()}", flush=True)
    manager.wait_until_finished()
    manager.check_for_errors()
    report = manager.last_restore
    result = {
        "listed": listed,
        "latest": latest,
        "parts": read,
        "hints": heard.lines,
        "mesh": [device.process_index for device in mesh.devices.flat],
        "start": start,
        "source": report.source if report else "scratch",
        "reason": report.reason if report else "",
        "extras": extras,
        "steps": list(manager.all_steps()),
        "generation": manager.generation,
        "counters": manager.metrics_snapshot(),
        "complete": manager.latest_complete_step(),
        "committed": sorted(int(p.name) for p in manager.directory.iterdir() if p.name.isdigit()),
    }
    manager.close()
    return result


def read_part(manager: CheckpointManager, mesh: Mesh, step: int, cut: str) -> str:
    """Reads and checks a part of `step`, cut as it was saved or in another way; tells where it came from."""
    right = make_state(mesh, step)
    place = NamedSharding(mesh, P("fsdp") if cut == "as saved" else P(("fsdp", "replica")))
    if cut == "otherwise on process 1" and jax.process_index() != 1:
        place = NamedSharding(mesh, P("fsdp"))
    half = right["params"]["half"]
    item = {
        "params": {"half": jax.ShapeDtypeStruct(half.shape, half.dtype, sharding=place), "w": ocp.PLACEHOLDER},
        "count": jax.ShapeDtypeStruct((3,), np.int32),
    }
    try:
        found = manager.restore(step, ocp.args.Composite(state=ocp.args.PyTreeRestore(item)))["state"]
    except EmergencyCheckpointError as error:
        return f"{type(error).__name__}: {error}"
    assert found["params"]["w"] is ocp.PLACEHOLDER
    assert found["params"]["half"].sharding == place
    for name, array, wanted in (
        ("half", found["params"]["half"], half),
        ("count", found["count"], right["count"]),
    ):
        whole = multihost_utils.process_allgather(array, tiled=True)
        right_bits = multihost_utils.process_allgather(wanted, tiled=True)
        assert whole.tobytes() == right_bits.tobytes(), f"{name} does not belong to step {step}"
    assert manager.last_restore is not None
    return manager.last_restore.source


class _Lines(logging.Handler):
    """Keeps what is logged with some text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in (message := record.getMessage()):
            self.lines.append(message)


class _CommitGate:
    """Process 0's agent stands still, so that it commits nothing, until the gate is opened."""

    def __init__(self, local: Path) -> None:
        record = read_record(agent_directory(local))
        assert record is not None
        self._agent = record.pid
        if jax.process_index() == 0:
            os.kill(self._agent, signal.SIGSTOP)

    def open(self) -> None:
        if jax.process_index() == 0:
            os.kill(self._agent, signal.SIGCONT)


def train_until_preempted(root: str) -> dict[str, Any]:
    """Trains until all processes are told to leave at one step, which is saved on every tier."""
    mesh = make_mesh(2)
    state = make_state(mesh, 0)
    config = make_config(root, {"enable_autocheckpoint": True, "local_checkpoint_period": 1000})
    with CheckpointManager.from_config(config, mesh, state) as manager:
        for step in range(1, 100_000):
            state = make_state(mesh, step)
            manager.save(step, state)
            print(f"step {step}", flush=True)
            if manager.reached_preemption(step):
                manager.wait_until_finished()
                manager.check_for_errors()
                return {"left_at": step, "steps": list(manager.all_steps())}
    raise AssertionError("no notice was ever agreed on")


def _increments(mesh: Mesh, step: int) -> dict[str, Any]:
    return make_state(mesh, step)


def _step(state: dict[str, Any], following: dict[str, Any]) -> dict[str, Any]:
    """Takes every bit from `following`, but through the donated buffers of `state`."""
    return jax.tree.map(lambda old, new: jnp.where(old == old, new, old), state, following)


def live(root: str, slices: int, life: dict[str, Any]) -> dict[str, Any]:
    """One life of a job: each process damages its own ramdisk as told, then all train; errors become text."""
    process = jax.process_index()
    for one, other in life.get("swap", ()):
        if process == one:
            swap(Path(root) / f"ramdisk_{one}", Path(root) / f"ramdisk_{other}")
    if life.get("swap_shared") and process == 0:
        swap(Path(root) / "ramdisk/emergency_ckpt/0", Path(root) / "ramdisk/emergency_ckpt/1")
    if life.get("drop_persistent") and process == 0:
        for path in Path(root).glob("bucket/job/checkpoints/[0-9]*"):
            shutil.rmtree(path)
    if "flip_shard" in life and process == 0:
        flip_shard(Path(root), **life["flip_shard"])
    if process in life.get("wipe", ()):
        remove_tree(Path(root) / f"ramdisk_{process}")
    if process in life.get("flip", ()):
        flip_newest(Path(root), process, 1)
    if process in life.get("flip_all", ()):
        flip_newest(Path(root), process, None)
    if process in life.get("block_lock", ()):
        lock = Path(root) / f"ramdisk_{process}/emergency_ckpt/0/lock"
        lock.unlink()
        lock.mkdir()
    if life.get("flip_persistent") and process == 0:
        for path in Path(root).glob("bucket/job/checkpoints/*/*/**/d/*"):
            flip_byte(path)
    multihost_utils.sync_global_devices("damaged")
    try:
        return train(
            root,
            slices,
            life["until"],
            life.get("flags", {}),
            life.get("wanted"),
            life.get("refused_at"),
            life.get("parts", ()),
            life.get("rows", ROWS),
            life.get("hold_commits_until", 0),
            life.get("loaded", 0),
        )
    except EmergencyCheckpointError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def live_through(
    trained: str, root: str, slices: int, stories: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """Every story is a job of its own: a copy of the trained one, then one life after the other."""
    told = {}
    for name, lives in stories.items():
        place = Path(root) / name
        mine = Path(trained) / f"ramdisk_{jax.process_index()}"
        if mine.exists():
            # The agent stays with its own directory.
            shutil.copytree(mine, place / mine.name, ignore=shutil.ignore_patterns("agent.*"))
        if jax.process_index() == 0 and (Path(trained) / "bucket").exists():
            shutil.copytree(Path(trained) / "bucket", place / "bucket")
        multihost_utils.sync_global_devices(name)
        told[name] = []
        for number, life in enumerate(lives):
            multihost_utils.sync_global_devices(f"{name} {number}")
            told[name].append(live(str(place), slices, life))
    return told


def swap(one: Path, other: Path) -> None:
    aside = one.with_name(f"{one.name}_aside")  # two pairs may be swapped at once
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def flip_shard(root: Path, step: int, rows: list[int]) -> None:
    """Flips one bit of these rows of the weights in a persistent step, wherever they lie in it."""
    needle = make_weights(step)[rows[0] : rows[1]].tobytes()
    found = [
        (path, at)
        for path in root.glob(f"bucket/job/checkpoints/{step}/**/d/*")
        if (at := path.read_bytes().find(needle)) >= 0
    ]
    assert found
    for path, at in found:
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_newest(root: Path, process: int, pages: int | None) -> None:
    """Flips one bit in each of the first pages (None: all) of the newest step of a process.

    Every shard begins a page of its own.
    """
    path = newest_slot(root, process)
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 4096)[:pages]:
        content[at] ^= 1
    path.write_bytes(content)


def newest_slot(root: Path, process: int) -> Path:
    """Data file of the newest sealed slot of a process."""
    steps = {}
    for manifest in (root / f"ramdisk_{process}").glob("emergency_ckpt/*/slot_*.manifest"):
        body = json.loads(manifest.read_bytes().partition(b"\n")[2])
        steps[tuple(body["step"])] = manifest.with_suffix(".data")
    return steps[max(steps)]
