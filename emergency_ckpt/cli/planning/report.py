"""A plan as a table for people, as JSON for programs, and as flags to paste.

All three are of the same plan; the flags load again to what the plan says.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from emergency_ckpt.cli.planning.deployment import deploy_notes, deploy_values
from emergency_ckpt.cli.planning.request import Asked, backup_steps
from emergency_ckpt.config import Config
from emergency_ckpt.config.load import is_given
from emergency_ckpt.config.values import stands_for_itself
from emergency_ckpt.core.forecast.job_plan import JobPlan
from emergency_ckpt.core.forecast.recovery import Source
from emergency_ckpt.core.forecast.simulation import Interval, Simulated, gain
from emergency_ckpt.core.forecast.sizing import quantity
from emergency_ckpt.core.forecast.storage_cost import requests_of_save
from emergency_ckpt.core.machines import MIB
from emergency_ckpt.telemetry.units import format_bytes, format_seconds

PLACEHOLDERS = {
    "run_name": "my-run",
    "base_output_directory": "gs://my-bucket/runs",
    "local_checkpoint_directory": "/local",
}
"""Stand in the flags for what a configuration does not set, and have to be replaced."""


def to_replace(config: Config) -> list[str]:
    """The flags for which a placeholder stands. A directory `/local` may be meant."""
    return [
        flag
        for flag, name in PLACEHOLDERS.items()
        if not (given := getattr(config, flag)) or (given == name and flag != "local_checkpoint_directory")
    ]


_SOURCES = {
    Source.OWN: "own ramdisks",
    Source.PEERS: "other hosts' ramdisks",
    Source.PERSISTENT: "persistent tier",
}


def plan_lines(plan: JobPlan, asked: Asked) -> Iterator[str]:
    """For people."""
    yield from _pairs(_summary(plan, asked))
    yield ""
    yield "what is lost when"
    rows = [("lost", "comes back from", "steps done again", "training again after")]
    rows += [
        (loss.what, _SOURCES[loss.source], f"{loss.steps:,.0f}", format_seconds(loss.seconds))
        for loss in plan.losses
    ]
    yield from _table(rows)
    yield ""
    yield "what this rests on"
    yield from _table([(each.name, each.value, each.source) for each in asked.assumptions])
    for note in notes(plan, asked):
        yield f"Note: {note}"


def notes(plan: JobPlan, asked: Asked) -> Sequence[str]:
    """What deserves a word."""
    return (*plan.notes, *deploy_notes(asked.deployment, plan))


def simulation_lines(simulated: Sequence[Simulated], days: float) -> Iterator[str]:
    """For people."""
    yield ""
    runs = len(simulated[0].lives)
    yield f"simulated: {runs} runs of {days:g} days, the same failures for all; mean, 95 % confidence interval"
    headings = ("policy", "goodput", "saving", "rolled back", "down", "periods", "from own/peers/persistent")
    rows: list[tuple[str, ...]] = [headings]
    for each in simulated:
        periods = f"{each.periods.local or '-'}/{each.periods.persistent}"
        back = "/".join(f"{each.restored(source):,}" for source in Source)
        shares = (_share(each.share(name)) for name in ("useful", "saving", "rolled_back", "down"))
        rows.append((each.policy, *shares, periods, back))
    yield from _table(rows)
    ours = simulated[-1]
    for other in simulated[:-1]:
        more = gain(ours, other)
        difference = f"{more.mean * 100:+.2f} ± {more.half_width * 100:.2f} % of the time"
        yield f"{ours.policy} - {other.policy}: {difference}"


ASSUMED_BY_SIMULATION = (
    "failures are independent and come at constant rates, also while the job is down",
    "a failure during a restart takes its ramdisks too, and begins the restart anew",
    "replaced hosts come at once when the repair time is over; nothing runs with fewer hosts meanwhile",
    "emergency_ckpt: what the planner of this package restores; a restore leaves the step on all ramdisks",
    "Orbax emergency: no local copy on the first slice, one whole other slice needed, a snapshot per save",
    "persistent only: asynchronous saves by the hosts of one slice, at Daly's period",
    "no drain goes on after a failure, for anybody (the agents of this package do finish theirs)",
)
"""Beside what the plan itself assumes."""


def to_json(plan: JobPlan, asked: Asked, config: Config, simulated: Sequence[Simulated] = ()) -> dict[str, Any]:
    """For programs: numbers without rounding, bytes and seconds."""
    of, monthly = plan.request, plan.monthly
    young, daly, goodput = plan.persistent_only
    step = of.step_seconds
    return {
        "job": {**dataclasses.asdict(of.shape), "hosts": of.shape.hosts, "chips": of.shape.chips},
        "machine": None if asked.machine is None else dataclasses.asdict(asked.machine),
        "state": dataclasses.asdict(of.state),
        "ramdisk": {
            "size": quantity(plan.ramdisk_mib),
            "slots": plan.ramdisk.slots,
            "slot_bytes": plan.ramdisk.slot_bytes,
            "needed_bytes": plan.ramdisk.needed_bytes,
            "available_bytes": None if of.memory is None else of.memory.for_ramdisk,
        },
        "periods": {
            "local_steps": plan.periods.local,
            "local_seconds": plan.periods.local * step,
            "persistent_steps": plan.periods.persistent,
            "persistent_seconds": plan.periods.persistent * step,
            "best_local_seconds": _finite(plan.tiers.best_local),
            "best_persistent_seconds": _finite(plan.tiers.best_persistent),
        },
        "failures": {
            "mean_seconds": plan.tiers.mean_seconds,
            "missed_by_local_tier": plan.tiers.missed,
            "survives_hosts": plan.recovery.survivable.hosts,
            "survives_slices": plan.recovery.survivable.slices,
        },
        "goodput": plan.goodput,
        "best_goodput": plan.best_goodput,
        "steps_lost_per_failure": plan.steps_lost,
        "persistent_only": {"young_seconds": young, "daly_seconds": daly, "goodput": goodput},
        "monthly_cost": None if monthly is None else {**dataclasses.asdict(monthly), "total": monthly.total},
        "losses": [{**dataclasses.asdict(loss), "source": loss.source.name.lower()} for loss in plan.losses],
        "flags": dict(flags(plan, config)),
        "deployment": dict(_deploy_values(plan, asked)),
        "assumptions": [dataclasses.asdict(each) for each in asked.assumptions],
        "notes": list(notes(plan, asked)),
        "simulation": [_simulated_json(each) for each in simulated],
        "simulation_assumptions": list(ASSUMED_BY_SIMULATION) if simulated else [],
    }


def flags(plan: JobPlan, config: Config) -> Iterator[tuple[str, Any]]:
    """The flags that say this plan, by name: with what the configuration sets of what they need."""
    of = plan.request
    backs_up = backup_steps(config, of.step_seconds) is not None
    saves_both = backs_up and is_given(config, "checkpoint_period") and config.checkpoint_period > 0
    for flag, placeholder in PLACEHOLDERS.items():
        yield flag, getattr(config, flag) or placeholder
    yield "enable_checkpointing", True
    if config.enable_multi_tier_checkpointing:
        yield "enable_multi_tier_checkpointing", True
    if config.enable_emergency_checkpoint or not config.enable_multi_tier_checkpointing:
        yield "enable_emergency_checkpoint", True
    yield "local_checkpoint_period", plan.periods.local
    yield "local_checkpoint_max_to_keep", of.protection.kept
    yield "local_checkpoint_copies", of.protection.copies
    yield "local_checkpoint_spread", of.protection.spreads
    if saves_both:
        yield "checkpoint_period", config.checkpoint_period
        for name in ("minutes", "steps"):
            flag = f"multi_tier_checkpointing_backup_interval_{name}"
            if getattr(config, flag):
                yield flag, getattr(config, flag)
    else:
        yield "checkpoint_period", 0 if backs_up else plan.periods.persistent
        if backs_up:
            yield "multi_tier_checkpointing_backup_interval_steps", plan.periods.persistent
    yield "max_num_checkpoints_to_keep", of.kept_persistent


def flags_line(plan: JobPlan, config: Config) -> str:
    """The same as words for a shell: they may be pasted, or come from `$(…)` with `eval`."""
    return _words(flags(plan, config))


def deploy_line(plan: JobPlan, asked: Asked, config: Config) -> str:
    """As `flags_line`, with the values of the deployment that follow from the plan."""
    return f"{flags_line(plan, config)} {_words(_deploy_values(plan, asked))}"


def _deploy_values(plan: JobPlan, asked: Asked) -> Iterator[tuple[str, Any]]:
    return deploy_values(asked.deployment, plan, asked.machine_name)


def _words(values: Iterator[tuple[str, Any]]) -> str:
    return " ".join(shlex.quote(f"{name}={_word(value)}") for name, value in values)


def _word(value: Any) -> str:
    if isinstance(value, str) and not stands_for_itself(value, is_text=True):
        quoted = json.dumps(value, ensure_ascii=False)
        # As YAML escapes characters: JSON makes two of one beyond the first 65,536.
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
    return str(value)


def _summary(plan: JobPlan, asked: Asked) -> Iterator[tuple[str, str]]:
    of, tiers = plan.request, plan.tiers
    shape, ramdisk = of.shape, plan.ramdisk
    machine = f" of {asked.machine.name} ({asked.machine.source})" if asked.machine else ""
    yield (
        "job",
        (
            f"{shape.slices:,} x {shape.hosts_per_slice:,} hosts{machine}, {shape.chips:,} chips, state "
            + ("the same in all slices" if shape.replicated and shape.slices > 1 else "without replicas")
        ),
    )
    state = of.state
    yield "state", f"{format_bytes(state.total_bytes)}, {format_bytes(state.host_bytes)} per host"
    yield (
        "ramdisk per host",
        (
            f"{quantity(plan.ramdisk_mib)}: {ramdisk.slots} slots of {quantity(-(-ramdisk.slot_bytes // MIB))} "
            f"and {ramdisk.buffer:.0%} (--mtc-ramdisk-size={quantity(plan.ramdisk_mib)})"
        ),
    )
    if of.memory is not None:
        memory = of.memory
        free, all_of_it = quantity(memory.for_ramdisk // MIB), quantity(memory.memory_bytes // MIB)
        yield "fits", f"yes: {free} of {all_of_it} are free for it"
    yield "on the ramdisks a step", plan.recovery.survivable.describe()
    yield (
        "a failure every",
        f"{format_seconds(tiers.mean_seconds)}; {tiers.missed:.2%} leave nothing on ramdisks",
    )
    for name, steps in (("local", plan.periods.local), ("persistent", plan.periods.persistent)):
        best = tiers.best_local if name == "local" else tiers.best_persistent
        unrounded = "never" if best == float("inf") else format_seconds(best)
        yield (
            f"{name} period",
            (f"{steps:,} steps, {format_seconds(steps * of.step_seconds)} (the formula says {unrounded})"),
        )
    yield "expected goodput", f"{plan.goodput:.2%} (with the best periods {plan.best_goodput:.2%})"
    young, daly, goodput = plan.persistent_only
    yield (
        "persistent tier alone",
        (f"{goodput:.2%}, saving every {format_seconds(daly)} (Daly; Young: {format_seconds(young)})"),
    )
    yield "steps lost per failure", f"{plan.steps_lost:,.1f}"
    monthly = plan.monthly
    if monthly is not None:
        kept = "all steps" if monthly.kept_steps is None else f"{monthly.kept_steps} steps"
        each = requests_of_save(of.state.total_bytes, shape.hosts)
        yield (
            "persistent tier per month",
            (
                f"${monthly.total:,.2f}: {kept} kept ${monthly.storage:,.2f}, {monthly.saves:,.0f} saves of "
                f"{each.writes + each.lists:,} writes ${monthly.requests:,.2f}"
            ),
        )


def _simulated_json(of: Simulated) -> dict[str, Any]:
    return {
        "policy": of.policy,
        "periods": dataclasses.asdict(of.periods),
        "runs": len(of.lives),
        **{
            name: dataclasses.asdict(of.share(share))
            for name, share in (
                ("goodput", "useful"),
                ("saving", "saving"),
                ("rolled_back", "rolled_back"),
                ("down", "down"),
            )
        },
        "restored": {source.name.lower(): of.restored(source) for source in Source},
    }


def _finite(seconds: float) -> float | None:
    return None if seconds == float("inf") else seconds


def _share(of: Interval) -> str:
    return f"{of.mean:.2%} ± {of.half_width:.2%}"


def _pairs(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    return _table(list(rows))


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of text, as wide as they must be."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
