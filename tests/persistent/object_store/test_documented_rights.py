"""The policy that the documents give is enough for a run, and nothing in it could be left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.object_store.test_trial import Policies, attempt
from tests.persistent.saving import assert_same, read_shards, save, small_state
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server

DOCUMENT = Path(__file__).parents[3] / "docs/bucket-rights-and-costs.md"
ACTIONS = ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]


def documented(kind: str) -> dict[str, Any]:
    found = re.search(rf"<!-- policy: {kind} -->\n```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def without(policy: dict[str, Any], action: str) -> list[dict[str, Any]]:
    left: list[dict[str, Any]] = []
    for statement in policy["Statement"]:
        given = statement["Action"]
        actions = [each for each in ([given] if isinstance(given, str) else given) if each != action]
        left += [{**statement, "Action": actions}] if actions else []
    return left


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Policies]:
    found = Policies(s3_server, monkeypatch)
    found.act_as("stranger")
    yield found
    found.client.close()


def live(url: str) -> None:
    """What a run does in its directory, from its start to the deletion of a step."""
    attempt(url)
    store = PersistentStore(url)
    generation = store.mint_generation(0, None)
    store.remove_leftovers(generation)
    step = save(store, Attempt(generation, 1, "default"), small_state(1))
    assert_same(read_shards(store.open_step(step)), small_state(1))
    store.delete_step(step)


def test_the_policy_for_another_account_is_enough_and_the_least(bucket: Policies) -> None:
    text = json.dumps(documented("bucket")).replace("my-bucket", bucket.bucket)
    policy = json.loads(re.sub(r"arn:aws:iam::\d+:role/[\w-]+", "arn:aws:iam:::user/stranger", text))
    bucket.set(*policy["Statement"])
    live(f"s3://{bucket.bucket}/runs/one")
    with pytest.raises(PersistentStoreError, match="may list there, and may not write"):
        live(f"s3://{bucket.bucket}/elsewhere")
    for number, action in enumerate(ACTIONS):
        if action == "s3:GetObject":
            continue  # Ceph lets whoever wrote an object read it.
        bucket.set(*without(policy, action))
        with pytest.raises(PersistentStoreError, match=action):
            live(f"s3://{bucket.bucket}/runs/{number}")


def test_the_policy_of_the_role_allows_the_same() -> None:
    """Ceph knows no policies of roles in this setting: that of the bucket stands for both."""
    ours = [{k: v for k, v in each.items() if k != "Principal"} for each in documented("bucket")["Statement"]]
    assert ours == documented("role")["Statement"]
