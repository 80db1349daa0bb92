"""The report: a picture that opens, a record that parses, a table for the console."""

import json

import imageio.v3 as imageio
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rcm_jax.evaluate import report
from rcm_jax.evaluate.report import write_report
from rcm_jax.evaluate.table import COLUMNS
from tests.page import content_of

ROWS = {
    "teacher 50": {"frechet_pixels": 0.36, "accuracy": 0.99},
    "student 1": {"frechet_pixels": 0.4, "accuracy": None},
}
BROKEN = [(0, np.nan), (1, np.inf), (2, -1)]


def contents(panels: int = 5, curves: int = 3) -> dict:
    rng = np.random.default_rng(0)
    steps = np.arange(0, 1000, 10)
    series = {
        f"loss {i}": {"loss": np.stack([steps, np.exp(-steps / 200) * (10**i) + rng.uniform(size=100) * 0.01], axis=1)}
        for i in range(curves)
    }
    return {
        "panels": {f"panel {i}": rng.uniform(size=(80, 8, 8, 1)) for i in range(panels)},
        "curves": series,
        "rows": ROWS,
        "title": "rCM on digits",
    }


def test_report(tmp_path):
    metadata = {"seed": np.int64(3), "times": np.array([1.5, np.inf])}
    labels = [str(digit) for digit in range(10)]
    text = write_report(tmp_path / "report", **contents(), footer="two\nlines", row_labels=labels, metadata=metadata)
    assert "student 1" in text and "0.400" in text
    picture = imageio.imread(tmp_path / "report" / "report.png")
    assert picture.shape[1] == 1640 and picture.shape[0] > 700 and picture[..., :3].std() > 20
    page = content_of(tmp_path / "report" / "index.html")
    assert page["note"] == f"two\nlines\nRows of the pictures: {', '.join(labels)}."
    assert [plot["title"] for plot in page["plots"]] == ["loss 0", "loss 1", "loss 2"] and len(page["pictures"]) == 5
    assert [row["title"] for row in page["table"]["rows"]] == list(ROWS)
    record = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert record["rows"] == ROWS and record["title"] == "rCM on digits"
    assert record["panels"]["panel 0"] == [80, 8, 8, 1] and len(record["curves"]["loss 1"]["loss"]) == 100
    assert record["metadata"] == {"seed": 3, "times": [1.5, None]}
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == ["index.html", "report.json", "report.png"]


def test_panels_are_drawn_pixel_by_pixel(tmp_path):
    """Tiny images are enlarged by a whole number: each of their pixels is one flat square of the page."""
    write_report(tmp_path, **contents())
    picture = imageio.imread(tmp_path / "report.png")[..., 0].astype(int)
    image = np.round(contents()["panels"]["panel 0"][0, ..., 0] * 255).astype(int).repeat(4, 0).repeat(4, 1)
    places = np.lib.stride_tricks.sliding_window_view(picture[100:180, 60:120], image.shape)
    assert np.abs(places - image).max(axis=(2, 3)).min() <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"panels": {}, "curves": {}, "rows": {}},
        {"panels": {"large, in colour": np.random.default_rng(0).uniform(size=(10, 64, 96, 3))}},
        {"panels": {f"panel {i}": np.zeros((3, 8, 8, 1)) for i in range(8)}, "curves": {}},
        {"curves": {"one": {"a": [(5, 2.0)]}, "constant": {"b": [(0, 1), (9, 1)]}, "broken": {"c": BROKEN}}},
        {"curves": {"several": {f"{k} steps": [(0, k), (10, k / 50)] for k in (1, 2, 4)}}},
        {"rows": {"a": {"something_else": 1.0, "accuracy": None}, "b": {}}},
    ],
    ids=["empty", "large", "many", "odd curves", "several series", "odd rows"],
)
@pytest.mark.filterwarnings("error")
def test_unusual_contents(tmp_path, changes):
    write_report(tmp_path, **contents(2, 1) | changes)
    assert imageio.imread(tmp_path / "report.png").shape[1] == 1640


OF_MIXTURES = ("map_error", "mmd", "sliced_wasserstein", "mode_kl", "modes_lost", "variance")
OF_LATENTS = ("rms_to_teacher", "mean", "std", "min", "max", "std_over_examples", "frame_change", "nonfinite")
OF_FEATURES = [*COLUMNS][:5]  # with what is measured on any features
ON_ANY = ("precision", "recall", "density", "coverage")
OF_IMAGES = [name for name in COLUMNS if name not in (*OF_MIXTURES, *OF_LATENTS, *OF_FEATURES)]


@pytest.mark.parametrize("columns", [OF_MIXTURES, OF_LATENTS, [*OF_FEATURES, *ON_ANY], OF_IMAGES], ids=len)
def test_no_text_overlaps_or_leaves_the_page(columns):
    data = contents(curves=4)
    rows = {row: dict.fromkeys(columns, 12.345) for row in ("real (training split)", "teacher 50", "student 1")}
    grids = {name: report._panel(images, 8, 5) for name, images in data["panels"].items()}
    curves = dict(data["curves"])
    curves["distance"] = {f"{k} steps": np.array([[0, 3.0], [9, 0.1 * k]]) for k in (1, 2, 4)}
    figure = report._draw(grids, curves, rows, data["title"], "footer\nline", [str(i) for i in range(10)])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = list(figure.texts) + [axes.xaxis.label for axes in figure.axes if axes.axison]
    for axes in figure.axes:
        if axes.axison:
            low, high = sorted(axes.get_ylim())
            texts += [
                label for at, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if low <= at <= high
            ]
            texts += [] if axes.get_legend() is None else axes.get_legend().get_texts()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    assert len(boxes) > 60
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for other, other_box in boxes[:i]:
            apart = box.x1 <= other_box.x0 or other_box.x1 <= box.x0 or box.y1 <= other_box.y0 or other_box.y1 <= box.y0
            assert apart, f"{text!r} overlaps {other!r}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curves": {"one": {"loss": [1.0, 2.0]}}}, r"'loss' has shape \(2,\), expected \[k, 2\]"),
        ({"row_labels": ["0", "1"]}, "2 row labels for the first panel's 10 rows"),
        ({"panels": {"a": np.zeros((4, 8, 8))}}, r"\(4, 8, 8\), expected \[n, h, w, c\]"),
    ],
)
def test_bad_contents(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, **contents(1, 1) | changes)
    assert not list(tmp_path.iterdir())
