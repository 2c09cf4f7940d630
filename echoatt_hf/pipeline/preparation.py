"""What a run starts from: rows of text, a sharing plan, and a converted student, from settings."""

from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..conversion.convert import ConversionReport, convert
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.devices import default_device
from ..models.inference import inference
from ..models.loading import load_config, load_model, load_tokenizer
from ..planning.from_settings import _check_rule, make_plan, needs_similarity
from ..planning.sharing import SharingPlan
from ..search.effect import PlanSearch, make_space, search_plan
from ..settings import CalibrationSettings, CompressionSettings, DataSettings, PlanSettings
from ..text.documents import load_documents, split_documents
from ..text.rows import pack_rows


__all__ = [
    "check_plan",
    "choose_plan",
    "convert_teacher",
    "convert_tuned",
    "load_calibration_rows",
    "load_held_out_rows",
    "load_rows",
    "plan_teacher",
]


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
        `ValueError`: the row is longer than the model's context, the model cannot keep the documents of a row apart, or
            the text does not fill a row.
    """
    _check_rows(settings, model)
    documents, held_out = _load_both(settings)
    held_out_rows = _pack(settings, held_out, tokenizer).take(settings.evaluation_rows)
    return _pack(settings, documents, tokenizer), list(held_out_rows)


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
        `ValueError`: the row is longer than the model's context, the model cannot keep the documents of a row apart, or
            the text does not fill a row.
    """
    _check_rows(settings, model)
    held_out = _load_held_out(settings) if settings.held_out_data else _load_both(settings)[1]
    return list(_pack(settings, held_out, tokenizer).take(settings.evaluation_rows))


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
        `ValueError`: the row is longer than the model's context, the model cannot keep the documents of a row apart, or
            the text does not fill a row.
    """
    _check_rows(settings.data, teacher)
    documents, _ = _load_both(settings.data)
    return list(_pack(settings.data, documents, tokenizer).take(settings.calibration.calibration_rows))


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


def _pack(
    settings: DataSettings, documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    return pack_rows(documents, tokenizer, settings.row_length, document_masks=settings.document_masks)


def _check_rows(settings: DataSettings, model: PreTrainedModel) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.row_length > context:
        raise ValueError(
            f"row_length is {settings.row_length}, but the model's context is {context} tokens: choose at most that."
        )
    if settings.document_masks and not _keeps_documents_apart(model):
        raise ValueError(
            f"document_masks is set, but models of type {model.config.get_text_config().model_type!r} with "
            f"{model.config._attn_implementation} attention let the documents in a row see each other: leave it out, or "
            "choose another attention implementation."
        )


def _keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether the second document of a row is the same to a model whatever the first one is."""
    inputs = {"input_ids": torch.tensor([[0, 1, 4, 5], [2, 3, 4, 5]]), "position_ids": torch.tensor([[0, 1] * 2] * 2)}
    with inference(model):
        logits = model(**BatchEncoding(inputs).to(model.device), use_cache=False).logits[:, 2:].float()
    return bool((logits[0] - logits[1]).norm() <= 1e-3 * logits[0].norm())


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
    config = load_config(settings.teacher)
    if not _needs_text(settings.plan, config, measured):
        return make_plan(settings.plan, config, measured), None
    check_plan(settings.plan, config)
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
    config = load_config(settings.teacher)
    check_plan(settings.plan, config)
    measured = AttentionSimilarity.from_json(similarity) if similarity is not None else None
    needs_text = _needs_text(settings.plan, config, measured)
    teacher = load_model(settings.teacher, dtype="auto").to(default_device())
    tokenizer, rows = load_tokenizer(settings.teacher, teacher), None
    if calibration.align or calibration.refit or needs_text:
        rows = load_calibration_rows(settings, tokenizer, teacher)
    if measured is None and (calibration.align or needs_text):
        measured = measure_on_rows(teacher, rows, progress=True)
    plan, _ = choose_plan(settings.plan, calibration, teacher, rows, measured, progress=True)
    return *convert_tuned(teacher, plan, rows, measured, calibration), tokenizer


def _needs_text(settings: PlanSettings, config: PreTrainedConfig, measured: AttentionSimilarity | None) -> bool:
    return settings.plan == "effect" or measured is None and needs_similarity(settings, config)


def convert_tuned(
    teacher: PreTrainedModel,
    plan: SharingPlan,
    rows: list[dict] | None,
    similarity: AttentionSimilarity | None,
    calibration: CalibrationSettings,
    share_weights: bool = False,
) -> tuple[EchoAttForCausalLM, ConversionReport]:
    """[`convert`], tuned as settings say. Arguments as there."""
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
            Of the teacher, needed for the plans `"effect"`, `"similarity"` and `"paper"`.
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


def check_plan(settings: PlanSettings, config: PreTrainedConfig) -> None:
    """Check that a plan is possible for a model, before anything is measured. Raises `ValueError` if it is not."""
    _check_rule(settings)
    if settings.plan == "effect":
        make_space(config, settings.ratio, settings.protected_layers, settings.block_size)
        return
    num_layers = config.get_text_config().num_hidden_layers
    alike = torch.ones(num_layers, num_layers)
    alike = AttentionSimilarity(None, 1, alike, alike)
    threshold = min(settings.threshold, 1.0) if settings.threshold is not None else None
    make_plan(replace(settings, threshold=threshold), config, alike)
