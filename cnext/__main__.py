"""``python -m cnext`` is ``cnext``."""

from __future__ import annotations

import sys

from cnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
