"""Contradictions are refused with both flags and a way out; flags without effect say so at start."""

from __future__ import annotations

from typing import Any

import pytest

from emergency_ckpt.config import FLAGS, Config, advice, inactive_flags
from emergency_ckpt.errors import ConfigError

RUN: dict[str, Any] = {"enable_checkpointing": True, "base_output_directory": "/out", "run_name": "r"}
LOCAL: dict[str, Any] = {"local_checkpoint_directory": "/local", "local_checkpoint_period": 10}
EMERGENCY: dict[str, Any] = {**RUN, **LOCAL, "enable_emergency_checkpoint": True}
MULTI_TIER: dict[str, Any] = {
    **RUN,
    **LOCAL,
    "enable_multi_tier_checkpointing": True,
    "multi_tier_checkpointing_backup_interval_minutes": 30,
}


@pytest.mark.parametrize("flags", [{}, RUN, EMERGENCY, MULTI_TIER, {**EMERGENCY, **MULTI_TIER}])
def test_settings_that_agree_are_accepted(flags: dict[str, Any]) -> None:
    assert Config(**flags).flags() == {**Config().flags(), **flags}


@pytest.mark.parametrize(
    ("flags", "first", "second"),
    [
        (
            {**EMERGENCY, "local_checkpoint_directory": ""},
            "enable_emergency_checkpoint",
            "local_checkpoint_directory",
        ),
        ({**EMERGENCY, "local_checkpoint_period": 0}, "enable_emergency_checkpoint", "local_checkpoint_period"),
        ({**EMERGENCY, "enable_checkpointing": False}, "enable_emergency_checkpoint", "enable_checkpointing"),
        ({**EMERGENCY, "base_output_directory": ""}, "enable_emergency_checkpoint", "base_output_directory"),
        ({**EMERGENCY, "run_name": ""}, "enable_emergency_checkpoint", "run_name"),
        (
            {**EMERGENCY, "local_checkpoint_spread": True, "checkpoint_agent": "off"},
            "local_checkpoint_spread",
            "checkpoint_agent",
        ),
        (
            {**MULTI_TIER, "local_checkpoint_directory": ""},
            "enable_multi_tier_checkpointing",
            "local_checkpoint_directory",
        ),
        (
            {**MULTI_TIER, "local_checkpoint_period": 0},
            "enable_multi_tier_checkpointing",
            "local_checkpoint_period",
        ),
        (
            {**MULTI_TIER, "enable_checkpointing": False},
            "enable_multi_tier_checkpointing",
            "enable_checkpointing",
        ),
        (
            {**MULTI_TIER, "multi_tier_checkpointing_backup_interval_minutes": None},
            "enable_multi_tier_checkpointing",
            "multi_tier_checkpointing_backup_interval_steps",
        ),
        (
            {**MULTI_TIER, "multi_tier_checkpointing_backup_interval_steps": 100},
            "multi_tier_checkpointing_backup_interval_minutes",
            "multi_tier_checkpointing_backup_interval_steps",
        ),
        (
            {
                **MULTI_TIER,
                "multi_tier_checkpointing_backup_interval_minutes": None,
                "multi_tier_checkpointing_backup_interval_steps": 9,
            },
            "multi_tier_checkpointing_backup_interval_steps",
            "local_checkpoint_period",
        ),
        ({**RUN, "checkpoint_period": 0}, "enable_checkpointing", "checkpoint_period"),
        ({**RUN, "run_name": ""}, "base_output_directory", "run_name"),
        ({**RUN, "base_output_directory": "az://bucket/x"}, "base_output_directory", "s3://"),
        ({**RUN, "base_output_directory": "https://host/x"}, "base_output_directory", "s3://"),
        (
            {**RUN, "load_full_state_path": "/a", "load_parameters_path": "/b"},
            "load_full_state_path",
            "load_parameters_path",
        ),
        ({"load_full_state_path": "/a"}, "load_full_state_path", "enable_checkpointing"),
        ({"load_parameters_path": "/a"}, "load_parameters_path", "enable_checkpointing"),
        (
            {"checkpoint_storage_use_ocdbt": False},
            "checkpoint_storage_use_zarr3",
            "checkpoint_storage_use_ocdbt",
        ),
        (
            {**EMERGENCY, "local_checkpoint_directory": "/out/r/checkpoints"},
            "local_checkpoint_directory",
            "base_output_directory",
        ),
        (
            {**EMERGENCY, "local_checkpoint_directory": "/out/r/checkpoints/x"},
            "local_checkpoint_directory",
            "base_output_directory",
        ),
        (
            {**EMERGENCY, "base_output_directory": "/local/out"},
            "local_checkpoint_directory",
            "base_output_directory",
        ),
    ],
)
def test_a_contradiction_names_both_flags_and_the_way_out(
    flags: dict[str, Any], first: str, second: str
) -> None:
    with pytest.raises(ConfigError, match="contradict each other") as caught:
        Config(**flags)
    lines = [line for line in str(caught.value).splitlines() if first in line and second in line]
    assert len(lines) == 1, str(caught.value)
    assert "Set " in lines[0] or "set " in lines[0]


def test_all_contradictions_are_reported_at_once_with_where_the_flags_were_set() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(
            enable_checkpointing=True,
            checkpoint_period=0,
            load_full_state_path="/a",
            load_parameters_path="/b",
            sources={"checkpoint_period": "x.yml:3"},
        )
    assert "checkpoint_period=0 (x.yml:3)" in str(caught.value)
    assert "load_full_state_path=/a (default)" in str(caught.value)


def test_a_bucket_is_no_contradiction_while_checkpoints_are_off() -> None:
    assert Config(base_output_directory="gs://bucket", run_name="r").base_output_directory == "gs://bucket"


def test_a_ramdisk_below_the_output_directory_but_beside_the_checkpoints_is_accepted() -> None:
    assert Config(**{**EMERGENCY, "local_checkpoint_directory": "/out/ramdisk"}).saves_locally


def test_nothing_is_inactive_by_default_nor_in_a_plain_emergency_job() -> None:
    assert inactive_flags(Config()) == []
    assert inactive_flags(Config(**EMERGENCY)) == []
    assert inactive_flags(Config(**MULTI_TIER)) == []


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (
            {"multi_tier_checkpointing_backup_interval_steps": 50},
            "multi_tier_checkpointing_backup_interval_steps",
        ),
        ({"mtc_data_parallelism": 2}, "mtc_data_parallelism"),
        ({"enable_checkpoint_cloud_logger": True}, "enable_checkpoint_cloud_logger"),
        ({"checkpoint_storage_use_zarr3": False}, "checkpoint_storage_use_zarr3"),
        (
            {"checkpoint_storage_use_zarr3": False, "checkpoint_storage_use_ocdbt": False},
            "checkpoint_storage_use_ocdbt",
        ),
        ({"preemption_exit_code": 143}, "preemption_exit_code"),
        ({"preemption_sources": "aws"}, "preemption_sources"),
        ({"preemption_signals": "SIGUSR1"}, "preemption_signals"),
        ({"local_checkpoint_directory": "/local"}, "local_checkpoint_directory"),
        ({"local_checkpoint_period": 5}, "local_checkpoint_period"),
        ({"local_checkpoint_max_to_keep": 2}, "local_checkpoint_max_to_keep"),
        ({"local_save_during_drain": "restart_drain"}, "local_save_during_drain"),
    ],
)
def test_a_flag_without_full_effect_says_so_in_one_sentence(flags: dict[str, Any], flag: str) -> None:
    said = [line for line in inactive_flags(Config(**flags)) if line.startswith(f"{flag}=")]
    assert len(said) == 1
    assert "does nothing" in said[0] or "active in part" in said[0]


def test_autocheckpoint_without_checkpoints_says_that_it_does_nothing() -> None:
    said = inactive_flags(Config(enable_autocheckpoint=True))
    assert len(said) == 1
    assert "does nothing while enable_checkpointing=False" in said[0]


def test_only_flags_that_were_changed_are_named_as_inactive() -> None:
    said = " ".join(inactive_flags(Config(mtc_data_parallelism=2)))
    changed = {"mtc_data_parallelism", "checkpoint_replica_axis"}  # the second is the advice
    assert {flag for flag in FLAGS if flag in said.replace(",", " ")} == changed


def test_with_a_backup_interval_checkpoint_period_may_say_nothing() -> None:
    flags = {**EMERGENCY, "checkpoint_period": 0, "multi_tier_checkpointing_backup_interval_steps": 20}
    assert Config(**flags).backs_up
    assert advice(Config(**flags)) == []
    with pytest.raises(ConfigError, match="checkpoint_period=0"):
        Config(**{**flags, "enable_emergency_checkpoint": False})


def test_a_local_period_beyond_the_persistent_one_is_accepted_with_advice() -> None:
    assert advice(Config(**EMERGENCY)) == []
    said = advice(Config(**{**EMERGENCY, "checkpoint_period": 5}))
    assert len(said) == 1
    assert "local_checkpoint_period=10" in said[0]
    assert "checkpoint_period=5" in said[0]
