"""What a page shows, without a browser."""

import json
import pathlib
import re


def content_of(path) -> dict:
    """The content that write_page put into a file."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    return json.loads(re.search(r'id="content">(.*?)</script>', text, re.DOTALL)[1])
