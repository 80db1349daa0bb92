"""Sets of a teacher's own samples: what rCM trains on when there are no videos."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rcm_jax.build.source import Item, Source
from rcm_jax.media.first_frame import check_conditions
from rcm_jax.run import generate, workdir
from rcm_jax.run.experiment import Experiment
from rcm_jax.run.program import make_network
from rcm_jax.train import checkpoint
from rcm_jax.util.config import revise

COMPUTED = ("dtype", "time_dtype", "attention")  # of a network: how its numbers are computed


def prompts(
    run: Experiment, teacher, lines: Sequence[str], uncond: Callable[[], Mapping[str, np.ndarray]], *, each: int = 1,
    seed: int = 0, steps: int | None = None, guidance: float | None = None, size: tuple[int, int] | None = None,
    frames: int | None = None, batch: int = 1,
) -> Source:  # fmt: skip
    """`each` samples of a teacher, guided, for every prompt. Item i starts from the noise of `seed` + i.

    Args:
      run: what says how to sample.
      teacher: a workdir of a teacher, or of converted weights. Its network may be another than the run's.
      uncond: what guidance replaces, asked for when the first samples are drawn.
      steps, guidance, size, frames: the config's if None; the teacher's shift is sampling.data_shift.
      batch: samples at once.

    Raises:
      ValueError: no prompts, a workdir of something else, a network that takes more than text, sizes or steps that
        cannot be.
    """
    if not lines or min(each, batch) < 1 or not 0 <= seed <= 2**32 - each * len(lines):
        raise ValueError(f"{len(lines)} prompts, {each} samples each from seed {seed}, {batch} at once: this cannot be")
    shift = run.sampling.data_shift or run.sampling.teacher_shift
    run = revise(run, {"sampling.teacher_shift": shift, "sampling.teacher_steps": steps or run.sampling.teacher_steps})
    run = _with_network_of(run, teacher)
    generator = generate.load(teacher, mode="teacher", config=run, size=size, frames=frames)
    check_conditions(run.model, generator.shape, {})
    guidance = generator.guidance if guidance is None else guidance
    _, step = checkpoint.params_of(generator.folder, "ema")
    numbered = enumerate(line for line in lines for _ in range(each))
    items = [Item(f"prompt {i // each}, seed {seed + i}", line, generator.shape, {"seed": seed + i})
             for i, line in numbered]  # fmt: skip
    sampling = run.sampling
    settings = {
        "kind": "prompts", "teacher": str(teacher), "teacher_step": step, "guidance": guidance,
        "steps": sampling.teacher_steps, "solver": sampling.teacher_solver, "shift": shift,
        "sigma_max": sampling.teacher_sigma_max or sampling.sigma_max, "each": each, "seed": seed,
    }  # fmt: skip
    return Source(items, settings, _sampler(generator, guidance, uncond, batch), batch=batch)


def _with_network_of(run: Experiment, teacher) -> Experiment:
    """With the network that a workdir holds, which may be larger than the run's, computed as the run's is."""
    there = workdir.read(teacher)
    computed = {
        key: getattr(run.model, key) for key in COMPUTED if hasattr(there.model, key) and hasattr(run.model, key)
    }
    changes = {"parametrization": there.parametrization, "time_scale": there.time_scale}
    return revise(run, {"model": revise(there.model, computed), **changes})


def _sampler(generator: generate.Generator, guidance: float, uncond: Callable, batch: int) -> Callable:
    """What draws samples; the teacher is read when the first are drawn."""
    loaded: list[Any] = []

    def load():
        network = make_network(generator.run, generator.dataset.first)
        mesh = generate.make_sampling_mesh(generator.run, generator.shape, batch)
        params = generator.restored(network, mesh)
        steps = generator.run.sampling.teacher_steps
        return mesh, params, generate.make_sampler(generator, network.F, steps, guidance, uncond())

    def make(items, prepared, texts):
        if not loaded:
            loaded.extend(load())
        mesh, params, sampler = loaded
        full = np.arange(batch) % len(items)  # every batch is as large: one compilation
        seeds = np.array([item.origin["seed"] for item in items], np.uint32)
        with jax.set_mesh(mesh):
            x0 = np.asarray(sampler(params, jax.random.key(0), seeds[full], {"text": texts[full]}, generator.shape))
        return [{"x0": row} for row in x0[: len(items)]]

    return make
