"""Refuse a built site that loads anything from another host.

    python docs/check_site.py FOLDER

Links that a reader may follow are none of that: only what a browser fetches by itself counts, in pages and in styles.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
}
_LOADING_RELS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
_IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)")


class _Page(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "link" and _LOADING_RELS & set((told.get("rel") or "").lower().split()):
            self.loaded.append(told.get("href") or "")
        elif tag in _LOADS:
            self.loaded.append(told.get(_LOADS[tag]) or "")
        self.loaded += _IN_STYLE.findall(told.get("style") or "")


def foreign(folder: Path) -> Iterator[str]:
    """Each page or style with what it loads from elsewhere."""
    for path in sorted(folder.rglob("*")):
        found: list[str] = []
        if path.suffix == ".html":
            page = _Page()
            page.feed(path.read_text(encoding="utf-8"))
            found = page.loaded
        elif path.suffix == ".css":
            found = _IN_STYLE.findall(path.read_text(encoding="utf-8"))
        for address in found:
            if re.match(r"(https?:)?//", address):
                yield f"{path.relative_to(folder)}: {address}"


if __name__ == "__main__":
    site = Path(sys.argv[1])
    if not (site / "index.html").is_file():
        sys.exit(f"{site}: no site is there")
    problems = list(foreign(site))
    print("\n".join(problems) or f"{site}: nothing is loaded from another host")
    sys.exit(1 if problems else 0)
