"""The page in a browser: everything is drawn, plays, sorts and filters, and nothing is loaded or complained about."""

import itertools
import os
import re
import shutil
import time

import numpy as np
import pytest

from rcm_jax.evaluate import page
from rcm_jax.evaluate.page import previews_of, write_page
from rcm_jax.media.picture import save_png
from rcm_jax.media.video import write_video

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = """</script><script>alert("taken")</script><b>&amp; "x' {{content}} <!-- <img src=x onerror=alert(1)>"""
HEADINGS = ["Pictures", "Videos", "Table", "While it trained", "Curves", "Config"]
ROWS = {
    HOSTILE: {"accuracy": 0.5, "map_error": 0.25, "mmd": float("nan")},
    "student, 1 step": {"accuracy": 0.75, "map_error": 10.0, "variance": 1.0},
    "student, 10 steps": {"accuracy": None, "map_error": 9.0, "variance": 2.0},
}
CURVES = {
    "falls": {"a": [(k, 100 / (1 + k)) for k in range(130)], HOSTILE: [(1, 3.0), (2, np.nan), (3, 5.0)]},
    "level": {"b": [(1000, 1.43001), (2000, 1.43006)]},
}
CONFIG = {"model": {"kind": "mlp", "dim": 64}, "data": {"where": HOSTILE, "shape": (1, 2)}, "pretrain": None}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"no browser: none of {', '.join(BROWSERS)} is on PATH (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'rcm-jax[dev]'")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with samples/: pictures and videos of a second or two, and another that is shorter."""
    folder = tmp_path_factory.mktemp("media")
    for i, frames in enumerate((48, 48, 24)):
        moving = np.zeros((frames, 32, 48, 3), np.uint8)
        for k, frame in enumerate(moving):
            frame[:, : k + 1] = 80 * (i + 1)
        write_video(folder / "samples" / f"{100 * i:08d}.mp4", moving, 24)
    save_png(folder / "samples" / "00000300.png", np.full((16, 24, 1), 90, np.uint8))
    return folder


@pytest.fixture(scope="module")
def opened(browser, media, tmp_path_factory):
    """(the page with all sections in a browser, what it asked for and what was said about it)."""
    first, second, short, still = (path for _, path in previews_of(media))
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(
        path,
        title=HOSTILE,
        note=f"{HOSTILE}\nSecond line.",
        pictures={"grey": np.full((8, 9, 1), 7, np.uint8), HOSTILE: np.zeros((8, 9, 3), np.uint8)},
        videos={HOSTILE: {"teacher": first, "student": second}, "b": {"student": short, "still": still}},
        previews=previews_of(media),
        curves=CURVES,
        rows=ROWS,
        config=CONFIG,
    )
    seen = browser.new_page(viewport={"width": 1200, "height": 800})
    events = []
    seen.on("console", lambda message: events.append(f"{message.type}: {message.text}"))
    seen.on("pageerror", lambda error: events.append(str(error)))
    seen.on("dialog", lambda dialog: events.append(dialog.message))
    seen.on("request", lambda request: events.append(request.url) if request.url.split(":")[0] != "blob" else None)
    seen.goto(path.as_uri())
    yield seen, events, path
    seen.close()


@pytest.fixture
def seen(opened):
    return opened[0]


def wait_until(seen, expression, seconds=10):
    """Until it is true in the page (whose own rules forbid wait_for_function to evaluate text)."""
    end = time.monotonic() + seconds
    while not seen.evaluate(expression):
        assert time.monotonic() < end, expression
        seen.wait_for_timeout(20)


def test_all_sections_are_drawn_and_text_stays_text(seen):
    assert seen.title() == HOSTILE == seen.inner_text("h1")
    assert "\nSecond line." in seen.locator(".note").first.text_content()
    assert seen.locator("h2").all_inner_texts() == HEADINGS
    assert seen.locator("#pictures figcaption").all_inner_texts() == ["grey", HOSTILE]
    assert seen.locator("#videos h3").all_inner_texts() == [HOSTILE, "b"]
    assert seen.locator("td:first-child").all_inner_texts()[0] == HOSTILE
    assert seen.locator(".line").nth(1).inner_text() == HOSTILE
    assert f"data.where = {HOSTILE}" in seen.text_content("#config pre")
    assert seen.locator("script").count() == 2 and seen.locator("body b").count() == 5  # the keys of the config
    assert seen.evaluate("[...document.querySelectorAll('#pictures img')].every((image) => image.naturalWidth == 9)")
    assert seen.locator("#videos video").count() == 3 and seen.locator("#videos .missing").count() == 2


def test_a_picture_can_be_enlarged(seen):
    seen.locator("#pictures img").first.click()
    assert seen.locator("dialog img").bounding_box()["width"] > 500
    seen.keyboard.press("Escape")
    seen.wait_for_selector("dialog", state="detached")


def test_curves(seen):
    falls, level = seen.locator(".plot").all()
    paths = [path.get_attribute("d") for path in falls.locator("path").all()]
    assert [path.count("M") for path in paths] == [1, 1, 2, 2]  # the value that is missing leaves a gap
    assert paths[0].count("L") == 129 and paths[0] != paths[1]  # raw values, and their average
    scales = [plot.locator(".scale").get_attribute("aria-pressed") for plot in (falls, level)]
    assert scales == ["true", "false"]
    assert level.locator("svg text").all_text_contents()[:3] == ["1.43002", "1.43004", "1.43006"]
    falls.locator(".scale").click()
    assert falls.locator("path").first.get_attribute("d") != paths[0]
    falls.locator(".line").last.click()
    assert falls.locator("path").count() == 2
    falls.locator("svg").scroll_into_view_if_needed()
    box = falls.locator("svg").bounding_box()
    seen.mouse.move(box["x"] + box["width"] - 11, box["y"] + 100)
    tip, drawn = (falls.locator(name).bounding_box() for name in (".tip", "svg"))
    assert drawn["y"] <= tip["y"] < tip["y"] + tip["height"] < drawn["y"] + drawn["height"]
    assert falls.locator(".tip").text_content() == "step 129\na  0.7692  (mean 0.7752)"
    seen.mouse.move(0, 0)
    assert falls.locator(".tip").is_hidden()


def test_the_table_sorts_numbers_and_marks_the_best(seen):
    def names():
        return [name.split(",")[-1].strip()[:8] for name in seen.locator("td:first-child").all_inner_texts()]

    hostile = names()[0]
    best = [cell.inner_text() for cell in seen.locator("td.best").all()]
    assert best == ["0.250", "0.750"]  # the first row's map error, the second's accuracy
    assert seen.locator("tbody tr").first.locator("td").all_inner_texts()[1:] == ["0.500", "0.250", "–", "–"]
    orders = {"accuracy": (["1 step", hostile, "10 steps"], [hostile, "1 step", "10 steps"])}
    orders["error"] = ([hostile, "10 steps", "1 step"], ["1 step", "10 steps", hostile])
    for heading, clicks in orders.items():
        for order in clicks:
            seen.locator("th button", has_text=heading).click()
            assert names() == order


def test_the_config_is_searched(seen):
    assert seen.text_content("#config pre").splitlines()[:2] == ["model.kind = mlp", "model.dim = 64"]
    seen.fill("#config input", "SHAPE")
    assert seen.text_content("#config pre") == "data.shape = [1, 2]\n"
    seen.fill("#config input", "")
    assert "pretrain = null" in seen.text_content("#config pre")


def test_the_slider_shows_what_training_showed(seen):
    def shown():
        wait_until(seen, "document.querySelector('#previews :is(img, video):not([hidden])').src")
        element = seen.locator("#previews :is(img, video):not([hidden])")
        return seen.inner_text("#previews output"), element.evaluate("(element) => [element.tagName, element.src]")

    step, (tag, last) = shown()
    assert (step, tag) == ("step 300", "IMG")
    seen.evaluate("document.activeElement.blur()")
    seen.keyboard.press("ArrowLeft")
    step, (tag, before) = shown()
    assert (step, tag) == ("step 200", "VIDEO") and before != last
    wait_until(seen, "document.querySelector('#previews video').currentTime > 0.1")
    seen.locator("#previews input").fill("0")
    assert shown()[0] == "step 0" and before != shown()[1][1]
    seen.locator("#previews input").press("ArrowRight")
    assert shown()[0] == "step 100"


def test_videos_play_in_step(seen):
    def times():
        return seen.evaluate(f"{players}.map((player) => player.currentTime)")

    players = "[...document.querySelectorAll('#videos video')]"
    near = "(a, b) => Math.abs(a - b) < 0.1"
    in_step = (
        f"((near, [a, b, short]) => a.currentTime > 0.4 && !a.paused && !b.paused && "
        f"near(a.currentTime, b.currentTime) && "
        f"near(Math.min(a.currentTime, short.duration), short.currentTime))({near}, {players})"
    )
    seen.locator("#videos .cells").first.scroll_into_view_if_needed()  # in sight it plays without a click
    wait_until(seen, in_step)
    seen.select_option("#videos select", "0.25")  # seconds until all begin anew together
    seen.locator("#videos input").fill("0.5")
    seen.evaluate(f"{players}[0].onended = () => (window.late = true); {players}[1].currentTime = 1.2")
    seen.evaluate(f"{players}[2].pause()")
    wait_until(seen, f"window.late || {in_step}")
    assert not seen.evaluate("window.late")
    seen.locator(".play").click()
    stopped = times()
    seen.wait_for_timeout(150)
    assert times() == stopped and "Play" in seen.inner_text(".play")

    seen.locator("#videos input").fill("1.5")
    assert times() == pytest.approx([1.5, 1.5, 1], abs=0.05)  # the short one waits at its end
    seen.select_option("#videos select", "2")
    seen.locator(".play").click()
    wait_until(seen, f"{players}[0].currentTime < 1")  # from the start
    assert seen.evaluate(f"{players}[0].playbackRate") == 2
    wait_until(seen, in_step)


def test_nothing_is_loaded_and_nothing_complains(opened):
    _, events, path = opened  # after all that the tests above did
    assert events == [path.as_uri()]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text())


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_window(browser, opened, width, scheme):
    seen = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
    seen.goto(opened[2].as_uri())
    assert seen.evaluate("document.documentElement.scrollWidth") <= width
    light = seen.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    seen.close()


def test_an_empty_page_has_a_title_alone(browser, tmp_path):
    write_page(tmp_path / "page.html", title="nothing")
    seen = browser.new_page()
    seen.goto((tmp_path / "page.html").as_uri())
    assert seen.inner_text("body").strip() == "nothing"
    seen.close()


def test_what_cannot_be_shown(tmp_path):
    for changes, error, words in [
        ({"videos": {"a": {"b": tmp_path / "x.safetensors"}}}, ValueError, r"must end in \.png or \.mp4"),
        ({"videos": {"a": {"b": tmp_path / "x.mp4"}}}, FileNotFoundError, r"x\.mp4"),
        ({"pictures": {"a": np.zeros((2, 2, 3))}}, ValueError, r"float64 \(2, 2, 3\)"),
        ({"curves": {"a": {"b": [1.0, 2.0]}}}, ValueError, r"'b' has shape \(2,\)"),
    ]:
        with pytest.raises(error, match=words):
            write_page(tmp_path / "page.html", title="t", **changes)
    assert not list(tmp_path.iterdir())


def test_of_many_previews_some_are_shown_evenly_and_the_last(tmp_path, monkeypatch):
    assert previews_of(tmp_path) == []
    (tmp_path / "samples").mkdir()
    for step in range(0, 2000, 4):
        (tmp_path / "samples" / f"{step:08d}.png").write_bytes(b"x" * 100)
    for name in ("00000500.mp4", "notes.png", "00000500.txt"):
        (tmp_path / "samples" / name).write_bytes(b"x" * 100)
    steps = [step for step, _ in previews_of(tmp_path)]
    assert len(steps) == page.MOST and steps[0] == 0 and steps[-1] == 1996
    assert {b - a for a, b in itertools.pairwise(steps)} == {32, 36}
    monkeypatch.setattr(page, "MOST", 1000)
    assert {path.name for step, path in previews_of(tmp_path) if step == 500} == {"00000500.mp4"}
    monkeypatch.setattr(page, "BYTES", 350)
    assert [step for step, _ in previews_of(tmp_path)] == [0, 1000, 1996]
    monkeypatch.setattr(page, "BYTES", 50)  # one at least
    assert [step for step, _ in previews_of(tmp_path)] == [1996]
