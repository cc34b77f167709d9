"""`GET /metrics`: strictly Prometheus's text format, what the documentation says, and true."""

from __future__ import annotations

import collections
import re
import urllib.request
from pathlib import Path

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.counters import Counters
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.core.layout import SHARD_ALIGNMENT
from emergency_ckpt.core.lineage import StepId
from tests.agent.jobs import make_job
from tests.agent.served import Ramdisk, raw, start

DOCUMENT = Path(__file__).parents[2] / "docs/agent-metrics.md"
NAME = r"[a-z_]+"
_LABEL = rf'{NAME}="(?:[^"\\\n]|\\[\\"n])*"'
_SAMPLE = re.compile(rf"({NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? ([0-9.e+-]+|\+Inf|NaN)")
_KINDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def parse(text: str) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    """Kinds by family, and samples by name and labels. Anything that the format does not allow fails."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    samples: dict[tuple[str, str], float] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family, said = line.removeprefix("# HELP ").split(" ", 1)
            assert said
            assert family not in helped
            helped.add(family)
        elif line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split(" ")
            assert name == family, f"{line!r} follows the help of {family}"
            assert name not in kinds
            assert kind in _KINDS
            kinds[name] = kind
        else:
            sample = _SAMPLE.fullmatch(line)
            assert sample, line
            base = family.removesuffix("_total") if kinds[family] == "counter" else family
            assert sample[1] in [base + suffix for suffix in _KINDS[kinds[family]]], line
            key = (sample[1], sample[2] or "")
            assert key not in samples, f"{line!r} is there twice"
            samples[key] = float(sample[3])
    assert set(kinds) == helped
    return kinds, samples


def read(endpoint: Endpoint) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    request = urllib.request.Request(f"{endpoint}/metrics")
    request.add_header("Authorization", f"Bearer {endpoint.token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return parse(answer.read().decode())


def test_the_document_has_every_metric_with_its_kind_and_labels(served: tuple[Ramdisk, Endpoint]) -> None:
    _, endpoint = served
    raw(endpoint, "GET /v1/layouts/x")
    kinds, samples = read(endpoint)
    told: dict[str, set[str]] = collections.defaultdict(set)
    for name, labels in samples:
        family = re.sub("_(bucket|sum|count)$", "", name)
        told[family] |= set(re.findall(rf'({NAME})="', labels)) - {"le"}
    rows = re.findall(r"^\| `(emergency_ckpt_\w+)` \| (\w+) \| (.*?) \|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert {name: kind for name, (kind, _) in documented.items()} == kinds
    for name, (_, labels) in documented.items():
        assert told[name] in (labels, set()), name
    for codes in (Path(__file__).parents[2] / "emergency_ckpt/agent").glob("*.py"):
        for code in re.findall(r'refuse\(\d+, "(\w+)"', codes.read_text()):
            assert f"`{code}`" in DOCUMENT.read_text(), code


def test_drains_flushes_and_refusals_are_counted_as_they_end(disk: Ramdisk, tmp_path: Path) -> None:
    job = make_job(disk, tmp_path / "bucket")
    job.save(5)
    job.save(7)
    for step in (5, 9):
        try:
            drain = job.owner.begin(job.destination, job.share(step))
        except ConnectionError:
            continue
        while job.owner.look(drain).ending is None:
            pass
    with job.trainer():
        pass
    job.wait_for(lambda: "was committed: step 7" in job.log)
    endpoint = start(disk.root)
    raw(endpoint, "GET /metrics", token="another")
    raw(endpoint, 'GET /nothing"}\\x{/%0A"', token="another")
    raw(endpoint, "BREW /v1/status")
    with PeerClient(endpoint) as client:
        slot = next(held.id for held in client.inventory() if held.id.step == StepId(1, 7))
        client.fetch(slot, disk.layout, client.manifest(slot), places := disk.places())
    prefix = "emergency_ckpt_agent"

    def value(name: str, labels: str = "") -> float:
        return samples[f"{prefix}_{name}", labels]

    # An answer is counted when its last byte is sent, and the client has that byte a moment before.
    job.wait_for(lambda: read(endpoint)[1][f"{prefix}_served_shards_total", ""] > 0)
    _, samples = read(endpoint)

    size = sum(disk.layout.shard_nbytes)
    assert value("drains_total", 'ending="committed"') == value("drain_seconds_count") == 2
    assert value("drained_bytes_total") == 2 * size
    assert value("flushes_begun_total") == value("flushes_total", 'ending="committed"') == 1
    assert value("flushes_total", 'ending="failed"') == 0
    assert value("refusals_total", 'reason="slot_not_here"') == 1
    assert value("refusals_total", 'reason="unauthorized"') == 2
    # With what lies between shards that follow each other.
    assert size <= value("served_bytes_total") < size + SHARD_ALIGNMENT * len(places)
    assert value("served_shards_total") == sum(place.nbytes > 0 for _, place in places)
    pages = {labels for name, labels in samples if name == f"{prefix}_requests_total"}
    assert 'page="other",status="401"' in pages


def test_an_ending_is_there_before_it_happens() -> None:
    _, samples = parse(Counters().text().decode())
    assert samples["emergency_ckpt_agent_drains_total", 'ending="corrupt"'] == 0
