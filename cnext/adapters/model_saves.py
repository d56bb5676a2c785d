"""``save_pretrained`` of a model with branches: adapters that `from_pretrained` loads, and a state to resume from.

It is an attribute of the instance, which `undo` removes. transformers' own method would write the weights under the
names that they have beside branches, which no stock class has: ``from_pretrained`` would draw new values for them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnext import durable
from cnext.adapters import hub, saving
from cnext.adapters.attach import layers
from cnext.adapters.exchange import without_branches
from cnext.adapters.saving import Attached
from cnext.distributed.wrapped_names import unwrapped
from cnext.errors import UserError

METHOD = "save_pretrained"
BASE = "base_model"
"""Subfolder for the base model where nothing else can name it."""
WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
"""What Trainer loads when it resumes. There is no config.json, so that no class takes them for a whole model."""


class SavePretrained:
    """``save_pretrained`` of a transformers model with branches in it.

    It refers to the model weakly, so that deleting the model frees its memory at once; a copy refers to the copy.

    Args:
        model: that it is the method of.
        attached: how its branches were attached.
        whole: False for a part of the model, which is refused.
        before: `saving.frozen_state` of the model when they were attached.
    """

    def __init__(
        self, model: nn.Module, attached: Attached, whole: bool, before: Mapping[str, tuple[int, tuple[int, ...]]]
    ) -> None:
        self._model = weakref.ref(model)
        self.attached = attached
        self.whole = whole
        self.before = before

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "called as the model's method"
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(memo.get(id(self.model), self.model), self.attached, self.whole, self.before)

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self.model, self.attached, self.whole, self.before)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Writes the branches as one PEFT adapter, and the state that ``Trainer`` resumes from.

        The state has the branches alone where the base model has a name, and the whole model otherwise, with the base
        model beside it: in that case, and where other parameters were changed too, nothing else has these weights.

        Args:
            save_directory, is_main_process, state_dict: as of transformers.
            options: others of transformers. Those of the Hub and safe_serialization (of the state) are obeyed; the rest
                is about whole models' weights.
        """
        model: Any = self.model
        folder = Path(save_directory)
        if not layers(model):  # while they are out of the model, or after `cnext.adapters.detach`
            type(model).save_pretrained(
                model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options
            )
            return
        if not self.whole:
            raise UserError(
                f"save_pretrained of {type(model).__name__}, which is a part of the model with branches, would write "
                "weights that no class can load; save the whole model, or handle.merged()"
            )
        # DeepSpeed's Trainer gives an empty state where the weights stay sharded.
        if not is_main_process or (state_dict is not None and not state_dict):
            return
        name = saving.base_name(model)
        own = name is None or bool(saving.trained_beside(model) or saving.changed_since(model, self.before))
        if options.get("push_to_hub"):
            hub.require_hub_name(None if own else name)
        base = os.path.abspath(folder / BASE) if own else str(name)
        saving.write(model, self.attached, folder, base, state=state_dict, to_resume=not own)
        if own:
            self._write_base(folder / BASE, state_dict)
        self._write_state(folder, state_dict, own, options.get("safe_serialization", True))
        if options.get("push_to_hub"):
            given = ("private", "token", "revision", "commit_message", "create_pr")
            hub.upload(folder, options.get("repo_id") or folder.name, **{k: options[k] for k in given if k in options})

    def _write_base(self, folder: Path, state: Mapping[str, Tensor] | None) -> None:
        model: Any = self.model
        adapted = [unwrapped(name) for name in layers(model)]
        plain = None if state is None else _without_branches({unwrapped(n): t for n, t in state.items()}, adapted)
        with without_branches(model):
            type(model).save_pretrained(model, str(folder), state_dict=plain)

    def _write_state(self, folder: Path, state: Mapping[str, Tensor] | None, whole: bool, safe: bool) -> None:
        from safetensors.torch import save_file

        own = branch_tensors(self.model)
        if state is None:
            # bitsandbytes' 4 bits change their weights on a CPU when asked for their state.
            state = self.model.state_dict() if whole else own
        # Copies: safetensors refuses tied weights, and the branches' A are views of one matrix.
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in ((unwrapped(name), tensor) for name, tensor in state.items())
            if whole or name in own
        }
        file, other = (folder / WEIGHTS, folder / OLD_WEIGHTS) if safe else (folder / OLD_WEIGHTS, folder / WEIGHTS)
        with durable.replaced(file) as unfinished:
            if safe:
                save_file(tensors, unfinished, metadata={"format": "pt"})
            else:
                torch.save(tensors, unfinished)
        other.unlink(missing_ok=True)


def _without_branches(state: Mapping[str, Tensor], adapted: list[str]) -> dict[str, Tensor]:
    """A state of the model with branches as one of the model without."""
    renamed = dict(state)
    for layer in adapted:
        for name in [name for name in renamed if name.startswith(f"{layer}.")]:
            tensor, rest = renamed.pop(name), name.removeprefix(f"{layer}.")
            if rest.startswith("base."):
                renamed[f"{layer}.{rest.removeprefix('base.')}"] = tensor
    return renamed


def branch_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The branches' tensors, not copied, by their names in the state of a model."""
    return {
        f"{unwrapped(name)}.branches.{key}.{half}": getattr(branch, half)
        for name, layer in layers(model).items()
        for key, branch in layer.branches.items()
        for half in "AB"
    }


def expect_branches_alone(model: nn.Module, found: Any) -> None:
    """Nothing is missing in a state of all branches and nothing else: the rest of the model is frozen."""
    names = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, each in (module._parameters | module._buffers).items()
        if each is not None and name not in module._non_persistent_buffers_set
    }
    frozen = names - branch_tensors(model).keys()
    if frozen and set(found.missing_keys) == frozen:
        found.missing_keys.clear()


def override(model: nn.Module, attached: Attached, before: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
    """Gives a transformers model, and its parts that are models with branches, another ``save_pretrained``."""
    from transformers import PreTrainedModel

    inside: set[nn.Module] = set()
    for module in model.modules():  # outer ones first
        if isinstance(module, PreTrainedModel) and layers(module):
            setattr(module, METHOD, SavePretrained(module, attached, module not in inside, before))
            inside |= set(module.modules())
    model.register_load_state_dict_post_hook(expect_branches_alone)


def undo(model: nn.Module) -> None:
    """Undoes `override`."""
    for module in model.modules():
        if isinstance(vars(module).get(METHOD), SavePretrained):
            delattr(module, METHOD)
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is expect_branches_alone]:
        del hooks[key]
