"""`AdapterLinear`: a frozen linear layer plus the sum of any number of low-rank branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnext import ops
from cnext.adapters.bases import has_own_forward, is_transposed, is_wrapped, sizes
from cnext.adapters.weight_reads import read_only
from cnext.errors import UserError


class Branch(nn.Module):
    """One low-rank branch: A (rank, in_features), and B (out_features, rank), which starts at zero."""

    def __init__(self, a: Tensor, out_features: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(out_features, a.shape[0]))


class AdapterLinear(nn.Module):
    """y = W x + b + scale * sum over branches of B_i A_i drop(x), with W and b frozen.

    Computed by `cnext.ops.lora_branches`: four branches of rank 8 cost as much as one of rank 32. Frozen branches
    contribute to y as well. The branches' A are views of one matrix, stacked, so that no copy is needed; if something
    moves them apart, the op copies, with the same result. (Every B is a tensor of its own: as columns of one matrix
    they would not be contiguous, which fused optimizers and FSDP require.)

    Where the base is quantized (by bitsandbytes or torchao) or offloaded (by accelerate), its own forward computes
    W x + b, and the branches are added to it, computed in the dtype of x; `cnext.ops.last_path` is then "plain".

    Args:
        base: the linear layer, (..., in_features) to (..., out_features): a torch.nn.Linear, a quantized one of
            bitsandbytes, or a Conv1D of transformers, whose weight is (in, out). It is frozen.
        branches: name to branch, in the order of summation.
        scale: alpha / total rank; 1.0 in the paper.
        dropout: probability of zeroing an element of x before the branches, in training mode only.
        independent: one dropout mask per branch, as released, instead of one that all branches share.

    Attributes:
        active: names of the branches in the sum; the others are ignored. Default: all.
        router: maps x to weights (..., active branches) of each token's branches, or None. A module becomes part of the
            layer.
        observer: called with every x, or None. (A forward hook would keep the layer from being computed together with
            others.)

    Example:
        >>> layer = AdapterLinear(linear, {"lora": Branch(torch.randn(8, linear.in_features), linear.out_features)})
        >>> layer(torch.randn(2, 5, linear.in_features)).shape

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 1.
    """

    def __init__(
        self,
        base: nn.Module,
        branches: dict[str, Branch],
        scale: float = 1.0,
        dropout: float = 0.0,
        independent: bool = False,
    ) -> None:
        super().__init__()
        # Or another layer with these attributes, see `cnext.adapters.bases`.
        self.base = cast("nn.Linear", base.requires_grad_(False))
        self._own_forward, self._transposed = has_own_forward(base), is_transposed(base)
        # A ModuleDict, which has no type for what is in it.
        self.branches = cast("Mapping[str, Branch]", nn.ModuleDict(branches))
        self.scale = scale
        self.dropout = dropout
        self.independent = independent
        self.active: Sequence[str] = tuple(branches)
        self.router: Callable[[Tensor], Tensor] | None = None
        self.observer: Callable[[Tensor], None] | None = None
        # In a tuple, so that it is no parameter of this module.
        self._unmerged: tuple[nn.Parameter] | None = None
        self._merged_from: list[nn.Parameter] = []
        self._versions: list[int] = []
        """How often each of these parameters had been written when they were merged."""
        self._merge_after_loading = False
        self.register_load_state_dict_post_hook(_merge_again)
        self._join()

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + scale * sum over the active branches of w_i B_i A_i drop(x).

        w_i is 1, or what ``router`` returns for x. Where the layer is merged or no branch is active, the base alone
        runs. Dropout is applied in training mode only. Memory for the backward pass: x, and drop(x) A^T of (..., total
        rank of the active branches).

        Args:
            x: (..., in_features), of the dtype of the base weight: float32, bfloat16, float16 or float64; under
                autocast of any of these. A quantized base takes what it takes by itself.

        Returns:
            (..., out_features), of the dtype of x, or of autocast.

        Raises:
            UserError: a shape, dtype or device does not fit; the base weight was unfrozen; or the branches were written
                to after they had been merged.

        Example:
            >>> branches = {"one": Branch(torch.randn(2, 8), 4)}
            >>> AdapterLinear(nn.Linear(8, 4), branches)(torch.randn(3, 5, 8)).shape
            torch.Size([3, 5, 4])
        """
        if self.observer is not None:
            self.observer(x)
        base = self.base
        if self._unmerged is not None or not self.active:
            if self._merged_from and not torch.compiler.is_compiling():
                self.require_current()
            return base(x)
        branches, weight = [self.branches[name] for name in self.active], self.dense_weight
        y = ops.lora_branches(
            x,
            weight,
            None if weight is None else base.bias,
            [branch.A for branch in branches],
            [branch.B for branch in branches],
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            independent=self.independent,
            routing=None if self.router is None else self.router(x),
        )
        if weight is None:
            frozen = base(x)
            y = frozen + y.to(frozen.dtype)
        return y

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the branches, named "<branch>.<A or B>", and of a router, "router.<name>"."""
        yield from self.get_submodule("branches").named_parameters()
        if isinstance(self.router, nn.Module):
            yield from self.router.named_parameters("router")

    # The four attributes of a linear layer that models ask for, as for the dtype of a weight.
    @property
    def weight(self) -> Tensor:
        """The base layer's weight, only to be asked for its dtype, device and shape unless the branches are merged.

        ``base.weight`` is the one to compute with, which leaves the branches out.
        """
        return self.base.weight if self.merged else read_only(self.base.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """The base layer's input size."""
        return sizes(self.base)[0]

    @property
    def out_features(self) -> int:
        """The base layer's output size."""
        return sizes(self.base)[1]

    @property
    def transposed(self) -> bool:
        """Whether the base weight is (in, out), as in a Conv1D of transformers."""
        return self._transposed

    @property
    def dense_weight(self) -> Tensor | None:
        """The base weight as (out, in); None where only the base's own forward can use it: quantized or offloaded."""
        weight = self.base.weight
        if self._own_forward or is_wrapped(weight):
            return None
        if weight.is_meta and not all(branch.A.is_meta for branch in self.branches.values()):
            return None
        return weight.T if self._transposed else weight

    @property
    def unmergeable(self) -> str | None:
        """Why the branches cannot be merged, to follow "the branches"; None where they can."""
        if self.router is not None:
            return "are routed by their input, so no one weight has them in it"
        if self.dense_weight is None:
            return (
                "are beside a weight that is quantized or offloaded, which cannot take them up exactly; save them, "
                "attach them to the model in bfloat16 or float32 without offloading, and merge them there"
            )
        if "weight" not in self.base._parameters:
            return (
                "are beside a weight that was parametrized after they were attached; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        return None

    @property
    def merged(self) -> bool:
        """Whether the branches are merged into the base weight."""
        return self._unmerged is not None

    @property
    def unmerged_weight(self) -> nn.Parameter:
        """The base weight without the branches, merged or not."""
        if self._unmerged is not None:
            return self._unmerged[0]
        if "weight" not in self.base._parameters:
            raise UserError(f"the branches {self.unmergeable}")
        return self.base.get_parameter("weight")

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def merge(self) -> None:
        """Gives the base another weight, W + scale * sum over the active branches of B_i A_i.

        Summed in float32 at least, then cast to W's dtype. The layer then costs as much as its base. The branches are
        kept, and W for `unmerge`. W itself is not written: other layers may own it too, as embeddings tied to a head.

        Raises:
            UserError: merged already; routed: weights that depend on x cannot be merged; or the base weight is
                quantized or offloaded.
        """
        if self.merged:
            raise UserError("merge: the branches are merged already; call unmerge first")
        if (reason := self.unmergeable) is not None:
            raise UserError(f"merge: the branches {reason}")
        weight = self.base.get_parameter("weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide, copy=True)
        rows = total.T if self._transposed else total
        for name in self.active:
            branch = self.branches[name]
            rows.addmm_(branch.B.to(wide), branch.A.to(wide), alpha=self.scale)
        self._unmerged = (weight,)
        self._remember()
        self.base.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Gives the base its weight from before `merge` again.

        Raises:
            UserError: not merged.
        """
        if self._unmerged is None:
            raise UserError("unmerge: the branches are not merged; call merge first")
        (self.base.weight,) = self._unmerged
        self._unmerged, self._merged_from, self._versions = None, [], []

    def _remember(self) -> None:
        parameters = [each for name in self.active for each in self.branches[name].parameters()]
        self._merged_from = [parameter for parameter in parameters if not parameter.is_inference()]
        self._versions = [parameter._version for parameter in self._merged_from]

    @property
    def current(self) -> bool:
        """Whether the branches are as they were merged: nothing has written to them since. True where not merged."""
        return [parameter._version for parameter in self._merged_from] == self._versions

    def require_current(self) -> None:
        """Raises UserError where the merged weight is not that of the branches as they are."""
        if not self.current:
            raise UserError(
                "the branches were trained, averaged or loaded after they had been merged, and the weights are not "
                "those of the branches as they are; call unmerge, and merge again"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of any module, with the unmerged weight where the branches are merged: loading cannot add them twice."""
        found = super().state_dict(*args, **kwargs)
        if self._unmerged is not None:
            (weight,), prefix = self._unmerged, args[1] if len(args) > 1 else kwargs.get("prefix", "")
            keep = args[2] if len(args) > 2 else kwargs.get("keep_vars", False)
            found[f"{prefix}base.weight"] = weight if keep else weight.detach()
        return found

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The state has the unmerged weight, and the branches from which `_merge_again` makes the merged one.
        if self.merged:
            self.unmerge()
            self._merge_after_loading = True
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _join(self) -> None:
        """Moves every A into one matrix. The parameters stay the same objects."""
        parts = [branch.A for branch in self.branches.values()]
        if {type(part) for part in parts} == {nn.Parameter} and len({(part.dtype, part.device) for part in parts}) == 1:
            rows = torch.cat([part.detach() for part in parts]).split([part.shape[0] for part in parts])
            for part, row in zip(parts, rows, strict=True):
                part.data = row

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLinear:
        current = self.current
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            if current:
                self._remember()
            (weight,) = nn.ParameterList(self._unmerged)._apply(fn, recurse)
            self._unmerged = (weight,)
        self._join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._merged_from, self._versions = [], []
        if self._unmerged is not None:
            self._remember()
        self._join()


def _merge_again(layer: nn.Module, _: object) -> None:
    """Ends the loading of a state into a layer that was merged."""
    if isinstance(layer, AdapterLinear) and layer._merge_after_loading:
        layer._merge_after_loading = False
        layer.merge()
