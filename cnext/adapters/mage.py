"""MAGE's four branches in any transformers model, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from cnext.adapters.attach import SHARED, attach, detach, layers, set_trainable
from cnext.adapters.linear import AdapterLinear
from cnext.adapters.roles import BRANCH_ROLES, roles_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AttachedMage:
    """Branches that are in a model, and the way back. Made by `attach_mage`.

    Args:
        model: the whole model.
        requires_grad: whether each parameter required a gradient before, by name.
    """

    def __init__(self, model: nn.Module, requires_grad: dict[str, bool]) -> None:
        self.model = model
        self._requires_grad = requires_grad

    @property
    def layers(self) -> dict[str, AdapterLinear]:
        """The adapter layers by name."""
        return layers(self.model)

    def train_on(self, reads: Iterable[str], writes: Iterable[str]) -> dict[str, nn.Parameter]:
        """Unfreezes the branches of a task's modalities and freezes all other parameters.

        A modality that is read trains its general branch, one that is written its expert branch. All four branches keep
        adding to the output.

        Args:
            reads: the task's input modalities: "text", "image" or both.
            writes: its output modalities, likewise.

        Returns:
            The parameters to optimize, keyed "<layer>.<branch>.<A or B>": for each adapter layer and branch A, (rank,
            in), and B, (out, rank), float32 or wider. Gradients left from earlier are dropped. Pass only these to an
            optimizer, which then keeps no state for frozen branches.

        Raises:
            UserError: a modality is unknown.

        Example:
            >>> handle = cnext.attach_mage(model)  # doctest: +SKIP
            >>> parameters = handle.train_on(reads=["text", "image"], writes=["text"])  # doctest: +SKIP
            >>> optimizer = torch.optim.AdamW(parameters.values(), lr=2e-4)  # doctest: +SKIP

        Reference: Continual-NExT, arXiv 2602.18055, section 4.
        """
        return set_trainable(self.model, [role.name for role in roles_of(reads, writes)])

    def merge(self) -> None:
        """Adds every layer's branches to its weight: the model then runs as fast as without them."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Undoes `merge`, to the bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def detach(self) -> nn.Module:
        """Takes the branches out and gives the untouched model back."""
        detach(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        return self.model


def attach_mage(
    model: nn.Module,
    *,
    rank: int = 8,
    scale: float = 1.0,
    dropout: float = 0.05,
    independent: bool = False,
    shared: Sequence[Sequence[str]] = SHARED,
    targets: Sequence[str] = TARGETS,
    language_model: nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> AttachedMage:
    """Puts MAGE's four branches into the language model's linear layers, y = W x + scale * sum of B_i A_i drop(x).

    Args:
        model: a transformers model, changed in place: all of it is frozen, the branches are not.
        rank: of each branch.
        scale, dropout, independent: see `AdapterLinear`.
        shared: see `cnext.adapters.attach`.
        targets: last parts of the names of the linear layers.
        language_model: the part of the model to look in, so that a vision tower's layers of the same names are left
            alone; None: what the model's ``get_decoder()`` gives, and the whole model where it has none.
        generator: source of the branches' first values, on the CPU; None is torch's own.

    Returns:
        A handle: which branches to train, merging, and ``detach()``.

    Raises:
        UserError: naming the targets that matched nothing, or a layer whose weight is not plain.

    Reference: Continual-NExT, arXiv 2602.18055, section 4.
    """
    if language_model is None:
        decoder = getattr(model, "get_decoder", None)
        language_model = model if decoder is None else decoder()
        # transformers 4 stops at the model that has the decoder beside a vision tower.
        for name in ("language_model", "text_model"):
            language_model = getattr(language_model, name, language_model)
    assert language_model is not None, "a transformers model that has get_decoder has a decoder"
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ranks = {role.name: rank for role in BRANCH_ROLES}
    attach(
        language_model,
        targets,
        ranks,
        scale=scale,
        dropout=dropout,
        independent=independent,
        shared=shared,
        generator=generator,
    )
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.requires_grad_(False)
    return AttachedMage(model, before)
