"""The pipeline: analyze, plan, convert, distill, evaluate, and write a student that is ready to publish."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..conversion.alignment import find_echoes, get_parameters, replace_parameter
from ..conversion.convert import count_kv_bytes_per_token
from ..distillation.adapters import add_lora, merge_lora, share_weights
from ..distillation.stored_teacher import StoredTeacher, write_stored_teacher
from ..distillation.trainer import EchoAttTrainer, EchoAttTrainingArguments
from ..evaluation.held_out import evaluate_model
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.loading import BUILTIN_TEACHER, default_device, load_model, load_tokenizer
from ..outputs.files import write_whole
from ..planning.sharing import SharingPlan
from ..publishing.card import write_model_card
from ..settings import CompressionSettings, DataSettings, DistillationSettings, StoreSettings, StudentSettings
from ..text.documents import collate_rows
from .preparation import check_plan, choose_plan, convert_tuned, load_rows
from .runs import (
    describe_data,
    describe_environment,
    describe_teacher,
    processes,
    train_from_last_checkpoint,
    unfinished_run,
    whole_state,
    without_paths,
)


__all__ = ["DistillationInterrupted", "compress", "distill", "distill_student", "store_teacher", "write_student"]

# transformers renamed it.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


class DistillationInterrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; what it had done is saved, and it can be resumed."""


def compress(
    settings: CompressionSettings, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> dict:
    """
    Make a student from a teacher: the whole pipeline, in one process.

    Until it is done, everything is kept in the folder `<output>.partial`; then the student takes the place of
    `output` at once. A run that was stopped goes on from there with `resume`.

    Args:
        settings ([`CompressionSettings`]):
            What to make.
        output (`str` or `Path`):
            Folder for the student: model, tokenizer, model card, `report.json`, `sharing_plan.json`,
            `similarity.json` and the heat map `similarity.png`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace an output folder that is not empty, and an unfinished run.
        resume (`bool`, *optional*, defaults to `False`):
            Go on with an unfinished run.

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        `FileExistsError`: the output folder is not empty, or holds an unfinished run, and neither `overwrite` nor
            `resume` is given.
        `ValueError`: a setting is out of range or does not fit the teacher, or several processes were launched.
        `DistillationInterrupted`: Ctrl-C; the run can be resumed.
    """
    if processes().num_processes > 1:
        raise ValueError(
            f"{processes().num_processes} processes were launched, but planning and conversion are the work of one: make the "
            "student with `echoatt convert`, and launch `echoatt distill`."
        )
    with unfinished_run(Path(output), settings.to_json(), overwrite, resume) as work:
        teacher = load_model(settings.teacher).to(default_device())
        tokenizer = load_tokenizer(settings.teacher, teacher)
        check_plan(settings.plan, teacher.config)
        _training_arguments(settings.distillation, work / "checkpoints")  # which check themselves
        train_rows, held_out_rows = load_rows(settings.data, tokenizer, teacher)
        rows = list(train_rows.take(settings.calibration.calibration_rows))
        similarity_file = work / "similarity.json"
        if not similarity_file.exists():
            write_whole(similarity_file, measure_on_rows(teacher, rows, progress=True).to_json())
        similarity = AttentionSimilarity.from_json(similarity_file)
        student, facts = _convert_once(work, settings, teacher, rows, similarity)
        plan = SharingPlan(student.config.echo_sources)
        models = _Models(teacher, student, tokenizer)
        report = _distill_and_write(work, models, train_rows, held_out_rows, settings, facts)
        write_whole(work / "student" / "similarity.json", similarity.to_json())
        similarity.plot(work / "student" / "similarity.png", plan)
    return report


def _convert_once(
    work: Path,
    settings: CompressionSettings,
    teacher: PreTrainedModel,
    rows: list[dict],
    similarity: AttentionSimilarity,
) -> tuple[EchoAttForCausalLM, dict]:
    """
    The converted student and the facts for the report. What was chosen and tuned is kept in `work`, so that a resumed run
    need not do it again.
    """
    facts_file, tuned_file = work / "conversion.json", work / "tuned.safetensors"
    share_weights = settings.distillation.lora_rank > 0
    if facts_file.exists():
        facts = json.loads(facts_file.read_text())
        student = EchoAttForCausalLM.from_teacher(teacher, facts["conversion"]["echo_sources"], share_weights)
        tuned = load_file(tuned_file, device=str(teacher.device))
        for layer, attention in find_echoes(student).items():
            for name in get_parameters(attention):
                path, _, leaf = name.rpartition(".")
                replace_parameter(attention.get_submodule(path), leaf, tuned[f"{layer}.{name}"])
        return student, facts
    plan, search = choose_plan(
        settings.plan, settings.calibration, teacher, rows, similarity, work / "measured.json", progress=True
    )
    student, conversion = convert_tuned(teacher, plan, rows, similarity, settings.calibration, share_weights)
    facts = {"search": search.to_dict()} if search is not None else {}
    facts["conversion"] = conversion.to_dict()
    tuned = {
        f"{layer}.{name}": parameter.detach().contiguous()
        for layer, attention in find_echoes(student).items()
        for name, parameter in get_parameters(attention).items()
    }
    save_file(tuned, tuned_file)
    write_whole(facts_file, json.dumps(facts))  # the last, as it says that all is there
    return student, facts


def store_teacher(
    settings: StoreSettings, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> dict:
    """
    Keep what a teacher says of a text, for distillation without it, see [`write_stored_teacher`].

    Args:
        settings ([`StoreSettings`]):
            Which teacher, which text, and what to keep.
        output, overwrite, resume:
            See [`compress`].

    Returns:
        `dict`: the manifest of the store.

    Raises:
        `ValueError`: a setting is out of range, or a finished part of a resumed run is corrupt.
    """
    with unfinished_run(Path(output), settings.to_json(), overwrite, resume, result="store") as work:
        teacher, store = load_model(settings.teacher).to(default_device()), settings.store
        tokenizer = load_tokenizer(settings.teacher, teacher)
        rows, held_out_rows = load_rows(settings.data, tokenizer, teacher)
        rows = rows.shuffle(seed=store.seed)
        if store.rows is not None:
            rows = rows.take(store.rows)
        return write_stored_teacher(
            work / "store",
            teacher,
            tokenizer,
            rows,
            held_out_rows,
            top_k=store.top_k,
            shard_rows=store.shard_rows,
            batch_size=store.batch_size,
            about={
                "teacher": describe_teacher(teacher, "main"),
                "text": describe_data(settings.data),
                "data": without_paths(asdict(settings.data)),
            },
            progress=True,
        )


def distill_student(
    student: str,
    teacher: str | None,
    data: DataSettings,
    distillation: DistillationSettings,
    output: str | Path,
    *,
    stored_teacher: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict:
    """
    Distil a student that is there, and write the result as [`compress`] does. In one process, or in each of several that
    `accelerate launch` started: they share the rows of a step, and the main one writes.

    Args:
        student (`str`):
            Folder or repository of a converted student.
        teacher (`str`, *optional*):
            The model it was made from. With a stored teacher it is only compared with, where it is given.
        data ([`DataSettings`]), distillation ([`DistillationSettings`]):
            The text and the training.
        stored_teacher (`str` or `Path`, *optional*):
            Folder that [`store_teacher`] wrote: the rows to train on, and those to evaluate on, in place of `data`, which
            must be the default.
        output, overwrite, resume:
            See [`compress`].

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        `ValueError`: the student is not an EchoAtt model, or does not fit the teacher.
        `DistillationInterrupted`: see [`compress`]; several processes stop at once, without a checkpoint.
    """
    stored, about, facts = None, None, {}
    if stored_teacher is not None:
        if data != DataSettings():
            raise ValueError("A stored teacher brings its own text: leave out the options of the data.")
        stored = StoredTeacher(stored_teacher, progress=True)
        about = {name: value for name, value in stored.manifest.items() if name not in ("data", "shards")}
        about, data = {"folder": str(stored_teacher), **about}, DataSettings(**stored.manifest["data"])
        facts = {"teacher": stored.manifest["teacher"], "data": stored.manifest["text"]}
    elif teacher is None:
        teacher = BUILTIN_TEACHER
    settings = StudentSettings(student, teacher, about, data, distillation)
    with unfinished_run(Path(output), settings.to_json(), overwrite, resume) as work:
        _training_arguments(distillation, work / "checkpoints")  # which check themselves
        model = load_model(student)
        if not isinstance(model, EchoAttForCausalLM):
            raise ValueError(
                f"{student!r} is a {type(model).__name__}, not an EchoAtt student: run `echoatt convert`."
            )
        original = load_model(teacher).to(default_device()) if teacher is not None else None
        if distillation.lora_rank and original is not None:
            share_weights(model, original)
        models = _Models(original, model.to(default_device()), load_tokenizer(student, model))
        if stored is None:
            train_rows, held_out_rows = load_rows(data, models.tokenizer, model)
        else:
            stored.check_student(model, models.tokenizer)
            if original is not None:
                stored.check_teacher(original)
            train_rows, held_out_rows = stored, stored.held_out_rows
        return _distill_and_write(work, models, train_rows, held_out_rows, settings, facts)


def _distill_and_write(
    work: Path,
    models: "_Models",
    train_rows: Dataset | IterableDataset | StoredTeacher,
    held_out_rows: list[dict],
    settings: "CompressionSettings | StudentSettings",
    facts: dict,
) -> dict:
    """Distil and evaluate, and write the student to `work / "student"`."""
    start, distillation = time.time(), settings.distillation
    evaluations = _Evaluations(work / "evaluations.json", models, held_out_rows)
    processes().wait_for_everyone()  # all have read the same evaluations
    if models.teacher is not None:
        evaluations.run("teacher", models.teacher)
    evaluations.run("converted", models.student)
    trainer = distill(
        models.student,
        models.teacher,
        train_rows,
        distillation,
        work / "checkpoints",
        held_out_rows=held_out_rows,
        evaluate=evaluations.run,
    )
    report = {
        "settings": without_paths(asdict(settings)),
        "teacher": describe_teacher(models.teacher, "main") if models.teacher is not None else {},
        "data": describe_data(settings.data),
        "plan": SharingPlan(models.student.config.echo_sources).to_dict(),
        **facts,
        "results": evaluations.results(),
        "tokens_per_step": distillation.batch_size * settings.data.row_length,
        "training_log": [entry for entry in trainer.state.log_history if {"loss", "eval_loss"} & set(entry)],
        "environment": describe_environment(),
        "last_session_s": round(time.time() - start, 1),
    }
    state_dict = whole_state(trainer)
    if processes().is_main_process:
        shutil.rmtree(work / "student", ignore_errors=True)
        write_student(work / "student", models.student, models.tokenizer, report, state_dict)
    return report


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train_rows: Dataset | IterableDataset | StoredTeacher,
    settings: DistillationSettings,
    checkpoints: Path,
    *,
    held_out_rows: list[dict] | None = None,
    evaluate: Callable[[str, PreTrainedModel], object] | None = None,
) -> EchoAttTrainer:
    """
    Distil a student in two stages, going on from the last checkpoint if there is one.

    Args:
        student, teacher (`PreTrainedModel`):
            The models; the student is trained in place. With `settings.lora_rank` adapters are trained and merged, and
            the student may share the teacher's weights. With a stored teacher the other one is not used.
        train_rows (`Dataset`, `IterableDataset` or [`StoredTeacher`]):
            Packed rows, as returned by [`pack_rows`], or with what the teacher says of them.
        settings ([`DistillationSettings`]):
            Steps, rates and weights.
        checkpoints (`Path`):
            Folder for checkpoints.
        held_out_rows (`list[dict]`, *optional*):
            Rows to log the loss of every `settings.eval_steps` steps.
        evaluate (`Callable`, *optional*):
            Called with `"stage 1"` and `"stage 2"` and the student, with its adapters, at the end of each stage.

    Returns:
        [`EchoAttTrainer`]: after training.

    Raises:
        `DistillationInterrupted`: Ctrl-C was pressed; the step was finished and a checkpoint saved.
    """
    transformers.set_seed(settings.seed)
    use_cache = student.config.use_cache
    model = add_lora(student, settings.lora_rank) if settings.lora_rank else student
    callback = _StageCallback(settings, evaluate)
    trainer = EchoAttTrainer(
        model=model,
        teacher=teacher if settings.stage1_steps and not isinstance(train_rows, StoredTeacher) else None,
        args=_training_arguments(settings, checkpoints),
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
    with _finish_step_on_interrupt(callback) if is_alone else nullcontext():
        train_from_last_checkpoint(trainer)
    student.config.use_cache = use_cache  # which `Trainer` turns off
    if callback.interrupted:
        raise DistillationInterrupted
    if settings.lora_rank:
        merge_lora(model)
    return trainer


def write_student(
    folder: Path,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: dict,
    state_dict: dict | None = None,
) -> None:
    """
    Write a student, of which `state_dict` are the weights where it has parts of them, with its tokenizer, report, plan
    and model card.
    """
    student.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    write_whole(folder / "sharing_plan.json", json.dumps(report["plan"], indent=2) + "\n")
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_model_card(folder)


def _training_arguments(settings: DistillationSettings, output_dir: Path) -> EchoAttTrainingArguments:
    values = asdict(settings)
    batch_size, accumulation_steps = values.pop("batch_size"), values.pop("accumulation_steps")
    number = processes().num_processes
    if batch_size % (accumulation_steps * number):
        raise ValueError(
            f"batch_size is {batch_size}, which {number} processes with accumulation_steps {accumulation_steps} do not divide."
        )
    del values["steps"], values["lora_rank"]
    values[CHECKPOINTING] = values.pop("gradient_checkpointing")
    values["eval_steps"] = settings.eval_steps or None
    # What `accelerate launch` was told counts, and with DeepSpeed the two must agree.
    values["bf16"] = settings.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return EchoAttTrainingArguments(
        output_dir=str(output_dir),
        stage1_steps=settings.stage1_steps,
        per_device_train_batch_size=batch_size // (accumulation_steps * number),
        gradient_accumulation_steps=accumulation_steps,
        per_device_eval_batch_size=8,
        eval_strategy="steps" if settings.eval_steps else "no",
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_total_limit=2,
        report_to="none",
        use_cpu=default_device() == "cpu",
        **values,
    )


@dataclass(frozen=True)
class _Models:
    teacher: PreTrainedModel | None
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class _Evaluations:
    """Evaluations of the models of a run, kept in a file so that a resumed run does not repeat them."""

    def __init__(self, file: Path, models: _Models, rows: list[dict]):
        self._file, self._models, self._rows = file, models, rows
        self._done: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
        # Before training, while the student has no adapters, which will be merged.
        self._sizes = {
            role: {"parameters": model.num_parameters(), "kv_bytes_per_token": count_kv_bytes_per_token(model)}
            for role, model in (("teacher", models.teacher), ("student", models.student))
            if model is not None
        }

    def run(self, name: str, model: PreTrainedModel) -> None:
        if name in self._done:
            return
        with _without_autocast(*filter(None, (model, self._models.teacher))):
            result = evaluate_model(
                model,
                self._rows,
                teacher=self._models.teacher,
                tokenizer=self._models.tokenizer,
                description=f"evaluate {name}" if processes().is_main_process else None,
            )
        self._done[name] = result | self._sizes["teacher" if model is self._models.teacher else "student"]
        if processes().is_main_process:  # all evaluate, as each may have a part of the model only
            write_whole(self._file, json.dumps(self._done))

    def results(self) -> list[dict]:
        return [{"name": name, **result} for name, result in self._done.items()]


@contextmanager
def _without_autocast(*models: PreTrainedModel) -> Iterator[None]:
    """
    The forward passes of the models' own: for mixed precision accelerate puts others in their place, on the objects, and
    results must not depend on how a student was trained.
    """
    wrapped = [(model, vars(model).pop("forward")) for model in models if "forward" in vars(model)]
    try:
        yield
    finally:
        for model, forward in wrapped:
            model.forward = forward


class _StageCallback(TrainerCallback):
    """Evaluates at the end of each stage, and on Ctrl-C ends the run after the step with a checkpoint."""

    def __init__(self, settings: DistillationSettings, evaluate: Callable[[str, PreTrainedModel], object] | None):
        self._ends = {}
        if settings.stage1_steps:
            self._ends[settings.stage1_steps] = "stage 1"
        if settings.stage2_steps:
            self._ends[settings.steps] = "stage 2"
        self._evaluate = evaluate
        self.interrupted = False

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
