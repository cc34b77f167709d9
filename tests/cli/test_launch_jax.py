"""A launched job is one JAX job: its processes see each other, also after one was killed and all restarted."""

from __future__ import annotations

import sys
from pathlib import Path

from emergency_ckpt.cli.launch import JobSpec, KillSpec, run_job

TRAIN = """
import jax
import numpy as np
from jax.experimental import multihost_utils
from emergency_ckpt.jaxio.launch import initialize_from_launcher, report_step

launched = initialize_from_launcher()
assert (jax.process_index(), jax.process_count()) == (launched.process, 4)
assert (jax.device_count(), jax.local_device_count()) == (8, 2)
for step in range(1, 4):
    total = multihost_utils.process_allgather(np.array([launched.process * step])).sum()
    assert total == 6 * step, total
    report_step(step)
    if step == 2 and launched.attempt == 0:
        import signal
        signal.pause()
print(f"attempt {launched.attempt} came to step {step}")
"""


def test_two_slices_of_two_processes_compute_together_before_and_after_a_lost_slice(tmp_path: Path) -> None:
    lines: list[tuple[int, str]] = []
    spec = JobSpec(
        command=(sys.executable, "-c", TRAIN),
        slices=2,
        processes_per_slice=2,
        devices_per_process=2,
        restarts=1,
        kills=(KillSpec.parse("slice=1@step=2"),),
        grace_seconds=2,
        time_limit_seconds=100,
        log_dir=tmp_path,
    )
    result = run_job(spec, on_output=lambda process, line: lines.append((process, line)))
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.attempt_1.log")))
    assert result.exit_code == 0, logs
    assert [attempt.exit_code for attempt in result.attempts] == [137, 0]
    assert [process for process, line in sorted(lines) if "attempt 1 came to step 3" in line] == [0, 1, 2, 3]
