"""How fast steps go into an S3 bucket and come back: `python -m benchmarks.uploading [--size-mib 1024]`.

Round by round, beside boto3's multipart transfer and awscrt (`pip install awscrt`; left out where it is not
there) with the same bytes. Then the same state is written by jobs of one, two and four slices, each host behind
a relay that lets a fixed rate through, because one machine has one network card.

The bucket is that of --url, with AWS's usual settings; without, a Ceph of its own is started (`make services`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from benchmarks.bucket_contenders import Boto3, Bucket, Contender, Crt, Ours, make_state
from benchmarks.own_server import own_server
from benchmarks.plan import MIB
from benchmarks.samples import Samples, Spread
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.object_store.s3_settings import resolve
from emergency_ckpt.persistent.object_store.urls import parse_url
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import read_part

OURS = Ours.name
DIRECTIONS = ("up", "down")
WRITTEN, COMMITTED = "written", "committed"
_SLICES = (1, 2, 4)


def measure(bucket: Bucket, nbytes: int, shard_bytes: int, rounds: int) -> Samples:
    """Seconds per contender, direction and round, after one round that is not counted."""
    layout, data = make_state(nbytes, shard_bytes)
    samples = Samples()
    with contextlib.ExitStack() as cleanup:
        contenders: list[Contender] = [Ours(bucket, layout, data), Boto3(bucket, data)]
        try:
            contenders.append(Crt(bucket, data))
        except ImportError:
            print("awscrt is not installed, so it is not measured: pip install awscrt", file=sys.stderr)
        for each in contenders:
            cleanup.callback(each.close)
        for number in range(rounds + 1):
            at = number % len(contenders)
            for each in contenders[at:] + contenders[:at]:
                seconds = [_timed(each.upload), _timed(each.download)]
                each.forget()
                for direction, took in zip(DIRECTIONS, seconds, strict=True):
                    if number:
                        samples.add(each.name, direction, took)
    return samples


def best_of_others(samples: Samples, direction: str) -> list[float]:
    """Per round the seconds of the fastest of the others."""
    others = [samples.of(name, direction) for name in samples.values if name != OURS]
    return [min(seconds) for seconds in zip(*others, strict=True)]


def measure_slices(
    bucket: Bucket, nbytes: int, shard_bytes: int, bytes_per_second: float, rounds: int
) -> Samples:
    """Seconds that a job needs to write and commit the same state; the "contender" is the number of slices.

    Every slice is one host: a process whose bytes pass through a relay of its own at this rate.
    """
    samples = Samples()
    server = urlsplit(resolve(Limits()).endpoint)
    with contextlib.ExitStack() as cleanup:
        relays = [cleanup.enter_context(_relay(server.netloc, bytes_per_second)) for _ in range(max(_SLICES))]
        for slices in _SLICES:
            layout, data = make_state(nbytes, shard_bytes, slices)
            committer = Ours(bucket, layout, data)
            cleanup.callback(committer.close)
            for _ in range(rounds):
                attempt = committer.begin()
                writers = [
                    _Writer(bucket, attempt, nbytes, shard_bytes, slices, process, f"http://{relay}")
                    for process, relay in enumerate(relays[:slices])
                ]
                with ThreadPoolExecutor(slices) as pool:
                    list(pool.map(_Writer.wait_ready, writers))
                    began = time.perf_counter()
                    list(pool.map(_Writer.write, writers))
                samples.add(f"{slices}", WRITTEN, time.perf_counter() - began)
                store = PersistentStore(bucket.url)
                committer.commit(attempt, [read_part(store, attempt, p) for p in range(slices)])
                samples.add(f"{slices}", COMMITTED, time.perf_counter() - began)
                committer.forget()
    return samples


class _Writer:
    """A process that writes its part when it is told to."""

    def __init__(
        self,
        bucket: Bucket,
        attempt: Attempt,
        nbytes: int,
        shard_bytes: int,
        slices: int,
        process: int,
        endpoint: str,
    ) -> None:
        order = {
            "bucket": dataclasses.asdict(bucket),
            "attempt": dataclasses.asdict(attempt),
            "state": [nbytes, shard_bytes, slices],
            "process": process,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.uploading", "--write", json.dumps(order, default=str)],
            env={**os.environ, "AWS_ENDPOINT_URL_S3": endpoint},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        self._expect("ready")

    def write(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._expect("written")
        self._process.communicate(timeout=60)

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        if (line := self._process.stdout.readline().strip()) != word:
            raise RuntimeError(f"a writer said {line!r} instead of {word!r}")


def write_as_told(order: dict[str, Any]) -> None:
    """One process of `measure_slices`."""
    raw = order["attempt"]
    attempt = Attempt(Generation(**raw["generation"]), raw["step"], raw["item"], raw["ordinal"])
    layout, data = make_state(*order["state"])
    ours = Ours(Bucket(**order["bucket"]), layout, data, generation=attempt.generation)
    print("ready", flush=True)
    sys.stdin.readline()
    ours.write(attempt, order["process"])
    print("written", flush=True)


@contextlib.contextmanager
def _relay(upstream: str, bytes_per_second: float) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.relay", upstream, f"{bytes_per_second}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate(timeout=30)


def as_table(samples: Samples, nbytes: int) -> Table:
    """For people."""
    table = Table(title=f"{nbytes / MIB:.0f} MiB into a bucket and back", title_justify="left")
    for heading in ("", *DIRECTIONS):
        table.add_column(heading, justify="right" if heading else "left")
    for name in samples.values:
        table.add_row(name, *(_rate(samples.of(name, d), nbytes) for d in DIRECTIONS))
    ratios = [Spread.of_ratios(best_of_others(samples, d), samples.of(OURS, d)) for d in DIRECTIONS]
    table.add_row(f"{OURS}, part of the fastest other", *map(_shown, ratios))
    return table


def slices_table(samples: Samples, nbytes: int, bytes_per_second: float) -> Table:
    """For people."""
    table = Table(
        title=f"{nbytes / MIB:.0f} MiB from hosts that send {bytes_per_second / MIB:.0f} MiB/s each",
        title_justify="left",
    )
    for heading in ("slices", "all parts written", "of one slice's", "committed", "of one slice's", "1/S"):
        table.add_column(heading, justify="right")
    for name in samples.values:
        shown: list[str] = []
        for what in (WRITTEN, COMMITTED):
            seconds = samples.of(name, what)
            shown += [
                f"{_shown(Spread.of(seconds))} s",
                _shown(Spread.of_ratios(seconds, samples.of("1", what))),
            ]
        table.add_row(name, *shown, f"{1 / int(name):.2f}")
    return table


def main(argv: Sequence[str]) -> int:
    """Measures and prints what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uploading", description=__doc__)
    parser.add_argument("--url", help="s3://bucket/prefix; default: a Ceph of its own")
    parser.add_argument("--size-mib", type=int, default=1024, help="default: 1024")
    parser.add_argument("--shard-mib", type=int, default=64, help="default: 64")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--slices-mib", type=int, default=256, help="state of the jobs (default: 256; 0: none)")
    parser.add_argument("--host-mib-per-second", type=float, default=25.0, help="default: 25")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--write", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write is not None:
        write_as_told(args.write)
        return 0
    with contextlib.ExitStack() as cleanup:
        if args.url:
            url = parse_url(args.url)
            bucket = Bucket(url.bucket, f"{url.prefix.rstrip('/')}/{uuid.uuid4().hex}".lstrip("/"))
        else:
            bucket = cleanup.enter_context(own_server())
        console = Console(width=120, highlight=False)
        found: dict[str, Any] = {}
        nbytes, shard = args.size_mib * MIB, args.shard_mib * MIB
        samples = measure(bucket, nbytes, shard, args.rounds)
        console.print(as_table(samples, nbytes))
        found["transfers"] = samples.values
        if args.slices_mib:
            nbytes, rate = args.slices_mib * MIB, args.host_mib_per_second * MIB
            of_slices = dataclasses.replace(bucket, prefix=f"{bucket.prefix}-slices")
            samples = measure_slices(of_slices, nbytes, min(shard, nbytes // 16), rate, args.rounds)
            console.print(slices_table(samples, nbytes, rate))
            found["slices"] = samples.values
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rate(seconds: Sequence[float], nbytes: int) -> str:
    rate = Spread.of([nbytes / each / MIB for each in seconds])
    return "-" if rate is None else f"{rate.median:.0f} MiB/s ({rate.low:.0f} to {rate.high:.0f})"


def _shown(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
