"""Check pages of reports with axe in Chromium: at the width of a phone and of a desk, in light and in dark colours.

    npm install --prefix /tmp/axe axe-core
    python tests/report/accessibility.py --axe /tmp/axe/node_modules/axe-core/axe.min.js runs/*/*/*/report.html

Run by hand, where Chromium and axe are; `test_pages.py` checks the structure everywhere. Prints what axe found, and
whether a page is wider than the screen; exit status 1 where there is anything.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 360, "desk": 1100}
COLOURS = {"dark": 0, "light": 1}
"""Chromium's numbers of the colour schemes that a reader prefers."""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
INSIDE = """
for (const fold of document.querySelectorAll("details")) fold.open = true;
axe.run(document, { resultTypes: ["violations"] }).then(found => parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth,
  violations: found.violations.map(one => [one.id, one.impact, one.nodes.length, one.nodes[0].html.slice(0, 200)]),
}), "*"));
"""
OUTSIDE = """
onmessage = message => { document.querySelector("#found").textContent = message.data;
                         document.querySelector("iframe").remove(); };
"""


def check(page: Path, axe: str, chromium: str, width: int, colours: str) -> dict[str, Any]:
    """What axe found in a page, all its folds open, and how wide it is: {"width": ..., "violations": [...]}.

    axe runs in a copy without the page's content policy, which lets no other script run.
    """
    text = POLICY.sub("", page.read_text(encoding="utf-8"))
    inside = html.escape(f"{text}<script>{axe}</script><script>{INSIDE}</script>")
    outer = (
        f'<!doctype html><meta charset="utf-8"><body><pre id="found"></pre><script>{OUTSIDE}</script>'
        f'<iframe srcdoc="{inside}" width="{width}" height="900" style="border:0"></iframe>'
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outer.html"
        file.write_text(outer, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={folder}/profile", f"--blink-settings=preferredColorScheme={COLOURS[colours]}"]
        options += [f"--window-size={width + 40},1000", "--virtual-time-budget=300000", "--dump-dom", file.as_uri()]
        done = subprocess.run([chromium, *options], capture_output=True, text=True, timeout=600, check=True)
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    if not found:
        sys.exit(f"{page}: axe gave no result; is --axe the file axe.min.js of the package axe-core?")
    return json.loads(html.unescape(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, help="report.html or study.html")
    parser.add_argument("--axe", required=True, type=Path, help="axe.min.js of the npm package axe-core")
    parser.add_argument("--chromium", default="chromium", help="program (default: %(default)s)")
    given = parser.parse_args()
    axe, faults = given.axe.read_text(encoding="utf-8").replace("</script", "<\\/script"), 0
    for page in given.pages:
        for name, width in WIDTHS.items():
            for colours in COLOURS:
                found = check(page, axe, given.chromium, width, colours)
                wide = [f"wider than the screen: {found['width']} of {width} pixels"] if found["width"] > width else []
                listed = [
                    *wide,
                    *(f"{rule} ({impact}, {n} times): {first}" for rule, impact, n, first in found["violations"]),
                ]
                print(f"{page}, {name}, {colours}: {'; '.join(listed) or 'nothing'}")
                faults += len(listed)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
