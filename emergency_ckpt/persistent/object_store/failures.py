"""What a store's refusal means: one error per situation that a user can act on, and what to do about it.

No message has a key, a token or a signature in it: of what a server answers only codes and short texts are
told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from emergency_ckpt.errors import (
    PersistentStoreError,
    StoreBucketMissingError,
    StoreCredentialsError,
    StoreCredentialsExpiredError,
    StoreEncryptionError,
    StoreFullError,
    StorePermissionError,
    StoreRegionError,
    StoreThrottledError,
    StoreUnreachableError,
    StoreUnsupportedError,
)
from emergency_ckpt.persistent.object_store.file_system import REFUSALS, system_failure
from emergency_ckpt.persistent.object_store.repeating import Failure

ADVICE: Mapping[type[PersistentStoreError], str] = {
    StoreCredentialsError: (
        "Check which credentials this host uses (`aws sts get-caller-identity`, `gcloud auth list`) and that"
        " they are of this server."
    ),
    StoreCredentialsExpiredError: (
        "Renew the credentials, or use some that renew themselves (a role, a profile)."
    ),
    StorePermissionError: (
        "Check that the bucket is yours, and that its policy lets these credentials list, read, write and"
        " delete objects under the prefix."
    ),
    StoreEncryptionError: (
        "Make what the bucket demands its default encryption, so that requests need not ask for it, and let"
        " these credentials use the key (kms:GenerateDataKey and kms:Decrypt)."
    ),
    StoreBucketMissingError: "Make the bucket, or correct its name or the endpoint.",
    StoreRegionError: "Set AWS_REGION (or `region` in the profile) to the region of the bucket.",
    StoreThrottledError: "Ask for less at a time, or for a higher limit; more prefixes help some stores.",
    StoreFullError: "Delete something there, or raise the quota.",
    StoreUnreachableError: "Check the endpoint, the network and the server.",
    StoreUnsupportedError: "Use a store that has it.",
    PersistentStoreError: "The server's own log may tell more.",
}

# Codes of S3 and its relatives. What is not here is told by its HTTP status.
_CODES: Mapping[str, type[PersistentStoreError]] = {
    "InvalidAccessKeyId": StoreCredentialsError,
    "SignatureDoesNotMatch": StoreCredentialsError,
    "InvalidToken": StoreCredentialsError,
    "InvalidSecurity": StoreCredentialsError,
    "RequestTimeTooSkewed": StoreCredentialsError,
    "UnrecognizedClientException": StoreCredentialsError,
    "InvalidClientTokenId": StoreCredentialsError,
    "ExpiredToken": StoreCredentialsExpiredError,
    "ExpiredTokenException": StoreCredentialsExpiredError,
    "TokenRefreshRequired": StoreCredentialsExpiredError,
    "RequestExpired": StoreCredentialsExpiredError,
    "AccessDenied": StorePermissionError,
    "AllAccessDisabled": StorePermissionError,
    "AccountProblem": StorePermissionError,
    "NoSuchBucket": StoreBucketMissingError,
    # Of GCS, to requests that do not need the object.
    "notFound": StoreBucketMissingError,
    "PermanentRedirect": StoreRegionError,
    "TemporaryRedirect": StoreRegionError,
    "AuthorizationHeaderMalformed": StoreRegionError,
    "IllegalLocationConstraintException": StoreRegionError,
    "SlowDown": StoreThrottledError,
    "Throttling": StoreThrottledError,
    "ThrottlingException": StoreThrottledError,
    "RequestLimitExceeded": StoreThrottledError,
    "TooManyRequests": StoreThrottledError,
    "rateLimitExceeded": StoreThrottledError,
    "userRateLimitExceeded": StoreThrottledError,
    "QuotaExceeded": StoreFullError,
    "quotaExceeded": StoreFullError,
    "InsufficientCapacity": StoreFullError,
    "XMinioStorageFull": StoreFullError,
    "NotImplemented": StoreUnsupportedError,
}
_STATUSES: Mapping[int, type[PersistentStoreError]] = {
    301: StoreRegionError,
    307: StoreRegionError,
    401: StoreCredentialsError,
    403: StorePermissionError,
    429: StoreThrottledError,
    501: StoreUnsupportedError,
    503: StoreThrottledError,
    507: StoreFullError,
}
# UnknownError is what RGW says of an object of a batch that another request deletes at the same moment.
_PASSING_CODES = (
    *("RequestTimeout", "OperationAborted", "ConditionalRequestConflict"),
    *("InternalError", "UnknownError"),
)
_PASSING_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
_TOLD = 300


def refusal(what: str, status: int, code: str, said: str = "", found_region: str = "") -> Failure:
    """What an answer with this HTTP status and this code of an error means; `said` is the server's own text."""
    kind = _CODES.get(code) or _STATUSES.get(status, PersistentStoreError)
    if code.startswith("KMS.") or (kind is StorePermissionError and "kms:" in said):
        kind = StoreEncryptionError
    passing = kind is StoreThrottledError or code in _PASSING_CODES or status in _PASSING_STATUSES
    text = f"the store refused it with {_words(status, code)}" + (f" ({_harmless(said)})" if said else "")
    if kind is StoreRegionError and found_region:
        text += f"; the bucket is in {found_region}"
    if code == "RequestTimeTooSkewed":
        text += "; the clock of this host differs from the server's"
    return Failure(explained(kind, what, text), passing)


def unreachable(what: str, text: str, passing: bool = True) -> Failure:
    """A request that got no answer."""
    return Failure(explained(StoreUnreachableError, what, _harmless(text)), passing)


def broken_connection(error: Exception, what: str) -> Failure | None:
    """What a connection that ended in the middle of an answer means; None for any other exception.

    The libraries above turn most of these into exceptions of their own, but not all.
    """
    import urllib3.exceptions

    if isinstance(error, urllib3.exceptions.HTTPError | ConnectionError | TimeoutError):
        return unreachable(what, f"no whole answer ({type(error).__name__})")
    return None


def explained(kind: type[PersistentStoreError], what: str, text: str) -> PersistentStoreError:
    return kind(f"{what}: {text}. {ADVICE[kind]}")


def tensorstore_failure(message: str, what: str) -> PersistentStoreError | None:
    """What an error of TensorStore means; None where no server and no file system has refused anything.

    Its messages quote whole answers, which may have keys and signatures in them.
    """
    status = re.search(r"\[http_response_code='(\d+)'\]", message)
    if status is None:
        if curl := re.search(r"CURL error ([^\[]*)", message):
            return unreachable(what, curl[1].strip(" .:")).error
        system = re.search(r"\[os_error_code='(\d+)'\]", message)
        if system is not None and int(system[1]) in REFUSALS:
            return system_failure(what, int(system[1]))
        return None
    if status[1] == "416":  # The object is shorter than it should be: damage, no refusal.
        return None
    code = re.search(r"<Code>([A-Za-z]+)</Code>", message) or re.search(r"\"reason\\?\": \\?\"(\w+)", message)
    return refusal(what, int(status[1]), code[1] if code else "").error


def without_secrets(url: str) -> str:
    """A URL for a message: no user, no password, no query."""
    return re.sub(r"//[^/]*@", "//", url).partition("?")[0]


def _words(status: int, code: str) -> str:
    known = code if code and not code.isdigit() else ""
    return f"{known} (HTTP {status})" if known else f"HTTP {status}"


def _harmless(text: str) -> str:
    """One short line without what looks like a key, a token or a signature."""
    line = " ".join(re.sub(r"\?\S+", "", text).split()).rstrip(".")
    return re.sub(r"[A-Za-z0-9/+_=-]{32,}", "…", line)[:_TOLD]
