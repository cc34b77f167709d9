"""Ways to bring the same bytes into an S3 bucket and back: this package, boto3 and awscrt.

Every contender moves the same bytes between memory and the bucket. Ours writes and commits a step as a drain
does, and reads it as a restore does, both verified; the others move one object and verify nothing.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from benchmarks.plan import MIB
from emergency_ckpt.core.checksums import checksum_blocks, shard_seed
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.upload_assignment import assign_uploads
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.object_store.s3_settings import resolve
from emergency_ckpt.persistent.reader import BoxRequest
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import PartReport, write_part

MULTIPART_BYTES, MULTIPART_THREADS = 8 * MIB, 10
"""boto3's own defaults: parts of 8 MiB, ten at a time."""

_ITEM = "default"
_CRT_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Where everything goes."""

    name: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}"


class Contender(Protocol):
    """`upload` and `download` move everything; `forget` removes it and is not measured."""

    name: str

    def upload(self) -> None: ...
    def download(self) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


def make_state(nbytes: int, shard_bytes: int, slices: int = 1) -> tuple[Layout, np.ndarray]:
    """Shards of one size that every slice of one process holds, and their bytes one after the other."""
    names = [f"layers.{number:05}.w" for number in range(max(1, nbytes // shard_bytes))]
    held = [Shard(name, Box((0,), (shard_bytes,))) for name in names]
    layout = Layout.build(
        [LeafSpec(n, (shard_bytes,), "uint8") for n in names],
        dict.fromkeys(range(slices), held),
        tuple(range(slices)),
    )
    data = np.random.default_rng(7).integers(0, 256, len(names) * shard_bytes, np.uint8)
    return layout, data


class Ours:
    """Steps of a run, written from memory as from a sealed slot: the checksums are there already.

    Args:
      layout, data: what `make_state` made.
      options: of the writer.
      generation: the life of the run that writes; None for a new one.
    """

    name = "emergency_ckpt"

    def __init__(
        self,
        bucket: Bucket,
        layout: Layout,
        data: np.ndarray,
        options: WriteOptions | None = None,
        generation: Generation | None = None,
    ) -> None:
        self._layout = layout
        self._data = data
        self._out = np.ones_like(data)
        self._options = options or WriteOptions()
        self._store = PersistentStore(bucket.url)
        self._generation = generation or self._store.mint_generation(0, None)
        self._steps = itertools.count(1)
        self._checksums = [
            checksum_blocks(self._shard(data, index).data, shard_seed(self._generation.number, layout, index))
            for index in range(len(layout.shards))
        ]

    def begin(self) -> Attempt:
        """An attempt at a step of its own."""
        return Attempt(self._generation, next(self._steps), _ITEM)

    def write(self, attempt: Attempt, process: int) -> PartReport:
        """The part of one process."""
        plan = assign_uploads(self._layout, range(self._layout.process_count))
        assert plan.shards is not None, plan.reason
        return write_part(
            self._store,
            attempt,
            self._layout,
            process,
            plan.shards[process],
            lambda index: self._shard(self._data, index),
            self._checksums.__getitem__,
            self._options,
        )

    def commit(self, attempt: Attempt, parts: list[PartReport]) -> None:
        commit(self._store, attempt, self._layout, parts, options=self._options)

    def upload(self) -> None:
        attempt = self.begin()
        self.commit(attempt, [self.write(attempt, 0)])

    def download(self) -> None:
        (step,) = self._store.steps()
        reader = self._store.open_step(step)
        reader.read_boxes(
            [
                BoxRequest(shard.leaf, shard.box, self._shard(self._out, index))
                for index, shard in enumerate(self._layout.shards)
            ]
        )
        if not np.array_equal(self._out[-MIB:], self._data[-MIB:]):
            raise RuntimeError("what was read is not what was written")

    def forget(self) -> None:
        for step in self._store.steps():
            self._store.delete_step(step)

    def close(self) -> None:
        self.forget()

    def _shard(self, data: np.ndarray, index: int) -> np.ndarray:
        size = self._layout.shard_nbytes[index]
        return data[index * size : (index + 1) * size]


class Boto3:
    """One object by boto3's managed multipart transfer."""

    name = "boto3"

    def __init__(self, bucket: Bucket, data: np.ndarray) -> None:
        from boto3.s3.transfer import TransferConfig

        self._bucket, self._key = bucket.name, f"{bucket.prefix}/boto3"
        self._data = data
        self._client = resolve(Limits()).client
        self._config = TransferConfig(
            multipart_chunksize=MULTIPART_BYTES, max_concurrency=MULTIPART_THREADS, use_threads=True
        )

    def upload(self) -> None:
        self._client.upload_fileobj(io.BytesIO(self._data.data), self._bucket, self._key, Config=self._config)

    def download(self) -> None:
        into = io.BytesIO()
        self._client.download_fileobj(self._bucket, self._key, into, Config=self._config)
        if into.getbuffer().nbytes != self._data.nbytes:
            raise RuntimeError("boto3 read another number of bytes than it wrote")

    def forget(self) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._key)

    def close(self) -> None:
        self.forget()


class Crt:
    """One object by AWS's C library, which splits it into parts. ImportError where it is not."""

    name = "awscrt"

    def __init__(self, bucket: Bucket, data: np.ndarray) -> None:
        from awscrt.auth import AwsCredentialsProvider
        from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
        from awscrt.s3 import S3Client, S3RequestTlsMode, create_default_s3_signing_config

        settings = resolve(Limits())
        endpoint = urlsplit(settings.endpoint)
        self._host = endpoint.netloc
        self._path = f"/{bucket.name}/{bucket.prefix}/awscrt"
        self._data = data
        self._out = bytearray(data.nbytes)
        bootstrap = ClientBootstrap(loop := EventLoopGroup(os.cpu_count() or 1), DefaultHostResolver(loop))
        credentials = AwsCredentialsProvider.new_default_chain(bootstrap)
        self._client = S3Client(
            bootstrap=bootstrap,
            region=settings.region,
            signing_config=create_default_s3_signing_config(
                region=settings.region, credential_provider=credentials
            ),
            part_size=MULTIPART_BYTES,
            tls_mode=S3RequestTlsMode.ENABLED if endpoint.scheme == "https" else S3RequestTlsMode.DISABLED,
        )
        self._boto = settings.client
        self._bucket, self._key = bucket.name, f"{bucket.prefix}/awscrt"

    def upload(self) -> None:
        from awscrt.s3 import S3RequestType

        headers = [("Content-Length", str(self._data.nbytes)), ("Content-Type", "binary/octet-stream")]
        self._ask("PUT", S3RequestType.PUT_OBJECT, headers, io.BytesIO(self._data.data))

    def download(self) -> None:
        from awscrt.s3 import S3RequestType

        view = memoryview(self._out)

        def take(chunk: bytes, offset: int, **_: Any) -> None:
            view[offset : offset + len(chunk)] = chunk

        self._ask("GET", S3RequestType.GET_OBJECT, [], None, take)
        if self._out[-MIB:] != self._data[-MIB:].tobytes():
            raise RuntimeError("awscrt read other bytes than it wrote")

    def forget(self) -> None:
        self._boto.delete_object(Bucket=self._bucket, Key=self._key)

    def close(self) -> None:
        self.forget()

    def _ask(
        self,
        method: str,
        kind: Any,
        headers: list[tuple[str, str]],
        body: io.BytesIO | None,
        on_body: Callable[..., None] | None = None,
    ) -> None:
        from awscrt.http import HttpHeaders, HttpRequest

        request = HttpRequest(method, self._path, HttpHeaders([("Host", self._host), *headers]), body)
        future: Future[None] = self._client.make_request(
            request=request, type=kind, on_body=on_body
        ).finished_future
        future.result(_CRT_SECONDS)
