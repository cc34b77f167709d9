"""A pod as a manifest says it, its containers really started: a notice, a restart, a kill of the program."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from emergency_ckpt.deploy.jobset import render_jobset
from emergency_ckpt.deploy.pods import NOTICES
from tests.deploy.plans import ON_GPUS, config, expanded, plan

PROGRAM = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from emergency_ckpt import CheckpointManager, load_config

config = load_config(sys.argv)
mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("replica", "data"))


def state(step):
    return {"w": jax.device_put(jnp.full((64, 64), step), NamedSharding(mesh, PartitionSpec(None, "data")))}


with CheckpointManager.from_config(config, mesh, state(0)) as manager:
    start = manager.restore_or_init(lambda: state(0)).step or 0
    print("restored", start, flush=True)
    step = start
    while not manager.reached_preemption(step):
        step += 1
        manager.save(step, state(step))
        print("step", step, flush=True)
        time.sleep(0.02)
    print("leaving", [notice.source for notice in manager.notices], flush=True)
sys.exit(42)
"""


class Pod:
    """One life of the pod of a host: what Kubernetes would start, with this machine's paths and addresses."""

    def __init__(self, spec: dict[str, Any], places: dict[str, str]) -> None:
        self._places = places
        (self._program,), (self._agent,) = spec["containers"], spec["initContainers"]
        self._environment = {**os.environ, "EMERGENCY_CKPT_AGENT_TOKEN": "0123456789abcdef" * 4}
        self.lines: list[str] = []

    def words(self, command: list[str]) -> list[str]:
        words = [expanded(word) for word in command]
        for there, here in self._places.items():
            words = [word.replace(there, here) for word in words]
        return (
            [sys.executable, "-m", "emergency_ckpt.cli.main", *words[1:]]
            if words[0] == "emergency-ckpt"
            else words
        )

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(command),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Sidecar, probe, program; in the end the sidecar is told to end, as when the others have ended."""
        agent = self._start(self._agent["command"])
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(agent.communicate()[0]))
        reader.start()
        program: subprocess.Popen[str] | None = None
        try:
            probe = self._agent["startupProbe"]
            while subprocess.run(self.words(probe["exec"]["command"]), timeout=30).returncode != 0:
                if agent.poll() is not None:
                    reader.join(10)
                    raise AssertionError(f"the agent did not start: {said}")
            self.program = program = self._start(self._program["command"])
            yield
            agent.terminate()
            reader.join(40)
            assert agent.returncode == 0, said
        finally:
            for process in (agent, program):
                if process is not None:
                    process.kill()
            reader.join(10)

    def wait_for(self, start: str) -> str:
        assert self.program.stdout is not None
        for line in self.program.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return line.strip()
        raise AssertionError(f"{start!r} was never said:\n{''.join(self.lines)}")

    def ended(self) -> int:
        rest, _ = self.program.communicate(timeout=100)
        self.lines.append(rest)
        return self.program.returncode

    def pre_stop(self) -> None:
        subprocess.run(
            self.words(self._program["lifecycle"]["preStop"]["exec"]["command"]), check=True, timeout=10
        )


def committed(directory: Path) -> list[int]:
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "show", "--json", str(directory)]
    shown = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=60).stdout)
    return sorted(step["step"] for step in shown["steps"] if not step["void"] and not step["problem"])


@pytest.mark.slow
def test_a_job_in_such_pods_leaves_at_a_notice_comes_back_and_is_drained_when_it_is_killed(
    tmp_path: Path, ramdisk: Path
) -> None:
    file = tmp_path / "train.py"
    file.write_text(PROGRAM)
    flags = config(local_checkpoint_period=1, checkpoint_period=1_000_000)
    made = plan("k8s", ON_GPUS, flags, command=(sys.executable, str(file)))
    (job_set,) = [d for d in yaml.safe_load_all(render_jobset(made)) if d["kind"] == "JobSet"]
    spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    places = {
        "/local": str(ramdisk),
        "gs://bucket/jobs": str(tmp_path / "bucket"),
        "$(POD_IP)": "127.0.0.1",
    }
    checkpoints = tmp_path / "bucket" / "r1" / "checkpoints"

    def pod(life: str) -> Pod:
        (tmp_path / life).mkdir()
        return Pod(spec, {**places, NOTICES: str(tmp_path / life)})

    first = pod("first")
    with first.living():
        assert first.wait_for("restored") == "restored 0"
        first.wait_for("step 3")
        first.pre_stop()
        assert first.wait_for("leaving") == "leaving ['file']"
        assert first.ended() == 42
        left_at = committed(checkpoints)[-1]

    # The next pod has the ramdisk of the one before, and not its notice.
    second = pod("second")
    with second.living():
        assert second.wait_for("restored") == f"restored {left_at}"
        second.wait_for(f"step {left_at + 5}")
        (trainer,) = psutil.Process(second.program.pid).children()
        trainer.send_signal(signal.SIGKILL)
        assert second.ended() == 137
        assert committed(checkpoints)[-1] > left_at
