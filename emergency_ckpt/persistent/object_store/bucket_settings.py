"""What a bucket is set up to do that matters to checkpoints: versions, locks, life cycle, encryption, access.

Reading settings needs rights that a job does not: where they are missing, that is said and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from emergency_ckpt.errors import PersistentStoreError, StorePermissionError
from emergency_ckpt.persistent.object_store.gcs import GcsStore
from emergency_ckpt.persistent.object_store.report import Finding, Level
from emergency_ckpt.persistent.object_store.s3 import S3Store

_BLOCKS = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
_EXPIRE = "Let a lifecycle rule delete versions that are not current after a day, or suspend versioning."
_ABORT = "Add a lifecycle rule that aborts them after some days."
_DAY_SECONDS = 86400


def s3_findings(store: S3Store) -> Iterator[Finding]:
    """What the settings of a bucket on S3 mean for checkpoints."""
    rules: list[dict[str, Any]] = []

    def life_cycle(found: dict[str, Any] | None) -> Finding:
        rules.extend(rule for rule in (found or {}).get("Rules", ()) if rule.get("Status") == "Enabled")
        if any("AbortIncompleteMultipartUpload" in rule for rule in rules):
            return Finding("lifecycle", Level.OK, "a rule aborts uploads in parts that were not ended")
        said = "no rule aborts uploads in parts that were not ended; other tools may leave such, which cost"
        return Finding("lifecycle", Level.WARN, said, _ABORT)

    yield _asked("lifecycle", "s3:GetLifecycleConfiguration", lambda: life_cycle(store.setting(_LIFE_CYCLE)))
    expires = any("NoncurrentVersionExpiration" in rule for rule in rules)
    yield _asked(
        "versioning",
        "s3:GetBucketVersioning",
        lambda: _versioning((store.setting("get_bucket_versioning") or {}).get("Status", ""), expires),
    )
    yield _asked("object lock", "s3:GetBucketObjectLockConfiguration", lambda: _object_lock(store))
    yield _asked("public access", "s3:GetBucketPublicAccessBlock", lambda: _public_access(store))


def gcs_findings(store: GcsStore) -> Iterator[Finding]:
    """What the settings of a bucket on GCS mean for checkpoints."""
    found: dict[str, Any] = {}

    def read() -> Finding:
        found.update(store.properties())
        key = (found.get("encryption") or {}).get("defaultKmsKeyName")
        return Finding("encryption", Level.OK, f"by default with {key}" if key else "by default, Google's keys")

    first = _asked("settings", "storage.buckets.get", read)
    yield first
    if first.level is Level.UNKNOWN:
        return
    rules = (found.get("lifecycle") or {}).get("rule", ())
    old = ("isLive", "numNewerVersions", "daysSinceNoncurrentTime", "noncurrentTimeBefore")
    expires = any(
        rule.get("action", {}).get("type") == "Delete"
        and any(name in rule.get("condition", {}) for name in old)
        for rule in rules
    )
    yield _versioning("Enabled" if (found.get("versioning") or {}).get("enabled") else "", expires)
    kept = int((found.get("softDeletePolicy") or {}).get("retentionDurationSeconds", 0))
    if kept:
        said = f"deleted objects are kept, and cost, for {kept / _DAY_SECONDS:g} days more"
        fix = "Set the soft delete policy of the bucket to 0 where checkpoints are all that it has."
        yield Finding("soft delete", Level.WARN, said, fix)
    else:
        yield Finding("soft delete", Level.OK, "off")
    locked = int((found.get("retentionPolicy") or {}).get("retentionPeriod", 0))
    yield _retention(f"a retention policy of {locked / _DAY_SECONDS:g} days" if locked else "")
    if any(rule.get("action", {}).get("type") == "AbortIncompleteMultipartUpload" for rule in rules):
        yield Finding("lifecycle", Level.OK, "a rule aborts uploads in parts that were not ended")
    else:
        said = "no rule aborts uploads in parts that were not ended; other tools may leave such, which cost"
        yield Finding("lifecycle", Level.WARN, said, _ABORT)
    prevented = (found.get("iamConfiguration") or {}).get("publicAccessPrevention") == "enforced"
    if prevented:
        yield Finding("public access", Level.OK, "prevented")
    else:
        said, fix = "not prevented by the bucket itself", "Enforce public access prevention for the bucket."
        yield Finding("public access", Level.WARN, said, fix)


_LIFE_CYCLE = "get_bucket_lifecycle_configuration"


def _asked(check: str, right: str, ask: Callable[[], Finding]) -> Finding:
    try:
        return ask()
    except StorePermissionError:
        return Finding(check, Level.UNKNOWN, f"not allowed to look ({right})")
    except PersistentStoreError:
        return Finding(check, Level.UNKNOWN, "this server does not tell")


def _versioning(status: str, expires: bool) -> Finding:
    if not status:
        return Finding("versioning", Level.OK, "off")
    keeps = "versions are kept" if status == "Enabled" else "suspended; older versions may be there"
    if expires:
        return Finding(
            "versioning", Level.OK, f"{keeps}, and a lifecycle rule deletes those that are not current"
        )
    return Finding("versioning", Level.WARN, f"{keeps}: steps that are deleted go on costing", _EXPIRE)


def _object_lock(store: S3Store) -> Finding:
    found = (store.setting("get_object_lock_configuration") or {}).get("ObjectLockConfiguration", {})
    if found.get("ObjectLockEnabled") != "Enabled":
        return Finding("object lock", Level.OK, "off")
    kept = (found.get("Rule") or {}).get("DefaultRetention")
    if not kept:
        return Finding("object lock", Level.OK, "on, and nothing is locked by default")
    period = f"{kept['Days']} days" if "Days" in kept else f"{kept.get('Years')} years"
    return _retention(f"a default retention ({kept.get('Mode', '').lower()}) of {period}", "object lock")


def _retention(what: str, check: str = "retention") -> Finding:
    if not what:
        return Finding(check, Level.OK, "off")
    said = f"{what}: nothing can be deleted or replaced meanwhile, and steps that are deleted go on costing"
    return Finding(check, Level.WARN, said, "Use a bucket without it for checkpoints.")


def _public_access(store: S3Store) -> Finding:
    found = (store.setting("get_public_access_block") or {}).get("PublicAccessBlockConfiguration", {})
    open_ways = [name for name in _BLOCKS if not found.get(name)]
    if not open_ways:
        return Finding("public access", Level.OK, "blocked")
    said = f"not blocked by the bucket itself ({', '.join(open_ways)} off; the account may block it)"
    return Finding("public access", Level.WARN, said, "Block public access to the bucket, all four ways.")
