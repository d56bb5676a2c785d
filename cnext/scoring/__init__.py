"""Scoring: answers to scores, scores to a score matrix, a matrix to metrics.

Importing this package imports neither torch nor numpy; a CLIP model is loaded by the first image that is scored. Models
and data files are elsewhere. Another package adds a scorer by an entry point of the group ``cnext.scorers``: ``name =
"module:scorer"``.
"""

from __future__ import annotations

from cnext.registry import Registry

_TEXT = {
    "short_answer": "cnext.scoring.text:short_answer",
    "ocr_answer": "cnext.scoring.text:ocr_answer",
    "exact_answer": "cnext.scoring.text:exact_answer",
    "contained_answer": "cnext.scoring.text:contained_answer",
    "coin_scienceqa": "cnext.scoring.coin:coin_scienceqa",
    "coin_textvqa": "cnext.scoring.coin:coin_textvqa",
    "coin_imagenet": "cnext.scoring.coin:coin_imagenet",
    "coin_gqa": "cnext.scoring.coin:coin_gqa",
    "coin_ocrvqa": "cnext.scoring.coin:coin_ocrvqa",
    "mllm_cl_rs_ad": "cnext.scoring.mllm_cl:mllm_cl_rs_ad",
    "mllm_cl_sci": "cnext.scoring.mllm_cl:mllm_cl_sci",
    "mllm_cl_fin": "cnext.scoring.mllm_cl:mllm_cl_fin",
    "mllm_cl_vp": "cnext.scoring.mllm_cl:mllm_cl_vp",
    "mllm_cl_ocr": "cnext.scoring.mllm_cl:mllm_cl_ocr",
}
_OWN = {
    **_TEXT,
    "cider": "cnext.scoring.cider:cider",
    "box": "cnext.scoring.boxes:box",
    "coin_grounding": "cnext.scoring.boxes:coin_grounding",
    "clip_text": "cnext.scoring.images:ClipText",
    "clip_image": "cnext.scoring.images:ClipImage",
}

BOXES = ("box", "coin_grounding")
"""The scorers of bounding boxes."""
SHORT_ANSWERS = tuple(_TEXT)
"""The scorers of a word or phrase."""


def make_scorers(clip: str = "tiny", device: str = "cpu") -> Registry:
    """The scorers by name: functions of the type `cnext.scoring.base.Scorer`, imported when they are used.

    A scorer that is registered as a class is constructed with ``(clip, device)``.

    Args:
        clip: a name that ``cnext.scoring.clip.load_clip`` accepts: "tiny", "<tag>/<model>" of open_clip (the benchmark
            uses "openai/ViT-B-32"), or a folder. Call that first to fail before a run and not during it.
        device: where the CLIP model runs.

    Example:
        >>> make_scorers()["short_answer"](task, samples, predictions)
    """
    return Registry(
        "scorer", "cnext.scorers", _OWN, lambda found: found(clip, device) if isinstance(found, type) else found
    )
