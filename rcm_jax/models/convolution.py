"""Two-dimensional convolutions, as the U-Nets have them: [b, h, w, c] with kernels [h, w, in, out]."""

import jax
from jaxtyping import Array, Float

from rcm_jax.models.product import precision_of
from rcm_jax.parallel.sharding import split

AXES = ("vector", "vector", "embed", "features")  # logical axes of a kernel; its window stays whole


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "rows columns c f"], dtype, stride: int = 1
) -> Float[Array, "b s u f"]:
    """x convolved (as networks say it: not turned) in `dtype`, zeros around it: for stride 1 the size stays.

    Images are split over devices by the batch alone: a kernel, which is split by its inputs, is gathered, not they.
    """
    sides = [((n - 1) // 2, n // 2) for n in kernel.shape[:2]]
    y = jax.lax.conv_general_dilated(
        split(x.astype(dtype), "batch"), kernel.astype(dtype), (stride, stride), sides,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(dtype),
    )  # fmt: skip
    return split(y, "batch")
