"""The report on latents: a few examples of the data, what teacher and student make of them from the same noise, and how
far apart these are."""

import pathlib
import re

import jax
import numpy as np

from rcm_jax.evaluate import curves
from rcm_jax.evaluate.page import previews_of, write_page
from rcm_jax.evaluate.report import data_name, in_steps, write_record
from rcm_jax.evaluate.table import Rows, format_table
from rcm_jax.parallel import distributed
from rcm_jax.run import latents, pixels
from rcm_jax.run.previews import asked_of, draw_on_mesh
from rcm_jax.util.config import to_mapping

STEPS = (1, 2, 4)  # of the student
DATA = "data"
NO_VIDEOS = (
    "There are no videos: set config.media.vae_path to published weights of the autoencoder and start the same command "
    "again, which trains no more."
)


def write_video_report(trained) -> str:
    """Writes report/ (index.html, report.json, with config.media.vae_path videos/) of a pipeline.Trained on latents;
    returns the table for the console.

    All processes must call it: they sample together, on the mesh of the training. The first writes; it alone returns
    more than "".
    """
    run, dataset = trained.run, trained.dataset
    examples, key = latents.fixed(dataset, run.train.leave_out), jax.random.fold_in(jax.random.key(run.seed), 3)
    asked = asked_of(run, examples, dataset.sample_shape)
    samples = {
        name: draw_on_mesh(trained.program.mesh, sampler, params, key, asked)
        for name, (sampler, params) in _samplers(trained).items()
    }
    if not distributed.first():
        return ""
    folder, rows = trained.folder / "report", _rows(examples["x0"], samples)
    shown = bool(run.media and run.media.vae_path)
    videos = (
        _write_videos(folder / "videos", run.media, {DATA: examples["x0"]} | samples, examples["cond"]) if shown else {}
    )
    plots = curves.of_training(trained.folder, trained.teacher_folder)
    title = f"{run.rcm.name} on {data_name(run.data)}"
    note = (
        f"Seed {run.seed}, guidance {run.teacher_guidance:g}. Statistics of the latents of {asked.n} samples, for the "
        "conditions of the data in the first row. All start from the same noise; rms: the root mean square distance "
        f"of latents.{'' if shown else f' {NO_VIDEOS}'}{curves.note(plots)}"
    )
    write_page(
        folder / "index.html",
        title=title,
        note=note,
        videos=videos,
        previews=previews_of(trained.folder),
        curves=plots,
        rows=rows,
        config=to_mapping(run),
    )
    places = {
        example: {name: str(path.relative_to(folder)) for name, path in files.items()}
        for example, files in videos.items()
    }
    metadata = {"seed": run.seed, "samples": asked.n}
    write_record(folder, title=title, footer=note, rows=rows, videos=places, curves=plots, metadata=metadata)
    return format_table(rows) + ("" if shown else f"\n{NO_VIDEOS}")


def _samplers(trained) -> dict:
    """{row of the table: (sampler, its parameters)}: the teacher first, if there is one."""
    program, samplers = trained.program, {}
    sampling = program.run.sampling
    if trained.teacher.params is not None:
        samplers[f"teacher, {in_steps(sampling.teacher_steps)}"] = program.teacher_sampler(), trained.teacher.params
    students = program.student_samplers(STEPS).items()
    return samplers | {f"student, {in_steps(k)}": (sampler, trained.student) for k, sampler in students}


def _rows(x0, samples: dict) -> Rows:
    """Statistics of the data [n, ...] and of samples, and the distances of students to the teacher."""
    rows = {name: latents.statistics(x) for name, x in ({DATA: x0} | samples).items()}
    teachers = [x for name, x in samples.items() if name.startswith("teacher")]
    for name, x in samples.items():
        if teachers and name.startswith("student"):
            rows[name]["rms_to_teacher"] = float(np.sqrt(np.mean(np.square(x - teachers[0], dtype=np.float64))))
    return rows


def _write_videos(folder: pathlib.Path, media, samples: dict, cond: dict) -> dict[str, dict[str, pathlib.Path]]:
    """Every sample in a file: {"example i": {name: path}}."""
    decoder = jax.device_put(pixels.read_decoder(media))
    videos = {}
    for name, x0 in samples.items():
        for i, one in enumerate(pixels.whole(x0, cond)):
            path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{i}{pixels.suffix(one.shape)}"
            pixels.write(path, pixels.frames(media, decoder, one), media.fps)
            videos.setdefault(f"example {i}", {})[name] = path
    return videos
