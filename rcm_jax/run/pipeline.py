"""From an experiment to a trained student: its data, its teacher or start, its distillation, all in a workdir."""

import pathlib
from typing import NamedTuple

import jax

from rcm_jax.data import DATASETS
from rcm_jax.data.dataset import Dataset, batches
from rcm_jax.evaluate.distillation import TEACHER_STEPS, write_samples
from rcm_jax.method import denoiser
from rcm_jax.method.denoiser import Velocities
from rcm_jax.models import check_network
from rcm_jax.parallel import distributed
from rcm_jax.parallel.sharding import make_mesh, replicated
from rcm_jax.run import experiment
from rcm_jax.train import checkpoint, trainer
from rcm_jax.train.state import Teacher, TrainState
from rcm_jax.train.steps import diffusion_method, rcm_method


class Trained(NamedTuple):
    """What came of a run. teacher_F is the teacher's velocity without guidance; folders are workdirs."""

    run: experiment.Experiment
    dataset: Dataset
    network: experiment.Network
    teacher_F: denoiser.Velocity
    teacher: Teacher
    teacher_folder: pathlib.Path | None  # None: the student started from random parameters
    folder: pathlib.Path
    state: TrainState


def train(values: dict, workdir) -> Trained:
    """Runs an experiment given as a nested mapping, or goes on with it, in workdir.

    Raises ValueError, before anything is written, for values that do not fit each other, the data or the teacher;
    trainer.Interrupted if asked to stop.
    """
    run = experiment.from_mapping(values)
    mesh = make_mesh(run.mesh)
    pretrained = not run.teacher and run.pretrain is not None
    for config in [run.train] + ([run.pretrain.train] if pretrained else []):
        config.check(mesh)
    workdir = pathlib.Path(workdir)
    dataset = DATASETS[type(run.data)](run.data)
    if run.exact_teacher and dataset.velocity is None:
        raise ValueError("config.exact_teacher is set, but the velocity of these data is not known: set it to False")
    network = experiment.make_network(run, dataset)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    check_network(run.model, dataset.sample_shape, mesh)
    folder = params = None
    if run.has_start:
        folder = pathlib.Path(run.teacher or workdir / "teacher")
    if run.teacher:  # read before anything is written
        step = experiment.check_teacher(values)
        params = checkpoint.restore_item(folder, "ema", trainer.abstract_params(abstract, mesh), step)
    checkpoint.claim_workdir(workdir, values)
    if pretrained:
        checkpoint.claim_workdir(folder, experiment.teacher_values(values))
        params = pretrain(run, folder, mesh, dataset, network, abstract).ema
    teacher_F = dataset.velocity if run.exact_teacher else network.F
    state, teacher = distil(run, workdir, mesh, dataset, network, teacher_F, abstract, params)
    return Trained(run, dataset, network, teacher_F, teacher, folder, workdir, state)


def on_host(trained: Trained) -> Trained:
    """With the averaged student and the teacher in the memory of every process, which can then use them alone."""
    ema, teacher = distributed.on_host((trained.state.ema, trained.teacher))
    return trained._replace(state=trained.state.replace(ema=ema), teacher=teacher)


def pretrain(run, folder, mesh, dataset, network, abstract) -> TrainState:
    """Train the teacher in folder; returns its last state, at once if it is finished."""
    config, size = run.pretrain.train, run.pretrain.train.batch_size
    method = diffusion_method(run.pretrain.method, network.F, dataset.uncond, config.accumulate)
    key, make_params = jax.random.key(run.seed), experiment.make_params(network)
    state, shardings = trainer.place_state(method, abstract, mesh, key, make_params, config.offload)
    sampler = experiment.teacher_sampler(network.F, dataset.uncond, run.rcm.guidance, run.sampling, TEACHER_STEPS[0])
    return trainer.fit(
        method,
        state,
        shardings,
        None,
        batches(dataset.train, size, run.seed, distributed.local_rows(size, mesh)),
        config=config,
        workdir=folder,
        mesh=mesh,
        key=jax.random.fold_in(key, 1),
        label="teacher",
        on_sample=sample_writer(run, folder, dataset, sampler, mesh),
    )


def distil(run, workdir, mesh, dataset, network, teacher_F, abstract, params) -> tuple[TrainState, Teacher]:
    """Distil from given parameters, which it gives up, or (None) random ones; returns the last state and teacher."""
    velocities = Velocities(
        student=network.F, teacher=denoiser.guided(teacher_F, run.rcm.guidance), fake_score=network.F
    )
    method, size = rcm_method(run.rcm, velocities, run.train.accumulate), run.train.batch_size
    key = jax.random.key(run.seed)
    start = (key, experiment.make_params(network)) if params is None else (params,)
    state, shardings = trainer.place_state(method, abstract, mesh, *start, offload=run.train.offload)
    if params is not None:
        params = experiment.as_dtype(params, run.teacher_dtype)
    teacher = Teacher(params, jax.device_put(dataset.uncond, replicated(mesh)))
    sampler = experiment.student_sampler(network.F, run.sampling, len(run.sampling.mid_times))
    state = trainer.fit(
        method,
        state,
        shardings,
        teacher,
        batches(dataset.train, size, run.seed + 1, distributed.local_rows(size, mesh)),
        config=run.train,
        workdir=workdir,
        mesh=mesh,
        key=jax.random.fold_in(key, 2),
        label=run.rcm.name,
        on_sample=sample_writer(run, workdir, dataset, sampler, mesh),
    )
    return state, teacher


def sample_writer(run, folder, dataset, sampler, mesh):
    """What draws samples while a network trains, for data that can be shown; of several processes the first draws."""
    if dataset.to_image is None:
        return None

    def write(state, step):
        if not distributed.several():
            with jax.set_mesh(mesh):
                write_samples(run, folder, dataset, sampler, state.ema, step)
            return
        params = distributed.on_host(state.ema)
        if distributed.first():
            write_samples(run, folder, dataset, sampler, params, step)

    return write
