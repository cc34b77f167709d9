"""A misspelt flag is found, and no key of MaxText is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.config import FLAGS
from emergency_ckpt.config.names import did_you_mean, misspelt, nearest
from emergency_ckpt.config.values import read_file

DATA = Path(__file__).parent / "data"
BASE_KEYS = sorted(read_file(DATA / "maxtext_base.yml"))
# Keys of MaxText's other files and schema, of this release and of earlier ones.
OTHER_KEYS = (DATA / "maxtext_other_keys.txt").read_text().split()


def test_the_sample_is_as_large_as_the_real_file() -> None:
    assert len(BASE_KEYS) > 670
    assert len(OTHER_KEYS) > 150


def test_no_key_of_maxtext_is_misspelt_in_its_complete_file() -> None:
    assert misspelt(BASE_KEYS, FLAGS) == {}


@pytest.mark.parametrize("keys", [BASE_KEYS, OTHER_KEYS], ids=["base", "other"])
def test_no_key_of_maxtext_is_misspelt_in_a_file_of_its_own(keys: list[str]) -> None:
    assert {key: found for key in keys if (found := misspelt([key], FLAGS))} == {}


@st.composite
def slips(draw: st.DrawFn) -> tuple[str, str]:
    """A flag, and the same with one letter dropped, doubled, changed, or swapped with its neighbour."""
    flag = draw(st.sampled_from(FLAGS))
    at = draw(st.integers(0, len(flag) - 2))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_0123456789"))
    slip = draw(
        st.sampled_from(
            [
                flag[:at] + flag[at + 1 :],
                flag[:at] + flag[at] + flag[at:],
                flag[:at] + letter + flag[at + 1 :],
                flag[:at] + flag[at + 1] + flag[at] + flag[at + 2 :],
            ]
        ).filter(lambda slip: slip != flag)
    )
    return flag, slip


@given(slips())
def test_one_slip_in_any_flag_is_found(flag_and_slip: tuple[str, str]) -> None:
    flag, slip = flag_and_slip
    assert misspelt([slip, "learning_rate"], FLAGS) == {slip: flag}


@settings(max_examples=20)  # each example looks at several hundred keys
@given(slips())
def test_a_slip_is_found_among_all_keys_of_maxtext(flag_and_slip: tuple[str, str]) -> None:
    flag, slip = flag_and_slip
    keys = [slip, *(key for key in BASE_KEYS if key != flag)]
    assert misspelt(keys, FLAGS) == {slip: flag}


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("local_checkpoint_dir", "local_checkpoint_directory"),
        ("local-checkpoint-period", "local_checkpoint_period"),
        ("Run_Name", "run_name"),
        ("max_checkpoints_to_keep", "max_num_checkpoints_to_keep"),
        ("enable_emergency_checkpointing", "enable_emergency_checkpoint"),
        ("enable_multitier_checkpointing", "enable_multi_tier_checkpointing"),
        ("checkpointing_period", "checkpoint_period"),
        ("enable_single_replica_checkpoint_restoring", "enable_single_replica_ckpt_restoring"),
        ("enable_auto_checkpoint", "enable_autocheckpoint"),
        ("checkpoint_coordination_timeout", "checkpoint_coordination_timeout_seconds"),
    ],
)
def test_what_people_write_instead_is_found(key: str, flag: str) -> None:
    assert misspelt([key], FLAGS) == {key: flag}


def test_a_near_name_passes_beside_the_flag_itself_unless_it_is_all_but_equal() -> None:
    assert misspelt(["local_checkpoint_dir", "local_checkpoint_directory"], FLAGS) == {}
    assert misspelt(["checkpoint_periods", "checkpoint_period"], FLAGS) == {
        "checkpoint_periods": "checkpoint_period"
    }


def test_nearest_names_are_offered_best_first_and_not_at_any_price() -> None:
    assert nearest("chekpoint_period", FLAGS)[0] == "checkpoint_period"
    assert did_you_mean("zzz", FLAGS) == ""
