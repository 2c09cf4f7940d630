"""How `compress` and `distill` train a student that is made, evaluate it, and write it."""

import json
import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, load_from_disk
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_echoatt import EchoAttConfig, check_base_family
from ..distillation.checkpoints import whole_state
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.trainer import EchoAttTrainingArguments
from ..distillation.two_stages import count_trained_rows, train_two_stages
from ..evaluation.held_out import evaluate_model
from ..models.devices import processes
from ..models.dtypes import as_saved, cast_weights
from ..models.loading import load_config
from ..models.sizes import describe_sizes
from ..outputs.files import write_whole
from ..outputs.provenance import describe_data, describe_environment, describe_teacher, without_paths
from ..planning.sharing import SharingPlan
from ..publishing.card import write_model_card
from ..settings import CompressionSettings, DataSettings, DistillationSettings, StudentSettings, upgrade_settings
from .preparation import load_rows
from .unfinished import work_folder


__all__ = [
    "RunModels",
    "check_losses",
    "check_one_gpu",
    "fill_in_rate",
    "load_rows_once",
    "train_and_write",
    "write_student",
]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunModels:
    """
    The models of a run.

    Args:
        teacher (`PreTrainedModel`, *optional*): none if a stored one takes its place.
        student (`PreTrainedModel`): the student.
        tokenizer (`PreTrainedTokenizerBase`): that of both.
        dtype (`torch.dtype`): the type that the student is saved in.
    """

    teacher: PreTrainedModel | None
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype


def fill_in_rate(
    settings: CompressionSettings | StudentSettings, model: str, output: Path, resume: bool
) -> CompressionSettings | StudentSettings:
    """
    The settings with the learning rate that is used, where none is given: that of the run that is resumed, which may have
    begun with another version and so with another default, or the default for the model.
    """
    rate, begun = settings.distillation.learning_rate, work_folder(output) / "settings.json"
    if rate is None and resume and begun.exists():
        kept = upgrade_settings(json.loads(begun.read_text()))
        rate = kept["settings"].get("distillation", {}).get("learning_rate")
    if rate is not None:
        return replace(settings, distillation=replace(settings.distillation, learning_rate=rate))
    config = load_config(model)
    if not isinstance(config, EchoAttConfig):
        check_base_family(config)  # others may have no hidden size
    return replace(settings, distillation=settings.distillation.for_width(config.get_text_config().hidden_size))


def check_one_gpu(arguments: EchoAttTrainingArguments, remedy: str) -> None:
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process, which trains on one. Make one visible "
            f"(CUDA_VISIBLE_DEVICES=0), or, to train on all of them, {remedy}."
        )


def check_losses(settings: DistillationSettings, plan: SharingPlan) -> None:
    if settings.attention_weight > 0 and not plan.echo_layers:
        raise ValueError(
            f"attention_weight is {settings.attention_weight}, but the plan has no echo layers, whose attention outputs it "
            "compares: set it to 0, or give a plan that has some."
        )


def load_rows_once(
    folder: Path, settings: DataSettings, models: RunModels
) -> tuple[Dataset | IterableDataset, list[dict]]:
    """[`load_rows`]; of several processes the main one reads the text, and the others read its rows from `folder`."""
    together = processes()
    if together.num_processes == 1:
        return load_rows(settings, models.tokenizer, models.student)
    found = [None, None]
    if together.is_main_process:
        rows, held_out_rows = load_rows(settings, models.tokenizer, models.student)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(rows, Dataset):
            rows.save_to_disk(folder)
        found = [isinstance(rows, Dataset), held_out_rows]
    is_on_disk, held_out_rows = broadcast_object_list(found)
    if is_on_disk:
        rows = load_from_disk(str(folder))
    elif not together.is_main_process:  # streamed: `Trainer` lets the main process alone read them
        rows, _ = load_rows(replace(settings, evaluation_rows=1, shuffle_buffer=1), models.tokenizer, models.student)
    return rows, held_out_rows


def train_and_write(
    work: Path,
    models: RunModels,
    train_rows: Dataset | IterableDataset | StoredTeacher,
    held_out_rows: list[dict],
    settings: CompressionSettings | StudentSettings,
    facts: dict,
) -> dict:
    """Distil and evaluate, and write the student to `work / "student"`."""
    start, distillation = time.time(), settings.distillation
    evaluations = _Evaluations(work / "evaluations.json", models, held_out_rows, distillation.evaluation_batch_size)
    processes().wait_for_everyone()  # all have read the same evaluations
    if models.teacher is not None:
        evaluations.run("teacher", models.teacher)
    evaluations.run("converted", models.student)
    trainer = train_two_stages(
        models.student,
        models.teacher,
        train_rows,
        distillation,
        work / "checkpoints",
        held_out_rows=held_out_rows,
        evaluate=evaluations.run,
        shuffle_buffer=settings.data.shuffle_buffer,
    )
    _warn_if_worse(evaluations.results(), distillation)
    report = {
        "settings": without_paths(asdict(settings)),
        "teacher": describe_teacher(models.teacher) if models.teacher is not None else {},
        "data": describe_data(settings.data),
        "plan": SharingPlan(models.student.config.plan).to_dict(),
        **facts,
        "results": evaluations.results(),
        "tokens": count_trained_rows(trainer.state) * settings.data.row_length,
        "training_log": [entry for entry in trainer.state.log_history if {"loss", "eval_loss"} & set(entry)],
        "environment": describe_environment(),
        "last_session_s": round(time.time() - start, 1),
    }
    state_dict = whole_state(trainer)
    if processes().is_main_process:
        shutil.rmtree(work / "student", ignore_errors=True)
        write_student(work / "student", models.student, models.tokenizer, report, models.dtype, state_dict)
        if (work / "checkpoints" / "runs").exists():  # of TensorBoard
            shutil.move(work / "checkpoints" / "runs", work / "student" / "runs")
    return report


def _warn_if_worse(results: list[dict], distillation: DistillationSettings) -> None:
    """Say so if training took the student away from the text and from its teacher, and what may help."""
    after, before = results[-1], next(result for result in results if result["name"] == "converted")
    names = [name for name in ("perplexity", "kl") if name in after]
    if processes().is_main_process and all(after[name] > before[name] for name in names):
        changes = " and ".join(f"{name} is {after[name]:.4g} and was {before[name]:.4g}" for name in names)
        remedies = [
            f"more steps than {distillation.steps} (--steps)",
            f"a lower learning rate than {distillation.learning_rate:g} (--learning-rate)",
        ]
        if distillation.hard_label_weight:  # learning the teacher's likeliest token makes a student too sure of it
            remedies.append(
                f"less weight of hard labels than {distillation.hard_label_weight:g} (--hard-label-weight)"
            )
        logger.warning(
            f"The student is worse than before its training: on held-out text {changes}. What may help: "
            f"{', '.join(remedies[:-1])} or {remedies[-1]}."
        )


def write_student(
    folder: Path,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: dict,
    dtype: torch.dtype,
    state_dict: dict | None = None,
    name: str | None = None,
) -> None:
    """
    Write a student in a type of its weights, with its tokenizer, report, plan and model card. Where the model has parts of
    the weights only, `state_dict` are all of them. `name` is what the folder will be called, if it is not called so yet.
    """
    if state_dict is None:
        cast_weights(student, dtype)
        student.save_pretrained(folder)
    else:
        state_dict = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()
        }
        student.save_pretrained(folder, state_dict=state_dict)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")  # where the model's own type has been written
        write_whole(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    write_whole(folder / "sharing_plan.json", json.dumps(report["plan"], indent=2) + "\n")
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_model_card(folder, name=name)


class _Evaluations:
    """Evaluations of the models of a run, kept in a file so that a resumed run does not repeat them."""

    def __init__(self, file: Path, models: RunModels, rows: list[dict], batch_size: int):
        self._file, self._models, self._rows, self._batch_size = file, models, rows, batch_size
        self._computed = models.student.dtype
        self._done: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
        # Before training, while the student has no adapters, which will be merged.
        self._sizes = {
            role: describe_sizes(model)
            for role, model in (("teacher", models.teacher), ("student", models.student))
            if model is not None
        }

    def run(self, name: str, model: PreTrainedModel) -> None:
        if name in self._done:
            return
        is_teacher = model is self._models.teacher
        with nullcontext() if is_teacher else as_saved(model, self._models.dtype, self._computed):
            result = evaluate_model(
                model,
                self._rows,
                teacher=self._models.teacher,
                tokenizer=self._models.tokenizer,
                batch_size=self._batch_size,
                description=f"evaluate {name}" if processes().is_main_process else None,
                among_processes=True,
            )
        self._done[name] = result | self._sizes["teacher" if is_teacher else "student"]
        if processes().is_main_process:
            write_whole(self._file, json.dumps(self._done))

    def results(self) -> list[dict]:
        return [{"name": name, **result} for name, result in self._done.items()]
