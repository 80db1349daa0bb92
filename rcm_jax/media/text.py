"""Prompts to the embeddings that Wan and Cosmos-Predict2 are conditioned on: clean, tokenize, encode.

Wan cleans its prompts, Cosmos-Predict2 takes them as they are. Both give their networks 512 tokens, zeros where padded.
"""

import functools
import html
import os
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int

from rcm_jax.models import TEXT_ENCODERS
from rcm_jax.models.records import record_of
from rcm_jax.util.extras import require
from rcm_jax.util.files import as_path, local

END, PADDING = "</s>", "<pad>"  # tokens that every T5 has


def clean(prompt: str) -> str:
    """The prompt as Wan cleans it: wrongly decoded text is mended, HTML entities are resolved twice, and any white
    space becomes one blank, none at the ends."""
    text = require("ftfy", "sample", "prompts").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(text)).split())


def tokenize(
    folder: str | os.PathLike, prompts: Sequence[str], length: int = 512, vocab_size: int | None = None
) -> tuple[Int[np.ndarray, "b length"], Int[np.ndarray, "b length"]]:
    """Tokens of prompts and where they are: ids and mask, int32, 1 where there is a token.

    Every prompt ends with </s>. What is longer than `length` with it is cut off before it, as the references do, and a
    warning gives the numbers. The folder must hold tokenizer.json, as Wan-AI's google/umt5-xxl and diffusers'
    tokenizer/ do; nothing else is read. What is no path, but could be the name of a repository (google/umt5-xxl), is
    looked for on the Hugging Face Hub and in its cache. ValueError for one that is nowhere, for a tokenizer that is no
    T5's or not of an encoder of so many tokens (vocab_size, which is a little more than the tokenizer has), for prompts
    that are no text.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or length < 1:
        raise ValueError(f"{len(prompts)} prompts of {length} tokens: there must be one at least, of one at least")
    for prompt in prompts:
        prompt.encode("utf-8")  # a ValueError that says where
    tokenizer = _open_tokenizer(folder)
    if vocab_size is not None and not vocab_size / 2 < len(tokenizer) <= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} knows {len(tokenizer)} tokens, the encoder {vocab_size}: take the one that is "
            "published with it"
        )
    counts = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    if cut := sum(count > length for count in counts):
        logging.warning(
            "%d of %d prompts end after %d tokens; the longest has %d", cut, len(counts), length, max(counts)
        )
    encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
    ids, mask = (np.array(encoded[name], np.int32) for name in ("input_ids", "attention_mask"))
    if np.any(ids[np.arange(len(ids)), mask.sum(axis=1) - 1] != tokenizer.convert_tokens_to_ids(END)):
        raise ValueError(f"the tokenizer in {folder} does not end prompts with {END}, as those of T5 do")
    return ids, mask


def _open_tokenizer(folder):
    """The tokenizer that tokenizer.json defines.

    Not AutoTokenizer: from the same file that may build another one, which knows no bytes (umT5 spells characters by
    them that it lacks), and without a file one that knows no words, both in silence.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    transformers, path = require("transformers", "sample", "prompts"), _tokenizer_file(folder)
    try:  # padding comes below: a token that the file names for it would be added to the others if it is not there
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token=None)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer, or damaged: {error}") from None
    if lacking := [token for token in (END, PADDING) if tokenizer.convert_tokens_to_ids(token) is None]:
        raise ValueError(f"{path} is no tokenizer of T5: it lacks {' and '.join(lacking)}")
    tokenizer.pad_token = PADDING
    return tokenizer


def _tokenizer_file(folder) -> pathlib.Path:
    """tokenizer.json of a folder, or of a repository; ValueError if there is none."""
    path = as_path(folder) / "tokenizer.json"
    if path.is_file():
        return local(path)
    if path.parent.is_dir() or not re.fullmatch(r"[\w.-]*\w/[\w.-]+", str(folder)):
        problem = "holds no tokenizer.json" if path.parent.is_dir() else "is no folder"
        raise ValueError(f"{folder} {problem}; name the tokenizer's folder that is published with the encoder")
    hub = require("huggingface_hub", "sample", "prompts")  # which transformers brings
    try:
        return pathlib.Path(hub.hf_hub_download(str(folder), "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder, nor to be had from the hub: {' '.join(str(error).split())}") from None


def encode(
    config, params, ids: Int[np.ndarray, "b l"], mask: Int[np.ndarray, "b l"], batch: int = 8
) -> Float[np.ndarray, "b l d"]:
    """Embeddings of tokens, in config.dtype, zero where padded; `batch` prompts at a time.

    config: of an encoder in TEXT_ENCODERS, params its parameters.
    ValueError for no tokens, and for tokens that the encoder does not have.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    if not ids.size or batch < 1:
        raise ValueError(f"ids {ids.shape}, {batch} prompts at a time: there must be one at least")
    known = record_of(TEXT_ENCODERS, config).tokens(config)
    if ids.min() < 0 or ids.max() >= known:
        raise ValueError(
            f"the tokens are {ids.min()} to {ids.max()}, the encoder has 0 to {known - 1}: "
            "take the tokenizer that is published with it"
        )
    params = jax.device_put(params)  # once, not with every batch
    count, batch = len(ids), min(batch, len(ids))
    fill = ((0, -count % batch), (0, 0))  # all batches have one shape: one compilation
    batches = (np.pad(x, fill).reshape(-1, batch, x.shape[1]) for x in (ids, mask))
    return np.concatenate([np.asarray(_encode(config, params, *part)) for part in zip(*batches, strict=True)])[:count]


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, ids, mask):
    return record_of(TEXT_ENCODERS, config).module(config).apply({"params": params}, ids, mask)
