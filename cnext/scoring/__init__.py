"""Scoring: answers to scores, scores to a matrix, a matrix to metrics.

Importing this package imports neither torch nor numpy; a CLIP model is loaded by the first image that is scored.
"""

from __future__ import annotations

from cnext.scoring.base import Scorer
from cnext.scoring.boxes import box
from cnext.scoring.cider import cider
from cnext.scoring.images import ImageScorers
from cnext.scoring.text import contained_answer, exact_answer, ocr_answer, short_answer


def make_scorers(clip: str = "tiny", device: str = "cpu") -> dict[str, Scorer]:
    """The scorers by name, the image ones bound to one CLIP model.

    Args:
        clip: a name that ``cnext.scoring.clip.load_clip`` knows: "tiny", "<tag>/<model>" of open_clip
            (the benchmark uses "openai/ViT-B-32"), or a folder. Call it first to fail before a run, not within it.
        device: where the CLIP model runs.
    """
    images = ImageScorers(clip, device)
    return {
        "short_answer": short_answer,
        "ocr_answer": ocr_answer,
        "exact_answer": exact_answer,
        "contained_answer": contained_answer,
        "cider": cider,
        "box": box,
        "clip_text": images.clip_text,
        "clip_image": images.clip_image,
    }
