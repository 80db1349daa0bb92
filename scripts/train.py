"""Train: python scripts/train.py --config=configs/digits.py --workdir=DIR [--config.key=value …]

Pretrains a teacher in DIR/teacher if config.teacher names none, distils it into DIR, and writes DIR/report/ for data
that are pictures of classes. Started again on the same DIR it goes on from the newest checkpoint.
"""

import common  # noqa: I001  (puts the checkout on the path)
import pathlib
import time

import jax
from absl import flags

from rcm_jax import checkpoint, denoiser, experiment, trainer
from rcm_jax.data import DATASETS
from rcm_jax.data.dataset import batches
from rcm_jax.evaluate.distillation import TEACHER_STEPS, write_distillation_report, write_samples
from rcm_jax.sharding import check_batch, make_mesh, replicated
from rcm_jax.steps import Velocities, diffusion_method, rcm_method
from rcm_jax.train_state import Teacher

CONFIG = common.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics, samples and the report go.")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    started = time.time()
    values = CONFIG.value.to_dict()
    run = experiment.from_mapping(values)
    mesh = make_mesh(run.mesh)
    for train in [run.train] + ([] if run.teacher else [run.pretrain.train]):
        check_batch(train.batch_size, mesh)
    workdir = pathlib.Path(WORKDIR.value)
    dataset = DATASETS[type(run.data)](run.data)
    network = experiment.make_network(run, dataset)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    folder = pathlib.Path(run.teacher or workdir / "teacher")
    if run.teacher:  # read before anything is written
        step = experiment.check_teacher(values)
        params = checkpoint.restore_item(folder, "ema", trainer.abstract_params(abstract, mesh), step)
    checkpoint.claim_workdir(workdir, values)
    try:
        if not run.teacher:
            checkpoint.claim_workdir(folder, experiment.teacher_values(values))
            params = pretrain(run, folder, mesh, dataset, network, abstract).ema
        state, teacher = distil(run, workdir, mesh, dataset, network, abstract, params)
    except trainer.Interrupted as stop:
        print(stop)
        raise SystemExit(130) from None  # not finished, as a shell says it
    print(f"trained in {(time.time() - started) / 60:.1f} min: {workdir}")
    if dataset.to_image is None:
        return
    print(write_distillation_report(run, workdir, folder, dataset, network.F, teacher, state.ema))
    print(f"{workdir / 'report'}: report.png, report.json ({(time.time() - started) / 60:.1f} min in all)")


def pretrain(run, folder, mesh, dataset, network, abstract):
    """Train the teacher in folder; returns its last state, at once if it is finished."""
    method = diffusion_method(run.pretrain.method, network.F, dataset.uncond)
    key = jax.random.key(run.seed)
    state, shardings = trainer.place_state(method, abstract, mesh, key, experiment.make_params(network))
    sampler = experiment.teacher_sampler(network.F, dataset.uncond, run.rcm.guidance, run.sampling, TEACHER_STEPS[0])
    return trainer.fit(
        method,
        state,
        shardings,
        None,
        batches(dataset.train, run.pretrain.train.batch_size, run.seed),
        config=run.pretrain.train,
        workdir=folder,
        mesh=mesh,
        key=jax.random.fold_in(key, 1),
        label="teacher",
        on_sample=sample_writer(run, folder, dataset, sampler),
    )


def distil(run, workdir, mesh, dataset, network, abstract, params):
    """rCM from the teacher's parameters, which it gives up; returns the last state and the teacher."""
    velocities = Velocities(
        student=network.F, teacher=denoiser.guided(network.F, run.rcm.guidance), fake_score=network.F
    )
    method = rcm_method(run.rcm, velocities)
    state, shardings = trainer.place_state(method, abstract, mesh, params)
    uncond = jax.device_put(dataset.uncond, replicated(mesh))
    teacher = Teacher(experiment.as_dtype(params, run.teacher_dtype), uncond)
    sampler = experiment.student_sampler(network.F, run.sampling, len(run.sampling.mid_times))
    state = trainer.fit(
        method,
        state,
        shardings,
        teacher,
        batches(dataset.train, run.train.batch_size, run.seed + 1),
        config=run.train,
        workdir=workdir,
        mesh=mesh,
        key=jax.random.fold_in(jax.random.key(run.seed), 2),
        label="rCM",
        on_sample=sample_writer(run, workdir, dataset, sampler),
    )
    return state, teacher


def sample_writer(run, folder, dataset, sampler):
    """What draws samples while a network trains, for data that can be shown."""
    if dataset.to_image is None:
        return None
    return lambda state, step: write_samples(run, folder, dataset, sampler, state.ema, step)


if __name__ == "__main__":
    common.run(main)
