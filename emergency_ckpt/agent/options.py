"""How an agent is started: its options, and the words of a command line that say them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.preemption.choosing import SourceOptions, names_of

TOKEN_VARIABLE = "EMERGENCY_CKPT_AGENT_TOKEN"


@dataclasses.dataclass(frozen=True, slots=True)
class AgentOptions:
    """Options of the agent of one ramdisk directory.

    Attributes:
      bind: the address to listen on; None: the one that reaches `reach`, or all where that is None too.
      port: 0 takes a free one.
      advertise: the address that others are told; None: chosen (see `agent.addresses`).
      reach: `host` or `host:port` of another process of the job, which tells the interface to use.
      token_file: has the token; None: the environment variable EMERGENCY_CKPT_AGENT_TOKEN, or a random one.
      tls_certificate, tls_key: files in PEM; both or none.
      tls_ca: file in PEM by which others verify the certificate, at this path on every host; None: those of the
        system.
      idle_seconds: how long the agent stays when no trainer is attached and nobody was served; None: for ever.
      connections: open at a time.
      stall_seconds: for which a client may read nothing before it is cut.
      finish_seconds: for drains that are running when a signal ends the agent, and for those that trainers, or
        agents without them, begin then.
      preemption_sources: the sources of notices to watch, separated by commas (`preemption.choosing`).
      preemption_file: a file whose appearance is a notice.
      preemption_imds_v1: `allowed` where version 1 of Amazon's metadata service may be spoken, else `never`.
    """

    bind: str | None = None
    port: int = 0
    advertise: str | None = None
    reach: str | None = None
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    idle_seconds: float | None = None
    connections: int = 512
    stall_seconds: float = 20.0
    finish_seconds: float = 25.0
    preemption_sources: str = "auto"
    preemption_file: Path | None = None
    preemption_imds_v1: Literal["never", "allowed"] = "never"

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the option."""
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port} is no port: 1 to 65535, or 0 for a free one")
        if self.connections < 1:
            raise ConfigError(f"--connections {self.connections}: at least 1 is needed")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError(
                "--tls-certificate and --tls-key are given together or not at all; found "
                f"{self.tls_certificate} and {self.tls_key}"
            )
        for name, seconds in (("idle", self.idle_seconds), ("stall", self.stall_seconds)):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ConfigError(f"--{name}-seconds {seconds} is no length of time; expected more than 0")
        if not 0 <= self.finish_seconds < float("inf"):
            raise ConfigError(
                f"--finish-seconds {self.finish_seconds} is no length of time; expected 0 or more"
            )

        _ = self.sources

    @property
    def sources(self) -> SourceOptions:
        """Raises ConfigError."""
        return SourceOptions(names_of(self.preemption_sources), self.preemption_file, self.preemption_imds_v1)

    def words(self) -> list[str]:
        """The words of a command line that say the same; files by absolute path."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                said = value.absolute() if isinstance(value, Path) else value
                words += [f"--{field.name.replace('_', '-')}", str(said)]
        return words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the directory and the options."""
    parser.add_argument(
        "--local-directory",
        type=Path,
        required=True,
        metavar="DIR",
        help="the ramdisk directory whose slots are served (local_checkpoint_directory of the job)",
    )
    parser.add_argument(
        "--bind", metavar="ADDR", help="address to listen on (default: see --reach, else all addresses)"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port (default: a free one)")
    parser.add_argument(
        "--advertise", metavar="ADDR", help="address or name that others are told (default: chosen, and logged)"
    )
    parser.add_argument(
        "--reach",
        metavar="HOST",
        help="another host of the job: the address of the interface that reaches it is used and advertised",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="F",
        help=f"has the token that lets clients in (default: the variable {TOKEN_VARIABLE}, or a random one)",
    )
    parser.add_argument(
        "--tls-certificate", type=Path, metavar="F", help="certificate (chain) in PEM: serve TLS"
    )
    parser.add_argument("--tls-key", type=Path, metavar="F", help="its key in PEM")
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="F",
        help="certificates in PEM by which clients verify it, at this path on every host (default: the "
        "system's)",
    )
    parser.add_argument(
        "--idle-seconds",
        type=float,
        metavar="S",
        help="leave when for S seconds no trainer was attached and nobody was served (default: stay)",
    )
    parser.add_argument(
        "--connections", type=int, default=512, metavar="N", help="open at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--stall-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="cut a client that reads nothing for so long (default: %(default)s)",
    )
    parser.add_argument(
        "--finish-seconds",
        type=float,
        default=25.0,
        metavar="S",
        help="after SIGTERM, which trainers are told of, serve on for S seconds at most, for the drains that "
        "run and those that follow from it; less than the grace period of the container (default: %(default)s)",
    )
    parser.add_argument(
        "--preemption-sources",
        default="auto",
        metavar="NAMES",
        help="watch these for notices that this host goes away, and tell its trainers: aws, gce, single ones "
        "(aws-spot, aws-rebalance, gce-preempted, gce-maintenance), separated by commas, or off (default: what "
        "seems to be there)",
    )
    parser.add_argument(
        "--preemption-file", type=Path, metavar="F", help="a file whose appearance is such a notice"
    )
    parser.add_argument(
        "--preemption-imds-v1",
        choices=("never", "allowed"),
        default="never",
        help="speak version 1 of Amazon's metadata service where it gives no token (default: %(default)s)",
    )


def options_of(args: argparse.Namespace) -> AgentOptions:
    """The options among the parsed arguments."""
    return AgentOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(AgentOptions)})
