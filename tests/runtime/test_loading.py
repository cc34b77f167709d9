"""Which leaves are parameters, and how other programs call them."""

from __future__ import annotations

import pytest

from emergency_ckpt.runtime.loading import find_parameters, parameter_names

FLAX = ["opt_state.0.mu.params.w", "opt_state.0.nu.params.w", "params.params.b", "params.params.w", "step"]


def test_the_optimizers_copy_of_the_tree_holds_no_parameters() -> None:
    assert parameter_names(FLAX) == ["params.params.b", "params.params.w"]
    assert parameter_names(["actor.params.w", "critic.params.w", "opt.actor.mu.params.w"]) == [
        "actor.params.w",
        "critic.params.w",
    ]
    assert parameter_names(["model.w"]) == []


@pytest.mark.parametrize("wanted", [["params.w", "params.a.b"], ["params.params.w", "params.params.a.b"]])
@pytest.mark.parametrize("below", ["", "params.", "params.params."])
def test_parameters_are_found_below_any_number_of_such_keys(wanted: list[str], below: str) -> None:
    saved = {f"{below}w", f"{below}a.b", "step", "opt_state.0.mu.params.w", "opt_state.0.mu.params.a.b"}
    assert find_parameters(wanted, saved) == dict(zip(wanted, [f"{below}w", f"{below}a.b"], strict=True))


def test_several_models_keep_their_names() -> None:
    wanted = ["actor.params.w", "critic.params.w"]
    assert find_parameters(wanted, {"actor.w", "critic.w"}) == {
        "actor.params.w": "actor.w",
        "critic.params.w": "critic.w",
    }
    assert find_parameters(wanted, {"actor.params.params.w", "critic.params.params.w"}) == {
        "actor.params.w": "actor.params.params.w",
        "critic.params.w": "critic.params.params.w",
    }


def test_where_nothing_is_found_the_names_stay_and_else_most_count() -> None:
    assert find_parameters(["params.w"], {"weights"}) == {"params.w": "params.w"}
    assert find_parameters(["params.w", "params.v"], {"w"}) == {"params.w": "w", "params.v": "v"}
