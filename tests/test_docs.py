"""README and docs: links lead somewhere, lines are not too wide, and what commands name is there."""

import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CONFIGS = {path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()}
MOST_README, WIDEST = 130, 100  # lines, columns
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:rcm_jax|kernels|configs|scripts|tests|docker)/[\w./-]+)`")
# --config=NAME[.py][:VARIANTS], and NAME.py:VARIANTS in running text
COMMAND = re.compile(r"--config=(?:configs/)?([a-z]\w*)(?:\.py)?(?::([\w,-]+))?")
VARIANT = re.compile(r"\b(\w+)\.py:([a-z][\w,-]*)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text: str) -> str:
    """The text without its blocks of code: fenced, or indented after an empty line."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"\n\n(?: {4}.*\n+)+", "\n\n", text)


def anchors(page: pathlib.Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def lost(page: pathlib.Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(without_code(page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def wide(text: str) -> list[str]:
    """Lines of prose that are too wide: tables, code, and links alone on a line may be."""
    lines = [line for line in without_code(text).splitlines() if len(line) > WIDEST and not line.startswith("|")]
    return [line for line in lines if not re.fullmatch(r"\s*([-*] )?!?" + LINK.pattern + r"\S?", line)]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page):
    assert not lost(page)


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, with a comma\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    links = "[a](gone.md) [b](other.md) [c](other.md#a-heading-with-a-comma) [d](other.md#no-heading)"
    page.write_text(f"{links}\n![e](f.png)\n")
    assert lost(page) == ["gone.md", "other.md#no-heading", "f.png"]


@every_page
def test_a_page_of_the_site_links_to_the_site_alone(page):
    links = LINK.findall(without_code(page.read_text()))
    assert page.name == "README.md" or not [link for link in links if link.startswith("..")]


def test_every_page_is_reached_from_the_readme_or_the_start_page():
    starts = [ROOT / "README.md", ROOT / "docs/index.md"]
    linked = {pathlib.Path(link.partition("#")[0]).name for page in starts for link in LINK.findall(page.read_text())}
    assert not {page.name for page in PAGES} - linked - {page.name for page in starts}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_prose_is_wrapped(page):
    assert not wide(page.read_text())


def test_what_is_too_wide_is_seen():
    long = "word " * 25
    assert wide(f"{long}\n\n| {long} |\n\n    {long}\n\n```\n{long}\n```\n\n[{long}](x.md)\n") == [long]


@every_page
def test_configs_and_variants_that_are_named_are_there(page):
    if page.name == "extend.md":  # it names what its reader adds
        return
    text = page.read_text()
    named = {*COMMAND.findall(text), *((name, words) for name, words in VARIANT.findall(text) if name in CONFIGS)}
    assert not {name for name, _ in named} - CONFIGS
    for name, variants in sorted(named):
        importlib.import_module(f"configs.{name}").get_config(variants)


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    assert not [name for name in NAMED.findall(page.read_text()) if not (ROOT / name).exists()]
