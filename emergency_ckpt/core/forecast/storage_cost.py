"""What the persistent tier costs per month: bytes that are kept, and requests of saves.

Requests are those that docs/bucket-rights-and-costs.md counts; prices are list prices of one day, without
discounts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

HOURS_PER_MONTH = 730
OBJECT_BYTES = 32 * 1024 * 1024
"""Of the persistent tier's data objects in buckets."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """US dollars: per GB (10^9 bytes) and month, per write or list, per read."""

    per_gb_month: float
    per_write: float
    per_read: float
    source: str


PRICES: Mapping[str, Prices] = {
    "s3": Prices(0.023, 0.005 / 1000, 0.0004 / 1000, "S3 Standard, us-east-1: aws.amazon.com/s3/pricing"),
    "gs": Prices(0.020, 0.005 / 1000, 0.0004 / 1000, "GCS Standard: cloud.google.com/storage/pricing"),
}
"""By the scheme of the URL."""


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """Of one save: writes and lists cost the same."""

    writes: int
    lists: int
    reads: int


def requests_of_save(total_bytes: int, hosts: int) -> Requests:
    """What a step costs that so many hosts write: counted for 1 to 16 writers (benchmarks/requests.py).

    A host's part is objects of 32 MiB and three small ones, one GET and two HEADs; the commit is 11 small
    objects, 16 lists and 12 reads, and 2 reads for each host.
    """
    objects = math.ceil(total_bytes / hosts / OBJECT_BYTES)
    return Requests(hosts * (objects + 3) + 11, 16, hosts * 5 + 12)


@dataclasses.dataclass(frozen=True, slots=True)
class MonthlyCost:
    """Dollars per month, and what they are for. `kept_steps` None: all of them."""

    kept_steps: int | None
    kept_bytes: int
    saves: float
    storage: float
    requests: float

    @property
    def total(self) -> float:
        return self.storage + self.requests


def monthly_cost(
    total_bytes: int, hosts: int, period_seconds: float, kept_steps: int | None, prices: Prices
) -> MonthlyCost:
    """Of a job that saves without a pause. Where all steps are kept, of the bytes after its first month."""
    saves = HOURS_PER_MONTH * 3600 / period_seconds
    kept_bytes = int(total_bytes * (saves if kept_steps is None else kept_steps))
    each = requests_of_save(total_bytes, hosts)
    per_save = (each.writes + each.lists) * prices.per_write + each.reads * prices.per_read
    return MonthlyCost(kept_steps, kept_bytes, saves, kept_bytes / 1e9 * prices.per_gb_month, saves * per_save)
