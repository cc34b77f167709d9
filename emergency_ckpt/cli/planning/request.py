"""From the words of the command line to a request for a plan.

What the configuration sets is taken as it is set; everything else is assumed, and named in `Assumption`s.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from emergency_ckpt.cli.planning.deployment import take_shape
from emergency_ckpt.cli.planning.quantities import parse_bytes, parse_count
from emergency_ckpt.config import Config
from emergency_ckpt.config.load import is_given
from emergency_ckpt.core.forecast.failures import FailureModel
from emergency_ckpt.core.forecast.job_shape import JobShape, Protection
from emergency_ckpt.core.forecast.plan_request import Request
from emergency_ckpt.core.forecast.save_costs import DRAIN_SLOWS, Costs, Rates, assumed_costs
from emergency_ckpt.core.forecast.sizing import StateSize, evenly_sharded, host_memory
from emergency_ckpt.core.forecast.storage_cost import PRICES
from emergency_ckpt.core.machines import MACHINES, Machine, find_machine
from emergency_ckpt.core.tpu_types import tpu_type
from emergency_ckpt.errors import ConfigError

MEASURABLE = {
    "local_blocked": "how long a local save blocks the step (`blocked` in the log)",
    "local_lag": "from then until it is complete (`complete after` in the log)",
    "persistent_blocked": "how much a persistent save blocks the step beside the local one, by its drain",
    "persistent_lag": "how long a drain takes (`committed after` in the log)",
    "restart": "from a failure until the program restores",
    "repair_host": "until there is another host",
    "repair_slice": "until there is another slice",
    "own_restore": "a restore where nothing was lost",
    "peers_restore": "a restore of shards from other hosts",
    "persistent_restore": "a restore from the persistent tier",
}
"""Fields of `Costs` that a user may have measured, each an option of the command."""


@dataclasses.dataclass(frozen=True, slots=True)
class Assumption:
    """Something that the result rests on: its name, its value in words, and who said so."""

    name: str
    value: str
    source: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, with what it was made of.

    Attributes:
      machine: None where only the memory is known, or nothing. machine_name: as it was given.
      deployment: the values of a deployment that were given.
    """

    request: Request
    machine: Machine | None
    machine_name: str | None
    assumptions: tuple[Assumption, ...]
    deployment: Mapping[str, Any]


def read_request(
    args: argparse.Namespace, config: Config, deployment: Mapping[str, Any] = MappingProxyType({})
) -> Asked:
    """Raises ConfigError for what is missing, contradicts itself or does not exist."""
    take_shape(args, deployment)
    machine, hosts, chips = _machine(args)
    shape = JobShape(args.slices, hosts, chips, not args.sharded_over_slices)
    protection = Protection(
        config.local_checkpoint_max_to_keep, config.local_checkpoint_copies, config.local_checkpoint_spread
    )
    state = _state(args, config, shape, protection)
    rates = Rates(
        **{
            name: float(parse_bytes(given))
            for name in ("device", "seal", "network", "store", "store_total")
            if (given := getattr(args, f"{name}_rate")) is not None
        }
    )
    costs, measured = _costs(args, assumed_costs(state, shape, rates))
    model = FailureModel(
        **{
            f"{name}_hours": given
            for name in ("process", "host", "slice", "job")
            if (given := getattr(args, f"{name}_mtbf_hours")) is not None
        }
    )
    memory_bytes = machine.memory_bytes if machine else None
    if args.machine_memory is not None:
        memory_bytes = parse_bytes(args.machine_memory)
    trainer = None if args.trainer_memory is None else parse_bytes(args.trainer_memory)
    is_on_gke = machine is None or machine.is_on_gke
    persistent_period, persistent_flag = _persistent_period(config, args.step_seconds)
    request = Request(
        shape,
        protection,
        state,
        args.step_seconds,
        costs,
        model,
        None if memory_bytes is None else host_memory(memory_bytes, state, trainer, is_on_gke),
        args.slots,
        args.buffer,
        config.local_checkpoint_period or None,
        persistent_period,
        config.max_num_checkpoints_to_keep,
        PRICES.get(args.store or config.base_output_directory.partition("://")[0]),
        persistent_flag,
        args.tpu_type,
    )
    assumptions = tuple(_assumptions(args, request, rates, measured, trainer))
    return Asked(request, machine, args.machine, assumptions, deployment)


def _machine(args: argparse.Namespace) -> tuple[Machine | None, int, int]:
    """(machine type, hosts per slice, chips per host)."""
    machine = None if args.machine is None else find_machine(args.machine)
    hosts, chips = args.hosts_per_slice, args.chips_per_host
    if args.tpu_type is not None:
        found = tpu_type(args.tpu_type)
        for flag, given, is_wrong in (
            ("--machine", args.machine, machine is not None and machine.name != found.machine),
            ("--hosts-per-slice", hosts, hosts is not None and hosts != found.hosts),
            ("--chips-per-host", chips, chips is not None and chips != found.chips_per_host),
        ):
            if is_wrong:
                raise ConfigError(
                    f"--tpu-type {args.tpu_type} is {found.hosts} hosts of {found.machine} with "
                    f"{found.chips_per_host} chips, which contradicts {flag} {given}. Give one of the two"
                )
        machine, hosts = MACHINES[found.machine], found.hosts
    if hosts is None:
        raise ConfigError("how many hosts a slice has is not known: give --hosts-per-slice or --tpu-type")
    if chips is None:
        chips = machine.chips if machine else 1
    return machine, hosts, chips


def _state(args: argparse.Namespace, config: Config, shape: JobShape, protection: Protection) -> StateSize:
    if args.state is not None:
        from emergency_ckpt.cli.planning.abstract_state import state_size

        return state_size(args.state, shape, protection, config.checkpoint_replica_axis)
    if args.state_bytes is not None:
        return evenly_sharded(parse_bytes(args.state_bytes), shape, protection, "--state-bytes, evenly sharded")
    if not 0 < args.bytes_per_parameter < math.inf:
        raise ConfigError(f"--bytes-per-parameter {args.bytes_per_parameter}: expected a number above 0")
    parameters = parse_count(args.parameters)
    total = math.ceil(parameters * args.bytes_per_parameter)
    source = f"{parameters:,} parameters of {args.bytes_per_parameter:g} bytes, evenly sharded"
    return evenly_sharded(total, shape, protection, source)


def _costs(args: argparse.Namespace, assumed: Costs) -> tuple[Costs, frozenset[str]]:
    given = {name: getattr(args, f"{name}_seconds") for name in MEASURABLE}
    given = {name: value for name, value in given.items() if value is not None}
    costs = dataclasses.replace(assumed, **given)
    if "local_blocked" in given:
        more = assumed.snapshot / assumed.local_blocked
        costs = dataclasses.replace(costs, snapshot=costs.local_blocked * more)
    if "persistent_lag" in given and assumed.persistent_lag > 0:
        # Those that write from one slice take longer by as much as was assumed.
        slower = assumed.one_slice_lag / assumed.persistent_lag
        costs = dataclasses.replace(costs, one_slice_lag=costs.persistent_lag * slower)
    return costs, frozenset(given)


def backup_steps(config: Config, step_seconds: float) -> int | None:
    """Steps between two backups, where an interval is set; of two the shorter one."""
    minutes = config.multi_tier_checkpointing_backup_interval_minutes
    of_minutes = max(1, round(minutes * 60 / step_seconds)) if minutes else None
    if of_minutes and (local := config.local_checkpoint_period):
        of_minutes = -(-of_minutes // local) * local  # The first local step when the time is over.
    return min(filter(None, (config.multi_tier_checkpointing_backup_interval_steps, of_minutes)), default=None)


def _persistent_period(config: Config, step_seconds: float) -> tuple[int | None, str]:
    """What the user has set, and by which flag; None where nobody did. What comes first counts."""
    given = config.checkpoint_period if is_given(config, "checkpoint_period") else None
    backups = backup_steps(config, step_seconds)
    if backups and (not given or backups <= given):
        return backups, "multi_tier_checkpointing_backup_interval_steps"
    return given or None, "checkpoint_period"


def _assumptions(
    args: argparse.Namespace,
    request: Request,
    rates: Rates,
    measured: frozenset[str],
    trainer: int | None,
) -> Sequence[Assumption]:
    costs, model = request.costs, request.model
    found: list[Assumption] = [
        Assumption("state", f"{request.state.total_bytes:,} bytes", request.state.source)
    ]
    by_rate = {
        "local_blocked": f"off the devices at {rates.device:.3g} B/s per host",
        "local_lag": f"sealed at {rates.seal:.3g} B/s, agreed on in 0.1 s",
        "persistent_blocked": f"one snapshot serves both tiers; the drain slows by {DRAIN_SLOWS:.0%}",
        "snapshot": "the others make one for each save",
        "persistent_lag": f"{rates.store:.3g} B/s per host, {rates.store_total:.3g} B/s of all",
        "one_slice_lag": "the same for the others, whose first slice writes alone",
        "own_restore": "read and checked, and onto the devices",
        "peers_restore": f"the same, and all of it at {rates.network:.3g} B/s from other hosts",
        "persistent_restore": "every host reads its part",
    }
    for field in dataclasses.fields(costs):
        name, value = field.name, getattr(costs, field.name)
        said = f"--{name.replace('_', '-')}-seconds" if name in measured else "assumed"
        why = "" if name in measured else by_rate.get(name, "")
        found.append(Assumption(f"{name} (s)", f"{value:.3g}", f"{said}: {why}" if why else said))
    llama = "Llama 3: 419 interruptions, 2,048 hosts, 54 days, 78 % hardware"
    defaults = {"process": llama, "host": llama, "slice": "a guess", "job": "a guess"}
    for name, source in defaults.items():
        given = getattr(args, f"{name}_mtbf_hours") is not None
        said = f"--{name}-mtbf-hours" if given else f"assumed: {source}"
        found.append(
            Assumption(f"hours between failures of a {name}", f"{getattr(model, name + '_hours'):,.0f}", said)
        )
    if request.memory is not None:
        said = "--trainer-memory" if trainer is not None else "assumed: a tenth, 16 GiB at least"
        found.append(
            Assumption("memory of the training program", f"{request.memory.trainer_bytes:,} bytes", said)
        )
        said = "GKE's rule" if request.memory.reserved_bytes else "assumed: nothing"
        found.append(Assumption("kept by Kubernetes", f"{request.memory.reserved_bytes:,} bytes", said))
    if request.prices is not None:
        found.append(Assumption("prices", f"${request.prices.per_gb_month}/GB/month", request.prices.source))
    return found
