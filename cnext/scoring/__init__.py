"""Scoring: answers to scores, scores to a score matrix, a matrix to metrics.

Importing this package imports neither torch nor numpy; a CLIP model is loaded by the first image that is scored. Models
and data files are elsewhere. Another package adds a scorer by an entry point of the group ``cnext.scorers``: ``name =
"module:scorer"``; a suite of one's own names one as ``"scorer": "module:function"``.
"""

from __future__ import annotations

from cnext.scoring.base import make_scorers
from cnext.scoring.names import BOXES, READ, SHORT_ANSWERS

__all__ = ["BOXES", "READ", "SHORT_ANSWERS", "make_scorers"]
