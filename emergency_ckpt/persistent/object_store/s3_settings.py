"""Where an S3 bucket is and with which credentials: AWS's standard settings, for boto3 and TensorStore alike.

boto3 resolves them; TensorStore is told what that gave, so that tensors and metadata go to one server.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from emergency_ckpt.errors import StoreCredentialsError
from emergency_ckpt.persistent.object_store.failures import without_secrets
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.object_store.tensorstore_limits import request_retries

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from botocore.session import Session

# How botocore found credentials -> how TensorStore finds the same ones.
_ENVIRONMENT = ("env",)
_PROFILE = ("shared-credentials-file", "config-file", "custom-process", "assume-role")
_DEFAULT = ("assume-role-with-web-identity",)
_CONTAINER = ("container-role",)
_MACHINE = ("iam-role",)


@dataclasses.dataclass(frozen=True)
class S3Settings:
    """What boto3 resolved.

    Attributes:
      client: boto3's client of the server. Thread-safe; it repeats nothing by itself.
      endpoint: URL of the server without a final '/'.
      region: the region that requests are signed for.
      session: botocore's session, which knows where credentials come from.
      limits: of requests.
    """

    client: BaseClient
    endpoint: str
    region: str
    session: Session
    limits: Limits

    @property
    def is_default_endpoint(self) -> bool:
        """Whether the endpoint follows from the region: AWS's own."""
        return self.endpoint in (f"https://s3.{self.region}.amazonaws.com", "https://s3.amazonaws.com")

    def kvstore(self, bucket: str, prefix: str) -> dict[str, Any]:
        """TensorStore's specification of the keys that begin with `prefix`.

        Conditional writes are off: stores that do not have AWS's semantics make them wait for ever, and stores
        with one writer need none. Raises StoreCredentialsError for credentials that TensorStore cannot have.
        """
        spec: dict[str, Any] = {
            "driver": "s3",
            "bucket": bucket,
            "path": prefix,
            "aws_region": self.region,
            "aws_credentials": self._tensorstore_credentials(),
            "use_conditional_write": False,
            "s3_request_retries": request_retries(self.limits),
        }
        if self.is_default_endpoint:
            return spec
        if self._has_bucket_in_host:
            scheme, _, host = self.endpoint.partition("://")
            return {**spec, "bucket": "", "endpoint": f"{scheme}://{bucket}.{host}"}
        return {**spec, "endpoint": self.endpoint}

    @property
    def kind_of_credentials(self) -> str:
        """How boto3 found them, in its own words."""
        found = _credentials(self.session)
        return str(found.method) if found is not None else "none"

    @property
    def _has_bucket_in_host(self) -> bool:
        """Whether a server that is not AWS's is addressed as bucket.host, which has to be asked for."""
        return (self.session.get_config_variable("s3") or {}).get("addressing_style") == "virtual"

    def _tensorstore_credentials(self) -> dict[str, Any]:
        server = without_secrets(self.endpoint)
        credentials = _credentials(self.session)
        method = credentials.method if credentials is not None else None
        if credentials is None:
            raise StoreCredentialsError(
                f"no credentials for {server}: neither AWS_ACCESS_KEY_ID, nor a profile, nor a role of this"
                " host gives any. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        if method in _ENVIRONMENT:
            return {"type": "environment"}
        if method in _PROFILE:
            # TensorStore's own defaults fail where one of the files is missing; given both names, one may be.
            return {
                "type": "profile",
                "profile": self.session.profile or "default",
                "credentials_file": _expanded(self.session.get_config_variable("credentials_file")),
                "config_file": _expanded(self.session.get_config_variable("config_file")),
            }
        if method in _DEFAULT:
            return {"type": "default"}
        if method in _CONTAINER:
            return {"type": "ecs"}
        if method in _MACHINE:
            return {"type": "imds"}
        raise StoreCredentialsError(
            f"the credentials for {server} come from {method!r}, which TensorStore cannot use. Give the profile"
            " a line `credential_process = aws configure export-credentials --profile NAME`, and use it by"
            " AWS_PROFILE; or export them as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN."
        )


def resolve(limits: Limits) -> S3Settings:
    """Reads the environment, the configuration files and the roles of this host, as boto3 does.

    Raises StoreCredentialsError where the profile that is asked for does not exist.
    """
    import boto3.session
    import botocore.exceptions
    from botocore.config import Config

    config = Config(
        connect_timeout=min(limits.attempt_seconds, 10.0),
        read_timeout=limits.attempt_seconds,
        retries={"total_max_attempts": 1},
        max_pool_connections=limits.concurrency + 2,
        # Servers that are not AWS's may refuse requests with checksums of the newer kind.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session()
        client = session.client("s3", config=config)
    except botocore.exceptions.ProfileNotFound as error:
        raise StoreCredentialsError(
            f"{error}: AWS_PROFILE names none. Correct it, or make the profile."
        ) from error
    found = client.meta
    return S3Settings(
        client, found.endpoint_url.rstrip("/"), found.region_name or "us-east-1", session._session, limits
    )


def _credentials(session: Session) -> Any:
    import botocore.exceptions

    try:
        return session.get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise StoreCredentialsError(
            f"the credentials of this host cannot be had ({type(error).__name__}). Check profile or role."
        ) from error


def _expanded(path: Any) -> str:
    return os.path.expanduser(os.path.expandvars(str(path)))
