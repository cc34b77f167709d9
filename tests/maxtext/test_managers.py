"""What MaxText's manager is made of: MaxText's arguments, then a file of ours, then the defaults."""

from __future__ import annotations

import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt import ConfigError
from emergency_ckpt.maxtext import create_orbax_emergency_checkpoint_manager
from emergency_ckpt.maxtext.managers import settings_of
from emergency_ckpt.runtime.settings import Settings


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))


def of(environ: dict[str, str], persistent: str = "/out/r1/checkpoints/") -> Settings:
    return settings_of("/local", persistent, 20, 1000, environ)


def test_without_a_file_maxtexts_arguments_are_on_top_of_the_defaults() -> None:
    settings = of({})
    assert str(settings.local_directory) == "/local"
    assert settings.persistent_directory == "/out/r1/checkpoints"
    assert settings.schedule.local is not None
    assert settings.schedule.local.periods == (20,)
    assert settings.schedule.persistent is not None
    assert settings.schedule.persistent.periods == (1000,)
    assert settings.save_on_preemption


@pytest.mark.parametrize("directory", ["gs://bucket/out/r1/checkpoints/", "s3://bucket/x", "/somewhere/else"])
def test_the_persistent_directory_is_the_one_that_maxtext_names(directory: str) -> None:
    assert of({}, directory).persistent_directory == directory.rstrip("/")


def test_a_file_has_the_flags_that_maxtext_does_not_know_and_maxtext_has_its_own(tmp_path: Path) -> None:
    file = tmp_path / "ours.yml"
    file.write_text(
        "base_config: base.yml\nlocal_checkpoint_copies: 2\n"
        "checkpoint_period: 7\npreemption_grace_seconds: 90\n"
    )
    settings = of({"EMERGENCY_CKPT_CONFIG": str(file)})
    assert settings.local_copies == 2
    assert settings.preemption_grace == timedelta(seconds=90)
    assert settings.schedule.persistent is not None
    assert settings.schedule.persistent.periods == (1000,)
    assert settings.save_on_preemption  # False is what the packaged file has, and nobody asked for it

    words = "local_checkpoint_copies=3 'checkpoint_agent_bind_address=10.0.0.1' checkpoint_period=5"
    both = of({"EMERGENCY_CKPT_CONFIG": str(file), "EMERGENCY_CKPT_FLAGS": words})
    assert both.local_copies == 3
    assert both.agent is not None
    assert both.agent.bind == "10.0.0.1"
    assert both.schedule == settings.schedule

    file.write_text("enable_autocheckpoint: False\n")
    assert not of({"EMERGENCY_CKPT_CONFIG": str(file)}).save_on_preemption


def test_variables_for_maxtexts_own_keys_are_left_to_maxtext() -> None:
    settings = of({"M_PER_DEVICE_BATCH_SIZE": "4", "M_MAX_NUM_CHECKPOINTS_TO_KEEP": "3"})
    assert settings.persistent_max_to_keep == 3


def test_what_cannot_be_used_names_the_file_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "ours.yml"
    file.write_text("local_checkpoint_copies: none at all\n")
    with pytest.raises(ConfigError, match=rf"EMERGENCY_CKPT_CONFIG={file}, EMERGENCY_CKPT_FLAGS=x=1: (.|\n)*x"):
        of({"EMERGENCY_CKPT_CONFIG": str(file), "EMERGENCY_CKPT_FLAGS": "x=1"})
    with pytest.raises(ConfigError, match="local_checkpoint_copies: expected a whole number"):
        of({"EMERGENCY_CKPT_CONFIG": str(file)})
    with pytest.raises(ConfigError, match="EMERGENCY_CKPT_FLAGS=a='b: No closing quotation"):
        of({"EMERGENCY_CKPT_FLAGS": "a='b"})
    with pytest.raises(ConfigError, match=r"no configuration file /missing\.yml"):
        of({"EMERGENCY_CKPT_CONFIG": "/missing.yml"})


class Logger:
    def __init__(self) -> None:
        self.entries: list[Any] = []

    def log_entry(self, entry: Any) -> None:
        self.entries.append(entry)


def test_the_manager_is_one_of_orbaxs_and_goes_on_from_all_leaves_that_are_asked_for(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ours.yml"
    file.write_text("checkpoint_agent: off\n")
    monkeypatch.setenv("EMERGENCY_CKPT_CONFIG", str(file))
    where = NamedSharding(mesh, P("fsdp"))
    abstract = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=where)}
    persistent = f"{tmp_path}/r1/checkpoints/"
    logger = Logger()

    def wanted(*names: str) -> Any:
        item = {name: abstract[name] for name in names}
        how = {name: ocp.type_handlers.ArrayRestoreArgs(sharding=where) for name in names}
        return ocp.args.Composite(state=ocp.args.PyTreeRestore(item, how, partial_restore=True))

    def state(step: int) -> dict[str, jax.Array]:
        return {"w": jax.device_put(jnp.arange(8.0) + step, where)}

    def saved(step: int) -> Any:
        return ocp.args.Composite(state=ocp.args.PyTreeSave(state(step)))

    with create_orbax_emergency_checkpoint_manager(
        str(ramdisk), persistent, mesh, abstract, 1, 4, logger
    ) as first:
        assert issubclass(type(first), orbax_emergency.CheckpointManager)
        for step in range(6):
            assert first.save(step, args=saved(step))
        first.wait_until_finished()
        generation = first.generation
    assert logger.entries
    with create_orbax_emergency_checkpoint_manager(
        str(ramdisk), persistent, mesh, abstract, 1, 4, None
    ) as second:
        assert second.latest_step() == 5
        restored = second.restore(4, args=wanted("w")).state
        assert second.generation > generation
        np.testing.assert_array_equal(restored["w"], state(4)["w"])
        assert second.save(5, args=saved(105))  # step 5 of the life before is void
        np.testing.assert_array_equal(second.restore(5, args=wanted("w")).state["w"], state(105)["w"])
        assert second.all_steps()[-1] == 5


def test_an_nnx_state_is_described_as_maxtext_saves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from emergency_ckpt.maxtext.managers import _saved_form

    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert _saved_form(state) is state  # MaxText is not there
    for name in ("maxtext", "maxtext.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("maxtext.common.train_state_nnx")
    module.to_linen_checkpoint_dict = lambda tree: {"params": tree}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert set(_saved_form(state)["params"]) == {"kernel", "bias"}
    module.to_checkpoint_dict = lambda tree: {"new": tree}  # type: ignore[attr-defined]
    assert _saved_form(state)["new"] is state
    assert _saved_form({"plain": 1}) == {"plain": 1}
