"""The demo's own keys are checked like flags, and its file is a valid configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.config import load_config
from emergency_ckpt.demo.options import CONFIG_FILE, DemoOptions
from emergency_ckpt.errors import ConfigError

KEYS: dict[str, Any] = {
    "demo_steps": 60,
    "demo_batch_size": 32,
    "demo_seed": 0,
    "demo_journal_directory": "/tmp/journals",
}


def test_the_packaged_file_with_its_needed_words_is_a_whole_configuration(tmp_path: Path) -> None:
    config = load_config(
        [
            str(CONFIG_FILE),
            f"base_output_directory={tmp_path}",
            "local_checkpoint_directory=/dev/shm/demo",
            "demo_journal_directory=/tmp/journals",
            "demo_steps=7",
        ],
        environ={},
    )
    assert config.saves_locally
    assert (config.local_checkpoint_period, config.checkpoint_period) == (5, 25)
    assert DemoOptions.from_keys(config.other_keys) == DemoOptions(7, 32, 0, Path("/tmp/journals"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"demo_steps": None}, "demo_steps is None; expected a whole number"),
        ({"demo_steps": True}, "demo_steps is True"),
        ({"demo_steps": 0}, "demo_steps is 0; it must be at least 1"),
        ({"demo_batch_size": 1.5}, "demo_batch_size is 1.5; expected a whole number"),
        ({"demo_journal_directory": ""}, "demo_journal_directory is empty"),
        ({"demo_journal_directory": 3}, "demo_journal_directory is 3; expected text"),
    ],
)
def test_a_wrong_key_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DemoOptions.from_keys(KEYS | change)


def test_a_missing_key_says_which_file_has_it() -> None:
    with pytest.raises(ConfigError, match=r"demo_seed is not set; start from .*demo\.yml"):
        DemoOptions.from_keys({key: value for key, value in KEYS.items() if key != "demo_seed"})
