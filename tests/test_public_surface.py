"""The public surface is one page, resolves to what it says, and costs nothing until it is used."""

from __future__ import annotations

import importlib
import inspect

import pytest

import emergency_ckpt
from emergency_ckpt import errors


@pytest.mark.parametrize("name", emergency_ckpt.__all__)
def test_every_public_name_resolves_to_the_object_of_its_module(name: str) -> None:
    home = f"emergency_ckpt.{emergency_ckpt._HOME.get(name, 'errors')}"
    assert getattr(emergency_ckpt, name) is getattr(importlib.import_module(home), name)
    assert name in dir(emergency_ckpt)


def test_every_error_is_public_and_derives_from_one_base() -> None:
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert set(classes) <= set(emergency_ckpt.__all__)
    assert all(issubclass(value, errors.EmergencyCheckpointError) for value in classes.values())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CheckpointMangaer'"):
        emergency_ckpt.CheckpointMangaer  # type: ignore[attr-defined]  # noqa: B018
