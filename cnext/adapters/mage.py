"""`attach_mage`: MAGE's branches, two for each modality, in a transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from cnext.adapters.attach import SHARED, attach, detach, layers, set_trainable
from cnext.adapters.bases import is_linear, offloaded_to
from cnext.adapters.linear import AdapterLinear
from cnext.adapters.roles import MODALITIES, branch_roles, roles_of
from cnext.adapters.targets import linear_targets
from cnext.errors import UserError, listed

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AttachedMage:
    """Handle of MAGE's branches in a model: trains, merges and detaches them. Returned by `attach_mage`.

    Args:
        model: the whole model.
        requires_grad: whether each parameter required a gradient before, by name.
        modalities: what tasks may read and write.
    """

    def __init__(
        self, model: nn.Module, requires_grad: dict[str, bool], modalities: Sequence[str] = MODALITIES
    ) -> None:
        self.model = model
        self.modalities = tuple(modalities)
        self._requires_grad = requires_grad
        # transformers' Trainer refuses a model of this flag as one that has nothing to train, unless it has PEFT's.
        self._quantized = bool(getattr(model, "is_quantized", False))
        if self._quantized:
            model.__dict__["is_quantized"] = False

    @property
    def layers(self) -> dict[str, AdapterLinear]:
        """The adapter layers by name."""
        return layers(self.model)

    def train_on(self, reads: Iterable[str], writes: Iterable[str]) -> dict[str, nn.Parameter]:
        """Unfreezes the branches of a task's modalities and freezes all other parameters.

        A modality that is read trains its general branch, one that is written its expert branch. All branches keep
        adding to the output.

        Args:
            reads: the task's input modalities, of those that the branches were attached with: "text", "image" or both.
            writes: its output modalities, likewise.

        Returns:
            The parameters to optimize, keyed "<layer>.<branch>.<A or B>": for each adapter layer and branch A, (rank,
            in), and B, (out, rank), float32 or wider. Gradients left from earlier are dropped. Pass only these to an
            optimizer, which then keeps no state for frozen branches.

        Raises:
            UserError: a modality is unknown, a text stands in place of a list, or the branches are merged.

        Example:
            >>> handle = cnext.attach_mage(model)  # doctest: +SKIP
            >>> parameters = handle.train_on(reads=["text", "image"], writes=["text"])  # doctest: +SKIP
            >>> optimizer = torch.optim.AdamW(parameters.values(), lr=2e-4)  # doctest: +SKIP

        Reference: Continual-NExT, arXiv 2602.18055, section 4.
        """
        return set_trainable(self.model, [role.name for role in roles_of(reads, writes, self.modalities)])

    def merge(self) -> None:
        """Merges the branches into the weights: the model then runs as fast as without them. See `AdapterLinear.merge`.

        A weight that another module owns too, such as an embedding tied to the head, stays there as it is.

        Raises:
            UserError: a layer is merged already, routed, quantized or offloaded, or the branches were detached; nothing
                is changed.
        """
        found = self._attached("merge")
        if merged := [name for name, layer in found.items() if layer.merged]:
            raise UserError(f"merge: the branches of {listed(merged, 3)} are merged already; call unmerge first")
        reasons = {name: layer.unmergeable for name, layer in found.items()}
        for reason in filter(None, dict.fromkeys(reasons.values())):
            names = [name for name in found if reasons[name] == reason]
            raise UserError(f"merge: the branches of {listed(names, 3)} {reason}")
        for layer in found.values():
            layer.merge()

    def unmerge(self) -> None:
        """Restores the weights from before `merge`, bit for bit.

        Raises:
            UserError: a layer is not merged, or the branches were detached; nothing is changed.
        """
        found = self._attached("unmerge")
        if apart := [name for name, layer in found.items() if not layer.merged]:
            raise UserError(f"unmerge: the branches of {listed(apart, 3)} are not merged; call merge first")
        for layer in found.values():
            layer.unmerge()

    def _attached(self, what: str) -> dict[str, AdapterLinear]:
        """The layers. Raises UserError where there are none any more."""
        if not self.layers:
            raise UserError(f"{what}: the model has no branches any more, they were detached; attach them again")
        return self.layers

    def detach(self) -> nn.Module:
        """Removes the branches, and restores which parameters require a gradient.

        Returns:
            The model as it was before `attach_mage`.
        """
        detach(self.model)
        if self._quantized:
            self.model.__dict__["is_quantized"] = True
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        return self.model


def attach_mage(
    model: nn.Module,
    *,
    modalities: Sequence[str] = MODALITIES,
    rank: int = 8,
    scale: float = 1.0,
    dropout: float = 0.0,
    independent: bool = False,
    shared: Sequence[Sequence[str]] = SHARED,
    targets: Sequence[str] | str = TARGETS,
    language_model: nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> AttachedMage:
    """Attaches MAGE's branches to the language model's linear layers, y = W x + scale * sum of B_i A_i drop(x).

    Each modality has a general branch, for tasks that read it, and an expert, for tasks that write it: four branches by
    default, six with a third modality.

    Args:
        model: a transformers model, changed in place: all its parameters are frozen, those of the branches are not.
        modalities: what the model reads or writes, such as ("text", "image", "audio"); see
            `cnext.adapters.branch_roles` for the branches' names and order.
        rank: of each branch. The total is this times twice the number of modalities.
        scale, dropout, independent: see `AdapterLinear`.
        shared: see `cnext.adapters.attach`.
        targets: last parts of the names of the linear layers, by default those of Llama and most decoders; or
            "all-linear": every one of the language model but the output head, as for BERT, GPT-2, OPT, Phi-3 and T5.
        language_model: the part of the model to search, so that layers of the same names in a vision tower are skipped.
            Default: the model's ``get_decoder()``, with the encoder where that reads text too, as in T5; or the whole
            model if it has none.
        generator: source of the branches' initial values, on the CPU. Default: torch's own.

    Returns:
        A handle to train, merge and detach the branches.

    Raises:
        UserError: modalities that are no list of names, targets that match nothing, or layers that branches cannot
            compute, see `cnext.adapters.attach`, such as those on the meta device; the model is then unchanged.

    Example:
        >>> mage = attach_mage(model)
        >>> parameters = mage.train_on(reads=["image", "text"], writes=["text"])
        >>> optimizer = torch.optim.AdamW(parameters.values(), 1e-4)

    Reference: Continual-NExT, arXiv 2602.18055, section 4.
    """
    ranks = {role.name: rank for role in branch_roles(modalities)}
    if language_model is None:
        language_model = _language_model(model)
    _require_targets_inside(model, language_model, targets)
    _require_own_layers(model, language_model, targets)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
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
    return AttachedMage(model, before, modalities)


def _language_model(model: nn.Module) -> nn.Module:
    """A model's decoder, or the smallest part that holds it and its text encoder, or the whole model."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    found = model if decoder is None else decoder
    # transformers 4 gives some models as their own decoder (BERT), head included, and stops at the model that has the
    # decoder beside a vision tower.
    found = getattr(model, "base_model", model) if found is model else found
    for name in ("language_model", "text_model"):
        found = getattr(found, name, found)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()  # pyright: ignore[reportCallIssue]
        # An encoder of images or sound has no such embeddings.
        if hasattr(encoder, "embed_tokens") and encoder not in {*found.modules()}:
            holders = [one for one in model.modules() if {found, encoder} <= {*one.modules()}]
            return holders[-1]  # parents come before their children
    return found


def _require_targets_inside(model: nn.Module, language_model: nn.Module, targets: Sequence[str] | str) -> None:
    """Raises UserError for a model with adapters, and for targets that it has, but its language model has not."""
    if layers(model):
        raise UserError("the model has adapters already; detach them first")
    if isinstance(targets, str):
        return
    inside, everywhere = (
        {name.rpartition(".")[2] for name, module in part.named_modules() if is_linear(module)}
        for part in (language_model, model)
    )
    outside = [target for target in targets if target not in inside]
    if outside and everywhere.issuperset(outside):
        raise UserError(
            f"{listed(outside, 3)}: the model has a linear layer of this name, but outside of its language model, "
            f"{type(language_model).__name__}; pass language_model=model to search the whole model"
        )


def _require_own_layers(model: nn.Module, language_model: nn.Module, targets: Sequence[str] | str) -> None:
    """Raises UserError for layers without values, and for those that the rest of the model has too."""
    found = linear_targets(language_model, targets)
    if on_meta := [n for n, one in found.items() if one.get_parameter("weight").is_meta and not offloaded_to(one)]:
        raise UserError(f"{listed(on_meta, 3)}: on the meta device, without values; load the weights first")
    outside, pending = set(), [model]
    while pending:
        module = pending.pop()
        if module is not language_model and module not in outside:
            outside.add(module)
            pending += module.children()
    if shared := [name for name, layer in found.items() if layer in outside]:
        raise UserError(
            f"{listed(shared, 3)}: the model has this layer outside of its language model too; pass "
            "language_model=model, and targets that name it at every place"
        )
