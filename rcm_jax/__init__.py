"""rCM in JAX: score-regularized continuous-time consistency distillation (arXiv 2510.08431)."""
