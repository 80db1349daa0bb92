"""The training loop of every method: state in, state out, resumable at any checkpoint to the last bit."""

import contextlib
import signal
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rcm_jax.parallel import distributed
from rcm_jax.parallel.sharding import check_batch, has_host_memory, in_host_memory, replicated, state_sharding
from rcm_jax.train import checkpoint
from rcm_jax.train.console import Console, say
from rcm_jax.train.guard import Guard
from rcm_jax.train.metrics import MetricsWriter, Window
from rcm_jax.train.pace import Pace, check_trace, traced
from rcm_jax.train.rotation import Rotation
from rcm_jax.train.state import Learner, Teacher, TrainState
from rcm_jax.train.steps import Method
from rcm_jax.train.watch import watched
from rcm_jax.util.ranges import Count, Natural, Width, config


@config
class TrainConfig:
    """How long, how many at once, how often to tell and to save."""

    steps: Count = 10_000
    batch_size: Width = 256
    log_every: Count = 100
    checkpoint_every: Count = 1000
    sample_every: Count = 1000
    snapshot_every: Natural = 0  # snapshots of the power EMAs, which stay; a multiple of checkpoint_every, or 0: none
    keep: Count = 2  # checkpoints kept: the newest
    keep_every: Natural = 0  # and those at multiples of it; 0: none
    wandb: bool = False
    wandb_project: str = "rcm_jax"
    wandb_name: str = ""  # of the run; "": the name of its workdir
    accumulate: Count = 1  # parts of a batch, one after another: as many times less memory for activations
    offload: bool = False  # optimizer states lie in the memory of the hosts
    asynchronous: bool = False  # checkpoints are written while training goes on
    most_skips: Count = 10  # so many updates of a network in a row whose gradients are not finite, and training stops
    hang_after: Natural = 3600  # seconds in which nothing new began, after which a run ends with status 4; 0: never
    leave_out: tuple[Natural, ...] = ()  # examples, by their index in the data: each gives its turn to the next one

    def __post_init__(self):
        # A snapshot ahead of the checkpoint from which a run goes on would be of another course.
        if self.snapshot_every % self.checkpoint_every:
            raise ValueError(
                f"snapshot_every {self.snapshot_every} must be 0 or a multiple of checkpoint_every "
                f"{self.checkpoint_every}"
            )

    def check(self, mesh) -> None:
        """ValueError where this cannot be done on these devices."""
        check_batch(self.batch_size, mesh, self.accumulate)
        if self.offload and not has_host_memory(mesh):
            kind = mesh.devices.flat[0].device_kind
            raise ValueError(f"train.offload: arrays of {kind} cannot lie in their host's memory: set it to False")


class Interrupted(Exception):
    """Training was asked to stop (SIGTERM, or SIGINT of a single process); everything up to `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.step = step


class Training(NamedTuple):
    """A method on a mesh, whole but for its values: made by `make_training`, run by `fit`, read by a plan."""

    label: str  # what the console calls it
    config: TrainConfig
    mesh: Mesh
    method: Method
    state: TrainState  # shapes, dtypes and shardings
    steps: dict[str, Callable]  # by phase, and "probe" if there is one; compiled when they are called

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the groups of parameters of every network, as `finite_groups` has them."""
        params = sorted(self.state.student.params)
        return {"student": params, "critic": params}


def make_training(label: str, config: TrainConfig, mesh, method: Method, boxed, key) -> Training:
    """A training that draws with keys of `key`; boxed: abstract parameters with logical axes. Nothing is allocated.

    ValueError where it cannot be on these devices.
    """
    config.check(mesh)
    abstract = jax.eval_shape(method.init, boxed)
    if config.snapshot_every and not method.powers(abstract):
        raise ValueError(
            "train.snapshot_every is for power EMAs, and ema_half_life leaves none: name their widths by ema_tracks"
        )
    shardings = shardings_of(abstract, mesh, config.offload)
    state = checkpoint.abstract_like(nn.meta.unbox(abstract), shardings)
    return Training(label, config, mesh, method, state, compile_steps(method, shardings, key))


def place(training: Training, source, make_params=lambda params: params, fake_score=None) -> TrainState:
    """The first state, of make_params(source), made in place: every leaf on its own devices at once.

    fake_score: the parameters that it starts from, if they are others.
    """

    def init(source, fake_score):
        return training.method.init(make_params(source), fake_score)

    return jax.jit(init, out_shardings=training.shardings)(source, fake_score)


def shardings_of(abstract_state: TrainState, mesh, offload: bool = False) -> TrainState:
    """Where every leaf of a state lies, from its abstract, still boxed, values."""
    shardings = state_sharding(abstract_state, mesh)
    if not offload:
        return shardings
    learners = {name: value for name, value in vars(shardings).items() if isinstance(value, Learner)}
    return shardings.replace(**{n: v.replace(opt_state=in_host_memory(v.opt_state)) for n, v in learners.items()})


def abstract_params(boxed, mesh):
    """Shapes, dtypes and shardings of parameters from their boxed abstract values, as a restore wants them."""
    return checkpoint.abstract_like(nn.meta.unbox(boxed), state_sharding(boxed, mesh))


def fit(
    training: Training, state: TrainState, teacher: Teacher, data, workdir, on_sample=None, profile=None
) -> TrainState:
    """Train from the newest checkpoint of workdir, or from `state`, to config.steps; returns the last state.

    state is donated. data is an iterator with get_state/set_state (rcm_jax.data.dataset.batches), of the local rows.
    on_sample(state, step) -> metrics.Shown or None, if given, is called every sample_every steps and at the end, in all
    processes. profile: two counts of steps between which a trace is written to workdir/profile.
    Raises Interrupted, after saving, if a signal asks to stop; Diverged when nothing is learned any more (Guard).
    """
    config = training.config
    kept = Rotation(workdir, training.state, config.keep, config.keep_every, config.asynchronous)
    with watched(config.hang_after) as watch, kept, _stop_requested() as stop:
        if kept.steps:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # two states of 14B parameters need not fit
            state = kept.restore(data)
        step, window, guard = int(state.step), Window(), Guard(config.most_skips, training.groups)
        check_trace(profile, step, config.steps)
        pace = Pace(training.steps, training.method.open_trips, step, watch.at)
        with (
            _written(workdir, step, config) as (write, show),
            Console(training.label, step, config.steps) as console,
            traced(workdir, profile) as trace,
        ):
            while step < config.steps:
                trace(step, state)
                with pace.waiting(state):
                    batch, index = _next_batch(training, data)
                state, metrics = pace.run(training.method.phase(step), step, state, teacher, batch)
                step += 1
                window.add(metrics)
                guard.add(step, metrics, index)
                console.advance()
                stopping = stop(step)
                last = stopping or step == config.steps
                if "probe" in training.steps and step % config.sample_every == 0:
                    window.add(pace.run("probe", step, state, teacher, batch))
                if last or step % config.log_every == 0:
                    values, speed = window.read(), pace.read(step)
                    write(step, values, speed)
                    console.show(step, values, speed, pace.left(step, config.steps), last)
                    guard.check(step == config.steps)
                if words := pace.forecast(step, config.steps, state):
                    say(f"{training.label}: {words}")
                if last or step % config.checkpoint_every == 0:
                    with pace.stopped("checkpoints", state):
                        guard.check()
                        kept.save(state, data, guard.healthy)
                        if config.snapshot_every and (step % config.snapshot_every == 0 or step == config.steps):
                            kept.wait()
                            checkpoint.save_snapshot(workdir, state, training.method.powers(state))
                if on_sample and (last or step % config.sample_every == 0):
                    with pace.stopped("previews", state):
                        show(step, on_sample(state, step))
                if stopping:
                    raise Interrupted(step)
            trace(step, state)
            with pace.stopped("checkpoints", state):
                kept.finish(state, data)
    return state


def _next_batch(training: Training, data):
    """(batch, where its examples stand in the data), of all processes."""
    rows = next(data)
    index = rows.pop("index")
    return distributed.global_batch(rows, training.config.batch_size, training.mesh), index


@contextlib.contextmanager
def _written(workdir, step, config):
    """What writes metrics, (step, values, pace) -> None, and previews, (step, Shown) -> None: in the first process
    alone."""
    if not distributed.first():
        yield lambda step, values, pace: None, lambda step, shown: None
        return
    writer = MetricsWriter(workdir, step, config.wandb, config.wandb_project, config.wandb_name)
    with contextlib.closing(writer):
        yield writer.write, writer.show


def compile_steps(method: Method, shardings, key) -> dict[str, Callable]:
    """Each phase, jitted: (state, teacher, batch) -> (state, metrics). The state is donated; keys follow its step.

    They are traced with the mesh of the shardings as JAX's context, whatever the caller's.

    The method's probe, if it has one, is there as "probe": it returns metrics alone and leaves the state.
    """

    def compiled(step_fn, **options):
        def run(state, teacher, batch):
            with jax.sharding.use_abstract_mesh(shardings.step.mesh.abstract_mesh):
                return step_fn(state, teacher, batch, jax.random.fold_in(key, state.step))

        return jax.jit(run, **options)

    # Metrics are whole everywhere: every process reads them.
    moves = dict(donate_argnums=0, out_shardings=(shardings, replicated(shardings.step.mesh)))
    steps = {name: compiled(step_fn, **moves) for name, step_fn in method.steps.items()}
    return steps | ({"probe": compiled(method.probe)} if method.probe else {})


@contextlib.contextmanager
def _stop_requested():
    """step -> whether SIGINT or SIGTERM came; the second signal acts as usual.

    Of several processes any may get SIGTERM, and all hear of it at the same step; JAX listens for it there.
    """
    if distributed.several():
        yield multihost_utils.reached_preemption_sync_point
        return
    seen = []
    previous = {}

    def handle(number, frame):
        seen.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda step: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
