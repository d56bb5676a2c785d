"""Sizes of SEED-X: the published ones, and those inferred from files of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cnext.errors import UserError

SIDE = 448
"""Side of a view in pixels."""
TOKENS = 64
"""Tokens of one view in the language model, read or written."""
PATCH_FEATURES = 4
"""Number of position features of a view: x, y, 1 - x, 1 - y of its centre."""

PUBLISHED_LLM = {
    "model_type": "llama",
    "vocab_size": 32330,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The released ``llm/config.json``, as far as it determines what the model computes."""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the visual encoder. Numbers of heads are fixed, 16 and 32: no file has them.

    width, layers, mlp: of its transformer.  patch: side of a patch in pixels.  positions: number of position
    embeddings.  queries, output: number of features of a view, and their width.
    """

    width: int = 1664
    layers: int = 48
    mlp: int = 8192
    patch: int = 14
    positions: int = 256
    queries: int = 256
    output: int = 4096

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], source: str) -> VisionSizes:
        """The sizes of a state dict, given its shapes. Raises UserError if it is another model's."""
        names = ("conv1.weight", "positional_embedding", "attn_pool.query", "transformer.resblocks.0.mlp.c_fc.weight")
        if missing := [name for name in names if name not in shapes]:
            raise UserError(
                f"{source}: expected the state of Qwen-VL's visual encoder (model.transformer.visual.state_dict()), "
                f"with {', '.join(missing)}; found {', '.join(list(shapes)[:4]) or 'nothing'}"
            )
        blocks = [re.match(r"transformer\.resblocks\.(\d+)\.", name) for name in shapes]
        return cls(
            width=shapes["conv1.weight"][0],
            layers=1 + max(int(block[1]) for block in blocks if block),
            mlp=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
            patch=shapes["conv1.weight"][-1],
            positions=shapes["positional_embedding"][0],
            queries=shapes["attn_pool.query"][0],
            output=shapes["attn_pool.query"][1],
        )
