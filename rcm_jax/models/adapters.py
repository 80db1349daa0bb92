"""Low-rank adapters (LoRA, arXiv 2106.09685) of the kernels of a network: W + scale·A·B, never formed.

An adapter is a tree as the parameters are, with A [*, in, r] and B [*, r, out] in the place of every kernel
[*, in, out] that has one. A dense layer that finds them beside its kernel adds x·A·B (rcm_jax.models.layers).
"""

import fnmatch
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.util.ranges import Positive, between, config

A, B = "lora_a", "lora_b"


@config
class AdapterConfig:
    """What is trained in the place of whole kernels."""

    rank: Annotated[int, between(1, 65_536)] = 32
    alpha: Positive | None = None  # the adapter counts alpha/rank times; None: once
    targets: tuple[str, ...] = ()  # modules by their paths (* stands for anything); none: those of the network's record

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapted(flax.struct.PyTreeNode):
    """Parameters of a network: those of a base, and of an adapter that counts `scale` times."""

    base: Any
    adapter: Any
    scale: float = flax.struct.field(pytree_node=False, default=1.0)


def targets_of(config: AdapterConfig, own: tuple[str, ...], boxed) -> dict[str, Any]:
    """{path of a module: its kernel} of those that a config names, among (boxed, abstract) parameters.

    own: what the record of the network names. ValueError where there is none to name, a name is no module's, or a rank
    is more than a kernel has.
    """
    kernels = {path.removesuffix("/kernel"): leaf for path, leaf in flat(boxed).items() if path.endswith("/kernel")}
    if not own:
        raise ValueError("this network has no kernels that take adapters: set config.adapter to None")
    found = {}
    for target in config.targets or own:
        matched = fnmatch.filter(kernels, target)
        if not matched:
            raise ValueError(f"adapter.targets: {target!r} is no module with a kernel; they are {', '.join(kernels)}")
        found |= {path: kernels[path] for path in matched}
    for path, leaf in found.items():
        fan_in, fan_out = leaf.value.shape[-2:]
        if config.rank > min(fan_in, fan_out):
            raise ValueError(
                f"adapter.rank {config.rank} is more than {path} has, of {fan_in} × {fan_out}: "
                f"{min(fan_in, fan_out)} at most, or name other adapter.targets"
            )
    return dict(sorted(found.items()))


def init(config: AdapterConfig, own: tuple[str, ...], boxed, key):
    """A boxed adapter that adds nothing: A uniform within 1/√in, as PEFT draws it, B zero; float32.

    Whatever axis of a kernel its axes split, of A and B it is the wide one: a rank may be too small to be split.
    """
    adapter = {}
    for i, (path, kernel) in enumerate(targets_of(config, own, boxed).items()):
        *layers, fan_in, fan_out = kernel.value.shape
        names, shape, bound = kernel.names[: len(layers)], (*layers, fan_in, config.rank), fan_in**-0.5
        down = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
        up = jnp.zeros((*layers, config.rank, fan_out))
        adapter[f"{path}/{A}"] = kernel.replace(value=down, names=(*names, "embed", "rank"))
        adapter[f"{path}/{B}"] = kernel.replace(value=up, names=(*names, "rank", "embed"))
    return unflatten_dict(adapter, sep="/")


def whole(params):
    """The parameters that a network is applied to: an Adapted as one tree, with A and scaled B beside the kernels."""
    if not isinstance(params, Adapted):
        return params
    scaled = {path: leaf * params.scale if path.endswith(B) else leaf for path, leaf in flat(params.adapter).items()}
    return unflatten_dict(flat(params.base) | scaled, sep="/")


def merged(kernel: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float) -> np.ndarray:
    """kernel + scale·A·B, [*, in, out] float32, of arrays [*, in, out], [*, in, r] and [*, r, out]."""
    total = kernel.astype(np.float32)
    for layer in np.ndindex(kernel.shape[:-2]):  # one at a time: A·B of all layers is as large as the kernel
        total[layer] += np.float32(scale) * (down[layer].astype(np.float32) @ up[layer].astype(np.float32))
    return total


def flat(tree) -> dict[str, Any]:
    """{path: leaf}."""
    return flatten_dict(tree, sep="/")
