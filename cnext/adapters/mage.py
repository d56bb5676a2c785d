"""`attach_mage`: MAGE's branches, two for each modality, in a transformers model."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnext.adapters import exchange, hub, model_saves, saving
from cnext.adapters.attach import MATRIX_A, SHARED, attach, detach, fix_a, layers, set_trainable
from cnext.adapters.bases import is_linear, offloaded_to
from cnext.adapters.linear import AdapterLinear
from cnext.adapters.roles import MODALITIES, branch_roles, roles_of
from cnext.adapters.saving import Attached
from cnext.adapters.shared_input import part
from cnext.adapters.targets import linear_targets
from cnext.errors import UserError, listed, unknown

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AttachedMage:
    """Handle of MAGE's branches in a model: trains, saves, merges and detaches them. Returned by `attach_mage`.

    Args:
        model: the whole model.
        requires_grad: whether each parameter required a gradient before, by name.
        attached: how the branches were attached.
    """

    def __init__(self, model: nn.Module, requires_grad: dict[str, bool], attached: Attached) -> None:
        self.model = model
        self.modalities = tuple(attached.modalities)
        self._requires_grad = requires_grad
        self._attached_by = attached
        self._before = saving.frozen_state(model)
        self._first = next(iter(layers(model).values()))
        # transformers' Trainer refuses a model of this flag as one that has nothing to train, unless it has PEFT's.
        self._quantized = bool(getattr(model, "is_quantized", False))
        if self._quantized:
            model.__dict__["is_quantized"] = False

    @property
    def layers(self) -> dict[str, AdapterLinear]:
        """The adapter layers by name, none after `detach`."""
        found = layers(self.model)
        return found if self._first in found.values() else {}

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
            UserError: no modality, one that is unknown, no list, or the branches are merged or detached.

        Example:
            >>> handle = cnext.attach_mage(model)  # doctest: +SKIP
            >>> parameters = handle.train_on(reads=["text", "image"], writes=["text"])  # doctest: +SKIP
            >>> optimizer = torch.optim.AdamW(parameters.values(), lr=2e-4)  # doctest: +SKIP

        Reference: Continual-NExT, arXiv 2602.18055, section 4.
        """
        self._attached("train_on")
        roles = roles_of(reads, writes, self.modalities)
        if not roles:
            raise UserError("train_on: expected a modality that the task reads or writes, got none: nothing to train")
        return set_trainable(self.model, [role.name for role in roles])

    def train_all(self, a: str = "fixed") -> dict[str, nn.Parameter]:
        """Unfreezes B of every branch and freezes all other parameters, as the method `mage` does on every task.

        With A fixed at its random initial value the model is linear in B, W + scale * sum of B_i A_i: the average of B
        over tasks is then that of the weights.

        Args:
            a: "fixed", or "trained", which unfreezes A of every branch too.

        Returns:
            The parameters to optimize, as `train_on` returns them.

        Raises:
            UserError: another value of ``a``, or the branches are merged or detached.

        Example:
            >>> parameters = cnext.attach_mage(model).train_all()  # doctest: +SKIP
            >>> optimizer = torch.optim.AdamW(parameters.values(), lr=2e-4)  # doctest: +SKIP

        Reference: LoRA-FA, arXiv 2308.03303.
        """
        found = self._attached("train_all")
        if a not in MATRIX_A:
            raise unknown("value of a", a, MATRIX_A)
        parameters = set_trainable(self.model, next(iter(found.values())).branches)
        return parameters if a == "trained" else fix_a(parameters)

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

    def merged(self) -> nn.Module:
        """A copy of the model with the branches merged into its weights, W + scale * sum of B_i A_i, and none beside.

        A plain model of its own class, in eval mode: `save_pretrained` writes a whole checkpoint, which the class's
        `from_pretrained` loads. The model with branches stays as it is. The copy is on the same devices and takes as
        much memory as the model. In half precision the merged weights are rounded to it.

        Returns:
            The copy. It has no `name_or_path`: its weights are no longer those of the base model.

        Raises:
            UserError: branches are in a weight that another module owns too, such as a head tied to the embeddings, or
                the branches were detached.

        Example:
            >>> handle.merged().save_pretrained("merged")  # doctest: +SKIP
            >>> AutoModelForCausalLM.from_pretrained("merged")  # doctest: +SKIP
        """
        self._attached("merged")
        with exchange.merged(self.model):
            copied: Any = copy.deepcopy(self.model)
        model_saves.undo(copied)
        for module in copied.modules():
            part(module)
        if vars(copied).pop("_original_forward", None) is not None:  # accelerate's autocast around the forward
            vars(copied).pop("forward", None)
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
        if hasattr(copied, "name_or_path"):
            copied.name_or_path = copied.config.name_or_path = ""
        return copied.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        per_branch: bool = False,
        base_model: str | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
        eval_results: Sequence[Any] = (),
    ) -> Path:
        """Writes the branches, without the frozen model, as PEFT adapters in safetensors, with a card.

        `cnext.load` gives back the same branches, bit for bit; PEFT, transformers' `from_pretrained` and vLLM read the
        folder as an adapter. Beside it are cnext_config.json (branches, how they were attached, versions), and
        reference.json, a checksum of the logits, by which `cnext.load` knows the base model.

        Args:
            folder: created if needed. Branches saved in it before are replaced.
            per_branch: an adapter per branch, each in a subfolder of its name, instead of one of the total rank.
            base_model: name or path of the model without branches. Default: the model's ``name_or_path``.
            license: for the card, an identifier of the Hugging Face Hub such as "apache-2.0".
            tags: for the card.
            eval_results: objects of `huggingface_hub`: each ``EvalResult`` is in the card's model-index, each
                ``EvalResultEntry`` in .eval_results/.

        Returns:
            The folder.

        Raises:
            UserError: the base model has no name; other parameters were changed, which no adapter holds; the branches
                are not finite; or the folder holds a whole model, or branches in the other form.

        Example:
            >>> handle.save_pretrained("branches")  # doctest: +SKIP
            >>> PeftModel.from_pretrained(base, "branches")  # doctest: +SKIP
            >>> cnext.load(other_base, "branches")  # doctest: +SKIP
        """
        self._attached("save_pretrained")
        name = base_model or saving.base_name(self.model)
        if name is None:
            raise UserError(
                "save_pretrained: the model has no name_or_path, so nobody could know which model the adapter is for; "
                "pass base_model= with its name on the Hugging Face Hub or its folder"
            )
        instead = (
            "save the whole model, handle.merged().save_pretrained(folder), or the branches with the base model as it "
            "is now, model.save_pretrained(folder)"
        )
        if beside := saving.trained_beside(self.model):
            raise UserError(
                f"save_pretrained: {listed(beside, 3)} require a gradient and are no branches, so an adapter would "
                f"lose what they learned; {instead}"
            )
        if base_model is None and (changed := saving.changed_since(self.model, self._before)):
            raise UserError(
                f"save_pretrained: {listed(changed, 3)} were trained, loaded or resized since the branches were "
                f"attached, so the base model is no longer {name}; {instead}; or pass base_model= of a copy that has "
                "these weights"
            )
        if broken := saving.not_finite(saving.branches_in(self.model)):
            raise UserError(
                f"save_pretrained: {listed(broken, 3)} are not finite: training diverged; load an earlier checkpoint, "
                "and train with a smaller learning rate"
            )
        hub.sorted_results(eval_results)
        config, kept = saving.write(self.model, self._attached_by, Path(folder), name, per_branch=per_branch)
        hub.write_card(Path(folder), config, kept, license=license, tags=tags, eval_results=eval_results)
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        per_branch: bool = False,
        base_model: str | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
        eval_results: Sequence[Any] = (),
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository of the Hugging Face Hub, created if needed.

        Args:
            repo_id: "user/name".
            per_branch, base_model, license, tags, eval_results: see `save_pretrained`. The base model must be on the
                Hub, too.
            private, token, revision, commit_message, create_pr: as of `huggingface_hub.HfApi.upload_folder`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            UserError: as `save_pretrained`; the base model is a local folder; or the Hub refuses the upload.

        Example:
            >>> handle.push_to_hub("me/birds", base_model="org/model", license="apache-2.0")  # doctest: +SKIP
        """
        self._attached("push_to_hub")
        name = base_model or saving.base_name(self.model)
        hub.require_hub_name(name)
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / repo_id.rpartition("/")[2]
            self.save_pretrained(
                folder, per_branch=per_branch, base_model=name, license=license, tags=tags, eval_results=eval_results
            )
            return hub.upload(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _attached(self, what: str) -> dict[str, AdapterLinear]:
        """The layers. Raises UserError where they are no longer in the model."""
        if not (found := self.layers):
            raise UserError(
                f"{what}: the branches of this handle were detached; use the handle of those that were attached later, "
                "or attach branches again"
            )
        return found

    def detach(self) -> nn.Module:
        """Removes the branches, and restores which parameters require a gradient.

        Returns:
            The model as it was before `attach_mage`.

        Raises:
            UserError: the branches were detached.
        """
        self._attached("detach")
        model_saves.undo(self.model)
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
    asked = language_model
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
    attached = Attached(
        modalities=list(modalities),
        rank=rank,
        scale=scale,
        dropout=dropout,
        independent=independent,
        shared=[list(group) for group in shared],
        targets=targets if isinstance(targets, str) else list(targets),
        language_model=None if asked is None else _name_in(model, asked),
    )
    handle = AttachedMage(model, before, attached)
    model_saves.override(model, attached, handle._before)
    return handle


def _name_in(model: nn.Module, part: nn.Module) -> str | None:
    """The name of a part of a model, "" for the model itself."""
    return next((name for name, module in model.named_modules() if module is part), None)


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
