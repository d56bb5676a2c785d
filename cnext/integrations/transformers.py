"""`AveragingCallback`: the moving averages of `cnext.averaging` in transformers' Trainer, and in TRL's trainers."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cnext.adapters import saving
from cnext.adapters.attach import adapter_parameters, branch_parameters, layers, require_unmerged
from cnext.averaging import RULES, MovingAverage, PemaKron
from cnext.distributed.wrapped_names import without_wrappers
from cnext.errors import UserError, listed, unknown
from cnext.integrations import average_file
from cnext.integrations.gradients import Clipping, Observed

SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP", "XLA")
"""accelerate's kinds of training in which a process has only a part of the gradients or parameters, or not in .grad."""


class AveragingCallback(TrainerCallback):
    """A moving average over each task that transformers' Trainer, or one of TRL's, trains.

    The parameters of the model that require a gradient when ``train`` begins are averaged, as in a loop of one's own;
    on a CPU to the bit.

    - An optimizer step's gradients are read accumulated, reduced, unscaled and before clipping. Trainer clips before it
      calls its callbacks, so within a step this one has its accelerator clip by infinity, and clips by
      ``max_grad_norm`` itself after reading. The arguments never change, and the norm in the logs is the one before
      clipping, as without it.
    - The steps of the task are ``max_steps``, or what Trainer computes from the epochs. After the last one the
      parameters become the average, before Trainer evaluates and saves for the last time.
    - Evaluations that Trainer schedules within a task see the average, where the rule has one at every step. ``pema``
      and ``pema-kron`` have none before the task's end: the parameters in training are evaluated.
    - Every checkpoint has the average's state, what is kept of earlier tasks included, in
      ``moving_average.safetensors``. ``train(resume_from_checkpoint=...)`` restores it, in a new process too, and
      checks that the model's parameters are those that it was saved with, and the others those of the same base model.
      A task that is resumed at its end stays as it is, so a script that trains several tasks can resume each from its
      last checkpoint.
    - With ``pema-kron``, the branches of `cnext.attach_mage` that a task does not train are ``frozen``, and their
      gradients are read; of a matrix that no branch trains, as A after `train_all`, they are not.

    Where training stops before the last step, as on a callback's request, its checkpoints can be resumed; the model's
    parameters become the average over the steps that were taken, with a warning, or it is an error where those are too
    few for the rule. Refused from the start are ``load_best_model_at_end``, as the best parameters in training are no
    average; hyperparameter search; and training that shards gradients or parameters, as DeepSpeed and FSDP do.

    Args:
        average: a rule of `cnext.averaging.RULES`, or a `MovingAverage`. It serves all tasks, one after another.
        eval_sets: number of evaluation sets, where the trainer's ``eval_dataset`` is a dict of several.
        peak_learning_rate: the schedule's largest, for ``pema-kron``, whose pull follows the learning rate. Default:
            the optimizer's before the schedule, which is ``args.learning_rate``.
        untrained: see `MovingAverage.begin_task`. It can be changed between tasks.
        resume_from: folder of the checkpoint that the next ``train`` resumes from, where that is neither in
            ``args.output_dir`` nor ``args.resume_from_checkpoint``: Trainer does not tell its callbacks.
        options: hyperparameters of the rule, where ``average`` is its name.

    Raises:
        UserError: the rule or an option is unknown, or options came with a `MovingAverage`. In ``train``: what is
            refused above; a checkpoint without the average's state, or with that of another rule, number of steps or
            parameters; a merged model, or one of which nothing requires a gradient; several callbacks of this class
            in one trainer; and as `MovingAverage`.

    Warns:
        RuntimeWarning: training stopped early or was interrupted, an evaluation did not see the average, or
            the model is another than in the task before, with other values.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from cnext.integrations.transformers import AveragingCallback
        >>> callback = AveragingCallback("pema", c=5.0)
        >>> branches = cnext.attach_mage(model)  # doctest: +SKIP
        >>> for folder, dataset in tasks.items():  # doctest: +SKIP
        ...     branches.train_on(reads=["text", "image"], writes=["text"])
        ...     Trainer(model, TrainingArguments(folder), train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(
        self,
        average: str | MovingAverage = "pema",
        *,
        eval_sets: int = 1,
        peak_learning_rate: float | None = None,
        untrained: bool = False,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.average = _made(average, options)
        self.eval_sets, self.peak_learning_rate = eval_sets, peak_learning_rate
        self.untrained, self.resume_from = untrained, resume_from
        self._observed = Observed({})
        self._clipping: Clipping | None = None
        self._running = False
        """Whether a task was begun and has not ended."""
        self._done = False
        """Whether Trainer was resumed at a task's end."""
        self._evaluations = 0
        """Evaluation sets that are still to see the average, while it is swapped in."""
        self._model: weakref.ref[nn.Module] | None = None
        """The last task's; None in a copy."""
        self._ended: dict[str, str] = {}
        """Digests of what the tasks ended with, by parameter."""

    def __copy__(self) -> AveragingCallback:
        raise UserError("copy.copy of an AveragingCallback would share its average; use copy.deepcopy")

    def __getstate__(self) -> dict[str, Any]:
        if self._running:
            raise UserError(
                "AveragingCallback: a training is running, and its trainer and model are no part of a copy; copy or "
                "pickle the callback between trainings, and resume a training from its checkpoint"
            )
        return {**self.__dict__, "_model": None, "_clipping": None}

    def save(self, folder: str | Path) -> None:
        """Writes the average's state between two tasks, for training without checkpoints. See `load`.

        Raises:
            UserError: a task is open, or the folder does not exist.
        """
        self._require_closed("save")
        average_file.write(Path(folder), self.average, {})

    def load(self, folder: str | Path) -> None:
        """Reads the state of an average after a task, from its last checkpoint or what `save` wrote.

        For a new process that begins with the next task: the model's parameters are loaded by yourself.

        Raises:
            UserError: a task is open; or there is no state, or one that was saved within a task, in the folder.
        """
        self._require_closed("load")
        found = average_file.read(Path(folder), self.average)
        if found.steps:
            raise UserError(
                f"{found.path} was saved after {found.step} of a task's {found.steps} steps; finish the task first, by "
                "train(resume_from_checkpoint=...)"
            )
        average_file.forget(self.average)
        self._ended = {}
        self.average.load_state_dict(found.tensors)

    def _require_closed(self, what: str) -> None:
        if self.average.steps:
            raise UserError(f"{what}: a task is open; expected it between two tasks")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Begins a task, or restores one."""
        model, optimizer = context["model"], context["optimizer"]
        _require_supported(args, state, optimizer)
        trainers = _trainers(self)
        if self._running and len(trainers) > 1:
            raise UserError(
                "AveragingCallback: a task is open in an outer trainer; the inner one needs a callback of its own"
            )
        if sum(isinstance(each, AveragingCallback) for each in trainers[0].callback_handler.callbacks) > 1:
            raise UserError("AveragingCallback: the trainer has several; give it one")
        require_unmerged(model, layers(model).values(), "AveragingCallback")
        self._clipping = Clipping.of(trainers[0], self)
        self._abandon(optimizer, resumed=state.global_step > 0)
        branches = branch_parameters(model)
        parameters = _trained(model, branches)
        if not parameters:
            raise UserError(
                "AveragingCallback: no parameter of the model requires a gradient; call train_on or train_all before "
                "train"
            )
        if isinstance(self.average, PemaKron):
            others = self.average.beside(parameters, branches) if branches else None
            self.average.frozen = self.average.frozen if others is None else others
            self._observed = Observed(others or {})
        if state.global_step:
            self._resume(args, state, model, parameters)
        else:
            self._warn_of_other_values(model, parameters)
            # A task may be the first of a branch, in layers that earlier tasks have trained.
            own = {_layer(name) for name in parameters if name in branches}
            known = not own.isdisjoint(map(_layer, self.average.past()))
            updates = state.max_steps * self._updates(args)
            self.average.begin_task(parameters, updates, untrained=self.untrained or known)
        self._model, self._running = weakref.ref(model), not self._done
        if self._done:
            self._ended |= _digests(parameters)
        if self._running and args.eval_on_start:
            self._swap_in()

    def _warn_of_other_values(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Warns of a model that is not the one of earlier tasks, nor has their values."""
        if self._model is not None and self._model() is model:
            return
        present = _digests({name: p for name, p in parameters.items() if name in self._ended})
        if other := [name for name, found in present.items() if found != self._ended[name]]:
            warnings.warn(
                f"{listed(other, 3)}: another model than in the task before, and other values than that ended with; an "
                "unrelated model needs a callback of its own, a new copy of the same the values of the last task",
                RuntimeWarning,
                stacklevel=2,
            )

    def _abandon(self, optimizer: Any, resumed: bool) -> None:
        """Closes a task that an exception left open. resumed: whether Trainer has loaded other parameters since."""
        self._done, self._evaluations = False, 0
        if not self._running:
            return
        average, self._running = self.average, False
        if average.step and not resumed:
            warnings.warn(
                f"the training before was interrupted after {average.step} of {average.steps} steps; its parameters "
                "are not averaged",
                RuntimeWarning,
                stacklevel=2,
            )
        kept = [(p, p.detach().clone()) for p in average.parameters.values()] if resumed else []
        average.abort_task()
        with torch.no_grad():
            for parameter, value in kept:  # where the average was swapped in
                parameter.copy_(value)
        if left := self._observed.close({id(p) for group in optimizer.param_groups for p in group["params"]}):
            warnings.warn(
                f"the training before was interrupted, and {listed(left, 3)} still require a gradient and are trained; "
                "call train_on before train",
                RuntimeWarning,
                stacklevel=2,
            )

    def _resume(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, parameters: dict[str, nn.Parameter]
    ) -> None:
        found = self._state(args, state.global_step, model, parameters)
        average_file.forget(self.average)
        self._ended = {}
        if found.steps:
            each = self._updates(args)
            if (found.step, found.steps) != (state.global_step * each, state.max_steps * each):
                raise UserError(
                    f"{found.path} was saved after {found.step} of {found.steps} steps, and Trainer resumes after "
                    f"{state.global_step * each} of {state.max_steps * each}; a task keeps its number of steps: resume "
                    "it with the same max_steps or epochs, batch size, accumulation and data"
                )
            self.average.begin_task(parameters, state.max_steps * each, untrained=self.untrained)
        elif state.global_step < state.max_steps:
            raise UserError(
                f"{found.path}: the task ended after {state.global_step} steps, and its parameters are the average; "
                f"Trainer would go on to {state.max_steps}. Resume with the same number of steps, or train on as a task"
                " of its own, without resume_from_checkpoint, after AveragingCallback.load"
            )
        self.average.load_state_dict(found.tensors)
        self._done = not found.steps

    def _state(
        self, args: TrainingArguments, step: int, model: nn.Module, parameters: Mapping[str, Tensor]
    ) -> average_file.AverageState:
        """The state in the checkpoint that Trainer has loaded: that of the model's parameters."""
        given, self.resume_from = self.resume_from, None
        named = [args.resume_from_checkpoint] if args.resume_from_checkpoint else []
        folders = [Path(given)] if given else [_folder(args, step), *map(Path, named)]
        there = [folder for folder in folders if (folder / average_file.NAME).is_file()]
        found = [average_file.read(folder, self.average) for folder in there or folders[:1]]
        present = average_file.digest(parameters)
        for each in sorted(found, key=lambda each: each.parameters != present):
            saving.require_same(model, each.path.parent)
            if each.parameters == present:
                if each.base not in ("", _base(model)):
                    raise UserError(
                        f"{each.path}: the parameters that were not trained have other values or dtypes now; resume "
                        "with the base model, and the earlier tasks' parameters, that the checkpoint was trained with"
                    )
                return each
        raise UserError(
            f"{listed(str(each.path) for each in found)}: the model's parameters, as Trainer has loaded them, are not "
            "those that this state was saved with. Expected the same checkpoint, restored in full, and the same "
            "parameters to require a gradient as then (train_on); Trainer warns of keys that it could not load. For a "
            "checkpoint elsewhere pass its folder as resume_from"
        )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Checks that the average is not swapped in."""
        self._require_swapped_out()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Postpones the clipping."""
        self._require_swapped_out()
        if self._running:
            self._postponed().open()
            if isinstance(self.average, PemaKron) and self.average.reads:
                self._observed.open()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Reads the gradients, and clips them."""
        model, optimizer = context["model"], context["optimizer"]
        if not self._running:  # Trainer takes a step too many where it is resumed at the end within an epoch
            for parameter in model.parameters() if self._done else ():
                parameter.grad = None
            return
        limit = args.max_grad_norm
        called = self._postponed().close()
        if limit and limit > 0 and not called:
            raise UserError(
                "AveragingCallback: Trainer clipped the gradients by other means than accelerate, before they "
                "could be read; set max_grad_norm to 0"
            )
        scaler = getattr(optimizer, "scaler", None)
        if self.average.place == "before optimizer":
            with self._observed.gradients(1.0 if scaler is None else scaler.get_scale()):
                self.average.update(rate=self._rate(args, optimizer))
        if limit is not None and limit > 0:
            nn.utils.clip_grad_norm_(model.parameters(), limit)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Updates an average whose place is after every micro-batch."""
        if self._running and self.average.place == "micro-batch":
            self.average.update(rate=self._rate(args, context["optimizer"]))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Updates an average whose place is after the optimizer's step."""
        if self._running and self.average.place != "before optimizer":
            self.average.update(rate=self._rate(args, context["optimizer"]))

    def _updates(self, args: TrainingArguments) -> int:
        """Updates of the average in an optimizer step."""
        return args.gradient_accumulation_steps if self.average.place == "micro-batch" else 1

    def _postponed(self) -> Clipping:
        assert self._clipping is not None, "a task was begun"
        return self._clipping

    def _rate(self, args: TrainingArguments, optimizer: Any) -> float:
        """The learning rate over the schedule's largest."""
        own = {id(parameter) for parameter in self.average.parameters.values()}
        rates = []
        for group in optimizer.param_groups:
            if own & {id(parameter) for parameter in group["params"]}:
                peak = self.peak_learning_rate or group.get("initial_lr") or args.learning_rate
                rates.append(float(group["lr"]) / peak if peak else 0.0)
        lowest, highest = min(rates, default=0.0), max(rates, default=0.0)
        # Division rounds.
        if isinstance(self.average, PemaKron) and (highest > 1 + 1e-6 or highest - lowest > 1e-6):
            raise UserError(
                f"the learning rates over the largest are {lowest:.6g} to {highest:.6g}; {self.average.name} expects "
                "one number of at most 1 for all its parameters: pass the schedule's largest as peak_learning_rate"
            )
        return min(highest, 1.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Ends the task after its last step."""
        if not self._running:
            if self._done:
                control.should_save = control.should_evaluate = False
            return
        average = self.average
        each = self._updates(args)
        if (average.step, average.steps) != (state.global_step * each, state.max_steps * each):
            raise UserError(
                f"the average has seen {average.step} of {average.steps} steps, and Trainer is at "
                f"{state.global_step * each} of {state.max_steps * each}; their number cannot change within a task"
            )
        if state.global_step >= state.max_steps:
            self._close()
        elif control.should_evaluate:
            self._swap_in()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Shows the average to an evaluation per epoch."""
        self._require_swapped_out()
        if self._done:
            control.should_save = control.should_evaluate = False
        elif self._running and control.should_evaluate:
            self._swap_in()

    def _close(self) -> None:
        self._observed.close()
        parameters = self.average.parameters
        self.average.end_task()
        self._ended |= _digests(parameters)
        self._running = False

    def _swap_in(self) -> None:
        if self.average.evaluated():
            self.average.swap_in()
            self._evaluations = self.eval_sets

    def _require_swapped_out(self) -> None:
        if self._evaluations:
            left, self._evaluations = self._evaluations, 0
            self.average.swap_out()
            raise UserError(
                f"eval_sets is {self.eval_sets}, and Trainer went on after {self.eval_sets - left} evaluations; give "
                "the number of evaluation sets, and put this callback after those that ask for or cancel evaluations"
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Swaps the average out after the last evaluation set."""
        several = not any(name == "eval_runtime" for name in context.get("metrics") or {"eval_runtime": 0})
        if self._evaluations:
            self._evaluations -= 1
            if self._evaluations == 0:
                self.average.swap_out()
            if several and self.eval_sets == 1:
                raise UserError("eval_dataset has several evaluation sets; pass their number as eval_sets")
        elif self._running and self.average.step and self.average.evaluated():
            warnings.warn(
                "this evaluation saw the parameters in training, not the average: Trainer did not schedule it, or a "
                "callback after this one did; use it within `average.for_eval()`, or put this callback last",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        """Writes the average's state into the checkpoint."""
        self._require_swapped_out()
        model = context["model"]
        if args.should_save:
            trained = _trained(model, branch_parameters(model))
            average_file.write(_folder(args, state.global_step), self.average, trained, _base(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Ends a task that was stopped early."""
        self._done, self._clipping = False, None
        if self._running:
            average = self.average
            try:
                average.require_steps()
            except UserError as error:
                raise UserError(
                    f"AveragingCallback: training stopped after {average.step} of {average.steps} steps, too few for "
                    f"{average.name}; the parameters are those in training. Go on from the last checkpoint, by "
                    "train(resume_from_checkpoint=True), or train anew with fewer max_steps or epochs"
                ) from error
            warnings.warn(
                f"training stopped after {self.average.step} of {self.average.steps} steps: the average is over these. "
                "Checkpoints hold the parameters before it, to be resumed; save_model saves the average",
                RuntimeWarning,
                stacklevel=2,
            )
            self._close()


def _made(average: str | MovingAverage, options: dict[str, Any]) -> MovingAverage:
    if isinstance(average, MovingAverage):
        if options:
            raise UserError(f"AveragingCallback: {', '.join(options)}: options go with a rule's name; set these there")
        return average
    rules = {str(name): rule for name, rule in RULES.items()}
    if average not in rules:
        raise unknown("averaging rule", str(average), list(rules))
    try:
        return rules[average](**options)
    except TypeError as error:
        raise UserError(f"AveragingCallback: {error}; see the arguments of {rules[average].__name__}") from error


def _require_supported(args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
    """Raises UserError for training in which the average would be wrong."""
    kind = getattr(getattr(optimizer, "accelerator_state", None), "distributed_type", None)
    if (name := getattr(kind, "value", "NO")) in SHARDED:
        raise UserError(
            f"AveragingCallback: training is distributed by {name}, in which a process does not have whole gradients; "
            "use data parallelism (DDP) or one process"
        )
    if args.load_best_model_at_end:
        raise UserError(
            "AveragingCallback: load_best_model_at_end would replace the average by parameters in training; set it to "
            "False, and use the last checkpoint, which has the average"
        )
    if state.is_hyper_param_search:
        raise UserError("AveragingCallback: hyperparameter search trains one task anew; use it without the average")
    if getattr(args, "half_precision_backend", None) == "apex":
        raise UserError("AveragingCallback: apex clips the gradients of its own copies; use fp16 or bf16 of torch")


def _folder(args: TrainingArguments, step: int) -> Path:
    """Of Trainer's checkpoint after a step."""
    return Path(str(args.output_dir), f"checkpoint-{step}")


def _trained(model: nn.Module, branches: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient by name, a branch's as `AttachedMage.train_on` has it."""
    names = {id(parameter): name for name, parameter in branches.items()}
    found = {names.get(id(p), name): p for name, p in model.named_parameters() if p.requires_grad}
    return without_wrappers(found, "AveragingCallback")


def _base(model: nn.Module) -> str:
    """Digest of the first values of what is neither trained nor a branch's."""
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    return average_file.digest_of_first(p for p in model.parameters() if not p.requires_grad and id(p) not in own)


def _digests(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: average_file.digest({name: parameter}) for name, parameter in parameters.items()}


def _layer(branch: str) -> str:
    """Of a branch's parameter, "<layer>.<branch>.<A or B>"."""
    return branch.rsplit(".", 2)[0]


def _trainers(callback: AveragingCallback) -> list[Trainer]:
    """Those on the stack that have the callback, the innermost first: Trainer does not tell its callbacks."""
    made, frame = [], sys._getframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(each is callback for each in found.callback_handler.callbacks):
            made += [] if any(each is found for each in made) else [found]
        frame = frame.f_back
    if not made:
        raise UserError("AveragingCallback: expected to be called by transformers' Trainer; pass it as callbacks")
    return made
