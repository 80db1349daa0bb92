"""What the site is made of: pages of the code, the notebook, and links out of docs/. `make docs` builds it."""

import importlib.util
import json
import logging
import pathlib
import types

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("hooks", TOP / "docs/hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)


def page(src_uri="results.md"):
    return types.SimpleNamespace(file=types.SimpleNamespace(src_uri=src_uri))


def config(repo_url=None):
    return {"docs_dir": str(TOP / "docs"), "repo_url": repo_url}


def linked(markdown, repo_url=None, src_uri="results.md"):
    return hooks.on_page_markdown(markdown, page(src_uri), config(repo_url), None)


def test_every_wing_has_a_page():
    wings = {path.parent.name for path in TOP.glob("rcm_jax/*/__init__.py")}
    pages = {path.stem: path.read_text() for path in TOP.glob("docs/api/*.md")}
    assert "::: rcm_jax\n" in pages.pop("rcm_jax")
    assert set(pages) == wings
    for wing, text in pages.items():
        assert text == f"# {wing}\n\n::: rcm_jax.{wing}\n"


def test_the_notebook_is_stored_without_what_it_prints():
    for path in TOP.glob("docs/*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert cells
        for cell in cells:
            assert not cell["outputs"] and cell["execution_count"] is None, f"{path}: clear all outputs"


@pytest.mark.parametrize(
    "markdown, expected",
    [
        ("see [configs/methods.py](../configs/methods.py)", "see `configs/methods.py`"),
        ("see [`methods.py`](../configs/methods.py#L3)", "see `configs/methods.py`"),
        ("[the table](../configs/methods.py).", "the table (`configs/methods.py`)."),
        ("`[a](../configs/methods.py)`", "`[a](../configs/methods.py)`"),
        ("```\n[a](../configs/methods.py)\n```", "```\n[a](../configs/methods.py)\n```"),
        ("[plan](plan.md) ![a picture](plan.png)", "[plan](plan.md) ![a picture](plan.png)"),
    ],
)
def test_links_out_of_docs_are_plain_text_without_a_repository(markdown, expected):
    assert linked(markdown) == expected


def test_links_out_of_docs_lead_to_the_repository_where_there_is_one():
    markdown = linked("[the table](../configs/methods.py)", "https://example.org/rcm/")
    assert markdown == "[the table](https://example.org/rcm/blob/HEAD/configs/methods.py)"


def test_links_are_read_from_the_page_that_has_them():
    assert linked("[plan](../plan.md)", src_uri="api/plan.md") == "[plan](../plan.md)"
    assert linked("[README.md](../../README.md)", src_uri="api/plan.md") == "`README.md`"


def test_a_link_to_a_file_that_is_not_there_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        linked("[gone](../configs/gone.py)")
    assert "results.md links to ../configs/gone.py" in caplog.text


@pytest.mark.parametrize(
    "html, loads",
    [
        ('<script src="https://cdn.example.org/a.js"></script>', True),
        ('<link rel="stylesheet" href="//cdn.example.org/a.css">', True),
        ('<img alt="" src="http://example.org/a.png">', True),
        ('<link rel="canonical" href="https://example.org/">', False),
        ('<a href="https://example.org/">x</a> <script src="assets/a.js"></script>', False),
    ],
)
def test_a_page_that_loads_something_from_elsewhere_is_named(html, loads, caplog):
    with caplog.at_level(logging.WARNING):
        assert hooks.on_post_page(html, page(), config()) == html
    assert ("results.md loads" in caplog.text) == loads


def test_a_page_that_lacks_a_module_is_named(caplog):
    html = '<h2 id="rcm_jax.kernels.attention"></h2>'
    with caplog.at_level(logging.WARNING):
        hooks.on_post_page(html, page("api/kernels.md"), config())
    assert "api/kernels.md lacks rcm_jax.kernels.blockwise" in caplog.text
    assert "rcm_jax.kernels.attention" not in caplog.text
