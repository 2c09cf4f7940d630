"""The pipeline: analyze, plan, convert, distill, evaluate, and write a student that is ready to publish."""

import json
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from .adapters import add_lora, merge_lora
from .alignment import get_parameters, set_parameters
from .configuration_echoatt import ECHOATT_VERSION
from .conversion import ConversionReport, convert, count_kv_bytes_per_token
from .data import collate_rows, load_documents, pack_rows, split_documents
from .distillation import EchoAttTrainer, EchoAttTrainingArguments
from .evaluation import evaluate_model
from .hub import write_model_card
from .modeling_echoatt import EchoAttForCausalLM, find_attention_modules
from .outputs import (
    check_output_file,
    check_output_folder,
    last_complete_checkpoint,
    replace_folder,
    write_whole,
)
from .planning import plan_from_similarity
from .search import PlanSearch, make_space, search_plan
from .settings import (
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DistillationSettings,
    PlanSettings,
    StudentSettings,
)
from .sharing import SharingPlan
from .similarity import AttentionSimilarity, measure_on_rows
from .teachers import default_device, load_config, load_model, load_tokenizer


__all__ = [
    "DistillationInterrupted",
    "check_plan",
    "choose_plan",
    "compress",
    "convert_teacher",
    "distill",
    "distill_student",
    "format_table",
    "load_calibration_rows",
    "load_held_out_rows",
    "load_rows",
    "make_plan",
    "plan_teacher",
    "resumable_search",
]


class DistillationInterrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; what it had done is saved, and it can be resumed."""


def compress(
    settings: CompressionSettings, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> dict:
    """
    Make a student from a teacher: the whole pipeline.

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
        `ValueError`: a setting is out of range or does not fit the teacher.
        `DistillationInterrupted`: Ctrl-C; the run can be resumed.
    """
    with _unfinished_run(Path(output), settings.to_json(), overwrite, resume) as work:
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
        for layer, attention in _echo_attentions(student).items():
            for name, parameter in get_parameters(attention).items():
                value = nn.Parameter(tuned[f"{layer}.{name}"], requires_grad=parameter.requires_grad)
                set_parameters(attention, {name: value})
        return student, facts
    plan, search = choose_plan(
        settings.plan, settings.calibration, teacher, rows, similarity, work / "measured.json", progress=True
    )
    student, conversion = _convert(teacher, plan, rows, similarity, settings.calibration, share_weights)
    facts = {"search": search.to_dict()} if search is not None else {}
    facts["conversion"] = conversion.to_dict()
    tuned = {
        f"{layer}.{name}": parameter.detach().contiguous()
        for layer, attention in _echo_attentions(student).items()
        for name, parameter in get_parameters(attention).items()
    }
    save_file(tuned, tuned_file)
    write_whole(facts_file, json.dumps(facts))  # the last, as it says that all is there
    return student, facts


def _echo_attentions(student: EchoAttForCausalLM) -> dict[int, nn.Module]:
    attentions = find_attention_modules(student.language_model)
    return {layer: attentions[layer] for layer in student.config.echo_layers}


def distill_student(
    student: str,
    teacher: str,
    data: DataSettings,
    distillation: DistillationSettings,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> dict:
    """
    Distil a student that is there, and write the result as [`compress`] does.

    Args:
        student (`str`):
            Folder or repository of a converted student.
        teacher (`str`):
            The model it was made from.
        data ([`DataSettings`]), distillation ([`DistillationSettings`]):
            The text and the training.
        output, overwrite, resume:
            See [`compress`].

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        `ValueError`: the student is not an EchoAtt model, or does not fit the teacher.
    """
    settings = StudentSettings(student=student, teacher=teacher, data=data, distillation=distillation)
    with _unfinished_run(Path(output), settings.to_json(), overwrite, resume) as work:
        model = load_model(student).to(default_device())
        if not isinstance(model, EchoAttForCausalLM):
            raise ValueError(
                f"{student!r} is a {type(model).__name__}, not an EchoAtt student: run `echoatt convert`."
            )
        models = _Models(load_model(teacher).to(default_device()), model, load_tokenizer(student, model))
        train_rows, held_out_rows = load_rows(data, models.tokenizer, model)
        return _distill_and_write(work, models, train_rows, held_out_rows, settings, {})


def _distill_and_write(
    work: Path,
    models: "_Models",
    train_rows: Dataset | IterableDataset,
    held_out_rows: list[dict],
    settings: "CompressionSettings | StudentSettings",
    facts: dict,
) -> dict:
    """Distil and evaluate, and write the student to `work / "student"`."""
    start, distillation = time.time(), settings.distillation
    evaluations = _Evaluations(work / "evaluations.json", models, held_out_rows)
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
        "settings": _without_paths(asdict(settings)),
        "plan": SharingPlan(models.student.config.echo_sources).to_dict(),
        **facts,
        "results": evaluations.results(),
        "tokens_per_step": distillation.batch_size * settings.data.row_length,
        "training_log": [entry for entry in trainer.state.log_history if {"loss", "eval_loss"} & set(entry)],
        "environment": describe_environment(),
        "last_session_s": round(time.time() - start, 1),
    }
    shutil.rmtree(work / "student", ignore_errors=True)
    write_student(work / "student", models.student, models.tokenizer, report)
    return report


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train_rows: Dataset | IterableDataset,
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
            the student may share the teacher's weights.
        train_rows (`Dataset` or `IterableDataset`):
            Packed rows, as returned by [`pack_rows`].
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
        teacher=teacher if settings.stage1_steps else None,
        args=_training_arguments(settings, checkpoints),
        train_dataset=train_rows,
        eval_dataset=held_out_rows if settings.eval_steps else None,
        data_collator=collate_rows,
        callbacks=[callback],
    )
    with _finish_step_on_interrupt(callback):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(checkpoints))
    student.config.use_cache = use_cache  # which `Trainer` turns off
    if callback.interrupted:
        raise DistillationInterrupted
    if settings.lora_rank:
        merge_lora(model)
    return trainer


def load_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Dataset | IterableDataset, list[dict]]:
    """
    Rows to train on and rows to evaluate on.

    Args:
        settings ([`DataSettings`]): which text, and how long a row is.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        model (`PreTrainedModel`): the model the rows are for, whose context they must fit.

    Returns:
        `tuple`: training rows, and held-out rows in a list.

    Raises:
        `ValueError`: the row is longer than the model's context, or the text does not fill a row.
    """
    _check_row_length(settings, model)
    documents, held_out = _load_both(settings)
    held_out_rows = pack_rows(held_out, tokenizer, settings.row_length).take(settings.evaluation_rows)
    return pack_rows(documents, tokenizer, settings.row_length), list(held_out_rows)


def load_held_out_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> list[dict]:
    """
    Rows to evaluate on: those of [`load_rows`], without reading more than they need.

    Args:
        settings ([`DataSettings`]): which text, and how long a row is.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        model (`PreTrainedModel`): the model the rows are for, whose context they must fit.

    Raises:
        `ValueError`: the row is longer than the model's context, or the text does not fill a row.
    """
    _check_row_length(settings, model)
    held_out = _load_held_out(settings) if settings.held_out_data else _load_both(settings)[1]
    return list(pack_rows(held_out, tokenizer, settings.row_length).take(settings.evaluation_rows))


def _load_both(settings: DataSettings) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    documents = load_documents(
        settings.data,
        text_column=settings.text_column,
        name=settings.data_name,
        split=settings.data_split,
        streaming=settings.streaming,
    )
    if settings.held_out_data:
        return documents, _load_held_out(settings)
    return split_documents(documents, settings.held_out_fraction)


def _load_held_out(settings: DataSettings) -> Dataset | IterableDataset:
    return load_documents(settings.held_out_data, text_column=settings.text_column)


def _check_row_length(settings: DataSettings, model: PreTrainedModel) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.row_length > context:
        raise ValueError(
            f"row_length is {settings.row_length}, but the model's context is {context} tokens: choose at most that."
        )


def load_calibration_rows(
    settings: CompressionSettings, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel
) -> list[dict]:
    """
    The first training rows: those on which [`compress`] analyzes, plans and tunes.

    Args:
        settings ([`CompressionSettings`]): which text, how long a row is, and how many rows.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's tokenizer.
        teacher (`PreTrainedModel`): the model the rows are for, whose context they must fit.

    Raises:
        `ValueError`: the row is longer than the model's context, or the text does not fill a row.
    """
    _check_row_length(settings.data, teacher)
    documents, _ = _load_both(settings.data)
    return list(pack_rows(documents, tokenizer, settings.data.row_length).take(settings.calibration.calibration_rows))


def plan_teacher(
    settings: CompressionSettings, similarity: Path | None = None, state: Path | None = None
) -> tuple[SharingPlan, PlanSearch | None]:
    """
    The sharing plan that [`compress`] would choose. The teacher is loaded only if something has to be measured.

    Args:
        settings ([`CompressionSettings`]): what to make; the distillation does not matter.
        similarity (`Path`, *optional*): `similarity.json` of the teacher, measured anew if it is needed and not given.
        state (`Path`, *optional*): file that keeps what a search has measured.

    Returns:
        `tuple`: [`SharingPlan`], and [`PlanSearch`] if there was a search.
    """
    measured = AttentionSimilarity.from_json(similarity) if similarity is not None else None
    if not _needs_text(settings.plan, measured):
        return make_plan(settings.plan, load_config(settings.teacher), measured), None
    check_plan(settings.plan, load_config(settings.teacher))
    teacher = load_model(settings.teacher).to(default_device())
    rows = load_calibration_rows(settings, load_tokenizer(settings.teacher, teacher), teacher)
    measured = measured or measure_on_rows(teacher, rows, progress=True)
    return choose_plan(settings.plan, settings.calibration, teacher, rows, measured, state, progress=True)


def convert_teacher(
    settings: CompressionSettings, similarity: Path | None = None
) -> tuple[EchoAttForCausalLM, ConversionReport, PreTrainedTokenizerBase]:
    """
    The student that [`compress`] would distil, in the dtype its teacher is stored in.

    Args:
        settings ([`CompressionSettings`]): what to make; the distillation does not matter.
        similarity (`Path`, *optional*): `similarity.json` of the teacher, measured anew if it is needed and not given.

    Returns:
        `tuple`: the student, [`ConversionReport`], and the tokenizer.
    """
    calibration = settings.calibration
    check_plan(settings.plan, load_config(settings.teacher))
    measured = AttentionSimilarity.from_json(similarity) if similarity is not None else None
    teacher = load_model(settings.teacher, dtype="auto").to(default_device())
    tokenizer, rows = load_tokenizer(settings.teacher, teacher), None
    if calibration.align or calibration.refit or _needs_text(settings.plan, measured):
        rows = load_calibration_rows(settings, tokenizer, teacher)
        measured = measured or measure_on_rows(teacher, rows, progress=True)
    plan, _ = choose_plan(settings.plan, calibration, teacher, rows, measured, progress=True)
    return *_convert(teacher, plan, rows, measured, calibration), tokenizer


def _needs_text(settings: PlanSettings, measured: AttentionSimilarity | None) -> bool:
    return settings.plan == "effect" or settings.plan == "similarity" and measured is None


def _convert(
    teacher: PreTrainedModel,
    plan: SharingPlan,
    rows: list[dict] | None,
    similarity: AttentionSimilarity | None,
    calibration: CalibrationSettings,
    share_weights: bool = False,
) -> tuple[EchoAttForCausalLM, ConversionReport]:
    is_tuned = calibration.align or calibration.refit
    return convert(
        teacher,
        plan,
        rows if is_tuned else None,
        similarity=similarity,
        align=calibration.align,
        refit=calibration.refit,
        share_weights=share_weights,
        progress=True,
    )


@contextmanager
def resumable_search(
    settings: CompressionSettings, output: Path | None, overwrite: bool, resume: bool
) -> Iterator[Path | None]:
    """The file beside `output` in which a search keeps what it has measured; it goes when the block ends well."""
    if output is None or settings.plan.plan != "effect":
        yield None
        return
    work = _open_work_folder(output, settings.to_json(), overwrite, resume, check_output_file)
    state = work / "measured.json"
    try:
        yield state
    except Exception:
        if not state.exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)


def choose_plan(
    settings: PlanSettings,
    calibration: CalibrationSettings,
    teacher: PreTrainedModel,
    rows: list[dict] | None,
    similarity: AttentionSimilarity | None,
    state: Path | None = None,
    *,
    progress: bool = False,
) -> tuple[SharingPlan, PlanSearch | None]:
    """
    The sharing plan for a teacher, by any rule.

    Args:
        settings ([`PlanSettings`]):
            The rule, indices or file.
        calibration ([`CalibrationSettings`]):
            How students are tuned.
        teacher (`PreTrainedModel`):
            The model that is to be converted.
        rows (`list[dict]`, *optional*):
            Calibration rows, needed for the plan `"effect"`.
        similarity ([`AttentionSimilarity`], *optional*):
            Of the teacher, needed for the plans `"effect"` and `"similarity"`.
        state (`Path`, *optional*):
            File that keeps what a search has measured.
        progress (`bool`, *optional*, defaults to `False`):
            Show progress bars.

    Returns:
        `tuple`: [`SharingPlan`], and [`PlanSearch`] if there was a search.

    Raises:
        `ValueError`: the plan cannot be read, or does not fit the model.
    """
    if settings.plan != "effect":
        return make_plan(settings, teacher.config, similarity), None
    _check_rule(settings)
    search = search_plan(
        teacher,
        rows,
        similarity,
        ratio=settings.ratio,
        protected_layers=settings.protected_layers,
        block_size=settings.block_size,
        search_rows=settings.search_rows,
        width=settings.search_width,
        align=calibration.align,
        refit=calibration.refit,
        state=state,
        progress=progress,
    )
    return search.plan, search


def make_plan(
    settings: PlanSettings, config: PreTrainedConfig, similarity: AttentionSimilarity | None = None
) -> SharingPlan:
    """
    The sharing plan for a model that need not be loaded: by any rule but `"effect"`.

    Args:
        settings ([`PlanSettings`]):
            The rule, indices or file.
        config (`PreTrainedConfig`):
            Configuration of the teacher.
        similarity ([`AttentionSimilarity`], *optional*):
            Needed for the plan `"similarity"`.

    Raises:
        `ValueError`: the plan cannot be read, or does not fit the model.
    """
    config = config.get_text_config()
    num_layers, layer_types = config.num_hidden_layers, getattr(config, "layer_types", None)
    _check_rule(settings)
    constraints = {
        "protected_layers": settings.protected_layers,
        "block_size": settings.block_size,
        "layer_types": layer_types,
    }
    if settings.plan == "similarity":
        if similarity is None:
            raise ValueError("The plan 'similarity' needs a measured similarity: run `echoatt analyze` first.")
        return plan_from_similarity(
            similarity.layers.tolist(),
            ratio=settings.ratio if settings.threshold is None else None,
            threshold=settings.threshold,
            **constraints,
        )
    if settings.plan == "blocks":
        return SharingPlan.from_ratio(num_layers, settings.ratio, **constraints)
    is_file = settings.plan.endswith(".json")
    sources = list(SharingPlan.from_json(settings.plan)) if is_file else parse_sources(settings.plan)
    if len(sources) != num_layers:
        raise ValueError(f"The plan has {len(sources)} layers and the model {num_layers}: give one source per layer.")
    return SharingPlan(sources, layer_types)


def check_plan(settings: PlanSettings, config: PreTrainedConfig) -> None:
    """Check that a plan is possible for a model, before anything is measured. Raises `ValueError` if it is not."""
    _check_rule(settings)
    if settings.plan == "effect":
        make_space(config, settings.ratio, settings.protected_layers, settings.block_size)
        return
    num_layers = config.get_text_config().num_hidden_layers
    alike = AttentionSimilarity(torch.ones(num_layers, num_layers, 1, 1), 1)
    threshold = min(settings.threshold, 1.0) if settings.threshold is not None else None
    make_plan(replace(settings, threshold=threshold), config, alike)


def _check_rule(settings: PlanSettings) -> None:
    if settings.threshold is not None and settings.plan != "similarity":
        raise ValueError("A threshold needs the plan 'similarity'.")


def parse_sources(text: str) -> list[int]:
    """Source indices from a text such as `"0,1,1,1,4"`. Raises `ValueError` for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"The plan {text!r} is not understood: give 'effect', 'similarity', 'blocks', source indices such as 0,1,1,1,4, or "
            "a .json file."
        ) from None


def format_table(results: list[dict]) -> str:
    """
    The results of a run as a Markdown table, which also reads well in a terminal.

    Args:
        results (`list[dict]`): entries of `report["results"]`.

    Returns:
        `str`: lines of the table.
    """
    header = ["", "perplexity", "bits/byte", "agreement", "KL (nats)", "parameters", "KV bytes/token"]
    lines = [header]
    for entry in results:
        lines.append(
            [
                entry["name"],
                f"{entry['perplexity']:.3f}",
                f"{entry['bits_per_byte']:.4f}",
                f"{entry['agreement']:.1%}",
                f"{entry['kl']:.4f}",
                f"{entry['parameters']:,}",
                f"{entry['kv_bytes_per_token']:,}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rows = ["| " + " | ".join(_pad(cells, widths)) + " |" for cells in lines]
    rule = (
        "|"
        + "|".join(f"{'-' * (width + 1)}{'-' if column == 0 else ':'}" for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([rows[0], rule, *rows[1:]])


def describe_environment() -> dict[str, str]:
    """Versions and hardware, without anything that identifies the machine or its user."""
    device = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "echoatt_hf": ECHOATT_VERSION,
        "commit": _commit(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": device,
    }


def write_student(folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: dict) -> None:
    """Write a student with its tokenizer, report, plan and model card."""
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_whole(folder / "sharing_plan.json", json.dumps(report["plan"], indent=2) + "\n")
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_model_card(folder, report, format_table(report["results"]))


def _training_arguments(settings: DistillationSettings, output_dir: Path) -> EchoAttTrainingArguments:
    values = asdict(settings)
    batch_size, accumulation_steps = values.pop("batch_size"), values.pop("accumulation_steps")
    del values["steps"], values["lora_rank"]
    values["eval_steps"] = settings.eval_steps or None
    return EchoAttTrainingArguments(
        output_dir=str(output_dir),
        stage1_steps=settings.stage1_steps,
        per_device_train_batch_size=batch_size // accumulation_steps,
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
    teacher: PreTrainedModel
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
        }

    def run(self, name: str, model: PreTrainedModel) -> None:
        if name in self._done:
            return
        result = evaluate_model(
            model,
            self._rows,
            teacher=self._models.teacher,
            tokenizer=self._models.tokenizer,
            description=f"evaluate {name}",
        )
        self._done[name] = result | self._sizes["teacher" if model is self._models.teacher else "student"]
        write_whole(self._file, json.dumps(self._done))

    def results(self) -> list[dict]:
        return [{"name": name, **result} for name, result in self._done.items()]


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


@contextmanager
def _unfinished_run(output: Path, settings: str, overwrite: bool, resume: bool) -> Iterator[Path]:
    """
    The folder of a run that is not finished. When the block ends well, its folder `student` takes the place of
    `output`; when it fails, what a resumed run can use is kept.
    """
    work = _open_work_folder(output, settings, overwrite, resume)
    try:
        yield work
    except Exception as error:
        # After a wrong setting a run with the same settings would only fail again.
        worth_keeping = ["checkpoints"]
        if not isinstance(error, ValueError):
            worth_keeping += ["measured.json", "conversion.json"]
        if not any((work / name).exists() for name in worth_keeping):
            shutil.rmtree(work, ignore_errors=True)
        raise
    replace_folder(work / "student", output)
    shutil.rmtree(work)


def _open_work_folder(
    output: Path,
    settings: str,
    overwrite: bool,
    resume: bool,
    check_output: Callable[[Path, bool], None] = check_output_folder,
) -> Path:
    """The folder of an unfinished run: a new one, or the one to resume, which must have been made by equal settings."""
    check_output(output, overwrite or resume)
    work = output.with_name(output.name + ".partial")
    file = work / "settings.json"
    if file.exists() and resume:
        if file.read_text() != settings:
            raise ValueError(
                f"The unfinished run in {str(work)!r} has other settings: resume it with the same ones, or start anew "
                "with --overwrite."
            )
        return work
    if work.exists() and not overwrite and not resume:
        raise FileExistsError(
            f"{str(work)!r} holds an unfinished run: continue it with --resume, or start anew with --overwrite."
        )
    if resume:
        check_output(output, overwrite)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_whole(file, settings)
    return work


def _without_paths(settings: dict) -> dict:
    """Settings as they may be published: of a path that is nobody else's business, its last part."""

    def shorten(value):
        if isinstance(value, dict):
            return {name: shorten(item) for name, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".."))):
            return Path(value).name
        return value

    return shorten(settings)


def _pad(cells: list[str], widths: list[int]) -> list[str]:
    return [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]


def _commit() -> str:
    """Commit of a source checkout of this package, with a mark if files were changed; empty elsewhere."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()
