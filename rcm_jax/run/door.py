"""What can be known of a run before it begins: it is refused while nothing is written, and no teacher pretrained."""

import dataclasses

import jax
import jax.numpy as jnp

from rcm_jax.data.dataset import buckets_of, replacements
from rcm_jax.parallel import distributed
from rcm_jax.parallel.sharding import make_mesh
from rcm_jax.run import agreement, pixels, workdir
from rcm_jax.run.experiment import Experiment, Pretraining
from rcm_jax.run.program import Program, assemble, load_data
from rcm_jax.train import trainer
from rcm_jax.train.metrics import wandb_library
from rcm_jax.train.state import Teacher


def check(run: Pretraining, folder, profile: tuple[int, int] | None = None) -> Program:
    """The program of an experiment, or of a teacher alone, that can run in a workdir; profile: as pipeline.train.

    ValueError or OSError where it cannot: its processes were started otherwise, or have other data; the config does not
    fit the data, the devices, the autoencoder or what is in the workdir; its steps or samplers cannot be traced; wandb
    is asked for and not installed. That a teacher or a start fits is seen when it is read, so that they may be those of
    a run that has not begun.
    """
    distributed.agree(agreement.of_run(run, folder))
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    alone = not isinstance(run, Experiment)
    whole = Experiment(**fields) if alone else run
    if not alone and whole.needs_teacher_network and not whole.teacher and whole.pretrain is None:
        raise ValueError(
            "teacher is empty, and this experiment has no pretraining: set config.teacher to the workdir of one "
            "(scripts/convert_checkpoint.py makes it from published weights)"
        )
    if (run.pretrain and run.pretrain.train.wandb) or (whole.train.wandb and not alone):
        wandb_library()
    dataset = load_data(run)
    if distributed.several():
        distributed.agree(agreement.of_data(dataset))
    program = assemble(whole, make_mesh(run.mesh), dataset)
    distributed.by_first(lambda: pixels.check(run.media, program.sample_shape))
    trainer.check_trace(profile, 0, whole.train.steps)
    workdir.check(folder, run)
    for training in (program.pretraining, None if alone else program.distillation):
        if training is not None:
            replacements(training.config.leave_out, buckets_of(program.dataset.train))
            check_traces(program, training)
    return program


def check_traces(program: Program, training: trainer.Training) -> None:
    """Traces steps and samplers, for JAX keeps what it has traced: what is raised then would be raised in training."""
    teacher, batch = program.abstract_inputs()
    if training is program.pretraining:
        teacher, size = Teacher(None, teacher.uncond), training.config.batch_size
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=x.sharding), batch)
        samplers = [(program.teacher_sampler(F=program.network.F), program.params)]
    else:
        samplers = [(program.student_sampler(), program.whole(teacher, training.state.ema))]
        samplers += [(program.teacher_sampler(), teacher.params)] * (teacher.params is not None)
    for step in training.steps.values():
        step.eval_shape(training.state, teacher, batch)
    with jax.set_mesh(program.mesh):
        for sampler, params in samplers:
            sampler.eval_shape(*program.sampler_inputs(params, batch))


def check_finite(params, source) -> None:
    """ValueError that names the parameters that are not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    fine = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])([leaf for _, leaf in leaves])
    if bad := [jax.tree_util.keystr(path) for (path, _), good in zip(leaves, fine, strict=True) if not good]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{source} has parameters that are not finite: {', '.join(bad[:5])}{more}")
