"""A program that does what MaxText's does, run with our manager: killed, told to leave, and finished.

MaxText itself is not among the packages of the tests; `imitation/` makes its calls.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emergency_ckpt import ConfigError
from emergency_ckpt.cli.launch import JobSpec, KillSpec, run_job
from emergency_ckpt.cli.launcher.spec import parse_exit_codes
from emergency_ckpt.maxtext import install, run_program

IMITATION = Path(__file__).parent / "imitation"
PROGRAM = "maxtext.trainers.pre_train.train"
STEPS = 51


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The imitation can be imported in this process, and is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(IMITATION))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "maxtext"]:
        del sys.modules[name]


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("slices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_program_of_maxtext_comes_back_after_a_loss_and_after_a_notice(
    ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices: int
) -> None:
    flags = tmp_path / "ours.yml"
    flags.write_text("base_config: base.yml\npreemption_exit_code: 43\npreemption_grace_seconds: 60\n")
    monkeypatch.setenv("EMERGENCY_CKPT_CONFIG", str(flags))
    monkeypatch.setenv("PYTHONPATH", f"{IMITATION}:{Path.cwd()}")
    lines: list[tuple[int, str]] = []
    spec = JobSpec(
        command=(
            *(sys.executable, "-m", "emergency_ckpt.maxtext", "-m", PROGRAM),
            *(f"base_output_directory={tmp_path}", "run_name=r1", f"steps={STEPS}", "step_seconds=0.15"),
            *("local_checkpoint_directory={ramdisk}", "local_checkpoint_period=2", "checkpoint_period=20"),
            "terminate_at=21",
        ),
        slices=slices,
        processes_per_slice=1,
        devices_per_process=4 // slices,
        restarts=2,
        restart_on=parse_exit_codes("43,SIGKILL"),
        kills=(KillSpec.parse(f"slice={slices - 1}@step=13"),),
        wipe_ramdisk=slices > 1,
        ramdisk_root=ramdisk,
        grace_seconds=30,
        time_limit_seconds=200,
        log_dir=tmp_path / "logs",
    )
    result = run_job(spec, on_output=lambda process, line: lines.append((process, line)))
    logs = "\n".join(path.read_text() for path in sorted((tmp_path / "logs").glob("process_0*.log")))
    assert [attempt.exit_code for attempt in result.attempts] == [137, 43, 0], logs

    said = [line for process, line in lines if process == 0]
    restored = [int(line.split()[1]) for line in said if line.startswith("restored ")]
    saved = [int(line.split()[1]) for line in said if line.startswith("saved ")]
    assert restored[0] in (12, 14)  # slice 1 was killed after step 13, and slice 0 went on for a moment
    assert restored[1] >= 21
    assert restored[1] in saved
    assert saved[-1] == STEPS - 1
    assert "training stopped: the job is preempted" in said

    directory = tmp_path / "r1" / "checkpoints"
    assert {20, restored[1], STEPS - 1} <= {
        int(path.name) for path in directory.iterdir() if path.name.isdigit()
    }
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), {"step": 0, "params": {"w": 0}})
    wanted = ocp.args.PyTreeRestore(restore_args={**how, "opt_state": {"mu": how["step"]}})
    orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = orbax.restore(directory / str(STEPS - 1) / "default", args=wanted)
    train = importlib.import_module(PROGRAM)
    state = train.new_state()
    for _ in range(STEPS):
        state = jax.jit(train.next_state)(state)
    np.testing.assert_array_equal(found["params"]["w"], state.params["w"])
    np.testing.assert_array_equal(found["opt_state"]["mu"], state.opt_state["mu"])
    assert int(found["step"]) == STEPS


def test_where_there_is_no_maxtext_it_is_said() -> None:
    with pytest.raises(ConfigError, match=r"can be imported .*PYTHONPATH"):
        install()


def test_a_program_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="no program is named"):
        run_program(["-m"])


def test_what_no_restart_mends_does_not_end_with_the_code_that_restarts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "emergency_ckpt.maxtext"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, "no program is named" in done.stderr) == (2, True)


@pytest.mark.usefixtures("_importable")
def test_the_replicators_manager_is_refused_with_what_to_set_instead() -> None:
    assert install() == (
        "maxtext.common.checkpointing.create_orbax_emergency_checkpoint_manager",
        "maxtext.common.checkpointing.create_orbax_emergency_replicator_checkpoint_manager",
    )
    checkpointing = sys.modules["maxtext.common.checkpointing"]
    with pytest.raises(ConfigError, match="Set enable_multi_tier_checkpointing=False"):
        checkpointing.create_orbax_emergency_replicator_checkpoint_manager("/local", 10, object())  # type: ignore[attr-defined]
