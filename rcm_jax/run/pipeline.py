"""From an experiment to a trained student: its data, its teacher or start, its distillation, all in a workdir."""

import pathlib
from typing import NamedTuple

import jax

from rcm_jax import data
from rcm_jax.data.dataset import Dataset, batches
from rcm_jax.parallel import distributed
from rcm_jax.parallel.sharding import make_mesh
from rcm_jax.run import previews, workdir
from rcm_jax.run.experiment import Experiment
from rcm_jax.run.program import Program, assemble
from rcm_jax.train import checkpoint, trainer
from rcm_jax.train.state import Teacher, TrainState
from rcm_jax.train.trainer import Training


class Trained(NamedTuple):
    """What came of a run; folders are workdirs."""

    program: Program
    teacher: Teacher
    teacher_folder: pathlib.Path | None  # None: the student started from random parameters
    folder: pathlib.Path
    state: TrainState

    @property
    def run(self) -> Experiment:
        return self.program.run

    @property
    def dataset(self) -> Dataset:
        return self.program.dataset


def train(run: Experiment, folder) -> Trained:
    """Runs an experiment, or goes on with it, in a workdir.

    Raises ValueError, before anything is written, for a config that does not fit the data, the devices or the teacher;
    trainer.Interrupted if asked to stop.
    """
    folder = pathlib.Path(folder)
    if run.needs_teacher_network and not run.teacher and run.pretrain is None:
        raise ValueError(
            "teacher is empty, and this experiment has no pretraining: set config.teacher to the workdir of one "
            "(scripts/convert_checkpoint.py makes it from published weights)"
        )
    program = assemble(run, make_mesh(run.mesh), data.load(run.data))
    teacher_folder = params = None
    if run.teacher:  # read before anything is written
        teacher_folder = pathlib.Path(run.teacher)
        step = workdir.check_teacher(run)
        params = checkpoint.restore_item(teacher_folder, "ema", program.params, step)
    workdir.claim(folder, run)
    if program.pretraining:
        teacher_folder = folder / "teacher"
        workdir.claim(teacher_folder, run.pretraining)
        params = pretrain(program, program.pretraining, teacher_folder).ema
    state, teacher = distil(program, params, folder)
    return Trained(program, teacher, teacher_folder, folder, state)


def on_host(trained: Trained) -> Trained:
    """With the averaged student and the teacher in the memory of every process, which can then use them alone."""
    ema, teacher = distributed.on_host((trained.state.ema, trained.teacher))
    return trained._replace(state=trained.state.replace(ema=ema), teacher=teacher)


def pretrain(program: Program, training: Training, folder) -> TrainState:
    """Train the teacher in folder; returns its last state, at once if it is finished."""
    run, dataset = program.run, program.dataset
    state = trainer.place(training, jax.random.key(run.seed), program.network.make_params)
    stream = _stream(training, dataset, run.seed)
    shown = previews.hook(program, program.teacher_sampler(F=program.network.F), folder)
    return trainer.fit(training, state, program.teacher(None), stream, folder, shown)


def distil(program: Program, params, folder) -> tuple[TrainState, Teacher]:
    """Distil from given parameters, which it gives up, or (None) random ones; returns the last state and teacher."""
    run, training = program.run, program.distillation
    if params is None:
        state = trainer.place(training, jax.random.key(run.seed), program.network.make_params)
    else:
        state = trainer.place(training, params)
        params = as_dtype(params, run.teacher_dtype)
    teacher = program.teacher(params)
    stream = _stream(training, program.dataset, run.seed + 1)
    shown = previews.hook(program, program.student_sampler(), folder)
    return trainer.fit(training, state, teacher, stream, folder, shown), teacher


def _stream(training: Training, dataset: Dataset, seed: int):
    """The batches of a training, of which this process reads its rows."""
    size = training.config.batch_size
    return batches(dataset.train, size, seed, distributed.local_rows(size, training.mesh))


def as_dtype(params, dtype: str):
    """Parameters in that dtype; an array that has another gives up its memory as soon as it is converted."""

    def convert(leaf):
        if leaf.dtype == dtype:
            return leaf
        converted = leaf.astype(dtype)
        leaf.delete()
        return converted

    return jax.tree.map(convert, params)
