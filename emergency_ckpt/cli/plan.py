"""`emergency-ckpt plan`: ramdisk, periods, goodput and costs of a job, before it runs. Needs no jax.

Only `--state` imports jax, since the user's function does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

from emergency_ckpt.cli.planning.deployment import read_both
from emergency_ckpt.cli.planning.plot import page
from emergency_ckpt.cli.planning.report import (
    ASSUMED_BY_SIMULATION,
    PLACEHOLDERS,
    deploy_line,
    flags_line,
    notes,
    plan_lines,
    simulation_lines,
    to_json,
    to_replace,
)
from emergency_ckpt.cli.planning.request import MEASURABLE, Asked, read_request
from emergency_ckpt.core.forecast.job_plan import JobPlan, make_plan, policies
from emergency_ckpt.core.forecast.plan_request import check_step_seconds
from emergency_ckpt.core.forecast.simulation import Simulated, compare
from emergency_ckpt.core.forecast.sizing import BUFFER, BYTES_PER_PARAMETER, quantity
from emergency_ckpt.core.machines import MACHINES
from emergency_ckpt.errors import ConfigError

_DESCRIPTION = """\
Says how large a ramdisk has to be, how often to save, what goodput to expect, what is lost when, and what
the persistent tier costs. The flags of a configuration count as they are set: periods that it sets are
checked, others are chosen. A file for `emergency-ckpt deploy` may be given as well: it says the shape of
the job. What is impossible is refused with the nearest plan that is not.
docs/planning.md explains the figures."""
_MOST_RUNS = 1000
_MOST_DAYS = 3650
_MOST_FAILURES = 5_000_000
"""Of all runs; they take some minutes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE key=value",
        help="a YAML file and overrides, as for a training program",
    )
    _add_state(parser.add_argument_group("the state"))
    _add_job(parser.add_argument_group("the job"))
    _add_costs(parser.add_argument_group("measured instead of assumed"))
    _add_failures(parser.add_argument_group("mean time between failures, in hours (inf: never)"))
    _add_output(parser.add_argument_group("output"))
    _add_simulation(parser.add_argument_group("simulation"))


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status."""
    _check(args)
    config, deployment = read_both(args.words, _environment())
    asked = read_request(args, config, deployment)
    plan = make_plan(asked.request)
    simulated = _simulate(args, plan) if args.simulate else ()
    if args.simulate and args.plot:
        _write(Path(args.plot), page(simulated, asked, args.days))
    if args.flags or args.deploy_flags:
        print(deploy_line(plan, asked, config) if args.deploy_flags else flags_line(plan, config))
        missing = to_replace(config)
        told = f"ramdisk per host: {quantity(plan.ramdisk_mib)} (--mtc-ramdisk-size of XPK)"
        print(told + (f"; replace {', '.join(missing)}" if missing else ""), file=sys.stderr)
        for note in notes(plan, asked):
            print(f"Note: {note}", file=sys.stderr)
    elif args.json:
        print(json.dumps(to_json(plan, asked, config, simulated), indent=2))
    else:
        _print(args, plan, asked, simulated)
    return 0


def _environment() -> dict[str, str]:
    """This process's, in which the run has a name: one plans before it has."""
    return os.environ | {"JOBSET_NAME": os.environ.get("JOBSET_NAME") or PLACEHOLDERS["run_name"]}


def _print(args: argparse.Namespace, plan: JobPlan, asked: Asked, simulated: tuple[Simulated, ...]) -> None:
    for line in plan_lines(plan, asked):
        print(line)
    if not simulated:
        return
    for line in simulation_lines(simulated, args.days):
        print(line)
    print("the simulation also assumes:")
    for each in ASSUMED_BY_SIMULATION:
        print(f"- {each}")
    if args.plot:
        print(f"drawn in {args.plot}")


def _simulate(args: argparse.Namespace, plan: JobPlan) -> tuple[Simulated, ...]:
    of = plan.request
    failures = args.days * 86400 * args.runs / of.model.mean_seconds(of.shape)
    if failures > _MOST_FAILURES:
        fit = 0.9 * args.days * _MOST_FAILURES / failures
        raise ConfigError(
            f"{failures:,.0f} failures in --runs {args.runs} of --days {args.days:g}: up to {_MOST_FAILURES:,} "
            f"are simulated. The nearest that can be is --days {fit:.2g}"
        )
    return compare(
        policies(plan), of.model, of.shape, of.costs, of.step_seconds, args.days * 86400, args.runs, args.seed
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--plot {path} cannot be written: {error}. Give another path, or --plot ''"
        ) from error


def _check(args: argparse.Namespace) -> None:
    check_step_seconds(math.nan if args.step_seconds is None else args.step_seconds)
    if not 2 <= args.runs <= _MOST_RUNS:
        raise ConfigError(f"--runs {args.runs}: expected 2 to {_MOST_RUNS}; an interval needs two at least")
    if not 0 < args.days <= _MOST_DAYS:
        raise ConfigError(f"--days {args.days}: expected above 0, up to {_MOST_DAYS}")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected 0 or more")


def _add_state(group: argparse._ArgumentGroup) -> None:
    sizes = group.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--parameters", metavar="N", help="parameters of the model, as 70e9 or 70B")
    sizes.add_argument("--state-bytes", metavar="BYTES", help="all of the state, as 840GB")
    sizes.add_argument(
        "--state",
        metavar="MODULE:FUNCTION",
        help="a function that returns the state as jax.ShapeDtypeStructs: exact, with shardings even per host",
    )
    group.add_argument(
        "--bytes-per-parameter",
        type=float,
        default=BYTES_PER_PARAMETER,
        metavar="N",
        help="with optimizer state (default: %(default)s)",
    )
    group.add_argument(
        "--sharded-over-slices",
        action="store_true",
        help="the state is sharded over the slices too: no slice has all of it",
    )


def _add_job(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slices", type=int, metavar="N", help="default: deploy_slices, or 1")
    group.add_argument(
        "--tpu-type",
        metavar="TYPE",
        help="v5p-128, v6e-256, …: machine type and hosts per slice (default: deploy_tpu_type)",
    )
    group.add_argument("--hosts-per-slice", type=int, metavar="N")
    group.add_argument("--machine", metavar="TYPE", help=f"machine type of a host: {', '.join(MACHINES)}")
    group.add_argument("--machine-memory", metavar="BYTES", help="memory of a host, where no type says it")
    group.add_argument(
        "--chips-per-host", type=int, metavar="N", help="default: those of the machine type, or 1"
    )
    group.add_argument(
        "--trainer-memory", metavar="BYTES", help="what the training program needs of it (default: a tenth)"
    )
    group.add_argument("--step-seconds", type=float, metavar="SECONDS", help="time of a train step; needed")
    group.add_argument("--slots", type=int, metavar="N", help="default: kept steps + 2")
    group.add_argument(
        "--buffer", type=float, default=BUFFER, metavar="SHARE", help="beside the slots (default: %(default)s)"
    )
    group.add_argument(
        "--store", choices=("s3", "gs", "none"), help="prices (default: by base_output_directory)"
    )


def _add_costs(group: argparse._ArgumentGroup) -> None:
    for name, meaning in MEASURABLE.items():
        group.add_argument(f"--{name.replace('_', '-')}-seconds", type=float, metavar="SECONDS", help=meaning)
    for name, meaning in (
        ("device", "off the devices of a host"),
        ("seal", "into a slot, with checksums"),
        ("network", "between hosts"),
        ("store", "to and from the persistent tier, of a host"),
        ("store-total", "of all hosts together"),
    ):
        group.add_argument(f"--{name}-rate", metavar="BYTES", help=f"bytes per second {meaning}, as 10GB")


def _add_failures(group: argparse._ArgumentGroup) -> None:
    for name, meaning in (
        ("process", "of a trainer, whose host stays"),
        ("host", "of a host, with its ramdisk"),
        ("slice", "of a slice at once"),
        ("job", "of all ramdisks at once"),
    ):
        group.add_argument(f"--{name}-mtbf-hours", type=float, metavar="HOURS", help=meaning)


def _add_output(group: argparse._ArgumentGroup) -> None:
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON in place of tables")
    forms.add_argument("--flags", action="store_true", help="print the flags of the plan, to paste")
    forms.add_argument(
        "--deploy-flags",
        action="store_true",
        help="print them with the deploy_… values that follow, for `emergency-ckpt deploy`",
    )


def _add_simulation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--simulate",
        action="store_true",
        help="simulate the job under failures: this package, Orbax's emergency manager, no local tier",
    )
    group.add_argument("--days", type=float, default=30.0, help="of each run (default: %(default)g)")
    group.add_argument("--runs", type=int, default=20, help="default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="of the failures (default: %(default)s)")
    group.add_argument(
        "--plot",
        default="goodput.html",
        metavar="FILE",
        help="where to draw it (default: %(default)s); '' for nowhere",
    )
