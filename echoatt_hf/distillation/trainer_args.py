"""Arguments of the trainer that have no setting of their own, from the texts of `--trainer-args`."""

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from ..settings import DistillationSettings
from .trainer import EchoAttTrainingArguments


__all__ = ["parse_trainer_args"]

# Arguments of the trainer with another name as a setting.
_SETTING_OF = {
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "stage1_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "evaluation_batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "eval_strategy": "eval_steps",
    "do_eval": "eval_steps",
    "activation_checkpointing": "gradient_checkpointing",
    "data_seed": "seed",
    "warmup_ratio": "warmup_steps",
}

# What would make a run write, start or stop elsewhere than `echoatt` looks, train on other rows, or say more in a report
# than others should know: how processes work together is said to `accelerate launch`.
_DECIDED = {
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "accelerator_config",
    "parallelism_config",
    "output_dir",
    "use_cpu",
    "do_train",
    "do_predict",
    "resume_from_checkpoint",
    "save_strategy",
    "save_only_model",
    "save_on_each_node",
    "load_best_model_at_end",
    "remove_unused_columns",
    "label_names",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_always_push",
    "hub_private_repo",
    "hub_revision",
    "enable_jit_checkpoint",
    "auto_find_batch_size",
    "local_rank",
    "fp16",
}


def parse_trainer_args(given: list[str] | None, taken: Collection[str] = ()) -> dict[str, Any]:
    """
    Arguments for [`EchoAttTrainingArguments`].

    Args:
        given (`list[str]`, *optional*): each `key=value`, the value in JSON, as `DistillationSettings.trainer_args` has them.
        taken (collection of `str`): arguments that the run decides itself.

    Raises:
        `ValueError`: there is no such argument, its value has another type, a setting or the run itself decides it, or a
            logger is not installed.
    """
    known = {each.name for each in fields(EchoAttTrainingArguments) if each.init}
    options = {each.name for each in fields(DistillationSettings)}
    hints, found = get_type_hints(EchoAttTrainingArguments), {}
    for argument in given or ():
        key, _, value = argument.partition("=")
        setting = key if key in options else _SETTING_OF.get(key)
        if setting is not None:
            raise ValueError(
                f"trainer_args has {key!r}, which is a setting of its own: give --{setting.replace('_', '-')}."
            )
        if key in _DECIDED or key in taken:
            raise ValueError(f"trainer_args has {key!r}, which `echoatt` decides itself: leave it out.")
        if key not in known:
            close = get_close_matches(key, sorted((known | options) - _DECIDED), 1)
            hint = f"did you mean {close[0]!r}" if close else "see transformers' TrainingArguments"
            raise ValueError(f"trainer_args has {key!r}, which is no argument of the trainer: {hint}?")
        found[key] = _converted(key, json.loads(value), hints[key])
    for name in _loggers(found.get("report_to")):
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(f"report_to is {name!r}: {error}") from None
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to is {name!r}, which is not installed: install it with `pip install {name}`.")
    return found


def _loggers(report_to: str | list[str] | None) -> list[str]:
    if report_to in (None, "none", "all"):
        return []
    return [report_to] if isinstance(report_to, str) else report_to


def _converted(key: str, value: Any, hint: Any) -> Any:
    """A value as a type of its field. A text may be a number that YAML does not take for one, such as 1e-3."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in kinds if get_origin(kind) is not Literal]
    if any(type(value) is kind for kind in kinds):
        return value
    if not isinstance(value, (bool, list, dict, NoneType)):
        for kind in (float, str):
            with suppress(ValueError):
                if kind in kinds:
                    return kind(value)
    names = ["null" if kind is NoneType else kind.__name__ for kind in kinds]
    raise ValueError(
        f"trainer_args has {key}={json.dumps(value)}; its value must be of the type {' or '.join(names)}."
    )
