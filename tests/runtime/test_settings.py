"""Orbax's option objects: every field has its effect or is refused by name; none is ignored."""

from __future__ import annotations

import dataclasses
import re
from datetime import timedelta
from typing import Any

import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import options as orbax_options

from emergency_ckpt import (
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    MultiprocessingOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.runtime.settings import Settings, settings_from_orbax

# Per option class how it is put into the options of a manager, its fields that have an effect (a value that is
# not the default, and what then holds of the settings), and, with a value, the fields that are refused.
PARTS: dict[str, tuple[type, dict[str, tuple[Any, Any]], dict[str, Any]]] = {
    "": (
        CheckpointManagerOptions,
        {
            "replica_axis_index": (1, lambda s: s.replica_axis == 1),
            "cleanup_tmp_directories": (True, lambda s: s.remove_foreign_leftovers),
            "enable_async_checkpointing": (False, lambda s: not s.asynchronous),
            "single_host_load_and_broadcast": (False, lambda s: not s.single_replica_restore),
        },
        {},
    ),
    "local": (
        LocalCheckpointOptions,
        {
            "save_interval_steps": (3, lambda s: s.schedule.local.periods == (3,)),
            "max_to_keep": (4, lambda s: s.local_max_to_keep == 4),
            "read_only": (True, lambda s: s.schedule.local is None and s.local_directory is not None),
            "should_save_fn": (lambda step, last: True, lambda s: s.asked_locally is not None),
        },
        {"debug_use_full_global_mesh": True},
    ),
    "persistent": (
        PersistentCheckpointOptions,
        {
            "save_interval_steps": (3, lambda s: s.schedule.persistent.periods == (3,)),
            "max_to_keep": (4, lambda s: s.persistent_max_to_keep == 4),
            "keep_period": (5, lambda s: s.persistent_keep_period == 5),
            "should_save_fn": (lambda step, last: True, lambda s: s.asked_persistently is not None),
        },
        {},
    ),
    "async_options": (
        orbax_options.AsyncOptions,
        {
            "timeout_secs": (7, lambda s: s.drain_timeout == timedelta(seconds=7)),
            "post_finalization_callback": (print, lambda s: s.after_commit is print),
        },
        {"barrier_sync_fn": print, "create_directories_asynchronously": False},
    ),
    "multiprocessing_options": (
        MultiprocessingOptions,
        {"coordination_timeout_secs": (7, lambda s: s.coordination_timeout == timedelta(seconds=7))},
        {},
    ),
}
# Shown elsewhere: the parts themselves, name formats, and policies (test_policies).
SHOWN_ELSEWHERE = {"save_decision_policy", "preservation_policy", "step_name_format", *PARTS}


def settings_with(part: str, **fields: Any) -> Settings:
    made = PARTS[part][0](**fields)
    options = made if part == "" else CheckpointManagerOptions(**{part: made})
    return settings_from_orbax("/local", "/bucket", options)


@pytest.mark.parametrize("part", PARTS)
def test_every_field_of_orbax_is_accounted_for(part: str) -> None:
    kind, effects, refused = PARTS[part]
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields - SHOWN_ELSEWHERE == set(effects) | set(refused)


@pytest.mark.parametrize(("part", "field"), [(part, field) for part in PARTS for field in PARTS[part][1]])
def test_a_supported_field_has_its_effect(part: str, field: str) -> None:
    value, holds = PARTS[part][1][field]
    assert holds(settings_with(part, **{field: value}))
    assert not holds(settings_from_orbax("/local", "/bucket", None))


@pytest.mark.parametrize(("part", "field"), [(part, field) for part in PARTS for field in PARTS[part][2]])
def test_an_unsupported_field_is_refused_by_name(part: str, field: str) -> None:
    name = f"{part}.{field}" if part else field
    with pytest.raises(ConfigError, match=rf"not supported: {name}\."):
        settings_with(part, **{field: PARTS[part][2][field]})


@pytest.mark.parametrize("part", PARTS)
def test_a_field_of_a_later_version_of_orbax_is_refused_unless_it_is_at_its_default(part: str) -> None:
    later = dataclasses.make_dataclass(
        "Later", [("novelty", list, dataclasses.field(default_factory=list))], bases=(PARTS[part][0],)
    )

    def settings(**fields: Any) -> Settings:
        made = later(**fields)
        options = made if part == "" else CheckpointManagerOptions(**{part: made})
        return settings_from_orbax(None, "/bucket", options)

    assert settings().persistent_directory == "/bucket"
    with pytest.raises(ConfigError, match=r"not supported: (\w+\.)?novelty\."):
        settings(novelty=["new"])


step_names: Any = ocp.path.step


class Commas(type(step_names.standard_name_format())):
    def build_name(self, step: int) -> str:
        return f"{step:,}"


@pytest.mark.parametrize(
    ("name_format", "said"),
    [
        (
            step_names.composite_name_format(
                step_names.standard_name_format(),
                [step_names.standard_name_format(), step_names.standard_name_format(step_prefix="old")],
            ),
            r"\(_CompositeNameFormat\) is not supported",
        ),
        (Commas(), r"\(Commas\) is not supported"),
        (
            dataclasses.replace(step_names.standard_name_format(), temporary_path_cls=object),
            "with temporary_path_cls is not supported",
        ),
    ],
)
def test_only_orbaxs_standard_names_of_steps_are_taken(name_format: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"step_name_format .*{said}.*standard_name_format"):
        settings_from_orbax("/local", "/bucket", CheckpointManagerOptions(step_name_format=name_format))


@pytest.mark.parametrize("fields", [{}, {"step_prefix": "x", "step_format_fixed_length": 3}])
def test_steps_are_called_as_orbax_calls_them(fields: dict[str, Any]) -> None:
    given = step_names.standard_name_format(single_host_load_and_broadcast=True, **fields)
    names = settings_from_orbax(None, "/b", CheckpointManagerOptions(step_name_format=given)).names
    assert [names.name(step) for step in (0, 23, 12345)] == [given.build_name(s) for s in (0, 23, 12345)]


@pytest.mark.parametrize(
    ("part", "field"),
    [("async_options", "timeout_secs"), ("multiprocessing_options", "coordination_timeout_secs")],
)
def test_a_time_limit_of_nothing_is_refused_by_the_name_of_the_option(part: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{part}.{field} is 0; expected a number of seconds above 0"):
        settings_with(part, **{field: 0})


@pytest.mark.parametrize("given", ["gs://bucket/run", "s3://bucket/run/", "s3://bucket"])
def test_an_object_store_is_named_by_its_url(given: str) -> None:
    assert settings_from_orbax("/local", given, None).persistent_directory == given.rstrip("/")


@pytest.mark.parametrize("given", ["s3:/bucket/run", "http://host/run", "s3://Bucket/run", "az://bucket/run"])
def test_what_is_no_url_of_a_store_is_refused_rather_than_taken_for_a_directory(
    given: str,
) -> None:
    with pytest.raises(ConfigError, match=re.escape(given)):
        settings_from_orbax("/local", given, None)


def test_metadata_that_is_not_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="metadata must be a JSON object"):
        settings_from_orbax(None, "/bucket", None, metadata={"when": object()})


def test_without_a_local_directory_there_is_no_local_tier() -> None:
    found = settings_from_orbax(None, "/bucket", None)
    assert found.local_directory is None
    assert found.schedule.local is None
