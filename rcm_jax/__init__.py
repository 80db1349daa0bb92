"""rCM in JAX: score-regularized continuous-time consistency distillation (arXiv 2510.08431)."""


def load(folder, **options):
    """A generator from a workdir, to call with prompts (or classes) and seeds: rcm_jax.run.generate.load."""
    from rcm_jax.run import generate  # importing rcm_jax alone imports nothing else

    return generate.load(folder, **options)
