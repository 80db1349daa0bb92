"""What was sampled, and files of it: videos, images, latents, a sheet of them all."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save as to_safetensors

from rcm_jax import convert
from rcm_jax.media import video
from rcm_jax.media.picture import grid, save_png
from rcm_jax.run import previews
from rcm_jax.run.pixels import frames, open_weights, write
from rcm_jax.util.files import as_path, write_whole

UPSCALE = 8  # of the small images of a grid


class Samples(NamedTuple):
    """x0 `latents` [n, s, ...] for n prompts or labels and s seeds, and what shows them."""

    generator: Any  # rcm_jax.run.generate.Generator
    asked: list
    seeds: list[int]
    latents: np.ndarray
    images: np.ndarray | None = None  # uint8 [n, H, W, 3]: what they begin with, of image to video
    known: np.ndarray | None = None  # [n, s, k, h, w, c]: latents before x0, which the network was given

    def frames(self, row: int, column: int, decoder=None, tile: int | None = None) -> Iterator[np.ndarray]:
        """The frames [h, w, 3] of one sample, in 0..255, one by one; decoder: of `open_decoder`, called if None."""
        params = open_decoder(self.generator) if decoder is None else decoder
        return frames(self.generator.media, params, self.whole[row, column], tile)

    @property
    def whole(self) -> np.ndarray:
        """Latents of the videos, with what they begin with: [n, s, k + t, h, w, c]."""
        return self.latents if self.known is None else np.concatenate([self.known, self.latents], axis=2)

    def picture(self, tile: int | None = None) -> np.ndarray:
        """Samples of classes as one picture, uint8 [H, W, c], a row for every class where they are images."""
        flat, labels = self.latents.reshape(-1, *self.generator.shape), np.repeat(self.asked, len(self.seeds))
        columns = self.asked.count(self.asked[0]) * len(self.seeds)
        if (media := self.generator.media) is not None:
            decoder = open_decoder(self.generator)
            images = [np.float32(frame) / 255 for x0 in flat for frame in frames(media, decoder, x0, tile)]
            return grid(images, columns, separator=previews.GAP, background=1.0)
        return previews.picture(self.generator.dataset, flat, labels, columns, UPSCALE)

    def save(self, out, sheet=None, *, tile: int | None = None, tick=lambda: None) -> list:
        """Writes the samples, by the suffix of `out`, and returns the files; tick is called after each.

        Of classes: one picture (.png) or all latents (.safetensors). Of prompts: a file for each prompt and seed, named
        after `out` if there are several: .mp4, .png for one frame, .safetensors for latents; sheet: a .png of them all.
        """
        out = as_path(out)
        if not self.generator.of_classes:
            return _save_videos(self, out, sheet, tile, tick)
        if out.suffix == ".png":
            save_png(out, self.picture(tile))
        else:
            _save_tensors(out, {"x0": self.latents, "label": np.asarray(self.asked, np.int32)})
        return [out]


def check_decoder(generator) -> dict:
    """The tensors of the autoencoder, not read yet; ValueError where they are missing or others."""
    return open_weights(generator.media.vae, generator.path("vae"))


def open_decoder(generator):
    """The parameters of the autoencoder, on the device."""
    config = generator.media.vae
    return jax.device_put(convert.from_reference(convert.name_of(config), check_decoder(generator), config))


def files_of(wanted: Any, out) -> list:
    """What `Samples.save` writes of Samples, or of a request for them: one file or, of several prompts and seeds, each
    its own, named after `out`."""
    out, prompts, seeds = as_path(out), range(len(wanted.asked)), wanted.seeds
    if wanted.generator.of_classes or len(prompts) * len(seeds) == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{i:03d}-seed{seed}") for i in prompts for seed in seeds]


def _save_videos(samples: Samples, out, sheet, tile, tick) -> list:
    """Every sample in its file, and the sheet: a row for every prompt, that begins with its image if it has one."""
    generator, seeds, paths = samples.generator, samples.seeds, files_of(samples, out)
    only_latents = out.suffix == ".safetensors"
    decoder = None if only_latents and not sheet else open_decoder(generator)
    shown, places = [], (0, 0.5, 1) if generator.frames > 1 else (0,)
    for path, (i, j) in zip(paths, np.ndindex(len(samples.asked), len(seeds)), strict=True):
        if only_latents:
            _save_tensors(path, {"x0": samples.whole[i, j]})
        if samples.images is not None and j == 0:
            shown.append(samples.images[i])
        if decoder is not None:
            pixels = video.keep(samples.frames(i, j, decoder, tile), generator.frames, places, shown)
            if only_latents:
                for _ in pixels:  # the sheet wants some of them
                    pass
            else:
                write(path, pixels, generator.media.fps)
        tick()
    if sheet:
        columns = len(seeds) * len(places) + (samples.images is not None)
        save_png(sheet, grid(np.array(shown, np.float32) / 255, columns))
    return paths


def _save_tensors(path, tensors: dict) -> None:
    content = to_safetensors(tensors)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
