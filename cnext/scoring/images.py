"""Scorers of generated images: against a caption (Flickr30k: `clip_text`) or a target image (HQEdit: `clip_image`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnext.image_files import open_image
from cnext.scoring.base import Flaw, Prediction, Score
from cnext.scoring.errors import image_error
from cnext.tasks.base import DataError, caption_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from cnext.scoring.clip import Clip
    from cnext.tasks.base import Sample, Task

NO_TARGET = "names no target image, with which the scorer clip_image compares"


@dataclass(frozen=True)
class _ClipScorer:
    """A scorer with a CLIP model, which is loaded when the first image is scored.

    clip, device: as in ``cnext.scoring.clip.load_clip``.
    """

    clip: str = "tiny"
    device: str = "cpu"

    def _load(self) -> Clip:
        from cnext.scoring.clip import load_clip

        return load_clip(self.clip, self.device)


class ClipText(_ClipScorer):
    """Cosine of image and text times 100, for tasks that write an image of a caption.

    strict: max(0, cos) with the caption alone; 0 without an image.
    paper: cos with the whole instruction, its prefix included, negative values kept. Without an image the previous
    sample's score counts again; where the very first sample has none, the score is 0, and the released code raises
    NameError. Texts beyond the model's context are truncated, where the released code raises.

    Reference: the released ``eval_gene.py``.
    """

    def __call__(self, task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
        generated = _generated(predictions)
        strict: dict[int, float] = {}
        paper: dict[int, float] = {}
        if generated:
            clip = self._load()
            image_pred = clip.encode_images(_image_pred(predictions[i]) for i in generated)
            instructions = [samples[i].turns[0].instruction for i in generated]
            captions = clip.encode_texts([caption_of(text) for text in instructions])
            strict = dict(zip(generated, _percent_cosines(image_pred, captions), strict=True))
            paper = dict(zip(generated, _percent_cosines(image_pred, clip.encode_texts(instructions)), strict=True))

        scores = []
        previous = 0.0
        for i, (_, prediction) in enumerate(zip(samples, predictions, strict=True)):
            previous = paper.get(i, previous)
            scores.append(_score(prediction, strict.get(i, 0.0), previous))
        return scores


class ClipImage(_ClipScorer):
    """Cosine of the generated and the target image times 100, for tasks that edit images.

    strict: max(0, cos); 0 without an image.
    paper: cos, negative values kept; 0 without an image.

    Raises:
        DataError: a sample names no target image.

    Reference: the released ``eval_edit.py``.
    """

    def __call__(self, task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
        generated = _generated(predictions)
        cosines: dict[int, float] = {}
        if generated:
            clip = self._load()
            image_pred = clip.encode_images(_image_pred(predictions[i]) for i in generated)
            image_target = clip.encode_images(_image_target(samples[i]) for i in generated)
            cosines = dict(zip(generated, _percent_cosines(image_pred, image_target), strict=True))
        return [
            _score(prediction, cosines.get(i, 0.0), cosines.get(i, 0.0))
            for i, (_, prediction) in enumerate(zip(samples, predictions, strict=True))
        ]


def _generated(predictions: Sequence[Prediction]) -> list[int]:
    """Indices of the predictions with an image."""
    return [i for i, prediction in enumerate(predictions) if prediction.image is not None]


def _score(prediction: Prediction, cosine: float, paper: float) -> Score:
    strict = max(0.0, cosine)
    return Score(strict=strict, paper=paper, error="" if strict == 100.0 else image_error(prediction))


def _percent_cosines(a, b) -> list[float]:
    # Unit vectors in float64: by rounding, the cosine of an image with itself may exceed 1.
    return (100.0 * (a * b).sum(-1)).clamp(-100.0, 100.0).tolist()


def _image_pred(prediction: Prediction) -> Image:
    from PIL import Image

    assert prediction.image is not None, "_generated selects those with an image"
    return Image.fromarray(prediction.image)


def _image_target(sample: Sample) -> Image:
    if sample.target_image is None:
        raise DataError(f"{sample.origin or sample.id}: {NO_TARGET}")
    return open_image(sample.target_image)


def target_flaw(sample: Sample) -> Flaw | None:
    """Asked of every sample of `clip_image`, see `cnext.scoring.base.REFERENCE_CHECKS`."""
    return None if sample.target_image else Flaw(NO_TARGET)
