"""How planning a restore grows with the job: `python -m benchmarks.planning [--processes 64,4096]`.

No job runs and nothing is copied: a layout and inventories are made up, part of the ramdisks is lost, and the
newest of three steps is planned. Time is taken without tracing, memory with it, of the planning alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.restore_plan import Strike
from emergency_ckpt.core.shards import Box

MIB = 1024 * 1024
_STEPS = (StepId(1, 100), StepId(1, 200), StepId(1, 300))
_ROUNDS = 3
_ROWS, _COLUMNS = 64, 128  # Of the smallest shard.


def make_layout(processes: int, leaves: int, pieces: int) -> Layout:
    """Two slices, each process one shard per leaf: cut by rows, by columns, or small and the same everywhere.

    `pieces`: into how many smallest shards a leaf could be cut; it gives the size of the state.
    """
    per_slice = processes // 2
    length, behind = pieces // per_slice * _ROWS, _COLUMNS
    by_rows: dict[int, tuple[Box, ...]] = {}
    by_columns: dict[int, tuple[Box, ...]] = {}
    for p in range(processes):
        begin = p % per_slice * length
        by_rows[p] = (Box((begin, 0), (begin + length, behind)),)
        by_columns[p] = (Box((0, begin), (behind, begin + length)),)
    replicated = {p: (Box((0,), (_COLUMNS,)),) for p in range(processes)}
    cuts = (
        (by_rows, (pieces * _ROWS, _COLUMNS)),
        (by_columns, (_COLUMNS, pieces * _ROWS)),
        (by_rows, (pieces * _ROWS, _COLUMNS)),
        (replicated, (_COLUMNS,)),
    )
    chosen = {f"layers.{number:04}.w": cuts[number % len(cuts)] for number in range(leaves)}
    return Layout.build_from_boxes(
        [LeafSpec(name, shape, "float32") for name, (_, shape) in chosen.items()],
        {name: held for name, (held, _) in chosen.items()},
        tuple(p // per_slice for p in range(processes)),
    )


def make_planner(layout: Layout, saved: Layout, held: Callable[[int], bool]) -> Planner:
    """Every process for which `held` says so has all steps as `saved` cuts them."""
    hosts = range(min(layout.process_count, saved.process_count))
    inventories = tuple(
        Inventory(p, tuple(Holding(step, saved.hash, p, f"{saved.held.kinds[p]}") for step in _STEPS))
        for p in hosts
        if held(p)
    )
    per_slice = layout.process_count // layout.slice_count
    groups = tuple(tuple(range(p, layout.process_count, per_slice)) for p in range(per_slice))
    others = {} if saved.hash == layout.hash else {saved.hash: OtherLayout(saved)}
    return Planner(layout, groups, inventories, (), others=others)


def measure(make: Callable[[], Planner], strikes: Sequence[Strike] = ()) -> tuple[float, float]:
    """(seconds, MiB at most) of one plan, which a planner makes that has worked out nothing before.

    Of a few rounds the fastest: nothing is random in it, and what slows others down is not of this plan.
    """
    seconds = math.inf
    for _ in range(_ROUNDS):
        planner = make()
        gc.collect()
        began = time.perf_counter()
        plan, reason = planner.plan(strikes=strikes)
        seconds = min(seconds, time.perf_counter() - began)
        if plan is None:
            raise RuntimeError(f"there should be a plan: {reason}")
        del plan
    planner = make()
    tracemalloc.start()
    planner.plan(strikes=strikes)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, most / MIB


def scenarios(processes: int, leaves: int) -> dict[str, tuple[Callable[[], Planner], Sequence[Strike]]]:
    """By name what was lost, as a planner to make and what was struck."""
    per_slice = processes // 2
    layout = make_layout(processes, leaves, per_slice)
    struck = [
        Strike(_STEPS[-1], p, frozenset(layout.shards[i] for i in layout.process_shards[p][:1]))
        for p in range(0, per_slice, 4)
    ]
    # A number of pieces that all of these jobs can cut evenly.
    half, most = (make_layout(n, leaves, 3 * per_slice) for n in (processes // 2, processes * 3 // 4))
    whole = make_layout(processes, leaves, 3 * per_slice)

    def one_slice(p: int) -> bool:
        return p >= per_slice

    def alternating(p: int) -> bool:
        return p % 2 == p // per_slice

    return {
        "nothing lost": (lambda: make_planner(layout, layout, lambda p: True), ()),
        "one of two slices lost": (lambda: make_planner(layout, layout, one_slice), ()),
        "every other process lost": (lambda: make_planner(layout, layout, alternating), ()),
        "a shard of every fourth struck": (lambda: make_planner(layout, layout, lambda p: True), struck),
        "saved by half as many": (lambda: make_planner(whole, half, lambda p: True), ()),
        "saved by three quarters": (lambda: make_planner(whole, most, lambda p: True), ()),
        "half as many restore it": (lambda: make_planner(half, whole, lambda p: True), ()),
    }


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one plan took."""

    processes: int
    leaves: int
    lost: str
    seconds: float
    mib: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure_all(processes: Sequence[int], leaves: int) -> list[Figure]:
    """Every scenario for every number of processes."""
    return [
        Figure(count, leaves, name, *measure(make, strikes))
        for count in processes
        for name, (make, strikes) in scenarios(count, leaves).items()
    ]


def as_table(figures: Sequence[Figure]) -> Table:
    """For people."""
    leaves = figures[0].leaves if figures else 0
    table = Table(title=f"planning a restore, {leaves} leaves, 2 slices", title_justify="left")
    for heading in ("processes", "what was lost", "plan", "per process", "memory at most"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    for each in figures:
        per_process = f"{each.seconds / each.processes * 1e6:.0f} µs"
        table.add_row(
            f"{each.processes}", each.lost, f"{each.seconds:.3f} s", per_process, f"{each.mib:.0f} MiB"
        )
    return table


def main(argv: Sequence[str]) -> int:
    """Measures and prints a curve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--processes", default="64,256,1024,4096", help="default: 64,256,1024,4096")
    parser.add_argument("--leaves", type=int, default=1000, help="default: 1000")
    parser.add_argument("--json", action="store_true", help="one line of JSON per figure instead of a table")
    args = parser.parse_args(argv)
    figures = measure_all(tuple(map(int, args.processes.split(","))), args.leaves)
    if args.json:
        for each in figures:
            print(json.dumps(each.to_json()))
    else:
        Console(width=110, highlight=False).print(as_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
