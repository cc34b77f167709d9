"""Where an agent is reached, and the token that it lets in. The token appears in no repr and no message."""

from __future__ import annotations

import dataclasses
from typing import Any

FORMAT_VERSION = 4
"""Of what agents and their clients say to each other; agents of another one are replaced."""


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of an agent and what is needed to speak with it.

    Attributes:
      host, port: where it listens, as told to others.
      token: for the header `Authorization: Bearer`.
      tls: whether it speaks TLS; `ca_file` has the certificates to verify it by (None: those of the system).
    """

    host: str
    port: int
    token: str = dataclasses.field(repr=False)
    tls: bool = False
    ca_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The token included: for files and channels that nobody else reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Endpoint:
        """Raises ValueError for anything that `to_json` did not make."""
        try:
            endpoint = cls(raw["host"], raw["port"], raw["token"], raw["tls"], raw["ca_file"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"an endpoint cannot be read: {type(error).__name__}: {error}") from error
        texts = (endpoint.host, endpoint.token, endpoint.ca_file or "-")
        if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in texts):
            raise ValueError("an endpoint has a host, a token or a ca_file that is no plain text")
        if type(endpoint.port) is not int or not 0 < endpoint.port < 65536 or type(endpoint.tls) is not bool:
            raise ValueError(f"an endpoint has port {endpoint.port!r:.20} or tls {endpoint.tls!r:.20}")
        return endpoint

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"
