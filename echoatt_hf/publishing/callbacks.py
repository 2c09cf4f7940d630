"""What a `Trainer` needs to push students that are whole in the middle of a run."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from ..configuration_echoatt import EchoAttConfig
from ..outputs.files import write_whole
from ..outputs.provenance import describe_conversion, describe_environment, describe_teacher
from ..planning.sharing import SharingPlan
from ..settings import default_of
from .card import write_model_card


__all__ = ["CODE_FILES", "PublishingCallback", "copy_code"]

CODE_FILES = ("configuration_echoatt.py", "modeling_echoatt.py")
"""The files by which a student loads where this package is not installed."""


def copy_code(folder: Path) -> None:
    """Copy the code that loads a student into its folder."""
    for name in CODE_FILES:
        shutil.copy(Path(__file__).parents[1] / name, folder / name)


class PublishingCallback(TrainerCallback):
    """
    Keeps in the output folder of a `Trainer` what a push needs beside the model: the two code files, `report.json` and the
    model card. [`EchoAttTrainer`] has it; a `Trainer` that fine-tunes a student takes it in `callbacks`, or else what it
    pushes in the middle of a run lacks the code.

    Args:
        teacher (`PreTrainedModel`, *optional*):
            The model the student is distilled from.
    """

    def __init__(self, teacher: PreTrainedModel | None = None):
        self._teacher = describe_teacher(teacher) if teacher is not None else {}

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        self.write(args, state, model)

    def write(self, args, state, model, **options) -> None:
        """Write code, report and card; `options` are those of [`make_card`]."""
        # Also of a student whose class is that of its own code, as it was loaded before this package was imported.
        is_student = isinstance(model, PreTrainedModel) and model.config.model_type == EchoAttConfig.model_type
        if not state.is_world_process_zero or not is_student:
            return
        folder = Path(args.output_dir)
        copy_code(folder)
        evaluations = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        report = {
            "plan": SharingPlan(model.config.plan).to_dict(),
            "architecture": type(model).__name__,
            "teacher": self._teacher,
            "conversion": describe_conversion(model.name_or_path),
            "steps": state.global_step,
            "stage2_steps": state.global_step - min(state.global_step, getattr(args, "stage1_steps", 0)),
            "tokens": state.num_input_tokens_seen,
            "arguments": _changed_arguments(args),
            "environment": describe_environment(),
        }
        if evaluations and math.isfinite(evaluations[-1]):
            report["eval_loss"] = evaluations[-1]
        write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
        write_model_card(folder, repo_id=_full_name(args), **options)


# What makes a run what it is. An argument that is not among them, such as a token or a folder, is never published.
_TOLD_ARGUMENTS = [
    "stage1_steps",
    "stage2_steps",
    "stage2_learning_rate",
    "kl_weight",
    "divergence",
    "kl_temperature",
    "hard_label_weight",
    "ce_weight",
    "hidden_weight",
    "hidden_layers",
    "hidden_distance",
    "attention_weight",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "tf32",
    "seed",
    "data_seed",
]


def _changed_arguments(args) -> dict[str, str]:
    told = {field.name: (getattr(args, field.name), default_of(field)) for field in fields(args)}
    told = {name: values for name, values in told.items() if name in _TOLD_ARGUMENTS}
    return {
        name: str(getattr(value, "value", value))
        for name, (value, default) in told.items()
        if value is not None and value != default
    }


def _full_name(args) -> str | None:
    """The repository a run pushes to, if it is told with its owner, without whom nobody can load it."""
    return args.hub_model_id if args.hub_model_id and "/" in args.hub_model_id else None
