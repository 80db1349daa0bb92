"""What tensors hold."""

import numpy as np


def check_finite(name: str, tensor: np.ndarray) -> None:
    """ValueError where a tensor has NaN or inf. Read once, without a copy, unless something is wrong."""
    with np.errstate(all="ignore"):
        if np.isfinite(np.sum(tensor, dtype=np.float64)):
            return
    if lost := int(np.sum(~np.isfinite(tensor))):
        raise ValueError(
            f"{name}: {lost:,} of {tensor.size:,} values are NaN or inf: the file is damaged, or the training of these "
            "weights has diverged; take others"
        )
