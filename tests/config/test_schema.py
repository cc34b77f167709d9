"""One typed, documented field per flag; values of the wrong type are refused with what was expected."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.config import FLAGS, Config
from emergency_ckpt.config.describe import expected
from emergency_ckpt.errors import ConfigError

# The table of the flags that a MaxText user knows, with its types and defaults.
MAXTEXT_DEFAULTS: dict[str, Any] = {
    "run_name": "",
    "base_output_directory": "",
    "enable_checkpointing": False,
    "async_checkpointing": True,
    "checkpoint_period": 10_000,
    "max_num_checkpoints_to_keep": None,
    "save_checkpoint_on_completion": True,
    "enable_emergency_checkpoint": False,
    "local_checkpoint_directory": "",
    "local_checkpoint_period": 0,
    "local_checkpoint_copies": 1,
    "local_checkpoint_spread": False,
    "checkpoint_agent": "auto",
    "checkpoint_agent_bind_address": "",
    "checkpoint_agent_advertise_address": "",
    "checkpoint_agent_port": 0,
    "checkpoint_agent_token_file": "",
    "checkpoint_agent_tls_certificate": "",
    "checkpoint_agent_tls_key": "",
    "checkpoint_agent_tls_ca": "",
    "checkpoint_agent_idle_seconds": 900.0,
    "jax_distributed_initialization_timeout": 300,
    "use_replicator_service": False,
    "enable_single_replica_ckpt_restoring": False,
    "enable_autocheckpoint": False,
    "load_full_state_path": "",
    "load_parameters_path": "",
    "checkpoint_storage_target_data_file_size_bytes": 2**31,
    "checkpoint_storage_use_ocdbt": True,
    "checkpoint_storage_use_zarr3": True,
    "checkpoint_storage_concurrent_gb": 96,
    "enable_checkpoint_cloud_logger": False,
    "enable_multi_tier_checkpointing": False,
    "multi_tier_checkpointing_backup_interval_minutes": None,
    "multi_tier_checkpointing_backup_interval_steps": None,
    "mtc_data_parallelism": 0,
}
OUR_DEFAULTS: dict[str, Any] = {
    "local_checkpoint_max_to_keep": 1,
    "local_checkpoint_slot_wait_seconds": 1.0,
    "local_checkpoint_foreign_run": "evict",
    "local_save_during_drain": "pause",
    "on_replica_divergence": "warn",
    "compare_device_copies": False,
    "checkpoint_agent": "auto",
    "checkpoint_agent_bind_address": "",
    "checkpoint_agent_advertise_address": "",
    "checkpoint_agent_port": 0,
    "checkpoint_agent_token_file": "",
    "checkpoint_agent_tls_certificate": "",
    "checkpoint_agent_tls_key": "",
    "checkpoint_agent_tls_ca": "",
    "checkpoint_agent_idle_seconds": 900.0,
    "agent_flush_on_trainer_exit": True,
    "preemption_exit_code": 42,
    "autocheckpoint_skip_if_replicated": False,
    "preemption_sources": "auto",
    "preemption_notice_file": "",
    "preemption_allow_imds_v1": False,
    "preemption_signals": "SIGTERM",
    "preemption_grace_seconds": 30.0,
    "trainer_stall_factor": 10.0,
    "trainer_stall_floor_seconds": 300.0,
    "trainer_stall_restart_seconds": 0.0,
    "checkpoint_replica_axis": 0,
    "checkpoint_storage_compression": "none",
    "checkpoint_coordination_timeout_seconds": 120.0,
    "checkpoint_drain_timeout_seconds": 1800.0,
    "checkpoint_drain_retry_seconds": 300.0,
    "checkpoint_storage_stall_seconds": 60.0,
    "checkpoint_log_format": "text",
}


def test_every_flag_is_there_with_its_documented_default() -> None:
    assert Config().flags() == {**MAXTEXT_DEFAULTS, **OUR_DEFAULTS}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_says_what_it_means_and_what_it_takes(flag: str) -> None:
    field = Config.model_fields[flag]
    assert field.description
    assert field.description.endswith((".", ".)"))
    assert expected(field)


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("checkpoint_period", -1, "a whole number of at least 0"),
        ("checkpoint_period", "often", "a whole number of at least 0"),
        ("checkpoint_period", 2.5, "a whole number of at least 0"),
        ("checkpoint_period", True, "a whole number of at least 0"),
        ("checkpoint_period", None, "a whole number of at least 0"),
        ("max_num_checkpoints_to_keep", 0, "a whole number of at least 1, or None"),
        ("multi_tier_checkpointing_backup_interval_steps", -5, "a whole number of at least 0, or None"),
        ("local_checkpoint_max_to_keep", 0, "a whole number of at least 1"),
        ("local_checkpoint_slot_wait_seconds", -0.5, "a number of at least 0"),
        ("local_checkpoint_slot_wait_seconds", True, "a number of at least 0"),
        ("checkpoint_coordination_timeout_seconds", 0, "a number above 0"),
        ("checkpoint_drain_timeout_seconds", float("inf"), "a number above 0"),
        ("checkpoint_drain_timeout_seconds", float("nan"), "a number above 0"),
        ("enable_checkpointing", "perhaps", "True or False"),
        ("enable_checkpointing", 2, "True or False"),
        ("checkpoint_log_format", "xml", "text or json"),
        ("local_checkpoint_foreign_run", "keep", "evict or error"),
        ("on_replica_divergence", "ignore", "warn or raise"),
        ("local_save_during_drain", "stop", "pause or restart_drain"),
        ("checkpoint_storage_compression", "gzip", "none or zstd"),
        ("checkpoint_replica_axis", -1, "a whole number of at least 0, or text"),
        ("checkpoint_replica_axis", True, "a whole number of at least 0, or text"),
        ("checkpoint_replica_axis", "", "a whole number of at least 0, or text"),
        ("run_name", 7, "text"),
        ("run_name", "/somewhere/else", "must stay below it"),
        ("run_name", "a/../../b", "must stay below it"),
        ("local_checkpoint_directory", "gs://bucket/ram", "a directory of this host, not a URL"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(flag: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{flag: value})
    message = str(caught.value)
    assert f"  - {flag}: expected" in message
    assert wanted in message
    assert repr(value) in message


def test_every_wrong_flag_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 flags.*checkpoint_period.*local_checkpoint_period"):
        Config(checkpoint_period=-1, local_checkpoint_period=-1)


def test_an_unknown_flag_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint_perod: there is no such flag\. Did you mean checkpoint_period"
    ):
        Config(checkpoint_perod=5)


def test_a_path_object_is_taken_for_a_directory(tmp_path: Path) -> None:
    assert Config(base_output_directory=tmp_path, run_name="r").base_output_directory == str(tmp_path)


def test_an_interval_of_zero_means_none_as_in_older_files() -> None:
    assert Config(multi_tier_checkpointing_backup_interval_minutes=0) == Config()


def test_a_replica_axis_is_a_name_or_an_index() -> None:
    assert Config(checkpoint_replica_axis="data").checkpoint_replica_axis == "data"
    assert Config(checkpoint_replica_axis=2).checkpoint_replica_axis == 2


def test_the_checkpoints_of_a_run_lie_below_its_name() -> None:
    assert Config(base_output_directory="/out/", run_name="r1").checkpoint_directory == "/out/r1/checkpoints"


def test_directories_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = Config(
        enable_checkpointing=True,
        base_output_directory="out",
        run_name="r1",
        enable_emergency_checkpoint=True,
        local_checkpoint_directory="~/ram",
        local_checkpoint_period=5,
    )
    assert config.checkpoint_directory == str(tmp_path / "out/r1/checkpoints")
    assert config.local_directory == Path("/home/somebody/ram")


@pytest.mark.parametrize(
    ("flags", "missing"),
    [({"run_name": "r"}, "base_output_directory"), ({"base_output_directory": "/out"}, "run_name")],
)
def test_without_both_parts_there_is_no_checkpoint_directory(flags: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing} is empty"):
        _ = Config(**flags).checkpoint_directory


def test_there_is_no_local_directory_while_the_local_tier_is_off() -> None:
    config = Config(local_checkpoint_directory="/local", local_checkpoint_period=5)
    assert not config.saves_locally
    assert config.local_directory is None


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run_name = "other"  # type: ignore[misc]


def test_a_replaced_config_is_checked_and_forgets_where_the_flag_came_from() -> None:
    config = Config(
        checkpoint_period=7, run_name="r", sources={"checkpoint_period": "x.yml:3", "run_name": "x.yml:4"}
    )
    changed = config.replace(checkpoint_period=9)
    assert (changed.checkpoint_period, changed.run_name) == (9, "r")
    assert (changed.source_of("checkpoint_period"), changed.source_of("run_name")) == ("default", "x.yml:4")
    with pytest.raises(ConfigError, match="checkpoint_period"):
        config.replace(checkpoint_period=-9)


def test_a_config_survives_copies_and_pickles() -> None:
    config = Config(run_name="r", other_keys={"rl": {"steps": 3}}, sources={"run_name": "command line"})
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
