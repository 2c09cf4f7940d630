"""Two-stage distillation of a student from its teacher, as a `Trainer`."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import fsdp2_prepare_model
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import IterableDataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import id_tensor_storage
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_echoatt import read_layer_plan
from ..modeling_echoatt import EchoAttPreTrainedModel
from ..models.checks import check_no_nan, check_same_tokenizer
from ..models.families import find_attention_modules
from ..models.heads import OutputHead
from ..settings import (
    DIVERGENCES,
    HIDDEN_DISTANCES,
    check_divergence,
    check_hidden_distance,
    default_of,
    parse_layers,
)
from ..text.rows import STORED_COLUMNS, TARGET_MASKS
from .head_losses import compute_losses
from .losses import (
    HardLabelLoss,
    KeptLogits,
    LogitLosses,
    NextTokenLoss,
    TeacherDivergence,
    divergence_from_stored,
    hard_labels_from_stored,
    hidden_distance,
    relative_distance,
    target_mask,
)
from .stored_teacher import StoredTeacher


__all__ = ["EchoAttTrainer", "EchoAttTrainingArguments"]

# What `Trainer` takes and this one has no use for.
_UNUSED = {
    "model_init": "give the student itself as model",
    "compute_loss_func": "the losses are those of the weights in EchoAttTrainingArguments; override compute_loss for another",
}

_WEIGHTS = ("kl_weight", "hard_label_weight", "ce_weight", "hidden_weight", "attention_weight")


@dataclass
class EchoAttTrainingArguments(TrainingArguments):
    """
    Arguments of a two-stage distillation. All of [`~transformers.TrainingArguments`] apply; these are added or have
    another default.

    > Parameters that control the stages

    Args:
        stage1_steps (`int`, *optional*, defaults to 1000):
            Optimizer steps of stage 1, in which the student learns from the teacher.
        stage2_steps (`int`, *optional*, defaults to 0):
            Optimizer steps of stage 2, in which the student learns from the text alone. `max_steps` is the sum.
        learning_rate (`float`, *optional*, defaults to 5e-5):
            Peak learning rate of stage 1. The default is that of transformers, for every model. `echoatt distill` goes by the
            model's width in its place, 0.128 / hidden size and at most 1e-3, which we recommend here too.
        stage2_learning_rate (`float`, *optional*):
            Peak learning rate of stage 2; a tenth of `learning_rate` if not given. `lr_scheduler_type` and
            `warmup_steps` apply to each stage for itself.

    > Parameters that control the loss of stage 1

    Args:
        kl_weight (`float`, *optional*, defaults to 1.0):
            Weight of the divergence of the student's next-token distributions from the teacher's.
        divergence (`str`, *optional*, defaults to `"forward"`):
            Which one: `"forward"`, KL(teacher || student), `"reverse"`, KL(student || teacher), or
            `"jensen_shannon"`, between the two.
        kl_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of both distributions in the divergence, and of nothing else.
        hard_label_weight (`float`, *optional*, defaults to 0.0):
            Weight of the cross-entropy of the token that the teacher finds likeliest, at each position.
        ce_weight (`float`, *optional*, defaults to 0.0):
            Weight of the cross-entropy of the text. Raise it where the text is better than the teacher. While training,
            `label_smoothing_factor` applies to the cross-entropy of both stages, and the router loss of a mixture of
            experts that is configured to have one (`output_router_logits`) is part of it.
        hidden_weight (`float`, *optional*, defaults to 0.0):
            Weight of the distance between the hidden states of matching layers.
        hidden_layers (`str` or sequence of `int`, *optional*, defaults to `"all"`):
            Whose outputs are compared, the last layer's after the final norm: those of `"all"` layers, of the last layer of
            each of the `"blocks"` of layers that share, or of layers such as `[3, 7]` or `"3,7"`.
        hidden_distance (`str`, *optional*, defaults to `"relative"`):
            Which one: `"relative"`, the squared distance over the squared length of the teacher's state, or `"squared"`,
            the squared distance as it is, the mean over features.
        attention_weight (`float`, *optional*, defaults to 0.0):
            Weight of the relative squared distance between what the attention of echo layers adds, after its output
            projection, and what the teacher's adds in the same layers. Try 0.1; more harmed one of the two students
            measured in the README.

    Raises:
        `ValueError`: a number is out of range, `max_steps` or `num_train_epochs` is given, as the stages say how long to
            train, or `parallelism_config` divides rows or layers, which these losses are not made for.

    The recipe of the EchoAtt paper is `kl_weight=0.25, divergence="reverse", hard_label_weight=0.5, hidden_weight=0.25,
    hidden_layers="blocks", hidden_distance="squared", learning_rate=1e-4, stage2_learning_rate=1e-4, warmup_steps=0.005,
    lr_scheduler_type="cosine"`, with `stage2_steps` a quarter of `stage1_steps`; [`DistillationSettings`] has it by name.

    Source: arXiv 2409.14595, section 3 (distillation, then fine-tuning).
    """

    stage1_steps: int = field(default=1000, metadata={"help": "Optimizer steps of stage 1 (from the teacher)."})
    stage2_steps: int = field(default=0, metadata={"help": "Optimizer steps of stage 2 (from the text alone)."})
    stage2_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of stage 2; a tenth of learning_rate if not given."}
    )
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of the divergence from the teacher's predictions in stage 1."}
    )
    divergence: str = field(default="forward", metadata={"help": f"Which divergence: {', '.join(DIVERGENCES)}."})
    kl_temperature: float = field(default=1.0, metadata={"help": "Temperature of the divergence in stage 1."})
    hard_label_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy of the teacher's likeliest token in stage 1."}
    )
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy of the text in stage 1."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the hidden-state distance in stage 1."})
    hidden_layers: str = field(
        default="all", metadata={"help": "Whose hidden states: 'all', 'blocks' (the last layer of each), or 3,7."}
    )
    hidden_distance: str = field(
        default="relative", metadata={"help": f"Which distance of hidden states: {', '.join(HIDDEN_DISTANCES)}."}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance of the attention outputs of echo layers in stage 1."}
    )

    # `EchoAttTrainer` stops at such a loss instead of leaving it out of the log.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave losses that are not finite out."})

    def __post_init__(self):
        for name in ("stage1_steps", "stage2_steps", *_WEIGHTS):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be 0 or more.")
        if not (math.isfinite(self.kl_temperature) and self.kl_temperature > 0):
            raise ValueError(f"kl_temperature is {self.kl_temperature}; it must be above 0.")
        check_divergence(self.divergence)
        check_hidden_distance(self.hidden_distance)
        if not isinstance(self.hidden_layers, str):
            self.hidden_layers = ",".join(map(str, self.hidden_layers))
        parse_layers(self.hidden_layers)
        if self.stage1_steps > 0 and not any(getattr(self, name) for name in _WEIGHTS):
            raise ValueError(f"{', '.join(_WEIGHTS)} are all 0: stage 1 would learn nothing.")
        if self.attention_weight > 0 and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            raise ValueError(
                f"attention_weight is {self.attention_weight} and torch_compile is set, but compiled models do not show what "
                "the attention of a layer gives: leave out one of them."
            )
        steps = self.stage1_steps + self.stage2_steps
        if steps == 0:
            raise ValueError("stage1_steps and stage2_steps are both 0: give at least one stage some steps.")
        if self.max_steps not in (-1, steps):
            raise ValueError(
                f"max_steps is {self.max_steps}, but the stages have {self.stage1_steps} + {self.stage2_steps} steps: "
                "leave max_steps out, the stages define it."
            )
        self.max_steps = steps
        if self.num_train_epochs != (default := default_of(type(self).__dataclass_fields__["num_train_epochs"])):
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs}, but the stages are counted in steps: leave it at {default}, and "
                "set stage1_steps and stage2_steps, epochs · rows / rows in a step."
            )
        if self.label_smoothing_factor < 0 or self.label_smoothing_factor >= 1:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be at least 0 and below 1."
            )
        for name in ("tp_size", "cp_size", "sp_size"):
            if getattr(self.parallelism_config, name, 1) > 1:
                raise ValueError(
                    f"parallelism_config has a {name} of {getattr(self.parallelism_config, name)}, which divides rows or layers, "
                    "but the losses need whole ones in each process: leave it out, and divide the weights with FSDP2 or "
                    "ZeRO-3."
                )
        if self.stage2_learning_rate is None:
            self.stage2_learning_rate = self.learning_rate / 10
        super().__post_init__()
        for steps in (self.stage1_steps, self.stage2_steps):
            _stage_factor(self, torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate), steps)


class EchoAttTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that distils a student from its teacher in two stages, in one `train()`.

    Stage 1 minimises `kl_weight` · divergence from the teacher + `hard_label_weight` · cross-entropy of its likeliest token
    + `ce_weight` · cross-entropy of the text + `hidden_weight` · distance of hidden states + `attention_weight` · distance of
    the attention outputs of echo layers; stage 2 minimises the cross-entropy of the text alone. Each part is logged. Losses
    are divided by the number of target tokens of the whole batch, over all accumulation steps and processes. `eval_loss` is
    the cross-entropy in both stages, the mean over all target tokens. The teacher is kept frozen, in evaluation mode, and
    out of every checkpoint; FSDP2 and ZeRO-3 divide its weights among processes, in place, as they do the student's.

    Args:
        model (`PreTrainedModel`):
            The student, such as an [`EchoAttForCausalLM`], or one with adapters, as [`add_lora`] makes it.
        args ([`EchoAttTrainingArguments`], *optional*):
            Arguments of the run; the defaults if not given.
        teacher (`PreTrainedModel`, *optional*):
            The model the student was made from, or another one with the same tokenizer. The tokenizers are compared where
            they are known: the student's is `processing_class`, or the one that was saved with it, the teacher's the one
            that was saved with it. Only needed for stage 1, and not there if `train_dataset` is a [`StoredTeacher`]. Its
            KL is that over its k tokens and one outcome for all others, so the temperature must be 1.
        kwargs:
            Everything else [`~transformers.Trainer`] takes, but `model_init` and `compute_loss_func`.

    Raises:
        `TypeError`: `args` are not `EchoAttTrainingArguments`, or `teacher` is no model.
        `ValueError`: stage 1 has steps but there is no teacher, teacher and student do not fit together, one of them has
            weights that are NaN, the student has nothing to train or would train weights of the teacher, several GPUs are
            visible to one process, or the loss needs more than a stored teacher holds.

    Example:

    ```python
    >>> trainer = EchoAttTrainer(model=student, teacher=teacher, args=args, train_dataset=rows)
    >>> trainer.train()
    ```
    """

    # The loss is divided by the tokens of the whole batch, see `compute_loss`.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: EchoAttTrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        if args is None:
            args = EchoAttTrainingArguments()
        if not isinstance(args, EchoAttTrainingArguments):
            raise TypeError(f"args is {type(args).__name__}; give EchoAttTrainingArguments.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would use DataParallel and weigh tokens wrongly: "
                "start with `accelerate launch` or `torchrun`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        for name, remedy in _UNUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is given, which this trainer does not use: {remedy}.")
        rows = kwargs.get("train_dataset")
        stored = rows if isinstance(rows, StoredTeacher) else None
        if stored is not None:
            _check_stored_teacher(stored, model, teacher, args, kwargs.get("processing_class"))
        elif args.stage1_steps > 0:
            _check_teacher(model, teacher, args, kwargs.get("processing_class"))
            check_no_nan(teacher, "teacher")
        if model is not None:
            _check_trainable(model, teacher)
            check_no_nan(model, "student")
        if isinstance(rows, IterableDataset):
            # Without an end: of a stream that ends within a run, `Trainer` would resume with the first row.
            kwargs["train_dataset"] = rows.repeat(None)
        self._router_weight = _router_weight(model)
        super().__init__(model=model, args=args, **kwargs)
        from ..publishing.callbacks import PublishingCallback

        self._publishing = PublishingCallback(teacher)
        self.add_callback(self._publishing)
        # `train` counts the target tokens of a batch only for models whose loss they divide.
        self.model_accepts_loss_kwargs = True
        # What is compiled is compiled whole.
        self._head = OutputHead.find(self.model, args.use_liger_kernel) if not args.torch_compile else None
        self.teacher = None
        if args.stage1_steps > 0 and stored is None:
            # Before it is prepared for mixed precision.
            self._teacher_head = OutputHead.find(teacher, args.use_liger_kernel)
            self.teacher = self._prepare_teacher(teacher.requires_grad_(False).eval())
            _restore_forward(teacher)
        self._stored_vocab_size = stored.manifest["vocab_size"] if stored is not None else None
        # While evaluating, the sum of the loss over target tokens, and their number.
        self._evaluated: torch.Tensor | None = None
        # Sum of each loss part since the last log, and the steps it was part of.
        self._parts: dict[str, tuple[torch.Tensor, set[int]]] = {}

    @property
    def stage(self) -> int:
        """`int`: the stage of the step that comes next, 1 or 2."""
        return 1 if self.state.global_step < self.args.stage1_steps else 2

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train both stages. See [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: the checkpoint was saved with FSDP or DeepSpeed, and this run has not the same, or the other way
                round: its optimizer states could not be read.
        """
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            _check_layout(self, get_last_checkpoint(self.args.output_dir) if folder is True else folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_teacher(self, teacher: PreTrainedModel) -> nn.Module:
        """The teacher on its device, divided among processes where the student's weights are."""
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            return fsdp2_prepare_model(self.accelerator, teacher)
        if is_deepspeed_zero3_enabled():
            import deepspeed

            config = {
                "train_micro_batch_size_per_gpu": self.args.per_device_train_batch_size,
                "zero_optimization": {"stage": 3},
                "bf16": {"enabled": teacher.dtype == torch.bfloat16},
                "fp16": {"enabled": teacher.dtype == torch.float16},
            }
            return deepspeed.initialize(model=teacher, config=config)[0]
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def compute_loss_context_manager(self):
        """
        The context of a loss. Mixed precision is its matter, and none of the models': where accelerate puts it, into their
        `forward`, it would stay, and what a student is found to be worth on the way would depend on how it is trained.
        """
        _restore_forward(self.model)
        context = super().compute_loss_context_manager()
        context.enter_context(self.accelerator.autocast())
        return context

    def training_step(self, model, inputs, num_items_in_batch=None):
        """
        Loss and gradients of a batch.

        Raises:
            `FloatingPointError`: the loss is not finite; the message names the step and the rows. The weights are those
                before the step.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Waits for the device, in place of `logging_nan_inf_filter`, which does so too and is off.
        if not torch.isfinite(loss):
            raise FloatingPointError(self._describe_failure(model, inputs, loss))
        return loss

    def _describe_failure(self, model, inputs: dict, loss: torch.Tensor) -> str:
        number = len(inputs["input_ids"])
        failed = list(range(number))
        if self.accelerator.num_processes == 1:  # a model on several devices may not run on one of them alone
            rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in failed]
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = [self.compute_loss(model, self._prepare_inputs(row)) for row in rows]
            failed = [row for row, value in enumerate(losses) if not torch.isfinite(value)] or failed
        begins = "; ".join(" ".join(map(str, inputs["input_ids"][row, :8].tolist())) for row in failed[:3])
        remedy = "look at these rows of the text, or leave them out"
        if len(failed) == number:
            remedy = "as no row is spared, lower the learning rate, or compute in float32"
        return (
            f"The loss of step {self.state.global_step + 1} (stage {self.stage}) is {loss.item()}, for {len(failed)} of "
            f"the {number} rows in the batch, which begin with the tokens {begins}{' ...' if len(failed) > 3 else ''}. The "
            f"step is not made, and checkpoints are as they were: {remedy}."
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Loss of the current stage, in nats per target token of the whole batch; the cross-entropy while evaluating.
        """
        # Transformers keeps the documents of packed rows apart only where there is no cache.
        inputs = {**inputs, "use_cache": False}
        labels = inputs.pop("labels", None)
        stored = {name: inputs.pop(name) for name in STORED_COLUMNS if name in inputs}
        if labels is None:
            raise ValueError(
                "The batch has no labels: use `collate_rows`, or a collator that adds labels (-100 = not predicted)."
            )
        num_tokens = target_mask(labels).sum() if num_items_in_batch is None else num_items_in_batch
        # A batch in which every label is masked has nothing to learn: a loss of 0, not 0 / 0.
        num_tokens = torch.as_tensor(num_tokens, device=labels.device).clamp_min(1)
        if model.training and self.stage == 1:
            loss, parts, outputs = self._stage1_loss(model, inputs, stored, labels, num_tokens, return_outputs)
        else:
            losses = LogitLosses({"ce": self._next_token_loss(model, labels)}, {"ce": 1.0}, labels, num_tokens)
            loss, parts, outputs = self._loss_of_logits(model, inputs, losses, return_outputs)
        if model.training and self._router_weight and getattr(outputs, "aux_loss", None) is not None:
            # As in the family's own loss, where it comes with the cross-entropy; a mean over tokens, as that is.
            parts["router"] = outputs.aux_loss.to(loss.device) * target_mask(labels).sum().to(loss.device) / num_tokens
            ce_weight = self.args.ce_weight if self.stage == 1 else 1.0
            loss = loss + ce_weight * self._router_weight * parts["router"]
        if model.training:
            self._add_parts(parts)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The tokens are those of all processes, over which gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As that of `Trainer`. Where the loss alone is asked for, the logits of the whole batch are not made."""
        inputs = self._prepare_inputs(inputs)
        if prediction_loss_only:
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.compute_loss(model, inputs).detach(), None, None
        else:
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if self._evaluated is not None and found[0] is not None:
            tokens = target_mask(inputs["labels"]).sum()
            self._evaluated = self._evaluated + torch.stack([found[0].float() * tokens, tokens])
        return found

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """
        As that of `Trainer`, but the loss is the mean over all target tokens. That of `Trainer` is a mean over rows of the
        means of their batches: with answers of different lengths it changes with the batch size.
        """
        self._evaluated = torch.zeros(2, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            total, tokens = self.accelerator.reduce(self._evaluated).tolist()
        finally:
            self._evaluated = None
        name = f"{metric_key_prefix}_loss"
        if name in output.metrics:
            output.metrics[name] = total / max(tokens, 1)
        return output

    def _stage1_loss(
        self, model: nn.Module, inputs: dict, stored: dict, labels: torch.Tensor, num_tokens: torch.Tensor, whole: bool
    ):
        """The weighted sum of the losses of stage 1, its parts, and the outputs of the student."""
        args = self.args
        with_hidden = args.hidden_weight > 0
        echoes = self.model.config.echo_layers if args.attention_weight > 0 else []
        losses = {}
        with_labels = args.hard_label_weight > 0
        if self.teacher is not None and (args.kl_weight > 0 or with_labels or with_hidden or echoes):
            with torch.no_grad(), _attention_outputs(self.teacher, echoes) as teacher_attended:
                teacher_logits, teacher_outputs = self._ask_teacher(inputs, output_hidden_states=with_hidden)
        if self.teacher is not None and with_labels and args.kl_weight > 0:
            teacher_logits = KeptLogits(teacher_logits)
        if args.kl_weight > 0:
            if self.teacher is None:
                losses["kl"] = divergence_from_stored(args.divergence, *_stored_parts(stored), self._stored_vocab_size)
            else:
                losses["kl"] = TeacherDivergence(args.divergence, teacher_logits, args.kl_temperature)
        if with_labels and self.teacher is None:
            losses["hard_label"] = hard_labels_from_stored(_stored_parts(stored)[0])
        elif with_labels:
            losses["hard_label"] = HardLabelLoss(teacher_logits)
        # Where states are all that counts, DDP still waits for a gradient of what makes the logits of them: zero.
        if args.ce_weight > 0 or not losses:
            losses["ce"] = self._next_token_loss(model, labels)
        weights = {name.removesuffix("_weight"): getattr(args, name) for name in _WEIGHTS}
        with _attention_outputs(model, echoes) as attended:
            loss, parts, outputs = self._loss_of_logits(
                model,
                inputs,
                LogitLosses(losses, weights, labels, num_tokens),
                whole,
                output_hidden_states=with_hidden,
            )
        if with_hidden:  # the first entry is the embeddings, which no layer has touched
            layers = find_hidden_layers(args.hidden_layers, self.model.config)
            states = [[each.hidden_states[layer + 1] for layer in layers] for each in (outputs, teacher_outputs)]
            parts["hidden"] = hidden_distance[args.hidden_distance](*states, labels.to(loss.device), num_tokens)
        if echoes:
            states = [[found[layer] for layer in echoes] for found in (attended, teacher_attended)]
            parts["attention"] = relative_distance(*states, labels.to(loss.device), num_tokens)
        loss = loss + sum(weights[name] * part for name, part in parts.items() if name not in losses)
        return loss, parts, outputs

    def _next_token_loss(self, model: nn.Module, labels: torch.Tensor) -> NextTokenLoss:
        """The cross-entropy, with smoothed labels while training."""
        return NextTokenLoss(labels, self.args.label_smoothing_factor if model.training else 0.0)

    def _ask_teacher(self, inputs: dict, **options):
        """The teacher's logits, as a function of tokens of the flattened batch, and its other outputs."""
        if self._teacher_head is None:
            outputs = self.teacher(**inputs, **options)
            logits = outputs.logits.flatten(0, 1)
            return lambda tokens: logits[tokens], outputs
        with self._teacher_head.last_states() as kept:
            outputs = self.teacher(**inputs, **options, logits_to_keep=1)
        return self._teacher_head.logits(kept), outputs

    def _loss_of_logits(self, model: nn.Module, inputs: dict, losses: LogitLosses, whole: bool, **options):
        """
        The weighted sum of `losses`, its parts by name, and the outputs of the model: with all logits if `whole` or if
        the head cannot be called alone.
        """
        if whole or self._head is None:
            outputs = model(**inputs, **options)
            parts = losses.parts(outputs.logits.flatten(0, 1))
            loss = losses.total(parts)
        else:
            with self._head.computes(partial(compute_losses, losses), self.accelerator.autocast) as found:
                outputs = model(**inputs, **options, logits_to_keep=1)
            loss, parts = outputs.loss, found[0]
        return loss, dict(zip(losses.losses, parts, strict=True)), outputs

    def _set_signature_columns_if_needed(self) -> None:
        """
        Keep what a stored teacher adds to a row, and the masks of tokens to predict, which are for the collator: `Trainer`
        would take them out as nothing the model knows.
        """
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *STORED_COLUMNS, *TARGET_MASKS])]

    def _add_parts(self, parts: dict[str, torch.Tensor]) -> None:
        for name, part in parts.items():
            total, steps = self._parts.get(name, (0.0, set()))
            self._parts[name] = total + part.detach(), steps | {self.state.global_step}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the loss parts beside the loss, such as `kl_loss`, and the stage."""
        if "loss" in logs and self._parts:
            # Divided by the tokens of all processes, or each by its own.
            how = "sum" if self.args.average_tokens_across_devices else "mean"
            for name, (total, steps) in self._parts.items():
                logs[f"{name}_loss"] = self.accelerator.reduce(total, how).item() / len(steps)
            logs["stage"] = 1 if self.state.global_step <= self.args.stage1_steps else 2
            self._parts = {}
        super().log(logs, start_time)

    def create_model_card(
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, dataset=None, **kwargs
    ) -> None:
        """The card of a student, see [`make_card`]; of adapters and other models that of the base class."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, EchoAttPreTrainedModel):
            options = {"tags": tags, "model_name": model_name, "finetuned_from": finetuned_from, "dataset": dataset}
            return super().create_model_card(language=language, license=license, **options, **kwargs)
        lists = {
            name: [value] if isinstance(value, str) else value
            for name, value in (("tags", tags), ("datasets", dataset))
        }
        options = {"language": language, "license": license, "title": model_name, "base_model": finetuned_from}
        self._publishing.write(self.args, self.state, model, **options, **lists)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """One schedule for each stage, the second scaled to `stage2_learning_rate`."""
        if self.lr_scheduler is None:
            args, optimizer = self.args, self.optimizer if optimizer is None else optimizer
            first, second = (_stage_factor(args, optimizer, steps) for steps in (args.stage1_steps, args.stage2_steps))
            scale = args.stage2_learning_rate / args.learning_rate if args.learning_rate else 0.0

            def factor(step: int) -> float:
                if step < args.stage1_steps:
                    return first(step)
                return scale * second(step - args.stage1_steps)

            self.lr_scheduler = LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def _stage_factor(
    args: EchoAttTrainingArguments, optimizer: torch.optim.Optimizer, steps: int
) -> Callable[[int], float]:
    """Factor of the learning rate by step, of the schedule the arguments name."""
    options = dict(args.lr_scheduler_kwargs or {})
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=max(steps, 1),
            scheduler_specific_kwargs=options,
        )
    except TypeError as error:
        raise ValueError(
            f"lr_scheduler_kwargs is {options}, which lr_scheduler_type {str(args.lr_scheduler_type)!r} does not take: {error}."
        ) from error
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type is {str(args.lr_scheduler_type)!r}, which is not a function of the step and "
            "cannot be used for two stages: use linear, cosine, constant or another of that kind."
        )
    return scheduler.lr_lambdas[0]


@contextmanager
def _attention_outputs(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """
    What the attention of `layers` gives in the forward pass made in this context, after its output projection.

    The hooks are gone when the backward pass repeats checkpointed layers: it sees nothing of them.
    """
    outputs = {}

    def keep(module, args, output):
        outputs[module.layer_idx] = output[0]

    attentions = find_attention_modules(model, layers) if layers else {}
    hooks = [attentions[layer].register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _check_layout(trainer: Trainer, checkpoint: str | None) -> None:
    """Check that the optimizer states of a checkpoint are in the files that this run will read: `Trainer` may read none."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        return  # which `Trainer` says
    names = [file.name for file in Path(checkpoint).iterdir()]
    saved_with = _name_layout(
        fsdp=any(name.startswith(FSDP_MODEL_NAME) for name in names),
        deepspeed=any(name.startswith("global_step") for name in names),
    )
    runs_with = _name_layout(fsdp=trainer.is_fsdp_enabled, deepspeed=trainer.is_deepspeed_enabled)
    if saved_with != runs_with:
        raise ValueError(
            f"The checkpoint {Path(checkpoint).name!r} was saved with {saved_with}, and this run has {runs_with}, which cannot "
            "read its optimizer states: launch as before, or start anew from its weights."
        )


def _name_layout(*, fsdp: bool, deepspeed: bool) -> str:
    return "FSDP" if fsdp else "DeepSpeed" if deepspeed else "neither FSDP nor DeepSpeed"


def _stored_parts(stored: dict) -> list[torch.Tensor]:
    """Token ids `(B, T, k)` and log-probabilities `(B, T, k + 1)` of a batch of a stored teacher."""
    if len(stored) < len(STORED_COLUMNS):
        raise ValueError(f"The batch lacks {' or '.join(STORED_COLUMNS)} of the stored teacher: use `collate_rows`.")
    return [stored[name] for name in STORED_COLUMNS]


def _restore_forward(model: nn.Module) -> None:
    """Take the autocast of accelerate out of a model's `forward`."""
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    del model.forward
    if getattr(original, "__func__", None) is not type(model).forward:  # it had another one, as of a `device_map`
        model.forward = original


def _router_weight(student: nn.Module | None) -> float:
    """Weight of the router loss that a mixture of experts is configured to have, 0 for other models."""
    config = student.config.get_text_config() if student is not None else None
    if not getattr(config, "output_router_logits", False):
        return 0.0
    weights = {
        value for module in student.modules() if (value := vars(module).get("router_aux_loss_coef")) is not None
    }
    if len(weights) != 1:
        raise ValueError(
            f"The student's configuration asks for a router loss (output_router_logits), but models of type "
            f"{config.model_type!r} do not say its weight: set output_router_logits to False."
        )
    return float(weights.pop())


def _check_teacher(
    student: nn.Module | None, teacher: PreTrainedModel | None, args: EchoAttTrainingArguments, tokenizer
) -> None:
    if teacher is None:
        raise ValueError("Stage 1 needs a teacher: give teacher=..., or set stage1_steps=0.")
    if student is None:
        return  # Trainer says what is missing
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher is {teacher!r}, not a model: load it, as with load_model.")
    if teacher is student:
        raise ValueError("teacher and model are the same object: the teacher must stay as it is.")
    check_same_tokenizer(student, teacher, tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None)
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    weights = [name for name in ("hidden_weight", "attention_weight") if getattr(args, name) > 0]
    if weights and (ours.num_hidden_layers, ours.hidden_size) != (theirs.num_hidden_layers, theirs.hidden_size):
        raise ValueError(
            f"The student has {ours.num_hidden_layers} layers of size {ours.hidden_size} and the teacher "
            f"{theirs.num_hidden_layers} of size {theirs.hidden_size}: set {' and '.join(weights)} to 0, or give the "
            "teacher the student was made from."
        )
    echoes = getattr(student.config, "echo_layers", [])
    if args.attention_weight > 0 and not echoes:
        raise ValueError(
            f"attention_weight is {args.attention_weight}, but the student has no echo layers, whose attention outputs "
            "it compares: set it to 0, or give a student whose plan has some."
        )
    if args.attention_weight > 0:
        find_attention_modules(teacher, echoes)
    if args.hidden_weight > 0:
        find_hidden_layers(args.hidden_layers, student.config)


def find_hidden_layers(name: str, config: PreTrainedConfig) -> list[int]:
    """
    The layers whose hidden states `hidden_layers` of [`EchoAttTrainingArguments`] names.

    Args:
        name (`str`): as there.
        config (`PreTrainedConfig`): configuration of the student.

    Raises:
        `ValueError`: the student has not these layers, or no blocks.
    """
    count, plan = config.get_text_config().num_hidden_layers, getattr(config, "plan", [])
    if name == "all":
        return list(range(count))
    layers = parse_layers(name)
    if layers is None:
        last = {source: layer for layer, (_, source) in enumerate(read_layer_plan(plan)) if source is not None}
        layers = sorted(last.values())
    if not layers:
        raise ValueError(
            "hidden_layers is 'blocks', but the student has no layers that share: set it to 'all', set hidden_weight to 0, or "
            "give a student whose plan has some."
        )
    if max(layers) >= count:
        raise ValueError(
            f"hidden_layers is {name!r}, but the student has {count} layers: give indices up to {count - 1}."
        )
    return layers


def _check_stored_teacher(
    stored: StoredTeacher, student: nn.Module | None, teacher: PreTrainedModel | None, args, tokenizer
) -> None:
    if teacher is not None:
        raise ValueError("There is a teacher and a stored one, train_dataset: give one of them.")
    if args.stage1_steps > 0:
        for name in ("hidden_weight", "attention_weight"):
            if getattr(args, name) > 0:
                raise ValueError(
                    f"{name} is {getattr(args, name)}, but a stored teacher has log-probabilities alone: set it to 0, or give "
                    "the teacher itself."
                )
        if args.kl_temperature != 1:
            raise ValueError(
                f"kl_temperature is {args.kl_temperature}, but a stored teacher keeps the mass of all tokens outside its "
                "top k as one outcome, whose probability is known at temperature 1 only: set it to 1, or give the teacher "
                "itself."
            )
    if student is not None:
        stored.check_student(student, tokenizer)


def _check_trainable(student: nn.Module, teacher: nn.Module | None) -> None:
    trainable = {name: _storage(value) for name, value in student.named_parameters() if value.requires_grad}
    if not trainable:
        raise ValueError(
            "The student has no trainable parameter, as one that shares the teacher's weights: train adapters with "
            "add_lora(student, rank), or convert without share_weights."
        )
    of_teacher = {_storage(value) for value in teacher.parameters()} if teacher is not None else set()
    shared = [name for name, storage in trainable.items() if storage is not None and storage in of_teacher]
    if shared:
        raise ValueError(
            f"{len(shared)} trainable parameters of the student are the teacher's own, such as {shared[0]}, and training "
            "would change the teacher: train adapters with add_lora(student, rank), which freezes all else, or convert "
            "without share_weights."
        )


def _storage(tensor: torch.Tensor) -> tuple | None:
    """What identifies the memory of a tensor; `None` without memory, as on the meta device."""
    storage = id_tensor_storage(tensor)
    return storage if storage[1] else None
