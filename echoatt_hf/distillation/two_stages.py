"""Both stages of a distillation, from settings: training that can be stopped and resumed."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled

from ..models.devices import default_device, explained_memory_errors, processes
from ..models.dtypes import cast_weights
from ..settings import DataSettings, DistillationSettings, default_of
from ..text.rows import collate_rows, shuffle_rows
from .adapters import add_lora, merge_lora
from .checkpoints import train_from_last_checkpoint
from .stored_teacher import StoredTeacher
from .trainer import EchoAttTrainer, EchoAttTrainingArguments
from .trainer_args import parse_trainer_args


__all__ = ["DistillationInterrupted", "count_trained_rows", "make_training_arguments", "train_two_stages"]

# transformers renamed it.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

ROWS_PER_STEP = "rows_per_step"
"""Key of the entries of a trainer's log that say how many rows the steps after them have."""


class DistillationInterrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; what it had done is saved, and it can be resumed."""


def train_two_stages(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train_rows: Dataset | IterableDataset | StoredTeacher,
    settings: DistillationSettings,
    checkpoints: Path,
    *,
    held_out_rows: list[dict] | None = None,
    evaluate: Callable[[str, PreTrainedModel], object] | None = None,
    shuffle_buffer: int = default_of(DataSettings.__dataclass_fields__["shuffle_buffer"]),
    trainer_class: Callable[..., EchoAttTrainer] = EchoAttTrainer,
) -> EchoAttTrainer:
    """
    Distil a student in two stages, going on from the last checkpoint if there is one.

    Args:
        student, teacher (`PreTrainedModel`):
            The models; the student is trained in place, and its weights are float32 after that, as other types cannot hold
            the smaller steps. With `settings.lora_rank` adapters are trained and merged, the weights keep their type, and
            the student may share the teacher's. With a stored teacher the other one is not used.
        train_rows (`Dataset`, `IterableDataset` or [`StoredTeacher`]):
            Packed rows, as returned by [`pack_rows`], or with what the teacher says of them. Each pass has another order.
        settings ([`DistillationSettings`]):
            Steps, rates and weights. A learning rate that is not given is that for the student's width.
        checkpoints (`Path`):
            Folder for checkpoints.
        held_out_rows (`list[dict]`, *optional*):
            Rows to log the loss of every `settings.eval_steps` steps.
        evaluate (`Callable`, *optional*):
            Called with `"stage 1"` and `"stage 2"` and the student, with its adapters, at the end of each stage.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Rows of a stream from which the next one is drawn.
        trainer_class (`Callable`, *optional*, defaults to [`EchoAttTrainer`]):
            Called with what that takes to make the trainer, such as `partial(PostShareTrainer, pairs=pairs)`.

    Returns:
        [`EchoAttTrainer`]: after training.

    Raises:
        `DistillationInterrupted`: Ctrl-C was pressed; the step was finished and a checkpoint saved.
        `MemoryError`: a step needs more memory than there is; the message says what needs less.
    """
    settings = settings.for_width(student.config.get_text_config().hidden_size)
    transformers.set_seed(settings.seed)
    use_cache = student.config.use_cache
    model = student
    if settings.lora_rank:
        model = add_lora(student, settings.lora_rank)
    else:
        cast_weights(student, torch.float32)
    if isinstance(train_rows, IterableDataset):
        # Without an end: `Trainer` skips the rows of a resumed run within one pass only.
        train_rows = shuffle_rows(train_rows.repeat(None), settings.seed, shuffle_buffer)
    callback = _StageCallback(settings, evaluate)
    trainer = trainer_class(
        model=model,
        teacher=teacher if settings.stage1_steps and not isinstance(train_rows, StoredTeacher) else None,
        args=make_training_arguments(settings, checkpoints),
        train_dataset=train_rows,
        eval_dataset=held_out_rows if settings.eval_steps else None,
        data_collator=collate_rows,
        callbacks=[callback],
    )
    if settings.lora_rank and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        divider = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed's ZeRO-3"
        raise ValueError(
            f"lora_rank is {settings.lora_rank}, and {divider} divides the weights that adapters are merged into: launch with "
            "examples/accelerate/ddp.yaml or zero2.yaml, or set lora_rank to 0."
        )
    # Several processes would not all be told of Ctrl-C in the same step.
    is_alone = trainer.accelerator.num_processes == 1
    remedy = (
        f"a step has {settings.batch_size} rows in {settings.accumulation_steps} micro-batches. More accumulation_steps, "
        "gradient_checkpointing or a smaller batch_size need less, and a run of the command line goes on with them and "
        "--resume. Adapters (lora_rank), bf16 or shorter rows need a new run"
    )
    with (
        explained_memory_errors(remedy),
        _finish_step_on_interrupt(callback) if is_alone else nullcontext(),
    ):
        train_from_last_checkpoint(trainer)
    student.config.use_cache = use_cache  # which `Trainer` turns off
    if callback.interrupted:
        raise DistillationInterrupted
    if settings.lora_rank:
        merge_lora(model)
    return trainer


def count_trained_rows(state: TrainerState) -> int:
    """Rows in the steps that led to a state of [`train_two_stages`], also in those before it was resumed."""
    changes = [entry for entry in state.log_history if ROWS_PER_STEP in entry]
    # Of a run that another version began the first one is not at 0.
    ends = [*(entry["step"] for entry in changes[1:]), state.global_step]
    starts = [0, *ends[:-1]]
    return sum((end - start) * entry[ROWS_PER_STEP] for entry, start, end in zip(changes, starts, ends, strict=True))


def make_training_arguments(settings: DistillationSettings, output_dir: Path) -> EchoAttTrainingArguments:
    """The arguments of the trainer for settings whose learning rate is known."""
    values = asdict(settings)
    batch_size, accumulation_steps = values.pop("batch_size"), values.pop("accumulation_steps")
    number = processes().num_processes
    if batch_size % (accumulation_steps * number):
        raise ValueError(
            f"batch_size is {batch_size}, which {number} processes with accumulation_steps {accumulation_steps} do not divide."
        )
    del values["recipe"], values["steps"], values["lora_rank"]
    values[CHECKPOINTING] = values.pop("gradient_checkpointing")
    values["eval_steps"] = settings.eval_steps or None
    # What `accelerate launch` was told counts, and with DeepSpeed the two must agree.
    values["bf16"] = settings.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    decided = {
        "output_dir": str(output_dir),
        "stage1_steps": settings.stage1_steps,
        "per_device_train_batch_size": batch_size // (accumulation_steps * number),
        "per_device_eval_batch_size": values.pop("evaluation_batch_size"),
        "gradient_accumulation_steps": accumulation_steps,
        "eval_strategy": "steps" if settings.eval_steps else "no",
        "use_cpu": default_device() == "cpu",
    }
    defaults = {
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": "none",
    }
    given = parse_trainer_args(values.pop("trainer_args"), decided.keys() | values.keys())
    return EchoAttTrainingArguments(**decided | values | defaults | given)


class _StageCallback(TrainerCallback):
    """Evaluates at the end of each stage, and on Ctrl-C ends the run after the step with a checkpoint."""

    def __init__(self, settings: DistillationSettings, evaluate: Callable[[str, PreTrainedModel], object] | None):
        self._ends = {}
        if settings.stage1_steps:
            self._ends[settings.stage1_steps] = "stage 1"
        if settings.stage2_steps:
            self._ends[settings.steps] = "stage 2"
        self._evaluate, self._batch_size = evaluate, settings.batch_size
        self.interrupted = False

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        # In the log, which checkpoints keep, as a resumed run may have steps of another size.
        state.log_history.append({"step": state.global_step, ROWS_PER_STEP: self._batch_size})

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        name = self._ends.get(state.global_step)
        if name is not None:
            if self._evaluate is not None:
                self._evaluate(name, model)
            control.should_save = True
        if self.interrupted and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        else:
            self.interrupted = False


@contextmanager
def _finish_step_on_interrupt(callback: _StageCallback) -> Iterator[None]:
    """The first Ctrl-C lets the step finish; the second one stops at once."""

    def on_interrupt(signum, frame):
        callback.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not in the main thread, where no Ctrl-C arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
