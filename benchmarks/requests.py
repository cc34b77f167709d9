"""How many requests a step costs an object store: `python -m benchmarks.requests`.

Steps of 1 to 16 writers are written, committed, read and deleted on a Ceph of our own (`make services`), and a
proxy counts. What grows is taken from that, and from it follow the requests of larger jobs: those of 8 to 4,096
hosts, beside what S3 promises for one prefix (3,500 writes and 5,500 reads per second).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.bucket_contenders import Bucket, Ours, make_state
from benchmarks.own_server import own_server
from benchmarks.plan import MIB
from emergency_ckpt.persistent.arrays import OBJECT_BYTES, WriteOptions
from emergency_ckpt.persistent.writer import PartReport
from tests.servers.fake_gcs import running
from tests.servers.proxy import Proxy, Request

WRITES_PER_SECOND, READS_PER_SECOND = 3500, 5500
"""Per prefix: docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"""
WRITES = ("PUT", "DELETE")
READS = ("GET", "HEAD")
DOLLARS_PER_WRITE, DOLLARS_PER_READ = 0.005 / 1000, 0.0004 / 1000
"""S3 Standard, us-east-1; a LIST costs what a PUT costs, a DELETE nothing: aws.amazon.com/s3/pricing"""

_WRITERS = (1, 2, 4, 8, 16)
_HOSTS = (8, 64, 512, 4096)
_STATES_GB = (20, 840)
_SHARDS_PER_WRITER = 4
_SHARD_BYTES = MIB


@dataclasses.dataclass(frozen=True)
class Counts:
    """Requests by kind."""

    by_kind: collections.Counter[str]

    def __getitem__(self, kind: str) -> int:
        return self.by_kind[kind]

    def shown(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.by_kind.items()))


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of several writers took: the part of one of them, the commit, one reader, the deletion."""

    writers: int
    part: Counts
    commit: Counts
    read: Counts
    delete: Counts


def kind_of(request: Request) -> str:
    """LIST and DELETE are told from GET and POST by what they ask for."""
    if request.method == "GET" and "list-type=2" in request.path:
        return "LIST"
    return "DELETE" if request.method == "POST" and "delete" in request.path else request.method


def count_step(proxy: Proxy, bucket: Bucket, writers: int) -> Step:
    """One step from its first to its last request."""
    nbytes = writers * _SHARDS_PER_WRITER * _SHARD_BYTES
    layout, data = make_state(nbytes, _SHARD_BYTES, writers)
    ours = Ours(dataclasses.replace(bucket, prefix=f"{bucket.prefix}-{writers}"), layout, data)

    def taken() -> Counts:
        found = collections.Counter(kind_of(request) for request in proxy.requests)
        proxy.requests.clear()
        return Counts(found)

    taken()
    attempt = ours.begin()
    parts: list[PartReport] = []
    for process in range(writers):
        parts.append(ours.write(attempt, process))
        part = taken()
    ours.commit(attempt, parts)
    commit = taken()
    ours.download()
    read = taken()
    ours.forget()
    return Step(writers, part, commit, read, taken())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Requests of one step of a job.

    Attributes:
      writes, lists, reads: of the save.
      restore_reads: of a restore in which every host reads its own part.
    """

    gigabytes: int
    hosts: int
    writes: int
    lists: int
    reads: int
    restore_reads: int

    @property
    def dollars(self) -> float:
        return (self.writes + self.lists) * DOLLARS_PER_WRITE + self.reads * DOLLARS_PER_READ


def estimate(small: Step, large: Step, gigabytes: int, hosts: int) -> Estimate:
    """From what two steps of different numbers of writers took."""

    def at(kinds: Sequence[str]) -> float:
        one, other = (sum(step.commit[kind] for kind in kinds) for step in (small, large))
        each = (other - one) / (large.writers - small.writers)
        return one + each * (hosts - small.writers)

    per_host = gigabytes * 1e9 / hosts
    objects = math.ceil(per_host / OBJECT_BYTES)
    part_writes = large.part["PUT"] - 1 + objects  # Each writer's data here is one object.
    part_reads = sum(large.part[kind] for kind in READS)
    restore = large.read["GET"] / large.writers + per_host / WriteOptions().max_chunk_bytes
    return Estimate(
        gigabytes,
        hosts,
        writes=round(hosts * part_writes + at(["PUT"])),
        lists=round(at(["LIST"])),
        reads=round(hosts * part_reads + at(READS)),
        restore_reads=round(hosts * (restore + small.read["GET"])),
    )


def measured_table(steps: Sequence[Step]) -> Table:
    """For people."""
    table = Table(title="requests of one step, counted", title_justify="left")
    for heading in ("writers", "part of one writer", "commit", "a reader of all of it", "deletion"):
        table.add_column(heading)
    for step in steps:
        counts = (step.part, step.commit, step.read, step.delete)
        table.add_row(f"{step.writers}", *(each.shown() for each in counts))
    return table


def estimated_table(estimates: Sequence[Estimate]) -> Table:
    """For people."""
    table = Table(title="requests of one step of larger jobs, from these", title_justify="left")
    headings = (
        "state",
        "hosts",
        "writes",
        "lists",
        "reads",
        "s at 3,500 writes/s",
        "$ per save",
        "restore: reads",
    )
    for heading in (*headings, "s at 5,500 reads/s"):
        table.add_column(heading, justify="right")
    for each in estimates:
        table.add_row(
            f"{each.gigabytes} GB",
            f"{each.hosts:,}",
            f"{each.writes:,}",
            f"{each.lists:,}",
            f"{each.reads:,}",
            f"{each.writes / WRITES_PER_SECOND:.1f}",
            f"{each.dollars:.3f}",
            f"{each.restore_reads:,}",
            f"{each.restore_reads / READS_PER_SECOND:.1f}",
        )
    return table


def main(argv: Sequence[str]) -> int:
    """Counts, and prints what follows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.requests", description=__doc__)
    parser.parse_args(argv)
    with own_server() as bucket:
        proxy = Proxy(os.environ["AWS_ENDPOINT_URL_S3"])
        with running(proxy):
            os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
            steps = [count_step(proxy, bucket, writers) for writers in _WRITERS]
    console = Console(width=150, highlight=False)
    console.print(measured_table(steps))
    console.print(
        estimated_table(
            [estimate(steps[1], steps[-1], gigabytes, hosts) for gigabytes in _STATES_GB for hosts in _HOSTS]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
