"""All that changes while training, as one pytree: explicit state in, state out."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


class Learner(flax.struct.PyTreeNode):
    """A network that is being trained: float32 master parameters, optimizer state and the count of its updates."""

    params: Any
    opt_state: Any
    updates: jax.Array  # [] int32

    def update(self, grads, optimizer, counts: Any = True) -> tuple["Learner", jax.Array, jax.Array]:
        """One step of an optax optimizer -> (learner, gradient norm [], applied [] bool).

        A gradient that is not finite, or that `counts` [] bool says is of no sample, leaves parameters, optimizer state
        and count as they were. An optimizer state in the memory of the host is fetched; whoever compiles this says
        where the new one goes.
        """
        norm = optax.tree.norm(grads)
        applied = jnp.isfinite(norm) & counts
        old = self.replace(opt_state=jax.tree.map(fetched, self.opt_state))
        updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
        new = Learner(optax.apply_updates(old.params, updates), opt_state, old.updates + 1)
        return jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old), norm, applied


def fetched(x):
    """In the memory of the device."""
    space = jax.memory.Space
    return jax.device_put(x, space.Device) if jax.typeof(x).memory_space == space.Host else x


class TrainState(flax.struct.PyTreeNode):
    """`step` counts iterations of every phase; `ema` averages the student.

    `tracks` are further averages of the student, power EMAs of other widths, a tuple; None: there are none.
    `fake_score` and `weighting` (the adaptive weighting of a loss) are learners, or None where the method has none.
    """

    step: jax.Array  # [] int32
    student: Learner
    ema: Any
    fake_score: Any = None
    weighting: Any = None
    tracks: Any = None


class Teacher(flax.struct.PyTreeNode):
    """The frozen side of distillation: never donated, never checkpointed.

    `uncond` has conditions without the batch axis (null class, negative prompt): those that guidance replaces.
    """

    params: Any
    uncond: Any


def finite_groups(tree) -> jax.Array:
    """[g] bool, for each group of parameters, those of one key at the top, whether all its numbers are finite."""
    squares = [[jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(group)] for _, group in sorted(tree.items())]
    return jnp.stack([jnp.isfinite(sum(group)) for group in squares])


def make_learner(params, optimizer) -> Learner:
    """A learner that starts from the given parameters."""
    return Learner(params=params, opt_state=optimizer.init(params), updates=jnp.zeros((), jnp.int32))
