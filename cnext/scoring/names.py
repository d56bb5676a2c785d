"""Names of the scorers that come with cnext, and where they are. Imports none of them."""

from __future__ import annotations

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
OWN = {
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
READ = ("ocr_answer", "coin_textvqa", "coin_ocrvqa", "mllm_cl_ocr")
"""Of these, the scorers of what is read from an image letter by letter and need not be words."""
