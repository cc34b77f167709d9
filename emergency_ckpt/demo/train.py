"""The demo's training program, and how a training program uses the checkpoint manager.

    python -m emergency_ckpt.demo.train demo.yml key=value ...

Everything that is particular to checkpoints is in `train`: construct one manager, start from what it gives,
call it at every step. All processes of the job run this program.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, RestoreReport, load_config
from emergency_ckpt.config import Config
from emergency_ckpt.demo.data import read_corpus, training_data
from emergency_ckpt.demo.digest import shard_checksums
from emergency_ckpt.demo.journal import Finished, Journal, Restored, Started, Trained
from emergency_ckpt.demo.model import ModelOptions, build_trainer
from emergency_ckpt.demo.options import DemoOptions
from emergency_ckpt.jaxio.launch import initialize_from_launcher, report_step


def main(argv: Sequence[str]) -> int:
    """Runs this process of the job; returns its exit code."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    config = load_config(argv)
    options = DemoOptions.from_keys(config.other_keys)
    started = time.time()
    launched = initialize_from_launcher()
    journal = Journal(options.journal_directory, jax.process_index())
    journal.write(Started(started, jax.process_index(), launched.attempt if launched else 0))
    slices = launched.slices if launched else 1
    mesh = Mesh(np.array(jax.devices()).reshape(slices, -1), ("replica", "fsdp"))
    last_step = train(config, options, mesh, journal)
    # Left early, with everything saved: an exit code after which the job is started again.
    return 0 if last_step == options.steps else config.preemption_exit_code


def train(config: Config, options: DemoOptions, mesh: Mesh, journal: Journal) -> int:
    """Trains to the last step, from wherever the manager can start; returns the step that was reached."""
    model = ModelOptions()
    trainer = build_trainer(model, mesh, fsdp_axis="fsdp", batch_size=options.batch_size, seed=options.seed)
    data = training_data(
        read_corpus(),
        length=model.length,
        batch_size=options.batch_size,
        process=jax.process_index(),
        process_count=jax.process_count(),
        seed=options.seed,
    )

    manager = CheckpointManager.from_config(config, mesh, trainer.abstract_state)
    restored = manager.restore_or_init(trainer.init, extras={"data": data})
    journal.write(_restored(manager.last_restore))

    state, step = restored.state, restored.step or 0
    while step < options.steps:
        step += 1
        state, loss = trainer.train_step(state, trainer.place(next(data)))
        journal.write(Trained(time.time(), step, float(loss)))
        manager.save(step, state, extras={"data": data})
        report_step(step)
        if manager.should_exit:
            break
    manager.finish(step, state, extras={"data": data})
    manager.check_for_errors()
    manager.close()

    if step == options.steps:
        journal.write(Finished(time.time(), step, shard_checksums(state), data.get_state()))
    return step


def _restored(report: RestoreReport | None) -> Restored:
    """What the manager's restore did, as a fact of the journal; None: it began from scratch."""
    if report is None:
        return Restored(time.time(), step=None, reason="", source="scratch", seconds=0.0, bytes=0)
    return Restored(time.time(), report.step, report.reason, report.source, report.seconds, report.bytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
