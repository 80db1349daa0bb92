"""The report on a whole run, by how its data are shown."""

from rcm_jax.evaluate.distillation import write_distillation_report
from rcm_jax.evaluate.mixture_report import write_scatter_report
from rcm_jax.util.extras import require

# Dataset.view -> what writes report/ of a pipeline.Trained, and returns its table as text
REPORTS = {"grid": write_distillation_report, "scatter": write_scatter_report}


def no_report(dataset) -> str:
    """Why there is no report on runs on a Dataset, in a sentence; "" if there is one."""
    if dataset.view == "video":
        return "no report: latents take a decoder; scripts/sample.py draws them"
    if dataset.num_classes is None or dataset.test is None:
        return "no report: it compares samples of classes with held-out data, and these data lack one or the other"
    try:
        require("matplotlib", "demo", "no report")
    except ValueError as error:
        return str(error)
    return ""
