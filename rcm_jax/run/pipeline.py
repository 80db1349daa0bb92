"""From an experiment to a trained student: its data, its teacher or start, its distillation, all in a workdir."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from rcm_jax.data.dataset import Dataset, batches, random_access
from rcm_jax.models.adapters import flat
from rcm_jax.parallel import distributed
from rcm_jax.run import door, lock, previews, weights, workdir
from rcm_jax.run.experiment import RANDOM, Experiment, Pretraining
from rcm_jax.run.program import Program
from rcm_jax.train import checkpoint, rotation, trainer
from rcm_jax.train.console import say
from rcm_jax.train.state import Teacher, TrainState
from rcm_jax.train.trainer import Training
from rcm_jax.util.files import absolute, as_path


class Trained(NamedTuple):
    """What came of a run; folders are workdirs, paths as util.files.as_path makes them."""

    program: Program
    teacher: Teacher
    teacher_folder: Any  # None: the student started from random parameters
    folder: Any
    state: TrainState

    @property
    def run(self) -> Experiment:
        return self.program.run

    @property
    def dataset(self) -> Dataset:
        return self.program.dataset

    @property
    def student(self):
        """The parameters of the averaged student, as F takes them."""
        return self.program.whole(self.teacher, self.state.ema)


def train(
    run: Experiment, folder, profile: tuple[int, int] | None = None, cache=None, from_step: int | None = None
) -> Trained:
    """Runs an experiment, or goes on with it, in a workdir.

    profile: two steps of the distillation, between which a trace is written to folder/profile. cache: a folder for
    compiled programs, so that a run that goes on need not compile them again; None: as JAX is set. from_step: the
    checkpoint from which to go on, later ones being put aside; None: the newest.

    Raises ValueError or OSError, before anything is written, for a config that does not fit the data, the devices, the
    teacher or the autoencoder, processes that were started otherwise, a workdir in which another run trains;
    trainer.Interrupted if asked to stop; guard.Diverged if nothing is learned any more.
    """
    folder = as_path(folder)
    program = door.check(run, folder, profile)
    teacher_folder = params = None
    if run.teacher == RANDOM:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.params)
        params = jax.jit(program.network.make_params, out_shardings=shardings)(jax.random.key(run.seed))
    elif run.teacher:  # read before anything is written
        teacher_folder = as_path(run.teacher)
        step = workdir.check_teacher(run)
        # A base is never trained, and so never needed in float32.
        params = checkpoint.restore_item(teacher_folder, "ema", program.base if run.adapter else program.params, step)
        door.check_finite(params, teacher_folder)
    starts = read_starts(program) if checkpoint.is_empty(folder) else {}
    workdir.claim(folder, run)
    with lock.held(folder):
        if from_step is not None:
            rotation.go_back(folder, from_step)
        if cache is not None:
            keep_programs(cache)
        say(introduce(program, program.distillation))
        if program.pretraining:
            teacher_folder = folder / "teacher"
            workdir.claim(teacher_folder, run.pretraining)
            params = pretrain(program, program.pretraining, teacher_folder).ema
            door.check_finite(params, teacher_folder)
        state, teacher = distil(program, params, folder, profile=profile, **starts)
    return Trained(program, teacher, teacher_folder, folder, state)


def train_teacher(run: Pretraining, folder, cache=None, from_step: int | None = None) -> TrainState:
    """Makes a teacher, or goes on with it, in a workdir; returns its last state. Arguments and errors: as `train`."""
    program = door.check(run, folder)
    assert program.pretraining
    workdir.claim(folder, run)
    with lock.held(folder):
        if from_step is not None:
            rotation.go_back(folder, from_step)
        if cache is not None:
            keep_programs(cache)
        say(introduce(program, program.pretraining))
        return pretrain(program, program.pretraining, as_path(folder))


def introduce(program: Program, training: Training) -> str:
    """What is about to run: the method, the network, the devices; the data and how long; what computes attention."""
    run, mesh = program.run, program.mesh
    count, trained = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (program.params, training.state.ema)
    )
    adapter = f", {trained:,} of an adapter beside them" if training is program.distillation and run.adapter else ""
    network = type(run.model).__name__.removesuffix("Config")
    devices = f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    first = program.pretraining if training is program.distillation else None
    before = f"{first.config.steps:,} of pretraining, then " if first else ""
    examples = len(random_access(program.dataset.train))
    attention = f"\nattention: {program.network.attention}" if program.network.attention else ""
    config = training.config
    return (
        f"{training.label}: {network} of {count:,} parameters{adapter} on {devices} (mesh {axes}), "
        f"JAX {jax.__version__}\n"
        f"{before}{config.steps:,} steps of {config.batch_size} samples {list(program.sample_shape)}; "
        f"{examples:,} examples{attention}"
    )


def keep_programs(folder) -> None:
    """From now on compiled programs are kept in a folder, and taken from it. Those of a second and less are not."""
    jax.config.update("jax_compilation_cache_dir", str(absolute(folder)))
    compilation_cache.reset_cache()  # JAX would not look again


def read_starts(program: Program) -> dict:
    """{"student", "fake_score"}: what is trained of each as it starts, where that is not as it is first drawn."""
    run, starts = program.run, {}
    for name, source in {"student": run.start, "fake_score": run.fake_start}.items():
        if source and run.adapter and str(source).endswith(".safetensors"):
            starts[name] = read_adapter(program, source)
        elif source:
            step, there = workdir.check_start(source, run), workdir.read(source)
            workdir.check_adapter(source, there, run)
            has_own = name == "fake_score" and isinstance(there, Experiment) and there.rcm.fake_score
            item = "fake_score" if has_own else "ema"
            starts[name], _ = checkpoint.restore_params(source, item, step, program.distillation.state.ema)
            door.check_finite(starts[name], source)
    return starts


def read_adapter(program: Program, path):
    """The adapter in a file, that training starts from; ValueError unless it is one as config.adapter has it."""
    config, wanted = program.run.adapter, program.distillation.state.ema
    assert config
    tree, scale = weights.read_adapter(path, program.run.model)
    theirs, ours = ({name: tuple(leaf.shape) for name, leaf in flat(adapter).items()} for adapter in (tree, wanted))
    if theirs != ours or not math.isclose(scale, config.scale, rel_tol=1e-6):
        name = next(iter(sorted(theirs.items() ^ ours.items())), ("scale", scale))[0]
        raise ValueError(
            f"{path} is no adapter as config.adapter has it (rank {config.rank}, counted {config.scale:g} times): see "
            f"{name}, which is {theirs.get(name, f'counted {scale:g} times')} there, {ours.get(name, 'absent')} here"
        )
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, wanted)


def on_host(trained: Trained) -> Trained:
    """With the averaged student and the teacher in the memory of every process, which can then use them alone."""
    ema, teacher = distributed.on_host((trained.state.ema, trained.teacher))
    return trained._replace(state=trained.state.replace(ema=ema), teacher=teacher)


def pretrain(program: Program, training: Training, folder) -> TrainState:
    """Train the teacher in folder; returns its last state, at once if it is finished."""
    run, dataset = program.run, program.dataset
    state = trainer.place(training, jax.random.key(run.seed), program.network.make_params)
    stream = _stream(training, dataset, run.seed)
    caption = f"{run.sampling.teacher_steps}-step teacher (EMA), guidance {run.teacher_guidance:g}"
    shown = previews.hook(program, program.teacher_sampler(F=program.network.F), folder, caption)
    return trainer.fit(training, state, program.teacher(None), stream, folder, shown)


def distil(program: Program, params, folder, student=None, fake_score=None, profile=None) -> tuple[TrainState, Teacher]:
    """Distil a teacher of given parameters, or (None) without one; returns the last state and teacher.

    student, fake_score: what they start from; None: the teacher or, without one, random parameters. All are given
    up. profile: as in `train`.
    """
    run, training = program.run, program.distillation
    first = None if run.adapter else params
    start = first if student is None else student
    if start is None:
        state = trainer.place(training, jax.random.key(run.seed), program.first, fake_score)
    else:
        own = first if fake_score is None and run.rcm.fake_score else fake_score
        state = trainer.place(training, start, fake_score=own)
    jax.tree.map(lambda leaf: leaf.delete(), (student, fake_score))
    if params is not None:
        params = as_dtype(params, run.teacher_dtype)
    teacher = program.teacher(params)
    stream = _stream(training, program.dataset, run.seed + 1)
    caption = f"{len(run.sampling.mid_times)}-step student (EMA)"
    whole = partial(program.whole, teacher)
    shown = previews.hook(program, program.student_sampler(), folder, caption, whole)
    return trainer.fit(training, state, teacher, stream, folder, shown, profile), teacher


def _stream(training: Training, dataset: Dataset, seed: int):
    """The batches of a training, of which this process reads its rows."""
    config = training.config
    rows = distributed.local_rows(config.batch_size, training.mesh)
    return batches(dataset.train, config.batch_size, seed, rows, config.leave_out)


def as_dtype(params, dtype: str):
    """Parameters in that dtype; an array that has another gives up its memory as soon as it is converted."""

    def convert(leaf):
        if leaf.dtype == dtype:
            return leaf
        converted = leaf.astype(dtype)
        leaf.delete()
        return converted

    return jax.tree.map(convert, params)
