"""Runs the Triton kernels on a CPU, in Triton's interpreter, with numpy arrays.

Triton decides at its import whether it interprets: TRITON_INTERPRET=1 must be in the environment then.
"""

import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from rcm_jax.kernels import triton_kernels
from rcm_jax.kernels.triton import Config

# Small tiles, so that the loops run and the tails are ragged, of sizes that cannot be mistaken for one another.
SMALL = Config(queries=16, keys=32, warps=4, stages=1)


class Tensor:
    """A numpy array with as much of a torch tensor's interface as the interpreter asks for. It stays where it is."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.dtype = self.array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def _itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = set_ = storage_offset = size = stride = copy_ = _itself


def repaired(builder):
    """(cast_impl, create_dot) of the interpreter, right for bfloat16 as well.

    Triton 3.9 keeps bfloat16 as its bits: it truncates where the hardware rounds, and multiplies them as integers.
    """
    cast_impl, create_dot = builder.cast_impl, builder.create_dot

    def cast(x, to):
        source, target = x.dtype.scalar, to.scalar
        if (source, target) == (tl.bfloat16, tl.float32):
            return TensorHandle(x.data.view(jnp.bfloat16).astype(np.float32), target)
        if (source, target) == (tl.float32, tl.bfloat16):
            return TensorHandle(x.data.astype(jnp.bfloat16).view(np.uint16), target)
        return cast_impl(x, to)

    def dot(x, y, *args):
        x, y = (cast(a, tl.float32) if a.dtype.scalar == tl.bfloat16 else a for a in (x, y))
        return create_dot(x, y, *args)

    return cast, dot


interpreter_builder.cast_impl, interpreter_builder.create_dot = repaired(interpreter_builder)


def run(launch, config=SMALL):
    """Runs a launch: numpy arrays of its outputs, NaN wherever the kernel did not write."""
    outputs = [Tensor(np.full(x.shape, np.nan, x.dtype)) for x in launch.outputs]
    kernel = getattr(triton_kernels, launch.kernel)
    kernel[launch.grid(config)](*map(Tensor, launch.arrays), *outputs, **launch.all_constants(config))
    return tuple(x.array for x in outputs)


@triton.jit
def last_tokens(x_at, out_at, LENGTH: tl.constexpr):
    """Copies the last 16 tokens of [b, LENGTH, 1, 16] with what the kernels load and store by. Grid (1, 1, b)."""
    x = triton_kernels._load(triton_kernels._of_head(x_at, LENGTH, 1, 16), LENGTH - 16, LENGTH, 1, 16, 16, 16, True)
    triton_kernels._store(triton_kernels._of_head(out_at, 16, 1, 16), x, 0, 16, 1, 16, 16, 16)
