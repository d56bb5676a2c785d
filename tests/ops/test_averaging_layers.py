"""The averaging rules give the same bits in every layer: C++, CUDA and Triton, on a GPU or interpreted.

On a CPU the instruction set in use is compared with the baseline; `test_averaging_kernels` runs this file where Triton
interprets, and CNEXT_TEST_DEVICE=cuda on a GPU.
"""

import math

import numpy
import pytest
import torch
from ops.averaging_cases import BF16, DEVICE, F16, F32, LAYERS
from torch import Tensor

from cnext import ops
from cnext.ops import dispatch
from cnext.ops.averaging_table import OPS
from cnext.ops.foreach import Prepared

INTERPRETED = "triton" in LAYERS and DEVICE == "cpu"
# Triton's interpreter cuts float32 to bfloat16 instead of rounding.
DTYPES = [(F32, F32), (F16, F32), (F16, F16), *([] if INTERPRETED else [(BF16, F32), (BF16, BF16)])]
SIZES = {
    "every size a multiple of 16": (48, 1024, 4096, 16, 8208, 1040, 4112),
    "any size": (1, 4095, 4097, 0, 8, 1023, 5, 3001),
    "nothing but empty tensors": (0, 0),
}
PLACES = {"aligned": 0, "one element beside": 1}
NUMBERS = {
    "fisher_accumulate_": {"scale": 0.3},
    "pema_merge_": {"new_scale": 0.7, "c": 3.0},
    "ema_step_": {"beta": 0.93},
    "pema_step_": {"decay": 0.9, "scale": 1 / 7},
    "pema_literal_": {"damping": 0.7, "scale": 0.3, "decay": 0.1},
    "dema_step_": {"factor": 1.7, "fallback": 0.013},
    "adamw_pema_step_": {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "scale": 1 / 3, "decay": 0.99},
    "adamw_pema_step_shared_": {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6},
}
every_op = pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.rules])


def slices(sizes: tuple[int, ...], place: int, dtype: torch.dtype, values: Tensor, device: str = "cpu") -> list[Tensor]:
    """Tensors of these sizes in one slab, each at a multiple of 64 bytes and ``place`` elements beside it."""
    slab = torch.empty(sum(sizes) + 64 * len(sizes), dtype=dtype, device=device)
    begin, made = 0, []
    for size in sizes:
        begin += -(slab.data_ptr() // slab.element_size() + begin) % (64 // slab.element_size()) + place
        made.append(slab[begin : begin + size])
        made[-1].copy_(values[:size])
        values, begin = values[size:], begin + size
    return made


def drawn(op: str, sizes: tuple[int, ...], place: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[list[Tensor]]:
    """The op's lists: every value that a guard asks about is among them."""
    lists = []
    for name, role in OPS[op].roles.items():
        values = torch.randn(sum(sizes))
        if name.startswith("fisher") or name == "exp_avg_sq":
            values = values.square() * 1e-2 * (torch.rand(len(values)) > 0.1)
        if name in ("grad", "theta") and op != "pema_merge_":
            for bad in (math.nan, math.inf, -math.inf, 0.0, 1e-30, 3e19):
                values[torch.rand(len(values)) < 0.02] = bad
        lists.append(slices(sizes, place, {"p": dtypes[0], "e": dtypes[1]}.get(role, F32), values))
    return lists


def rows(op: str, tensors: int) -> list[Tensor]:
    name, width = OPS[op].rows
    if not name:
        return []
    table = torch.rand(tensors, width, dtype=torch.float64) * 1e-2
    if width == 4:
        table[:, 1:] = torch.tensor([0.99, 0.037, 0.61], dtype=torch.float64)
    table[:1, 0] = 0.0
    return [table if width > 1 else table.view(-1)]


def moved(lists: list[list[Tensor]], place: int) -> list[list[Tensor]]:
    """Copies on the device of the tests, placed alike."""
    return [
        slices(tuple(tensor.numel() for tensor in tensors), place, tensors[0].dtype, torch.cat(tensors), DEVICE)
        for tensors in lists
    ]


@every_op
@pytest.mark.parametrize("impl", LAYERS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_same_bits_as_the_baseline_of_the_cpp_layer(op, impl, dtypes, place, sizes):
    torch.manual_seed(1)
    given, extra = drawn(op, sizes, place, dtypes), rows(op, len(sizes))
    result, expected = moved(given, place), given
    core = dispatch.core("cpp")
    before = core.use_instruction_set("baseline")
    try:
        counts = getattr(torch.ops.cnext, op)(*expected, *extra, **NUMBERS.get(op, {}), impl="cpp")
    finally:
        core.use_instruction_set(before)
    extra = [table.to(DEVICE) for table in extra]
    found = getattr(torch.ops.cnext, op)(*result, *extra, **NUMBERS.get(op, {}), impl=impl)
    for name, mine, theirs in zip(OPS[op].roles, result, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if op == "dema_step_" and name == "ema":
                # Its weight comes of norms, which are summed in another order.
                torch.testing.assert_close(
                    a.cpu(), b, rtol={BF16: 1e-2, F16: 1e-3}.get(b.dtype, 1e-6), atol=0, equal_nan=True
                )
            else:
                kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
                assert torch.equal(a.cpu().view(kind), b.view(kind)), name
    if counts is not None:
        torch.testing.assert_close(found.cpu(), counts, rtol=1e-5, atol=1e-9, equal_nan=True)


if DEVICE == "cuda":

    @pytest.mark.parametrize("impl", LAYERS)
    def test_offsets_are_64_bit(impl):
        """One tensor of more than 2^31 elements, its last ones among those that are written."""
        values = torch.zeros(2**31 + 8, device=DEVICE)
        values[0], values[-1] = 1.0, 2.0
        assert ops.sums([values], impl=impl).item() == 3.0
        ops.fisher_accumulate_([values], [values.clone()], scale=0.5, impl=impl)
        assert (values[0].item(), values[1].item(), values[-1].item()) == (1.5, 0.0, 4.0)

    def captured(call: Prepared, *arguments: Tensor) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(*arguments)
        return graph

    def state(seed: int) -> tuple[list[list[Tensor]], Tensor]:
        torch.manual_seed(seed)
        lists = [[torch.randn(3001, device=DEVICE) for _ in range(40)] for _ in range(4)]
        lists[2] = [tensor.square() for tensor in lists[2]]
        return lists, torch.full((40,), 0.1, dtype=torch.float64, device=DEVICE)

    @pytest.mark.parametrize("impl", LAYERS)
    def test_a_prepared_call_in_a_graph_among_other_calls(impl):
        lists, level = state(0)
        plain = [[tensor.clone() for tensor in tensors] for tensors in lists]
        step = ops.prepare("pema_step_", *lists, impl=impl)
        step(level)  # Triton compiles and uploads its tables
        ops.pema_step_(*plain, level, impl=impl)
        graph = captured(step, level)
        for seed in range(1, 40):
            others, _ = state(seed)
            ops.pema_step_(*others, level, impl=impl)
        for _ in range(3):
            graph.replay()
            ops.pema_step_(*plain, level, impl=impl)
        for mine, theirs in zip(lists, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def test_cuda_is_captured_without_a_call_before():
        lists, level = state(0)
        plain = [[tensor.clone() for tensor in tensors] for tensors in lists]
        graph = captured(ops.prepare("pema_step_", *lists, impl="cuda"), level)
        graph.replay()
        ops.pema_step_(*plain, level, impl="cuda")
        assert all(torch.equal(a, b) for a, b in zip(lists[3], plain[3], strict=True))

    def test_triton_refuses_to_be_captured_without_its_tables():
        lists, level = state(0)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(ValueError, match="call it once before the capture"), torch.cuda.graph(graph):
            ops.pema_step_(*lists, level, impl="triton")

    @pytest.mark.parametrize("impl", LAYERS)
    def test_calls_on_several_streams_do_not_share_scratch_memory(impl):
        lists, level = state(0)
        plain = [[tensor.clone() for tensor in tensors] for tensors in lists]
        step, streams = ops.prepare("pema_step_", *lists, impl=impl), [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for stream in streams * 3:
            with torch.cuda.stream(stream):
                counts = step(level)
            stream.synchronize()
            expected = ops.pema_step_(*plain, level, impl=impl)
            assert numpy.array_equal(counts.cpu().numpy(), expected.cpu().numpy())
