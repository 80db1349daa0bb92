"""The inception score (Salimans et al., 1606.03498)."""

import numpy as np
from scipy.special import log_softmax

from rcm_jax.evaluate.arrays import as_samples

SEED = 2020  # of the order in which samples are taken, as torch-fidelity has it


def inception_score(logits, splits: int = 10, shuffle: bool = True) -> tuple[float, float]:
    """(mean, standard deviation) over `splits` parts of exp(mean KL(p(y|x) ‖ p(y))), from logits [n, classes].

    shuffle: in a fixed random order, for samples that are sorted by class. ValueError for fewer samples than splits.
    """
    logits = as_samples("logits", logits, at_least=max(splits, 1))
    if splits < 1:
        raise ValueError(f"splits = {splits} must be at least 1")
    if shuffle:
        logits = logits[np.random.RandomState(SEED).permutation(len(logits))]
    log_p, scores = log_softmax(logits, axis=1), []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        marginal = np.maximum(p.mean(0), np.finfo(p.dtype).tiny)
        scores.append(np.exp((p * (part - np.log(marginal))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
