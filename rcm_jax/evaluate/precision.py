"""What narrow precision costs in F and in its tangent dF of a network: the study, its table and its picture.

Relative error ‖a − a32‖/‖a32‖ against the same network in float32, at the same weights, x_t, t and F_T; dF as the
consistency loss forms it, and its parts along x and along t alone. Also the mismatch of F between a variant and (a):
what a network meets whose time embedding was trained in bfloat16 and is now float32 (rCM, section 4.2). All values are
rounded where the program says so.

The weights are initial values, not trained ones, changed in three ways. Wan's sinusoids of the time have frequencies up
to 1 in a time of 0..1000, and an untrained network uses all alike, so its F is another one at every thousandth of tau:
`smooth` = U damps what turns by f in a thousandth by exp(−(U·f)²/2), and F varies over some U thousandths. (Those of
Cosmos turn by 0.001 at most, and stay as they are.) `modulation` multiplies the layer from time to modulation, whose
initial outputs (gates too) are near 0.06: blocks would hardly matter. What is initially 0 is drawn as other layers are.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax import models
from rcm_jax.evaluate.report import DPI, WIDTH
from rcm_jax.media.picture import GREY, INK, RULE, SERIES, figure
from rcm_jax.method import denoiser, trigflow
from rcm_jax.models import cosmos, wan
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.models.wan import WanConfig

TAU = 0.02, 0.999  # rectified-flow times between which the study looks
NARROW = {"dtype": "bfloat16", "time_dtype": "bfloat16"}
VARIANTS = {  # name → (changes of the config, whether the time itself is rounded to bfloat16)
    "(a) bfloat16 blocks": ({"dtype": "bfloat16"}, False),
    "(b) … and time embedding": (NARROW, False),
    "(c) … and the time itself": (NARROW, True),
}
QUANTITIES = "F", "dF", "dF in t", "dF in x"
MISMATCH = "F from (a)"
SIZE = 13  # points: pages show the picture at half its width
PUBLISHED = {
    name: c for name, c in (wan.PUBLISHED | cosmos.PUBLISHED).items() if getattr(c, "model_type", "t2v") == "t2v"
}


class Kind(NamedTuple):
    """What the study must know of a kind of network."""

    features: str  # field of the config, as the next three: how many cosines and sines of the time
    channels: str
    text: str
    layers: str
    sinusoidal: tuple[str, ...]  # parameters whose first axis is that of the sinusoids
    modulation: str  # from time to modulation


KINDS = {
    WanConfig: Kind("freq_dim", "in_dim", "text_dim", "num_layers", ("time_in/kernel",), "time_projection/kernel"),
    CosmosConfig: Kind(
        "model_channels",
        "in_channels",
        "crossattn_emb_channels",
        "num_blocks",
        ("time_in/kernel", "time_norm/scale"),
        "time_out/kernel",
    ),
}


def study(config, *, times=16, repeats=2, grid=(2, 8, 8), tokens=16, seed=0, smooth=30.0, modulation=8.0):
    """{"tau" [times], "rms" {quantity: [repeats, times]} in float32, "errors" {variant: {quantity: the same}}}.

    config: of a kind in KINDS; grid: frames, rows and columns of the latents; tokens: of text; smooth, modulation: as
    the module says. The mismatch is taken from the first variant, (a).
    The grid of times is even in log tan t; every repeat has its own x0, noise and text, and moves the grid by a
    fraction of its spacing, so that the luck of rounding one time evens out. tau is that of the middle of the cells.

    Raises:
      ValueError: a network that is not text to video, or sizes or factors that make no sense.
    """
    if getattr(config, "model_type", "t2v") != "t2v":
        raise ValueError(f"the study takes text-to-video networks, not model_type {config.model_type!r}")
    most = getattr(config, "text_len", math.inf)
    if min(times, repeats, tokens, *grid) < 1 or tokens > most:
        raise ValueError(
            f"times {times}, repeats {repeats}, grid {grid} and tokens {tokens} must be at least 1, and tokens at most "
            f"the network's {most}"
        )
    if not (0 <= smooth < math.inf and 0 < modulation < math.inf):
        raise ValueError(f"smooth {smooth} must be at least 0 and modulation {modulation} above 0, both finite")
    config = dataclasses.replace(config, dtype="float32", time_dtype="float32")
    key = jax.random.key(seed)
    params = weights(config, key, smooth, modulation)
    first, last = (math.log(tau / (1 - tau)) for tau in TAU)
    edges = np.linspace(first, last, times + 1)
    rms, found = [], {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        logit = edges[:-1] + (repeat + 0.5) / repeats * np.diff(edges)
        t = jnp.asarray(np.arctan(np.exp(logit)), jnp.float32)
        x, cond = inputs(config, jax.random.fold_in(key, repeat), t, grid, tokens)
        F_teacher = _forward(config, params, x, t, cond)
        exact = measured(config, False, params, x, t, cond, F_teacher)
        rms.append([_norm(value) / math.sqrt(x[0].size) for value in exact])
        F_first = None
        for name, (changes, rounded) in VARIANTS.items():
            values = measured(dataclasses.replace(config, **changes), rounded, params, x, t, cond, F_teacher)
            F_first = values[0] if F_first is None else F_first
            errors = [_norm(a - b) / _norm(b) for a, b in zip(values, exact, strict=True)]
            found[name].append([*errors, _norm(values[0] - F_first) / _norm(F_first)])
    middle = (edges[:-1] + edges[1:]) / 2
    errors = {name: _by_quantity(values) for name, values in found.items()}
    return {"tau": 1 / (1 + np.exp(-middle)), "rms": _by_quantity(rms), "errors": errors}


@functools.partial(jax.jit, static_argnums=0)
def _init(config, key):
    return nn.meta.unbox(models.init(config, key))


def weights(config, key, smooth: float, modulation: float) -> dict:
    """Initial float32 parameters, changed as the module says."""
    kind = KINDS[type(config)]
    half = getattr(config, kind.features) // 2
    thousandth = models.network_of(config).time_scale / 1000  # of tau
    turns = 10_000.0 ** -(np.arange(half) / half) * thousandth
    damping = np.tile(np.exp(-((smooth * turns) ** 2) / 2), 2).astype(np.float32)  # cosines, sines
    factors = dict.fromkeys(kind.sinusoidal, damping) | {kind.modulation: np.array([modulation], np.float32)}

    def change(i, path, leaf):
        if path.endswith("/kernel") and not leaf.any():
            scale = (2 / sum(leaf.shape[-2:])) ** 0.5  # Glorot's
            return scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        return (leaf.T * factors[path]).T if path in factors else leaf  # along the first axis

    params = flatten_dict(_init(config, key), sep="/")
    changed = {path: change(i, path, leaf) for i, (path, leaf) in enumerate(params.items())}
    return unflatten_dict(changed, sep="/")


def inputs(config, key, t, grid, tokens: int):
    """(x_t [b, *grid, c], cond) at times t [b]: x0 smooth in space, of unit variance, plus noise; random text."""
    channels, features = (getattr(config, getattr(KINDS[type(config)], name)) for name in ("channels", "text"))
    keys = jax.random.split(key, 3)
    shape, coarse = ((len(t), *sizes, channels) for sizes in (grid, [-(-n // 2) for n in grid]))
    x0 = jax.image.resize(jax.random.normal(keys[0], coarse), shape, "linear")
    x = trigflow.diffuse(x0 / jnp.std(x0), jax.random.normal(keys[1], shape), t)
    return x, {"text": jax.random.normal(keys[2], (len(t), tokens, features))}


def _velocity(config, rounded: bool) -> denoiser.Velocity:
    """F of the network; rounded: its time becomes the nearest bfloat16, and its tangent too, as a cast does it."""
    record = models.network_of(config)
    network, scale = record.module(config), record.time_scale

    def net(params, x, time, cond):
        time = jax.lax.reduce_precision(time, 8, 7) if rounded else time
        return network.apply({"params": params}, x, time, **cond)

    return denoiser.from_rectified_flow(net, scale)


# XLA may keep more bits than a bfloat16 has where it fuses operations; here every value is rounded.
_jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})


@functools.partial(_jit, static_argnums=0)
def _forward(config, params, x, t, cond):
    return _velocity(config, False)(params, x, t, cond)


@functools.partial(_jit, static_argnums=(0, 1))
def measured(config, rounded, params, x, t, cond, F_teacher):
    """QUANTITIES [4 of b, ...]: F and dF as in losses.scm, and dF with no tangent in x and with none in t."""
    F = functools.partial(_velocity(config, rounded), params)
    dt = jnp.cos(t) * jnp.sin(t)
    dx = trigflow.expand(dt, x) * F_teacher
    value, dF = jax.jvp(lambda x, t: F(x, t, cond), (x, t), (dx, dt))
    _, in_t = jax.jvp(lambda t: F(x, t, cond), (t,), (dt,))
    _, in_x = jax.jvp(lambda x: F(x, t, cond), (x,), (dx,))
    return value, dF, in_t, in_x


def _norm(x) -> np.ndarray:
    """‖x‖ per sample: [b, ...] -> [b], float64."""
    return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)


def _by_quantity(values) -> dict[str, np.ndarray]:
    """[repeats][quantities][times] → {quantity: [repeats, times]}; errors have MISMATCH as well."""
    values = np.moveaxis(np.asarray(values), 1, 0)
    return dict(zip((*QUANTITIES, MISMATCH)[: len(values)], values, strict=True))


def mean_square(values, axis=None):
    """Root of the mean of squares."""
    return np.sqrt(np.mean(np.square(values), axis=axis))


def summary(result) -> dict[str, dict[str, float]]:
    """Rows for format_table: root mean square over all times and repeats, and the largest; percent."""
    kinds = {"": mean_square, ", worst": np.max}
    return {
        name + kind: {quantity: 100 * float(of(values)) for quantity, values in by_quantity.items()}
        for kind, of in kinds.items()
        for name, by_quantity in result["errors"].items()
    }


def draw(result, title: str):
    """A figure: errors of F and of dF over tau, root mean square of the repeats as lines, all of them as a band."""
    page = figure(WIDTH / DPI, 5.6, dpi=DPI)
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    page.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.04))
    page.suptitle(title, fontsize=15, color=INK, weight="bold", x=0.012, ha="left")
    titles = {"F": "F, the network's velocity", "dF": "dF, its tangent (jvp along the trajectory)"}
    for axes, (quantity, heading) in zip(page.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for color, (name, errors) in zip(SERIES, result["errors"].items(), strict=False):
            values = errors[quantity]
            axes.fill_between(result["tau"], values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
            axes.plot(result["tau"], mean_square(values, 0), color=color, linewidth=2.4, label=name)
        axes.set_title(heading, loc="left", fontsize=SIZE, color=INK)
        axes.set(xscale="logit", yscale="log", xlim=TAU)  # logit tau is log tan t
        axes.xaxis.set_major_locator(FixedLocator((*TAU, 0.1, 0.5, 0.9, 0.99)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.tick_params(length=0, labelsize=SIZE, labelcolor=GREY, labelleft=True)
        axes.set_xlabel("rectified-flow time tau (even in log tan t)", fontsize=SIZE, color=GREY)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
    page.axes[0].set_ylabel("relative error to float32", fontsize=SIZE, color=GREY)
    named = page.axes[0].get_legend_handles_labels()
    page.legend(*named, loc="outside lower center", ncols=3, fontsize=SIZE, labelcolor=INK, frameon=False)
    return page
