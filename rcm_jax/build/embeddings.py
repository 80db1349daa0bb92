"""The embeddings of the prompts of a set: made before the examples, so that one large network is in memory at a time.

Each prompt of a shard is embedded once and kept without its padding, in texts/00012.safetensors, until the shard is
made. uncond.safetensors and empty.safetensors, the embeddings of the negative and of the empty prompt, stay.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rcm_jax.build.engine import Plan, Shard
from rcm_jax.data import records
from rcm_jax.data.latents import UNCOND
from rcm_jax.media import text
from rcm_jax.run import texts
from rcm_jax.run.experiment import MediaConfig
from rcm_jax.util.files import write_whole

EMPTY = "empty.safetensors"


def embed(
    plan: Plan, shards: Sequence[Shard], media: MediaConfig, negative: str | None, encoder: Mapping, tokenizer,
    tick: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Writes what is not there of the embeddings that those shards need.

    negative: the negative prompt; None for zeros. encoder: its tensors, which are read only if something is to be
    embedded; tokenizer: its folder. tick is called for every shard.
    """
    if plan.source.uncond is not None:  # it has no texts
        _write(plan.folder / UNCOND, plan.source.uncond)
        return
    wanted = {UNCOND: negative, EMPTY: ""}
    singles = {name: prompt for name, prompt in wanted.items() if not (plan.folder / name).exists()}
    pending = [] if plan.source.brings_text else [shard for shard in shards if not _path(plan, shard).exists()]
    if negative is None and singles.pop(UNCOND, 0) is None:
        _write(plan.folder / UNCOND, {"text": zeros(media)})
    if not singles and not pending:
        return
    params = texts.read_encoder(media, encoder)

    def lengths_and_rows(prompts):
        ids, mask = texts.tokenize(media, tokenizer, prompts)
        return mask.sum(axis=1), text.encode(media.text_encoder, params, ids, mask)

    for name, prompt in singles.items():
        _write(plan.folder / name, {"text": lengths_and_rows([prompt])[1][0]})
    for shard in pending:
        lengths, rows = lengths_and_rows(_prompts(plan, shard))
        _write(_path(plan, shard), {f"{i:06d}": row[:n] for i, (n, row) in enumerate(zip(lengths, rows, strict=True))})
        tick()


def zeros(media: MediaConfig) -> np.ndarray:
    """The embedding [l, d] of no text, in the dtype of the encoder."""
    return np.zeros((media.text_length, media.text_width), media.text_encoder.dtype)


def read(plan: Plan, shard: Shard, media: MediaConfig) -> np.ndarray | None:
    """The embeddings [n, l, d] of the prompts of the items of a shard; None where the source brings its own."""
    if plan.source.brings_text or plan.source.uncond is not None:
        return None
    path = _path(plan, shard)
    found = records.decode(path.read_bytes(), path)
    places = {prompt: f"{i:06d}" for i, prompt in enumerate(_prompts(plan, shard))}
    rows = [found[places[item.prompt]] for item in plan.items(shard)]
    return np.stack([np.pad(row, ((0, media.text_length - len(row)), (0, 0))) for row in rows])


def _prompts(plan: Plan, shard: Shard) -> list[str]:
    """Those of a shard, each once."""
    return list(dict.fromkeys(item.prompt for item in plan.items(shard)))


def _path(plan: Plan, shard: Shard):
    return plan.folder / "texts" / f"{shard.number:05d}.safetensors"


def _write(path, tensors) -> None:
    content = records.encode(records.as_arrays(tensors, path))
    write_whole(path, lambda temporary: temporary.write_bytes(content))
