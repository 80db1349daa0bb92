"""Prompts to the conditions of a network: what a MediaConfig says of them, and published weights."""

from collections.abc import Sequence

import jax
import numpy as np

from rcm_jax import convert
from rcm_jax.media import text
from rcm_jax.models import TEXT_ENCODERS
from rcm_jax.models.records import record_of
from rcm_jax.run.experiment import MediaConfig


def tokenize(media: MediaConfig, tokenizer, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [n, text_length] of sentences, cleaned if the network wants it; ValueError for another tokenizer."""
    sentences = [text.clean(sentence) for sentence in sentences] if media.clean_prompts else sentences
    known = record_of(TEXT_ENCODERS, media.text_encoder).tokens(media.text_encoder)
    return text.tokenize(tokenizer, sentences, media.text_length, known)


def read_encoder(media: MediaConfig, tensors):
    """The parameters of the text encoder, on the device, from its tensors (rcm_jax.run.pixels.open_weights)."""
    config = media.text_encoder
    # Not kept on the host: it may go when it is on the device.
    return jax.device_put(convert.from_reference(convert.name_of(config), tensors, config, dtype=config.dtype))


def negative_prompt(media: MediaConfig, given: str | None) -> str:
    """What guidance leads away from; ValueError if it is missing where it matters."""
    if given is None and not media.zero_negative:
        raise ValueError(
            "guidance needs --negative_prompt: Wan-AI's own is sample_neg_prompt in wan/configs/shared_config.py of "
            "Wan-Video/Wan2.1; --negative_prompt= is an empty one, which makes weaker samples"
        )
    return given or ""
