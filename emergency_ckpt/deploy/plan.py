"""A deployment as a whole: the flags of the job, the values around them, and what follows from both.

A `Plan` that exists can be rendered for its target: what contradicts recovery is refused here, with the rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from emergency_ckpt.config import Config, load_config
from emergency_ckpt.config.load import check_words, is_file, is_given
from emergency_ckpt.config.names import misspelt
from emergency_ckpt.config.values import read_value
from emergency_ckpt.core.machines import Machine, known_machine
from emergency_ckpt.core.tpu_types import TpuType, tpu_type
from emergency_ckpt.deploy import grace
from emergency_ckpt.deploy.checks import FROM_GOOGLE, problems
from emergency_ckpt.deploy.program import MAXTEXT_ADAPTER, program_words
from emergency_ckpt.deploy.values import DEFAULT_RESTART_CODES, FIELDS, PREFIX, Deployment
from emergency_ckpt.errors import ConfigError

Target = Literal["xpk", "gcluster", "k8s", "hyperpod"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is rendered. Raises ConfigError where target, flags and values do not go together."""

    target: Target
    config: Config
    values: Deployment

    def __post_init__(self) -> None:
        found = list(problems(self))
        if found:
            lines = "\n".join(f"  - {problem}" for problem in found)
            raise ConfigError(f"This cannot be deployed with {self.target}:\n{lines}")
        _ = self.run_words

    @property
    def tpu(self) -> TpuType | None:
        return tpu_type(self.values.tpu_type) if self.values.tpu_type else None

    @property
    def hosts_per_slice(self) -> int:
        return self.tpu.hosts if self.tpu else self.values.hosts_per_slice or 1

    @property
    def shape(self) -> tuple[int, int]:
        """Jobs of the job set, and pods of each.

        A job per slice of TPUs; one for all hosts elsewhere, because jax takes a job for all there is.
        """
        pods = self.hosts_per_slice
        return (self.values.slices, pods) if self.tpu else (1, pods * self.values.slices)

    @property
    def kind(self) -> str:
        """Of the job, in Kubernetes' words."""
        return self.values.hyperpod_kind if self.target == "hyperpod" else "JobSet"

    @property
    def ramdisk(self) -> str:
        """Where the ramdisk is mounted: the local directory of the job."""
        return self.config.local_checkpoint_directory

    @property
    def grace(self) -> grace.Grace:
        rule = grace.under_xpk if self.target in FROM_GOOGLE else grace.with_sidecar
        return rule(self.values.planned_save_seconds)

    @property
    def program_config(self) -> Config:
        """The flags of the program: it reckons with the time that its pod has, unless somebody said another."""
        flag = "preemption_grace_seconds"
        if not self.config.enable_autocheckpoint or is_given(self.config, flag) or not self._reads_all_flags:
            return self.config
        return self.config.replace("deploy_planned_save_seconds", **{flag: float(self.notice_seconds)})

    @property
    def notice_seconds(self) -> int:
        """What the program has from the notice on: the hold, or what a spot machine leaves of it."""
        hold, spot = self.grace.hold_seconds, self.spot_seconds
        return hold if spot is None else min(hold, spot)

    @property
    def machine(self) -> Machine | None:
        """The hosts, where their type is one that is known."""
        return known_machine(self.tpu.machine if self.tpu else self.values.instance_type)

    @property
    def spot_seconds(self) -> int | None:
        """What is left after a notice on a spot machine; None on others."""
        of_google = self.target in FROM_GOOGLE or (self.values.platform == "gke" and self.target == "k8s")
        return grace.SPOT_SECONDS["gke" if of_google else "eks"] if self.values.capacity == "spot" else None

    @property
    def _reads_all_flags(self) -> bool:
        return self.values.program == "own" or MAXTEXT_ADAPTER in self.values.command

    @property
    def restart_codes(self) -> tuple[int, ...]:
        """All exit codes after which the job is started again."""
        return tuple(sorted({*DEFAULT_RESTART_CODES, *self.values.restart_exit_codes}))

    @property
    def further_restart_codes(self) -> tuple[int, ...]:
        """Those that XPK does not know by itself."""
        return tuple(code for code in self.restart_codes if code not in DEFAULT_RESTART_CODES)

    @property
    def run_words(self) -> tuple[str, ...]:
        """The command of the program's container: held until drains are over."""
        return (
            "emergency-ckpt",
            "run",
            "--local-directory",
            self.ramdisk,
            "--grace-seconds",
            str(self.grace.hold_seconds),
            "--",
            *program_words(self.program_config, self.values.command, self.values.program),
        )

    @property
    def uses_host_network(self) -> bool:
        wanted = self.values.host_network
        return self.tpu is not None if wanted is None else wanted

    @property
    def volume(self) -> Literal["csi", "hostpath", "emptydir"]:
        """Where the ramdisk lives in a manifest: GKE has a driver for hosts with TPUs."""
        if self.values.ramdisk_volume is not None:
            return self.values.ramdisk_volume
        return "csi" if self.target == "k8s" and self.values.platform == "gke" and self.tpu else "hostpath"

    @property
    def mtc_bucket(self) -> str | None:
        """The bucket that the multi-tier driver is configured with."""
        if self.values.mtc_bucket:
            return self.values.mtc_bucket
        scheme, _, rest = self.config.base_output_directory.partition("://")
        return rest.partition("/")[0] or None if scheme == "gs" else None


def load_plan(target: Target, file: str | None, words: Sequence[str]) -> Plan:
    """The plan that a configuration file and `key=value` words describe.

    Words and keys that begin with `deploy_` are values of the deployment, everything else is as for a training
    program. Variables of this machine's environment do not count: what is rendered follows from files and
    words.
    """
    argv = [*([file] if file else []), *words]
    # run_name may be missing: it is the name of the workload then, which the file may say.
    _, values, sources = read_words(argv, {"JOBSET_NAME": "unnamed"})
    deployment = Deployment(sources, **values)
    return Plan(target, load_config(_of_job(argv), {"JOBSET_NAME": deployment.workload}), deployment)


def read_words(
    words: Sequence[str], environment: Mapping[str, str]
) -> tuple[Config, dict[str, Any], dict[str, str]]:
    """The flags of the job; the values of the deployment, unchecked, and where each was said, by their names.

    `environment`: for the flags alone. Raises ConfigError, also for values that look misspelt.
    """
    check_words(words)
    ours = f"M_{PREFIX.upper()}"
    of_flags = {name: text for name, text in environment.items() if not name.startswith(ours)}
    config = load_config(_of_job(words), of_flags)
    given = {key: value for key, value in config.other_keys.items() if key.startswith(PREFIX)}
    sources = {key.removeprefix(PREFIX): config.source_of(key) for key in given}
    _refuse_misspelt(config)
    values: dict[str, Any] = {key.removeprefix(PREFIX): value for key, value in given.items()}
    for word in words:
        if not _is_value(word):
            continue
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"command line: {word!r} is not of the form key=value.")
        name = key.removeprefix(PREFIX)
        values[name] = _value_of(text)
        sources[name] = "command line"
    return config, {name: value for name, value in values.items() if value is not None}, sources


def _of_job(words: Sequence[str]) -> list[str]:
    return [word for word in words if not _is_value(word)]


def _is_value(word: str) -> bool:
    """Whether a word is a value of the deployment; a file may be called so, too."""
    return word.startswith(PREFIX) and not is_file(word)


def _value_of(text: str) -> Any:
    """A value as it was written, for the model to read; YAML for lists, maps and None."""
    read = read_value(text, "command line")
    return read.value if read.value is None or isinstance(read.value, dict | list) else read.text


def _refuse_misspelt(config: Config) -> None:
    foreign = [key for key in config.other_keys if not key.startswith(PREFIX)]
    found = misspelt([*foreign], [PREFIX + name for name in FIELDS])
    if found:
        raise ConfigError(
            "\n".join(
                f"{config.source_of(key)}: {key} is not a value of a deployment. Did you mean {name}?"
                for key, name in found.items()
            )
        )
