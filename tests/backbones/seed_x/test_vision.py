"""Views of an image, the visual encoder and the resamplers, against formulas written out."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cnext.backbones.seed_x.anyres import WHOLE, best_grid, patch_features, views
from cnext.backbones.seed_x.model import SeedX
from cnext.backbones.seed_x.resampler import Resampler, resized, sinusoids
from cnext.backbones.seed_x.vision import Attention, normalized, pooled


@pytest.mark.parametrize(
    ("width", "height", "grid", "tokens"),
    [
        (640, 480, (1, 1), 132),
        (640, 427, (2, 1), 198),
        (500, 375, (1, 1), 132),
        (500, 333, (2, 1), 198),
        (1024, 768, (2, 2), 330),
        (1200, 400, (3, 1), 264),
        (350, 500, (1, 2), 198),
    ],
    ids=str,
)
def test_grids_and_token_counts(loaded: SeedX, width: int, height: int, grid: tuple[int, int], tokens: int) -> None:
    from PIL import Image

    assert best_grid(width, height) == grid
    count = len(views(Image.new("RGB", (width, height))).centres)
    assert len(loaded.tokenizer.picture(count)) == tokens


def test_views_are_tiles_of_the_resized_image_and_the_whole() -> None:
    from PIL import Image

    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (768, 1024, 3), dtype=numpy.uint8))
    found = views(image)
    stretched = image.resize((896, 896))
    boxes = [(0, 0), (448, 0), (0, 448), (448, 448)]
    expected = [stretched.crop((x, y, x + 448, y + 448)) for x, y in boxes] + [image.resize((448, 448))]
    for view, tile in zip(found.pixels, expected, strict=True):
        assert torch.equal(view.permute(1, 2, 0), torch.from_numpy(numpy.array(tile)))
    centres = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5]]
    assert found.centres.tolist() == centres
    assert patch_features(found.centres)[1].tolist() == [0.375, 0.125, 0.125, 0.375]
    assert views(image, WHOLE).pixels.shape == (1, 3, 448, 448), "both views of one tile are the same"
    assert views(image, WHOLE).centres.tolist() == [[0.5, 0.5]] * 2


def test_pixels_are_normalized_as_clip_does() -> None:
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    red = (float(pixels[1, 0, 2, 3]) / 255 - 0.48145466) / 0.26862954
    blue = (float(pixels[1, 2, 2, 3]) / 255 - 0.40821073) / 0.27577711
    found = normalized(pixels)[1, :, 2, 3]
    torch.testing.assert_close(found[[0, 2]], torch.tensor([red, blue]))


def test_attention_is_packed_by_head() -> None:
    torch.manual_seed(0)
    width, heads, size = 32, 16, 2
    layer, x = Attention(width).double(), torch.randn(2, 5, width, dtype=torch.float64)
    packed = layer.in_proj(x)
    mixed = torch.zeros_like(x)
    for head in range(heads):
        start = head * 3 * size
        q, k, v = (packed[..., start + part * size : start + (part + 1) * size] for part in range(3))
        weights = (q @ k.mT / math.sqrt(size)).softmax(-1)
        mixed[..., head * size : (head + 1) * size] = weights @ v
    torch.testing.assert_close(layer(x), layer.out_proj(mixed))


def cubic(distance: float) -> float:
    """The bicubic kernel, with a = -3/4."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_positions_are_resized_bicubically() -> None:
    torch.manual_seed(0)
    table = torch.randn(16, 3)
    old, new = 4, 8
    matrix = torch.zeros(new, old)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    expected = torch.einsum("ay,bx,yxc->abc", matrix, matrix, table.view(4, 4, 3)).reshape(64, 3)
    torch.testing.assert_close(resized(table, 64), expected)
    assert resized(table, 16) is table


def test_sinusoids_by_hand() -> None:
    table = sinusoids(3, 8)
    for place in range(9):
        row, column = divmod(place, 3)
        expected = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (k / 2) for k in range(2)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(table[place], torch.tensor(expected))


def attended(resampler: Resampler, x: Tensor) -> Tensor:
    """One sample through a resampler, head by head."""
    width, heads = resampler.query.shape[1], 32
    size, attn = width // heads, resampler.attn
    kv = F.layer_norm(x @ resampler.kv_proj.weight.T, (width,), resampler.ln_kv.weight, resampler.ln_kv.bias, 1e-5)
    q = F.layer_norm(resampler.query, (width,), resampler.ln_q.weight, resampler.ln_q.bias, 1e-5) + resampler.pos_embed
    inputs = (q, kv + resized(resampler.pos_embed, len(x)), kv)
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (one @ w.T + b for one, w, b in zip(inputs, weights, biases, strict=True))
    heads_out = []
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        heads_out.append((q[:, cut] @ k[:, cut].T / math.sqrt(size)).softmax(-1) @ v[:, cut])
    return torch.cat(heads_out, 1) @ attn.out_proj.weight.T + attn.out_proj.bias


def test_resamplers_head_by_head(loaded: SeedX) -> None:
    torch.manual_seed(0)
    for resampler, tokens, source in ((loaded.input_resampler, 256, 64), (loaded.output_resampler, 64, 64)):
        x = torch.randn(2, tokens, source)
        expected = torch.stack([attended(resampler, one) for one in x])
        torch.testing.assert_close(resampler(x), expected, rtol=1e-4, atol=1e-5)


def test_features_by_hand(loaded: SeedX) -> None:
    """Patches row by row, resized positions, pre-norm blocks, the pool, a norm, and the projection last."""
    vit = loaded.vit
    pixels = torch.randint(256, (1, 3, 448, 448), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = normalized(pixels)[0]
    patches = [image[:, y : y + 56, x : x + 56] for y in range(0, 448, 56) for x in range(0, 448, 56)]
    x = torch.stack([(vit.conv1.weight * patch).sum((1, 2, 3)) for patch in patches])
    x = vit.ln_pre(x + resized(vit.positional_embedding, 64))
    for block in vit.transformer["resblocks"]:
        x = x + block.attn(block.ln_1(x)[None])[0]
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    expected = vit.ln_post(vit.attn_pool(x[None])) @ vit.proj
    assert vit.features(pixels).shape == (1, 256, 64)
    torch.testing.assert_close(vit.features(pixels), expected, rtol=1e-3, atol=1e-4)
    assert vit.ln_pre.eps == vit.attn_pool.ln_q.eps == 1e-6


def test_pooling_averages_four_successive_features() -> None:
    features = torch.randn(2, 256, 5)
    torch.testing.assert_close(pooled(features), F.avg_pool1d(features.mT, 4, 4).mT)
