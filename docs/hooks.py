"""What mkdocs does beside its own when it builds the site: links out of docs/, and two checks of every page."""

import logging
import os
import pathlib
import re

log = logging.getLogger("mkdocs.hooks")  # a warning ends a strict build
CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)#\s]*)[^)\s]*\)", re.DOTALL)
LOADED = re.compile(r"""<(?:script|img|iframe|link(?![^>]*canonical))[^>]*\s(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links to files of the checkout outside docs/: to the repository if mkdocs.yml has a repo_url, else plain text."""
    top = pathlib.Path(config["docs_dir"]).parent

    def link(match):
        if match["target"] is None:  # code
            return match[0]
        here = pathlib.Path(config["docs_dir"], page.file.src_uri).parent
        path = os.path.relpath(here / match["target"], top)
        if (top / "docs") in pathlib.Path(top, path).parents:
            return match[0]
        if not (top / path).exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, match["target"])
        if config["repo_url"]:
            return f"[{match['text']}]({config['repo_url'].rstrip('/')}/blob/HEAD/{path})"
        named = match["text"].strip("`") in (path, os.path.basename(path))
        return f"`{path}`" if named else f"{match['text']} (`{path}`)"

    return CODE_OR_LINK.sub(link, markdown)


def on_post_page(output: str, page, config) -> str:
    """A warning for a page that would load something from another host, or that lacks a module of its wing."""
    top, name = pathlib.Path(config["docs_dir"]).parent, page.file.src_uri
    for match in LOADED.finditer(output):
        log.warning("%s loads %s: the site is read without a network", name, match[0])
    if name.startswith("api/"):
        for module in modules(top, pathlib.Path(name).stem):
            if f'id="{module}"' not in output:
                log.warning("%s lacks %s", name, module)
    return output


def modules(top: pathlib.Path, wing: str) -> list[str]:
    """The names by which the modules of a wing are imported, without its own: rcm_jax.WING.MODULE, …"""
    folder = top / "kernels" if wing == "kernels" else top / "rcm_jax" / wing
    paths = (path.relative_to(folder).with_suffix("").parts for path in sorted(folder.rglob("*.py")))
    inside = (tuple(part for part in parts if part != "__init__") for parts in paths)
    return [".".join(("rcm_jax", wing, *parts)) for parts in inside if parts]
