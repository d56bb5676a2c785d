"""The one tolerance of the op tests."""

import torch
from torch import Tensor


def assert_as_accurate(
    result: Tensor, plain: Tensor, exact: Tensor, what: str = "", factor: float = 2.0, roundings: float = 1.0
) -> None:
    """A kernel may err, against float64, by a small factor more than plain torch at the same precision does.

    The largest error over the tensor counts, and the rounding of the result to its dtype is always allowed.

    Args:
        result: what the kernel gave.
        plain: the reference at the same precision.
        exact: the reference in float64, from the same inputs.
        roundings: how often the result may have been rounded (2 where the path cuts instead of rounding).
    """
    dtype = result.dtype
    assert dtype == plain.dtype
    assert torch.equal(result.isfinite(), plain.isfinite()), f"{what}: not finite where plain torch is, or the reverse"
    fine = exact.isfinite() & plain.isfinite()
    result, plain, exact = (tensor.double()[fine] for tensor in (result, plain, exact))
    if not exact.numel():
        return
    scale = exact.abs().max()
    allowed = factor * (plain - exact).abs().max() + roundings * torch.finfo(dtype).eps / 2 * scale
    worst = (result - exact).abs().max()
    assert worst <= allowed, f"{what}: error {worst:.3e}, allowed {allowed:.3e}, values up to {scale:.3e}"
