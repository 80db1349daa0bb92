"""Sampling as a library: `load` a workdir, call what it gives with prompts (or classes) and seeds, save the samples.

From prompts: text, then latents, then pixels, with one of the three networks in memory at a time. A sample depends on
its prompt and its seed alone, not on the batch in which it is drawn nor on the devices. Whatever can be wrong is found
by `load` and `request`, before anything is computed.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rcm_jax.data import LatentsConfig
from rcm_jax.data.dataset import Dataset
from rcm_jax.media import text
from rcm_jax.method import denoiser, trigflow
from rcm_jax.method.denoiser import Velocity
from rcm_jax.models import AUTOENCODERS, check_network, network_of
from rcm_jax.models.records import record_of
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.run import images, previews, texts, weights, workdir
from rcm_jax.run.experiment import Experiment, MediaConfig, Pretraining
from rcm_jax.run.pixels import open_weights, with_frames
from rcm_jax.run.program import Network, load_data, make_network, student_sampler, teacher_sampler, zeros
from rcm_jax.run.samples import Samples
from rcm_jax.train import checkpoint
from rcm_jax.util.files import as_path

MOST = 10**6  # samples of one request: they are in memory together
FILES = {  # around a network, and what they are
    "text_encoder": "published weights of umT5 (Wan) or T5 (Cosmos), any layout",
    "tokenizer": "the folder of its tokenizer.json, or a repository of the hub",
    "vae": "published weights of the autoencoder, any layout",
    "clip": "published weights of CLIP's image encoder, any layout",
}


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained network and how it is sampled. Call it with prompts, or class labels, and seeds: `Samples`."""

    folder: Any  # a path
    step: int | None  # of the checkpoint; None: the newest
    of_teacher: bool  # else a student, which samples in few steps and has its guidance built in
    run: Any  # the Experiment or Pretraining that says how to sample
    dataset: Dataset  # that of the classes, or for prompts one of zeros
    files: Mapping[str, Any]  # paths, by the keys of FILES; opened when they are needed
    low: "Generator | None" = None  # the network for little noise, of a pair of which this one is for much
    adapter: Any = None  # the path of an adapter beside its parameters

    @property
    def media(self) -> Any:
        """MediaConfig; None: samples are shown as they are."""
        return getattr(self.run, "media", None)

    @property
    def of_classes(self) -> bool:
        """Whether samples are of classes, else of prompts."""
        return self.media is None or self.media.text_encoder is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        return self.dataset.sample_shape

    @property
    def frames(self) -> int:
        """Of pixels."""
        if not self.media:
            return 1
        return 1 + (self.known_frames + with_frames(self.shape)[0] - 1) * self.media.vae.stride[0]

    @property
    def known_frames(self) -> int:
        """Of latents, which the network is given."""
        return network_of(self.run.model).known_frames(self.run.model)

    @property
    def guidance(self) -> float:
        """Of the teacher, unless it is asked for another."""
        return self.run.rcm.guidance if isinstance(self.run, Experiment) else 1.0

    @property
    def noise_range(self) -> trigflow.Range:
        """Rectified-flow times for which its network is."""
        return self.run.noise_range if isinstance(self.run, Experiment) else trigflow.WHOLE

    @property
    def network(self) -> Network:
        return make_network(self.run, self.dataset.first)

    def restored(self, network: Network, mesh):
        """Its parameters, as F takes them, over the devices of a mesh."""
        return weights.restore(network, self.folder, self.step, mesh, self.adapter)

    def path(self, name: str) -> Any:
        """Of one of FILES; ValueError if it was not given, FileNotFoundError if it names nothing."""
        if (given := self.files.get(name)) is None:
            raise ValueError(f"--{name} is needed: {FILES[name]}")
        if name != "tokenizer" and not as_path(given).exists():  # which may be a repository of the hub
            raise FileNotFoundError(f"--{name}={given}: no such file or folder")
        return as_path(given)

    def __call__(self, asked, seeds=(0,), **options) -> Samples:
        """Samples for every prompt (or class label) and seed; options: those of `request`."""
        wanted = request(self, asked, seeds, **options)
        return sample(wanted, conditions(wanted))


def load(
    folder, *, step: int | None = None, mode: str | None = None, config: Experiment | None = None,
    size: tuple[int, int] | None = None, frames: int | None = None, image=None, low=None, adapter=None,
    low_adapter=None, **files,
) -> Generator:  # fmt: skip
    """A generator from a workdir of a distillation (its averaged student), of a teacher, or of converted weights.

    Args:
      folder: the workdir.
      step: of its checkpoint; None: the newest.
      mode: "student" or "teacher": what converted weights are; a trained workdir knows.
      config: what says how to sample; None: the workdir's own.
      size: width and height in pixels; None: the config's. For prompts alone, as what follows.
      frames: of pixels; None: the config's.
      low: a workdir as `folder`, with the network for little noise of a pair (Wan2.2); `folder` has that for much.
      adapter: a file of an adapter, in any layout, to be beside the parameters; low_adapter: beside those of `low`.
      image: a file whose shape the samples have, in about as many pixels as the config's; for size=None.
      files: text_encoder, tokenizer, vae: paths of the published files around the network, any layout.

    Raises:
      ValueError: no workdir, another mode or config than its own, sizes that cannot be.
    """
    there = workdir.read(folder)
    known = "student" if isinstance(there, Experiment) else "teacher" if isinstance(there, Pretraining) else mode
    if known is None:
        raise ValueError(f"{folder} holds converted weights: say --mode=teacher or, if distilled, --mode=student")
    if mode not in (None, known):
        raise ValueError(f"--mode={mode}, but {folder} holds a {known}")
    if config is not None:
        workdir.check_same(folder, there, config, ("model.", "parametrization", "time_scale"))
    run: Any = there if config is None else config
    files = {name: path for name, path in files.items() if path is not None}
    if unknown := set(files) - set(FILES):
        raise ValueError(f"{', '.join(sorted(unknown))} is no file around a network: {', '.join(FILES)}")
    if hasattr(run.model, "num_classes") and isinstance(run, Pretraining):
        allowed = {"vae"} if run.media else set()
        if size or frames or image is not None or set(files) - allowed:
            raise ValueError(
                f"{folder} samples from classes: it takes no sizes of pixels, and of weights around it "
                f"{' and '.join(allowed) or 'none'}"
            )
        dataset = classes_dataset(run)
    else:
        if size is None and image is not None and getattr(run, "media", None):
            size = images.size_like(run, image)
        dataset = prompts_dataset(run, size, frames)
    if adapter is not None:
        weights.check_adapter(folder, there, adapter)
    generator = Generator(as_path(folder), step, known == "teacher", run, dataset, files, adapter=adapter)
    if low is None:
        if low_adapter is not None:
            raise ValueError(f"low_adapter {low_adapter} is for the second network of a pair: name that by low")
        return generator
    options = dict(mode=mode, config=config, size=size, frames=frames, image=image, adapter=low_adapter)
    return _paired(generator, load(low, **options, **files))


def _paired(high: Generator, low: Generator) -> Generator:
    """Two generators as one; ValueError unless they are a teacher's or a student's networks for the two parts of the
    noise."""
    boundary, end = high.noise_range[0], low.noise_range[1]
    if boundary == 0:
        raise ValueError(
            f"--low={low.folder}: {high.folder} is for all noise by rcm.noise_range {list(high.noise_range)}, and "
            "needs no other: take the config of a pair, say wan2_2_i2v_a14b.py"
        )
    if isinstance(workdir.read(low.folder), Experiment) and end != boundary:
        raise ValueError(f"{high.folder} is for noise from {boundary} on, but --low={low.folder} for noise up to {end}")
    shapes = [jax.tree.map(lambda x: x.shape, checkpoint.params_of(g.folder, "ema", g.step)[0]) for g in (high, low)]
    if high.of_teacher != low.of_teacher or shapes[0] != shapes[1]:
        raise ValueError(
            f"{high.folder} and --low={low.folder} are no pair: both must be teachers, or students, of one size"
        )
    return dataclasses.replace(high, low=low)


def classes_dataset(run: Any) -> Dataset:
    """The data of a run; of latents, which need not be there, one example of zeros."""
    if not isinstance(run.data, LatentsConfig):
        return load_data(run)
    null = {"label": np.int32(run.model.num_classes)}
    return dataclasses.replace(zeros(run, run.data.shape), uncond=null)


def prompts_dataset(run: Any, size: tuple[int, int] | None = None, frames: int | None = None) -> Dataset:
    """One example of zeros, in the shapes of latents and text, for width × height pixels and so many frames (None: its
    own); ValueError for an experiment that has no prompts, for sizes that cannot be, with the nearest that can, and
    where the network takes no such latents or text."""
    if not isinstance(run, Experiment) or run.media is None:
        raise ValueError("nothing says how prompts and pixels are made: name a config with media, e.g. wan_1_3b.py")
    if len(run.data.shape) != 4 or run.data.shape[-1] != run.media.vae.z_dim:
        raise ValueError(
            f"latents of shape {list(run.data.shape)} must be [t, h, w, c], with the {run.media.vae.z_dim} channels of "
            "media.vae.z_dim"
        )
    text_shape = jax.ShapeDtypeStruct((run.media.text_length, run.media.text_width), np.float32)
    dataset = zeros(run, latents_shape(run, size, frames), text=text_shape)
    jax.eval_shape(make_network(run, dataset.first).init, jax.random.key(0))
    return dataset


def latents_shape(run: Any, size, frames) -> tuple[int, ...]:
    """[t, h, w, c] of x0 for (width, height) and frames of pixels, by default those of the config."""
    strides, patch, known = (
        run.media.vae.stride,
        network_of(run.model).patch(run.model),
        network_of(run.model).known_frames(run.model),
    )
    t, h, w, c = run.data.shape
    width, height = size or (w * strides[2], h * strides[1])
    frames = 1 + (known + t - 1) * strides[0] if frames is None else frames
    for name, side, unit in (("width", width, strides[2] * patch[2]), ("height", height, strides[1] * patch[1])):
        if side < 1 or side % unit:
            near = [n for n in (side // unit * unit, side // unit * unit + unit) if n > 0]
            raise ValueError(f"{name} {side} must be a multiple of {unit}: nearest are {' and '.join(map(str, near))}")
    record_of(AUTOENCODERS, run.media.vae).check_pixels(run.media.vae, (1, frames, height, width, 3))
    t = 1 + (frames - 1) // strides[0] - known
    if t < 1:
        raise ValueError(f"{frames} frames are too few: more than {1 + (known - 1) * strides[0]} of them are given")
    return t, height // strides[1], width // strides[2], c


class Request(NamedTuple):
    """Samples asked for, all of it checked."""

    generator: Generator
    asked: list  # prompts or labels
    seeds: list[int]
    steps: int
    guidance: float | None  # None: of a student that has it built in
    low_guidance: float | None  # of a pair's network for little noise; None: the same
    batch: int
    encoder: Any = None  # tensors of the text encoder, not read yet
    tokens: Any = None  # (ids, mask) of the prompts and, last, the negative one
    negative: str = ""  # the negative prompt
    zero_last: bool = False  # it is zeros
    frames: Any = None  # uint8 [n, f, H, W, 3]: what the video of every prompt begins with, if the network is told

    @property
    def calls(self) -> int:
        """How often the network is called, in batches."""
        count, times = (len(self.asked) * len(self.seeds), 1) if self.tokens else (len(self.asked), len(self.seeds))
        return -(-count // self.batch) * times * self.steps


def request(
    generator: Generator, asked, seeds=(0,), *, steps: int | None = None, guidance: float | None = None,
    low_guidance: float | None = None, negative_prompt: str | None = None, batch: int = 1, image=(),
) -> Request:  # fmt: skip
    """ValueError for what cannot be sampled.

    Args:
      steps, guidance: the config's if None; most students have their guidance built in, and take none.
      low_guidance: that of the network for little noise of a pair of teachers; None: the same.
      image: for networks that are told how videos begin, the file of the first frame, or a video whose end is gone on
        with, or one for each prompt.
    """
    run, asked, seeds = generator.run, [asked] if isinstance(asked, str) else list(asked), [int(s) for s in seeds]
    if not asked:
        raise ValueError("there is no prompt: give --prompt or --prompts=FILE")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance {guidance} must be a finite number")
    if len(asked) * len(seeds) > MOST:
        raise ValueError(f"{len(asked):,} × {len(seeds):,} samples are more than {MOST:,}: ask for them in parts")
    guidance = guidance_of(generator, guidance, negative_prompt)
    steps = int(steps or (run.sampling.teacher_steps if generator.of_teacher else len(run.sampling.mid_times)))
    if low_guidance is not None and not (generator.low and generator.of_teacher):
        raise ValueError(f"low_guidance {low_guidance} is for a pair of teachers, with --low=DIR")
    make_sampler(generator, generator.network.F, steps, guidance, None)  # are there so many steps?
    checkpoint.params_of(generator.folder, "ema", generator.step)
    if generator.of_classes:
        known = range(generator.dataset.num_classes or 0)
        if bad := [str(label) for label in asked if int(label) not in known]:
            raise ValueError(f"there is no class {', '.join(bad)}: the classes are 0 to {len(known) - 1}")
        batch = previews.BATCH if generator.media is None else batch
        return Request(generator, [int(label) for label in asked], seeds, steps, guidance, low_guidance, batch)
    media = generator.media
    encoder = open_weights(media.text_encoder, generator.path("text_encoder"))
    negative = _negative(media, guidance if generator.of_teacher else None, negative_prompt)
    tokens = texts.tokenize(media, generator.path("tokenizer"), [*asked, negative])
    zero_last = media.zero_negative and not negative
    shown = images.read(generator, [image] if isinstance(image, str | os.PathLike) else list(image), len(asked))
    return Request(
        generator, asked, seeds, steps, guidance, low_guidance, batch, encoder, tokens, negative, zero_last, shown
    )


def guidance_of(generator: Generator, given: float | None, negative_prompt: str | None = None) -> float | None:
    """That of a teacher, or of a student that takes it as an input; None for one that has it built in.

    ValueError for one that is not to be had.
    """
    if generator.of_teacher:
        return generator.guidance if given is None else given
    least, most = generator.guidance, generator.run.rcm.guidance_max
    if negative_prompt is not None or (given is not None and most is None):
        name = "guidance" if given is not None and most is None else "negative_prompt"
        raise ValueError(f"--{name} is for teachers: this student was distilled with guidance {least}")
    if most is None:
        return None
    own = generator.run.sampling.student_guidance
    guidance = given if given is not None else least if own is None else own
    if not least <= guidance <= most:
        raise ValueError(f"guidance {guidance:g} is not one that this student has learned: {least:g} to {most:g}")
    return guidance


def _negative(media: MediaConfig, guidance: float | None, given: str | None) -> str:
    """The negative prompt; ValueError if it is missing where it matters, or is there for nothing."""
    if guidance in (None, 1.0):
        if given is not None:
            raise ValueError("--negative_prompt is for guidance, and with --guidance=1 there is none")
        return ""
    return texts.negative_prompt(media, given)


def conditions(wanted: Request) -> tuple[dict, dict]:
    """({name: [n, ...]} of what was asked for, the conditions that guidance replaces): the work of the encoders."""
    if wanted.tokens is None:
        return {"label": np.asarray(wanted.asked, np.int32)}, wanted.generator.dataset.uncond
    media = wanted.generator.media
    params = texts.read_encoder(media, wanted.encoder)
    embedded = text.encode(media.text_encoder, params, *wanted.tokens)
    if wanted.zero_last:
        embedded[-1] = 0
    shown = {} if wanted.frames is None else images.conditions(wanted.generator, wanted.frames)
    return {"text": embedded[:-1]} | shown, {"text": embedded[-1]}


def make_sampling_mesh(run, shape, batch: int):
    """A mesh of all devices: samples over as many as divide the batch, and their tokens over the rest, if they can."""
    devices = len(jax.devices())
    fsdp = math.gcd(batch, devices)
    rest = devices // fsdp
    for seq in (n for n in range(rest, 0, -1) if rest % n == 0):
        mesh = make_mesh(MeshConfig(data=rest // seq, fsdp=fsdp, seq=seq))
        try:
            check_network(run.model, shape, mesh)
        except ValueError:
            continue
        return mesh


def make_sampler(
    generator: Generator, F: Velocity, steps: int, guidance: float | None, uncond, low_guidance: float | None = None
) -> Callable:
    """Its teacher_sampler or student_sampler; uncond: what a teacher's guidance replaces, without a batch axis.

    A pair's takes a pair of parameters. ValueError for one network of a pair.
    """
    sampling, boundary = generator.run.sampling, generator.noise_range[0]
    if generator.low is None and generator.noise_range != trigflow.WHOLE:
        raise ValueError(
            f"{generator.folder} is for a part of the noise, {list(generator.noise_range)}: --checkpoint and --low "
            "name the two networks of a pair, first that for much noise"
        )
    low = F
    if generator.of_teacher:
        w = 1.0 if guidance is None else guidance
        F, low = denoiser.guided(F, w), denoiser.guided(F, w if low_guidance is None else low_guidance)
    if generator.low:
        F = denoiser.by_noise_level(F, low, boundary)
    if generator.of_teacher:
        return teacher_sampler(F, uncond, sampling, steps)
    return student_sampler(F, sampling, steps, guidance)


def counted(F: Velocity, tick: Callable[[], object]) -> Velocity:
    """F, which calls tick() on the host whenever it is about to be computed."""

    def note(_) -> None:
        tick()

    def call(params, x, t, cond):
        jax.debug.callback(note, x.reshape(-1)[0])  # the value is there once earlier steps are done
        return F(params, x, t, cond)

    return call


class Loaded(NamedTuple):
    """What draws samples: to be called under its mesh."""

    mesh: Any
    params: Any
    sampler: Callable


def load_sampler(wanted: Request, uncond, batch: int, tick: Callable[[], object] | None = None) -> Loaded:
    """The sampler of a request, with its parameters over all devices, for so many samples at once."""
    generator, network = wanted.generator, wanted.generator.network
    mesh = make_sampling_mesh(generator.run, generator.shape, batch)
    params = generator.restored(network, mesh)
    if generator.low:
        params = params, generator.low.restored(network, mesh)
    F = counted(network.F, tick) if tick else network.F
    return Loaded(mesh, params, make_sampler(generator, F, wanted.steps, wanted.guidance, uncond, wanted.low_guidance))


def sample(wanted: Request, given: tuple[dict, dict], tick: Callable[[], object] | None = None) -> Samples:
    """The samples, from what `conditions` gave; tick is called with every call of the network."""
    generator, seeds, (cond, uncond) = wanted.generator, wanted.seeds, given
    shape, batch = generator.shape, min(wanted.batch, len(wanted.asked) * len(seeds))
    mesh, params, sampler = load_sampler(wanted, uncond, batch, tick)
    with jax.set_mesh(mesh):
        if "text" in cond:
            latents = draw(sampler, params, cond, seeds, shape, wanted.batch)
        else:
            keys, batch = map(jax.random.key, seeds), min(batch, len(wanted.asked))
            latents = np.stack(
                [previews.draw(sampler, params, key, cond["label"], shape, batch) for key in keys], axis=1
            )
        jax.effects_barrier()  # the last tick
    known = np.repeat(cond["known"][:, None], len(seeds), axis=1) if "known" in cond else None
    first = None if wanted.frames is None else wanted.frames[:, 0]
    return Samples(generator, wanted.asked, seeds, latents, first, known)


def draw(sampler: Callable, params, cond: dict, seeds: Sequence[int], shape, batch: int) -> np.ndarray:
    """x0 [n, s, *shape] for conditions {name: [n, ...]} and s seeds, `batch` at a time."""
    pairs = [(row, seed) for row in range(len(cond["text"])) for seed in seeds]
    rows, ids, batch = *(list(column) for column in zip(*pairs, strict=True)), min(batch, len(pairs))
    parts = []
    for start in range(0, len(pairs), batch):
        part = {name: x[rows[start : start + batch]] for name, x in cond.items()}
        parts.append(draw_batch(sampler, params, part, ids[start : start + batch], shape, batch))
    return np.concatenate(parts).reshape(len(cond["text"]), len(seeds), *shape)


def draw_batch(sampler: Callable, params, cond: dict, seeds: Sequence[int], shape, batch: int) -> np.ndarray:
    """x0 [n, *shape] for conditions [n, ...] and n seeds, n at most `batch`: all batches are as large, for one
    program."""
    rows = np.minimum(np.arange(batch), len(seeds) - 1)
    ids, cond = np.asarray(seeds, np.uint32)[rows], {name: x[rows] for name, x in cond.items()}
    return np.asarray(sampler(params, jax.random.key(0), ids, cond, tuple(shape)))[: len(seeds)]
