"""A page in headless Chromium, as a reader on a phone meets it: shown in a frame, which a script outside works upon."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 360, 844
"""Pixels of a phone."""


def chromium(*options: str) -> str:
    """What Chromium prints with these options."""
    assert CHROMIUM is not None
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")
    done = subprocess.run([CHROMIUM, *fixed, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def work(page: Path, script: str, folder: Path) -> Any:
    """The value of a JavaScript function's body, given ``page``, the page's document, and ``view``, its window.

    The page itself is not touched: its own content policy holds, under which nothing but its own script runs.
    """
    inside = html.escape(page.read_text(encoding="utf-8"))
    outer = (
        f'<!doctype html><meta charset="utf-8"><body><iframe srcdoc="{inside}" width="{WIDTH}" height="{HEIGHT}" '
        'style="border:0"></iframe><pre id="found"></pre><script>const frame = document.querySelector("iframe");'
        "const work = (page, view) => {" + script + "};"
        "onload = () => { document.querySelector('#found').textContent = "
        "JSON.stringify(work(frame.contentDocument, frame.contentWindow)); frame.remove(); };</script>"
    )
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    shown = chromium(f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "outer.html").as_uri())
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', shown, re.S)
    return json.loads(html.unescape(found))
