"""Digits: the whole path on a laptop. Pretrain a teacher on scikit-learn's 8×8 digits, distil it with rCM, report."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All keys; change any from the command line, e.g. --config.train.steps=200."""
    config = ConfigDict()
    config.seed = 0
    config.data = "digits"
    config.model = dict(
        kind="dit",
        image_shape=(8, 8, 1),
        num_classes=10,
        patch=2,
        dim=64,
        num_layers=3,
        num_heads=4,
        mlp_ratio=4,
        freq_dim=64,
        max_frequency=16.0,
        dtype="float32",
        remat="none",
        unroll=3,
    )
    config.parametrization = "trigflow"
    config.time_scale = 1.0
    config.teacher = ""
    config.pretrain = dict(
        method=dict(
            time=dict(kind="log_normal", mean=-0.2, std=1.2),
            drop_condition=0.1,
            ema_std=0.05,
            optimizer=dict(
                learning_rate=1e-3,
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                weight_decay=0.0,
                warmup_steps=100,
                decay_steps=0,
                final_scale=0.0,
            ),
        ),
        train=dict(
            steps=6000, batch_size=128, log_every=100, checkpoint_every=2000, sample_every=2000, keep=2, wandb=False
        ),
    )
    config.rcm = dict(
        scm_time=dict(kind="log_normal", mean=0.0, std=1.6),
        dmd_time=dict(kind="shifted_uniform", shift=5.0),
        student=dict(
            learning_rate=1e-4,
            b1=0.0,
            b2=0.99,
            eps=1e-8,
            weight_decay=0.01,
            warmup_steps=100,
            decay_steps=0,
            final_scale=0.0,
        ),
        fake_score=dict(
            learning_rate=1e-4,
            b1=0.0,
            b2=0.99,
            eps=1e-8,
            weight_decay=0.01,
            warmup_steps=100,
            decay_steps=0,
            final_scale=0.0,
        ),
        guidance=1.0,
        scm_scale=1.0,
        dmd_scale=0.2,
        update_freq=5,
        warmup=500,
        warmup_form="paper",
        max_rollout=4,
        ema_std=0.05,
    )
    config.train = dict(
        steps=5500, batch_size=128, log_every=100, checkpoint_every=1000, sample_every=1000, keep=2, wandb=False
    )
    config.sampling = dict(sigma_max=80.0, mid_times=((), (1.1,), (1.3, 0.8), (1.3, 1.0, 0.6)), teacher_shift=1.0)
    config.mesh = dict(data=-1, fsdp=1, seq=1)
    return config
