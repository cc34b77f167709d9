"""Which address an agent listens on and which one it tells others, and why."""

from __future__ import annotations

import dataclasses
import socket

from emergency_ckpt.errors import ConfigError

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Reserved for documentation: nothing is sent there, only the route is asked for.
_FAR_AWAY = "192.0.2.1"
_DISCARD_PORT = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Addresses:
    """`bind` to listen on, `advertise` for others, `dial` for this very host; `why` is for the log."""

    bind: str
    advertise: str
    dial: str
    why: str


def choose_addresses(bind: str | None, advertise: str | None, reach: str | None) -> Addresses:
    """From what was given (None: nothing). Raises ConfigError for a host that cannot be looked up."""
    if bind is None and reach is None:
        bind = "0.0.0.0"
    if bind is not None and bind not in _WILDCARDS:
        why = "as given" if advertise else "the address that it listens on"
        return Addresses(bind, advertise or bind, bind, why)
    if reach is not None:
        found = interface_address(reach)
        why = f"the address of the interface that reaches {reach}"
        bind = bind or found
        dial = _WILDCARDS.get(bind, bind)
        return Addresses(bind, advertise or found, dial, "as given" if advertise else why)
    assert bind is not None
    dial = _WILDCARDS[bind]
    if advertise:
        return Addresses(bind, advertise, dial, "as given")
    try:
        found = interface_address(_FAR_AWAY)
    except ConfigError:
        return Addresses(bind, dial, dial, "there is no route to other hosts: this host only")
    return Addresses(bind, found, dial, "the address of the default route")


def interface_address(peer: str) -> str:
    """The address of this host from which `peer` (`host`, `host:port`, `[host]:port`) is reached."""
    host, port = _split(peer)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # A datagram socket: nothing is sent.
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"no interface of this host reaches {peer}: {error}. Name the address to listen on (--bind) and "
            "the one that others reach (--advertise)."
        ) from error


def _split(peer: str) -> tuple[str, int]:
    host, colon, port = peer.rpartition(":")
    if colon and port.isdigit() and (host.startswith("[") or ":" not in host):
        return host.strip("[]"), int(port)
    return peer.strip("[]"), _DISCARD_PORT
