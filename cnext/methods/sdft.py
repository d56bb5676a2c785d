"""SDFT: LoRA of rank 32 that learns from its own answers, corrected by itself with a demonstration in view.

For a question x with the demonstration c, here the sample's answer, the model writes an answer y of its own, sampled
from p(. | x). Its teacher is a moving average of the model, which reads the demonstration beside the question:

    L = mean over samples of mean over t of KL(p(. | y_<t, x) || p_teacher(. | y_<t, x, c))
    theta_teacher <- (1 - ema) theta_teacher + ema theta    after every step; theta at the start of a task

over the whole vocabulary at each token; y is not differentiated. The cross-entropy with the demonstration is computed
for the log, and its gradient is dropped. How much is learnt depends on what a demonstration in the context changes: a
model that cannot use one teaches itself nothing, and the paper's model of 3 B parameters learns less by it than by
fine-tuning.

From the paper: the loss (its equations have this direction; it reports that its experiments used the other one,
``divergence`` "forward"), answers sampled on-policy, the sum over the vocabulary, the teacher and its rates of 0.01 to
0.05. Decided here: where the demonstration stands (``template``), for the embedded model does not know the words of the
paper's prompt; no token is left out of the loss, as answers are a word or two where the paper masks the first three; a
conversation's first turn alone is learnt; and tasks that write an image, whose features or codes are predicted in one
pass from nothing of the model's own, and whose demonstration would be a second image beside the one that is read, are
trained by the task loss.

Not the method of the same initials in arXiv 2402.13669, which rewrites the demonstrations.

Reference: Shenfeld et al., Self-Distillation Enables Continual Learning, arXiv 2601.19897.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext import adapters, ops
from cnext.averaging.base import by_kind
from cnext.backbones.base import Backbone, outer_model
from cnext.errors import UserError, unknown
from cnext.methods.base import Card, Memory
from cnext.methods.parts.low_rank import LowRank
from cnext.tasks.base import Sample, Task, Turn

DIVERGENCES = ("reverse", "forward")


@contextmanager
def sampled(backbone: Backbone, seeds: Sequence[int]) -> Iterator[None]:
    """Context in which `Backbone.generate` samples each token from its distribution, instead of the most likely one.

    The most likely token of logits with Gumbel noise is a sample of their distribution.

    Args:
        seeds: one for each sample. Its answer follows from this alone, as long as the backbone generates all of them
            in one batch; else the answers follow from all seeds and the batches.
    """
    # A backbone's own head, where it has one, needs no transformers.
    head: Any = getattr(backbone, "lm_head", None)
    head = outer_model(backbone).get_output_embeddings() if head is None else head
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def add(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        own = generators if len(logits) == len(generators) else generators[:1] * len(logits)
        rows = torch.stack([torch.rand(logits.shape[1:], generator=each) for each in own])
        noise = -torch.log(-torch.log(rows.double().clamp(2**-60, 1 - 2**-50)))
        return logits + noise.to(logits)

    handle = head.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def divergence(student: Tensor, teacher: Tensor, counts: Sequence[int], direction: str) -> Tensor:
    """KL(student || teacher), "reverse", or KL(teacher || student), "forward": a mean over samples of means over t.

    Args:
        student, teacher: logits (N, vocabulary) of the tokens of all samples, one sample after another.
        counts: tokens of each sample, N in all.

    Returns:
        A scalar, in nats; 0 without samples.
    """
    q, p = (logits.log_softmax(-1) for logits in (student, teacher))
    first, second = (q, p) if direction == "reverse" else (p, q)
    tokens = F.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    parts = [part.mean() for part in tokens.split(list(counts))]
    return torch.stack(parts).mean() if parts else student.sum()


@dataclass
class Sdft(LowRank):
    """y = W x + scale B A x."""

    scale: float = 3.0
    lr_factor: float = 0.25
    ema: Annotated[float, "Weight of the current parameters in the teacher's, at each step."] = 0.02
    divergence: Annotated[str, "KL of the student from the teacher (reverse), or of the teacher (forward)."] = "reverse"
    template: Annotated[str, "What the teacher is asked: a text with {demonstration} and {question}."] = (
        "{demonstration} {question}"
    )
    longest: Annotated[int, "Most tokens of an answer of its own, if the task does not allow fewer."] = 32

    card = Card(
        "arXiv 2601.19897",
        keeps="within a task a moving average of the parameters",
        grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema <= 1 <= self.longest:
            raise UserError(f"sdft: expected 0 <= ema <= 1 <= longest, got {self.ema} and {self.longest}")
        if self.divergence not in DIVERGENCES:
            raise unknown("divergence", self.divergence, DIVERGENCES)
        if missing := [place for place in ("{demonstration}", "{question}") if place not in self.template]:
            raise UserError(f"sdft: template must contain {' and '.join(missing)}, got {self.template!r}")
        self.step, self.teacher = 0, {}
        self.distills, self.most = False, self.longest

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.distills, self.most = "image" not in task.writes, min(self.longest, task.max_new_tokens)
        return super().trainable(task)

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        self.parameters, self.step = parameters, 0
        online = parameters if self.distills else {}
        self.teacher = {name: p.detach().to(torch.float32, copy=True) for name, p in online.items()}

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        for parameter in parameters.values() if self.distills else ():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.distills:
            return None
        training = self.model.training
        self.backbone.eval()
        own, shown = self.rollouts(self.batch_samples)
        with torch.no_grad(), adapters.holding(self.parameters, self.teacher):
            wanted = self.backbone.output(self.backbone.encode(shown)).logits
        encoded = self.backbone.encode(own)
        counts = [self.backbone.supervised([each])[0] for each in encoded]
        given = self.backbone.train(training).output(encoded).logits
        if len(given) != len(wanted):
            raise UserError(
                "sdft: an answer has another number of tokens after the demonstration than without it; choose a "
                f"template that ends as the question does, got {self.template!r}"
            )
        return divergence(given, wanted, counts, self.divergence)

    def rollouts(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """The questions with the model's own answers, sampled; and these after the demonstrations, for the teacher."""
        texts = [f"{self.backbone.seed}/{self.step}/{sample.id}" for sample in samples]
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in texts]
        # Answers end at different tokens on different processes.
        with self.uneven(), sampled(self.backbone, seeds):
            answers = [answer.text for answer in self.backbone.generate(samples, self.most)]
        own, shown = [], []
        for sample, answer in zip(samples, answers, strict=True):
            first = sample.turns[0]
            own.append(replace(sample, turns=(Turn(first.instruction, answer),), prompt="", references=()))
            shown.append(replace(own[-1], turns=(Turn(self.prompt(first), answer),)))
        return own, shown

    def prompt(self, turn: Turn) -> str:
        """What the teacher is asked: the question and its demonstration in the template."""
        parts = {"demonstration": turn.answer, "question": turn.instruction}
        return re.sub(r"\{(demonstration|question)\}", lambda place: parts[place[1]], self.template)

    def after_step(self) -> None:
        self.step += 1
        for names in by_kind(self.teacher):
            online: list[Tensor] = [self.parameters[name] for name in names]
            ops.ema_step_(online, [self.teacher[name] for name in names], beta=1 - self.ema)

    def after_task(self) -> None:
        self.teacher = {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step), **self.teacher}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        online = self.adapter_parameters()
        self.teacher = {
            name: value.to(online[name].device, copy=True) for name, value in state.items() if name != "step"
        }
