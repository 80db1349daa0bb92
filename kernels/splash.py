"""The splash attention of JAX for TPUs, an opponent in `kernels.bench`: value and gradients, no tangent.

It is not chosen for runs: its kernels do not say how their outputs vary inside shard_map, where runs call attention.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from .reference import K, Q

BLOCK = 512  # queries and keys: what is not a multiple is filled up


def value(q: Q, k: K, v: K, scale, *, block=BLOCK, interpret=False) -> Q:
    """O in the dtype of q. JAX differentiates it backwards."""
    l, m = q.shape[1], k.shape[1]
    filled_l, filled_m = -(-l // block) * block, -(-m // block) * block
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((filled_l, filled_m))] * q.shape[2])
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    attend = splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if filled_m > m:  # queries see the keys of their own segment
        filler = jnp.arange(filled_m) >= m
        segments = splash_attention_kernel.SegmentIds(jnp.zeros(filled_l, jnp.int32), filler.astype(jnp.int32))
    heads = (_heads_first(x, length) for x, length in ((q * scale, filled_l), (k, filled_m), (v, filled_m)))
    o = jnp.asarray(jax.vmap(lambda q, k, v: attend(q, k, v, segments))(*heads))
    return o[:, :, :l].swapaxes(1, 2).astype(q.dtype)


def _heads_first(x, length):
    """[b, l, n, d] to [b, n, length, d], zeros behind."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))
