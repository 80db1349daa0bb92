"""From prompts to samples: text, then latents, then pixels, with one of the three networks in memory at a time.

A sample depends on its prompt and its seed alone, not on the batch in which it is drawn nor on the devices.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax import convert
from rcm_jax.convert.files import open_tensors
from rcm_jax.data.dataset import Dataset
from rcm_jax.media import text, vae, video
from rcm_jax.media.picture import save_png
from rcm_jax.method import denoiser
from rcm_jax.models import check_network
from rcm_jax.models.wan_vae import check_pixels
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run import experiment
from rcm_jax.run.experiment import Generator, MediaConfig, SamplingConfig
from rcm_jax.train import checkpoint, trainer
from rcm_jax.util.config import build


@dataclasses.dataclass(frozen=True)
class Generation(Generator):
    """What sampling from prompts needs of an experiment."""

    shape: tuple[int, ...]  # of latents, [t, h, w, c]
    guidance: float  # of the teacher
    sampling: SamplingConfig
    media: MediaConfig

    @property
    def frames(self) -> int:
        """Of pixels."""
        return 1 + (self.shape[0] - 1) * self.media.vae.stride[0]

    def __post_init__(self):
        super().__post_init__()
        if len(self.shape) != 4 or self.shape[-1] != self.media.vae.z_dim:
            raise ValueError(
                f"latents of shape {list(self.shape)} must be [t, h, w, c], with the {self.media.vae.z_dim} channels "
                "of media.vae.z_dim"
            )


def generation(values: dict, size: tuple[int, int] | None = None, frames: int | None = None) -> Generation:
    """The part of an experiment's mapping that samples, for width × height pixels and so many frames (None: its own).

    ValueError for a mapping that has no such part, and for sizes that cannot be, with the nearest that can.
    """
    if not values.get("media") or "rcm" not in values:
        raise ValueError("nothing says how prompts and pixels are made: name a config with media, e.g. wan_1_3b.py")
    part = {key: values[key] for key in ("model", "parametrization", "time_scale", "sampling", "media")}
    part |= {"shape": values["data"]["shape"], "guidance": values["rcm"]["guidance"]}
    run = build(Generation, part, kinds=experiment.KINDS)
    return dataclasses.replace(run, shape=latents_shape(run, size, frames))


def latents_shape(run: Generation, size, frames) -> tuple[int, ...]:
    """[t, h, w, c] of latents for (width, height) and frames of pixels, by default those of the config."""
    strides, patch = run.media.vae.stride, run.model.patch
    t, h, w, c = run.shape
    width, height = size or (w * strides[2], h * strides[1])
    frames = 1 + (t - 1) * strides[0] if frames is None else frames
    for name, side, unit in (("width", width, strides[2] * patch[2]), ("height", height, strides[1] * patch[1])):
        if side < 1 or side % unit:
            near = [n for n in (side // unit * unit, side // unit * unit + unit) if n > 0]
            raise ValueError(f"{name} {side} must be a multiple of {unit}: nearest are {' and '.join(map(str, near))}")
    check_pixels(run.media.vae, (1, frames, height, width, 3))
    return 1 + (frames - 1) // strides[0], height // strides[1], width // strides[2], c


def abstract_inputs(run: Generation) -> dict[str, jax.ShapeDtypeStruct]:
    """x0 and text of one sample, with a leading axis of 1."""
    text_shape = (1, run.media.text_length, run.media.text_encoder.d_model)
    shapes = {"x0": (1, *run.shape), "text": text_shape}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def make_network(run: Generation) -> experiment.Network:
    """The network; ValueError if latents or text are none that it takes. Nothing is computed."""
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_inputs(run).items()}
    examples = {"x0": zeros["x0"], "cond": {"text": zeros["text"]}}
    network = experiment.make_network(run, Dataset(examples, None, None, None, None))
    jax.eval_shape(network.init, jax.random.key(0))
    return network


def open_weights(kind: str, config, path) -> dict:
    """The tensors of a published file or folder, not read yet; ValueError unless they are that model of that config."""
    tensors = open_tensors(path)
    convert.recognise(kind, tensors, config)
    return tensors


def embed(media: MediaConfig, tensors, ids, mask) -> np.ndarray:
    """The condition "text" [n, l, d] of tokens [n, l], by the weights that `open_weights` opened."""
    config = media.text_encoder
    # Not kept here: what is on the host may go when it is on the device.
    return text.encode(
        config, convert.from_reference(config.model_type, tensors, config, dtype=config.dtype), ids, mask
    )


def make_sampling_mesh(run: Generation, batch: int):
    """A mesh of all devices: samples over as many as divide the batch, and their tokens over the rest, if they can."""
    devices = len(jax.devices())
    fsdp = math.gcd(batch, devices)
    rest = devices // fsdp
    for seq in (n for n in range(rest, 0, -1) if rest % n == 0):
        mesh = make_mesh(MeshConfig(data=rest // seq, fsdp=fsdp, seq=seq))
        try:
            check_network(run.model, run.shape, mesh)
        except ValueError:
            continue
        return mesh


def restore(run: Generation, network: experiment.Network, folder, step: int | None, mesh):
    """The averaged parameters of a workdir in the dtype they are stored in, over the devices of a mesh."""
    abstract = trainer.abstract_params(jax.eval_shape(network.init, jax.random.key(0)), mesh)
    stored, step = checkpoint.params_of(folder, "ema", step)
    abstract = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, there.dtype, sharding=leaf.sharding), abstract, stored
    )
    return checkpoint.restore_item(folder, "ema", abstract, step)


def make_sampler(run: Generation, F: denoiser.Velocity, steps: int, guidance: float | None, uncond) -> Callable:
    """experiment.student_sampler or, with a guidance, teacher_sampler; uncond: its condition, without a batch axis."""
    if guidance is None:
        return experiment.student_sampler(F, run.sampling, steps)
    return experiment.teacher_sampler(F, uncond, guidance, run.sampling, steps)


def counted(F: denoiser.Velocity, tick: Callable[[], object]) -> denoiser.Velocity:
    """F, which calls tick() on the host whenever it is about to be computed."""

    def call(params, x, t, cond):
        jax.debug.callback(lambda _: tick(), x.reshape(-1)[0])  # the value is there once earlier steps are done
        return F(params, x, t, cond)

    return call


def draw(sampler: Callable, params, texts, seeds: Sequence[int], shape, batch: int) -> np.ndarray:
    """x0 [n, s, *shape] for the conditions "text" [n, l, d] and s seeds, `batch` at a time."""
    pairs = [(row, seed) for row in range(len(texts)) for seed in seeds]
    parts, batch = [], min(batch, len(pairs))
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        rows, ids = np.array((part + part[-1:] * batch)[:batch]).T  # every batch is as large: one compilation
        x0 = sampler(params, jax.random.key(0), ids.astype(np.uint32), {"text": texts[rows]}, tuple(shape))
        parts.append(np.asarray(x0)[: len(part)])
    return np.concatenate(parts).reshape(len(texts), len(seeds), *shape)


def frames(media: MediaConfig, params, x0, tile: int | None = None) -> Iterator[np.ndarray]:
    """The frames [h, w, 3] of latents x0 [t, h, w, c], in 0..255: one by one, or (tile: latents a side) in tiles."""
    if tile is None:
        chunks = vae.decode_chunks(media.vae, params, x0[None])
    else:
        chunks = [vae.decode(media.vae, params, x0[None], tile=tile)]
    for chunk in chunks:
        pixels = np.asarray(chunk[0], np.float32)
        yield from np.round(np.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def write(path: pathlib.Path, frames: Iterator[np.ndarray], fps: int) -> None:
    """The frames in a file, by its suffix: .mp4, or .png for one frame."""
    if path.suffix == ".mp4":
        video.write_video(path, frames, fps)
    else:
        (frame,) = frames
        save_png(path, frame)
