"""One process of the job: joins it, measures, and leaves its samples behind as JSON.

Started by `benchmarks.job` as `python -m benchmarks.worker PLAN`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.plan import MIB, Plan
from benchmarks.sections import Measurements
from benchmarks.workload import Workload
from emergency_ckpt.jaxio.launch import initialize_from_launcher


def main() -> None:
    plan = Plan.from_json(sys.argv[1])
    launched = initialize_from_launcher()
    assert launched is not None, "start the benchmarks with python -m benchmarks"
    mesh = Mesh(np.array(jax.devices()).reshape(launched.slices, -1), ("replica", "fsdp"))
    workload = Workload(mesh, plan.size_mib * MIB)
    measurements = Measurements(plan, workload, launched.ramdisk)
    measurements.run()
    result = {"state_bytes": workload.nbytes, "values": measurements.samples.values}
    result_path(plan, launched.process).write_text(json.dumps(result))


def result_path(plan: Plan, process: int) -> Path:
    return Path(plan.directory) / f"result_{process}.json"


if __name__ == "__main__":
    try:
        main()
    except Exception:
        # Leaving in the ordinary way would first wait for the other processes.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
