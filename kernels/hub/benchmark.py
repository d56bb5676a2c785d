"""`kernels benchmark ./OUT`: each op beside its definition in plain torch, checked before it is timed."""

import torch
from kernels.benchmark import Benchmark

BRANCHES, RANK, DROPOUT = 4, 8, 0.05


class Averages(Benchmark):
    """A step of the averaging rules over 32 matrices of a million parameters each."""

    seed = 0

    def setup(self) -> None:
        shape = (32, 1024, 1024) if self.device != "cpu" else (4, 64, 64)
        self.ema, self.theta, self.grad = (torch.randn(shape, device=self.device) for _ in range(3))
        self.before, self.fisher = self.ema.clone(), self.grad.square()
        self.lists = [list(one) for one in (self.ema, self.theta, self.fisher)]

    def benchmark_ema_step(self) -> None:
        self.ema.copy_(self.before)
        self.kernel.ema_step_(self.lists[1], self.lists[0], beta=0.99)
        self.out = self.ema

    def verify_ema_step(self) -> torch.Tensor:
        return 0.99 * self.before + 0.01 * self.theta

    def benchmark_fisher_accumulate(self) -> None:
        self.fisher.zero_()
        self.kernel.fisher_accumulate_(self.lists[2], list(self.grad), scale=0.5)
        self.out = self.fisher

    def verify_fisher_accumulate(self) -> torch.Tensor:
        return 0.5 * self.grad.square()


class Branches(Benchmark):
    """A linear layer with four branches of rank 8 and dropout."""

    seed = 0

    def setup(self) -> None:
        rows, width, dtype = (4096, 4096, torch.bfloat16) if self.device != "cpu" else (64, 256, torch.float32)
        self.x = torch.randn(rows, width, device=self.device, dtype=dtype)
        self.weight = torch.randn(width, width, device=self.device, dtype=dtype) / width**0.5
        self.a = [torch.randn(RANK, width, device=self.device, dtype=dtype) / width**0.5 for _ in range(BRANCHES)]
        self.b = [torch.randn(width, RANK, device=self.device, dtype=dtype) / RANK for _ in range(BRANCHES)]

    def benchmark_lora_branches(self) -> None:
        self.out = self.kernel.lora_branches(self.x, self.weight, None, self.a, self.b, scale=1.0)

    def verify_lora_branches(self) -> torch.Tensor:
        return self.kernel.lora_branches(self.x, self.weight, None, self.a, self.b, scale=1.0, impl="reference")
