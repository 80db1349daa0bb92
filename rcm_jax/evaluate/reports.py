"""The report on a whole run, by how its data are shown."""

from collections.abc import Callable

from rcm_jax.evaluate.distillation import write_distillation_report
from rcm_jax.evaluate.mixture_report import write_scatter_report
from rcm_jax.evaluate.video_report import write_video_report
from rcm_jax.parallel import distributed
from rcm_jax.run import pipeline
from rcm_jax.util.extras import require

MOST_CLASSES = 100


def by_first(write: Callable) -> Callable:
    """A report that the first process writes alone, with small networks brought to its memory."""

    def together(trained) -> str:
        if distributed.several():
            trained = pipeline.on_host(trained)
        return write(trained) if distributed.first() else ""

    return together


# Dataset.view -> what writes report/ of a pipeline.Trained; all processes must call it. In the first it returns its
# table as text.
REPORTS = {
    "grid": by_first(write_distillation_report),
    "scatter": by_first(write_scatter_report),
    "video": write_video_report,
}


def no_report(dataset) -> str:
    """Why there is no report on runs on a Dataset, in a sentence; "" if there is one."""
    if dataset.view == "video":  # of any conditions, and nothing is drawn
        return ""
    if (dataset.num_classes or 0) > MOST_CLASSES:
        return f"no report: it is of {MOST_CLASSES} classes at most; scripts/evaluate.py measures samples of more"
    if dataset.num_classes is None or dataset.test is None:
        return "no report: it compares samples of classes with held-out data, and these data lack one or the other"
    try:
        require("matplotlib", "demo", "no report")
    except ValueError as error:
        return str(error)
    return ""
