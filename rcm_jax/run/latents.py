"""A few examples of data that are latents, which samples are drawn for, and numbers that tell how samples are."""

import warnings
from collections.abc import Sequence

import numpy as np

from rcm_jax.data.dataset import Dataset, buckets_of, random_access

EXAMPLES = 4


def fixed(dataset: Dataset, leave_out: Sequence[int] = ()) -> dict:
    """The first EXAMPLES of the held-out data, or of the others if there are none: {"x0": [k, ...], "cond": …}.

    Of examples of several shapes, of that in which samples are drawn.
    leave_out: of the data that are trained on, examples that are passed over.
    """
    examples = dataset.train if dataset.test is None else dataset.test
    passed = set(leave_out) if dataset.test is None else set()
    rows = [i for i in buckets_of(examples)[0][: EXAMPLES + len(passed)].tolist() if i not in passed]
    return random_access(examples)[np.array(rows[:EXAMPLES])]


def statistics(x0) -> dict[str, float]:
    """Of samples x0 [n, t, h, w, c], over the numbers that are finite; NaN where there are none.

    mean, std, min, max; nonfinite: the share of numbers that are not finite. std_over_examples, for two and more: of
    the numbers in one place, root mean square over places; 0 when all samples are the same. frame_change, for two
    frames and more: the mean absolute difference of neighbouring frames; 0 for a video that stands still.
    """
    x0 = np.asarray(x0, np.float32)
    finite = np.isfinite(x0)
    x = np.where(finite, x0, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of places without a number
        values = {
            "mean": np.nanmean(x, dtype=np.float64),
            "std": np.nanstd(x, dtype=np.float64),
            "min": np.nanmin(x),
            "max": np.nanmax(x),
            "nonfinite": 1 - finite.mean(),
        }
        if x.shape[0] > 1:
            values["std_over_examples"] = np.sqrt(np.nanmean(np.nanvar(x, axis=0, ddof=1), dtype=np.float64))
        if x.ndim == 5 and x.shape[1] > 1:
            values["frame_change"] = np.nanmean(np.abs(np.diff(x, axis=1)), dtype=np.float64)
    return {name: float(value) for name, value in values.items()}
