"""Where no Chromium is installed, test_report.py alone holds the pages to what they promise."""

from __future__ import annotations

from report.browser import CHROMIUM

collect_ignore = [] if CHROMIUM else ["test_report_browser.py"]
