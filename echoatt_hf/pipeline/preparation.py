"""What a run starts from: rows of text, a sharing plan, and a converted student, from settings."""

import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..configuration_echoatt import EchoAttConfig, check_base_family
from ..conversion.convert import ConversionReport, convert
from ..conversion.tuning import hold_out
from ..distillation.served_teacher import ServedTeacher
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.checks import relative_error
from ..models.dtypes import cast_weights
from ..models.inference import inference
from ..models.loading import load_config, load_placed, load_tokenizer
from ..planning.from_settings import _check_rule, is_searched, make_plan, needs_similarity
from ..planning.sharing import SharingPlan
from ..search.effect import PlanSearch, make_space, search_plan
from ..settings import (
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DataSource,
    EvaluationSettings,
    PlanSettings,
    ScoringSettings,
)
from ..text.documents import check_held_out, holds_chats, load_documents, split_documents
from ..text.rows import draw_rows, mix_rows, pack_rows, sample_rows, slide_rows


__all__ = [
    "check_calibration",
    "check_plan",
    "choose_plan",
    "convert_teacher",
    "convert_tuned",
    "load_calibration_rows",
    "load_held_out_rows",
    "load_prompts",
    "load_rows",
    "plan_teacher",
]


logger = logging.getLogger(__name__)

TOKENS_PER_FEATURE = 10
"""Tokens of calibration text that a head feature needs. Below, what is fitted to them says little of other text."""


class _Documents(NamedTuple):
    """Documents of the sources that are packed together, their share of the rows, and whether there are conversations."""

    documents: Dataset | IterableDataset
    weight: float
    has_chats: bool


def load_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | ServedTeacher
) -> tuple[Dataset | IterableDataset, list[dict]]:
    """
    Rows to train on and rows to evaluate on, these at random places of what is held out. The places are the same for all
    models with one tokenizer. Of streamed text they are drawn from its first `shuffle_buffer` rows.

    Args:
        settings ([`DataSettings`]): which text, and how long a row is.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        model (`PreTrainedModel` or [`ServedTeacher`]): the model the rows are for, whose context they must fit.

    Returns:
        `tuple`: training rows, and held-out rows in a list.

    Raises:
        `ValueError`: the row is longer than the model's context, the model cannot keep the documents of a row apart, a
            source is both to train on and held out, the text does not fill a row, conversations do not fit the tokenizer's
            chat template, or one of the two has none and only answers are to be learned.
    """
    _check_rows(settings, model)
    groups, held_out = _load_both(settings)
    # Each side by itself: what is held out has the same rows in `load_held_out_rows`, which does not read the other one.
    training = _settle_masks(settings, groups, model)
    evaluation = _settle_masks(settings, held_out, model, "held-out data")
    parts = [_pack(training, group.documents, tokenizer) for group in groups]
    return mix_rows(parts, [group.weight for group in groups]), _draw_rows(
        evaluation, held_out, tokenizer, settings.evaluation_rows
    )


def load_held_out_rows(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    scoring: ScoringSettings | None = None,
) -> list[dict]:
    """
    Rows to evaluate on: those of [`load_rows`], without packing rows to train on.

    Args:
        settings ([`DataSettings`]): which text, and how long a row is.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        model (`PreTrainedModel`): the model the rows are for, whose context they must fit.
        scoring ([`ScoringSettings`], *optional*): with a stride, rows are drawn of those of [`slide_rows`], for which
            all the text is tokenized.

    Raises:
        `ValueError`: as [`load_rows`].
    """
    groups = _load_held_out(settings, model)
    settings = _settle_masks(settings, groups, model, "held-out data")
    stride = scoring.stride if scoring is not None else None
    return _draw_rows(settings, groups, tokenizer, settings.evaluation_rows, stride=stride)


def _load_held_out(settings: DataSettings, model: PreTrainedModel) -> list[_Documents]:
    _check_rows(settings, model)
    if settings.held_out_sources is None:
        return _load_both(settings)[1]
    check_held_out(settings.sources, settings.held_out_sources)
    return _load_groups(settings.held_out_sources, settings.streaming)


def load_prompts(
    settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> list[dict]:
    """
    Rows at random places of the held-out text for [`evaluate_continuations`], of a prompt and as many tokens as are to be
    written. The places are the same for all models with one tokenizer.

    Args:
        settings ([`EvaluationSettings`]): which text, and how many prompts of which length.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        model (`PreTrainedModel`): the model the prompts are for, whose context they must fit.

    Raises:
        `ValueError`: they do not fit, or see [`load_rows`].
    """
    scoring = settings.scoring
    length = scoring.prompt_tokens + scoring.new_tokens
    _check_context("prompt_tokens + new_tokens", length, model)
    data = replace(settings.data, row_length=length, assistant_only=False, document_masks=False)
    return _draw_rows(data, _load_held_out(data, model), tokenizer, scoring.continuations)


def load_calibration_rows(
    settings: CompressionSettings, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel
) -> list[dict]:
    """
    Rows at random places of the training text: those on which [`compress`] analyzes, plans and tunes, on all of their
    tokens. Of streamed text they are drawn from its first `shuffle_buffer` rows.

    Args:
        settings ([`CompressionSettings`]): which text, how long a row is, and how many rows.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's tokenizer.
        teacher (`PreTrainedModel`): the model the rows are for, whose context they must fit.

    Raises:
        `ValueError`: the row is longer than the model's context, the model cannot keep the documents of a row apart, a
            source is both to train on and held out, or the text does not fill a row.
    """
    data, calibration = settings.data, settings.calibration
    _check_rows(data, teacher)
    groups, _ = _load_both(data)
    data = _settle_masks(replace(data, assistant_only=False), groups, teacher)
    rows = _draw_rows(data, groups, tokenizer, calibration.calibration_rows, calibration.calibration_seed)
    _check_calibration(rows, teacher)
    return rows


def _draw_rows(
    settings: DataSettings,
    groups: list[_Documents],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int = 0,
    stride: int | None = None,
) -> list[dict]:
    """Rows at random places of documents, in random order: the first ones would all be of one long document."""
    generator = np.random.default_rng(seed)
    weights = np.asarray([group.weight for group in groups])
    counts = generator.multinomial(count, weights / weights.sum()).tolist()
    options = {"assistant_only": settings.assistant_only}
    rows = []
    for documents, number in zip((group.documents for group in groups), counts, strict=True):
        if not number:
            continue
        is_streamed = isinstance(documents, IterableDataset)
        if stride is not None:
            slides = slide_rows(documents, tokenizer, settings.row_length, stride, **options)
            rows += sample_rows(islice(slides, settings.shuffle_buffer if is_streamed else None), number, seed)
        elif is_streamed:
            packed = _pack(settings, documents, tokenizer)
            rows += packed.shuffle(seed=seed, buffer_size=settings.shuffle_buffer).take(number)
        else:
            packing = {name: getattr(settings, name) for name in ("row_start", "document_masks", "num_proc")}
            rows += draw_rows(documents, tokenizer, settings.row_length, number, seed=seed, **packing, **options)
    return [rows[index] for index in generator.permutation(len(rows))]


def _check_calibration(rows: list[dict], teacher: PreTrainedModel) -> None:
    """Warn if there is so little text that what is fitted to it says little of other text."""
    config = teacher.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    features = config.num_attention_heads * head_dim
    tokens = sum(len(row["input_ids"]) for row in rows)
    if tokens < TOKENS_PER_FEATURE * features:
        needed = -(-TOKENS_PER_FEATURE * features // len(rows[0]["input_ids"]))
        logger.warning(
            f"{len(rows)} calibration rows have {tokens:,} tokens, fewer than {TOKENS_PER_FEATURE} for each of the {features:,} "
            f"head features of a layer: give {needed:,} rows (--calibration-rows), if the text has as many."
        )


def _load_both(settings: DataSettings) -> tuple[list[_Documents], list[_Documents]]:
    """Documents to train on and documents to evaluate on."""
    sources, held_out = settings.sources, settings.held_out_sources
    if held_out is not None:
        check_held_out(sources, held_out)
        return _load_groups(sources, settings.streaming), _load_groups(held_out, settings.streaming)
    groups = _load_groups(sources, settings.streaming)
    split = [split_documents(group.documents, settings.held_out_fraction) for group in groups]
    return tuple(
        [group._replace(documents=parts[side]) for parts, group in zip(split, groups, strict=True)] for side in (0, 1)
    )


def _load_groups(sources: list[DataSource], streaming: bool) -> list[_Documents]:
    """Documents of all sources together, one source after the other; with weights, of each one for itself."""
    if all(source.weight is None for source in sources):
        documents = load_documents(sources, streaming=streaming)
        # Of a stream the first documents are looked at, which are those of the first source.
        is_joined = streaming and len(sources) > 1
        looked_at = [load_documents(source, streaming=True) for source in sources] if is_joined else [documents]
        return [_Documents(documents, 1.0, any(map(holds_chats, looked_at)))]
    loaded = [(load_documents(source, streaming=streaming), source.weight) for source in sources]
    return [
        _Documents(documents, 1.0 if weight is None else weight, holds_chats(documents))
        for documents, weight in loaded
    ]


def _settle_masks(
    settings: DataSettings, groups: list[_Documents], model: PreTrainedModel | ServedTeacher, name: str = "data"
) -> DataSettings:
    """The settings for the data to train on or the held-out data, with what follows from whether it has conversations."""
    has_chats = any(group.has_chats for group in groups)
    if settings.assistant_only and not has_chats:
        raise ValueError(
            f"assistant_only is set, but the {name} holds no conversations (of a stream the first 16 documents of each source are "
            "looked at): leave the option out, or give data with the columns messages, conversations, or prompt and completion."
        )
    if settings.document_masks is None:
        settings = replace(settings, document_masks=has_chats and _keeps_documents_apart(model))
    return settings


def _pack(
    settings: DataSettings, documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    return pack_rows(
        documents,
        tokenizer,
        settings.row_length,
        row_start=settings.row_start,
        document_masks=settings.document_masks,
        assistant_only=settings.assistant_only,
        num_proc=settings.num_proc,
    )


def _check_rows(settings: DataSettings, model: PreTrainedModel) -> None:
    _check_context("row_length", settings.row_length, model)
    if settings.document_masks and not _keeps_documents_apart(model):
        raise ValueError(
            f"document_masks is set, but models of type {model.config.get_text_config().model_type!r} with "
            f"{model.config._attn_implementation} attention let the documents in a row see each other: leave it out, or "
            "choose another attention implementation."
        )


def _check_context(name: str, length: int, model: PreTrainedModel) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"{name} is {length}, but the model's context is {context} tokens: choose at most that.")


def _keeps_documents_apart(model: PreTrainedModel | ServedTeacher) -> bool:
    """Whether the second document of a row is the same to a model whatever the first one is."""
    if isinstance(model, ServedTeacher):  # which is asked of each document alone
        return True
    inputs = {"input_ids": torch.tensor([[0, 1, 4, 5], [2, 3, 4, 5]]), "position_ids": torch.tensor([[0, 1] * 2] * 2)}
    with inference(model):
        logits = model(**BatchEncoding(inputs).to(model.device), use_cache=False).logits[:, 2:]
    return relative_error(logits[1], logits[0]) <= 1e-3


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
    config = load_config(settings.teacher)
    measured = _read_similarity(similarity, config)
    if not _needs_text(settings.plan, config, measured):
        return make_plan(settings.plan, config, measured), None
    check_plan(settings.plan, config)
    teacher, _ = load_placed(settings.teacher, settings.dtype)
    rows = load_calibration_rows(settings, load_tokenizer(settings.teacher, teacher), teacher)
    check_calibration(settings, rows)
    measured = measured or measure_on_rows(teacher, rows, progress=True)
    return choose_plan(settings.plan, settings.calibration, teacher, rows, measured, state, progress=True)


def convert_teacher(
    settings: CompressionSettings, similarity: Path | None = None, state: Path | None = None
) -> tuple[EchoAttForCausalLM, ConversionReport, PreTrainedTokenizerBase]:
    """
    The student that [`compress`] would distil, with weights of the type it is to be saved in.

    Args:
        settings ([`CompressionSettings`]): what to make; the distillation does not matter.
        similarity (`Path`, *optional*): `similarity.json` of the teacher, measured anew if it is needed and not given.
        state (`Path`, *optional*): file that keeps what a search has measured.

    Returns:
        `tuple`: the student, [`ConversionReport`], and the tokenizer.
    """
    calibration = settings.calibration
    config = load_config(settings.teacher)
    check_plan(settings.plan, config)
    measured = _read_similarity(similarity, config)
    needs_text = _needs_text(settings.plan, config, measured)
    teacher, dtype = load_placed(settings.teacher, settings.dtype)
    tokenizer, rows = load_tokenizer(settings.teacher, teacher), None
    if calibration.align or calibration.refit or needs_text:
        rows = load_calibration_rows(settings, tokenizer, teacher)
        check_calibration(settings, rows)
    if measured is None and (calibration.align or needs_text):
        measured = measure_on_rows(teacher, rows, progress=True)
    plan, _ = choose_plan(settings.plan, calibration, teacher, rows, measured, state, progress=True)
    student, report = convert_tuned(teacher, plan, rows, measured, calibration)
    cast_weights(student, dtype)
    return student, report, tokenizer


def _read_similarity(file: Path | None, config: PreTrainedConfig) -> AttentionSimilarity | None:
    """The similarity in a file, if one is given. Raises `ValueError` if it is of a model with more layers or fewer."""
    if file is None:
        return None
    similarity, num_layers = AttentionSimilarity.from_json(file), config.get_text_config().num_hidden_layers
    if len(similarity.layers) != num_layers:
        raise ValueError(
            f"The similarity {str(file)!r} is of a model of {len(similarity.layers)} layers; this one has {num_layers}: give "
            "that of `echoatt analyze` for this model."
        )
    return similarity


def _needs_text(settings: PlanSettings, config: PreTrainedConfig, measured: AttentionSimilarity | None) -> bool:
    return is_searched(settings) or measured is None and needs_similarity(settings, config)


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
    if not is_searched(settings):
        return make_plan(settings, teacher.config, similarity), None
    _check_rule(settings)
    search = search_plan(
        teacher,
        rows,
        similarity,
        ratio=settings.ratio if not settings.target else None,
        targets=settings.list_targets(),
        moves=settings.list_moves(),
        decode_context=settings.decode_context,
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


def check_plan(settings: PlanSettings, config: PreTrainedConfig) -> SharingPlan | None:
    """
    Check that a plan is possible for a model, before anything is measured.

    Returns:
        [`SharingPlan`]: the plan, if it does not depend on what is measured.

    Raises:
        `ValueError`: it is not possible, or the model is no decoder language model or already a student.
    """
    if isinstance(config, EchoAttConfig):
        raise ValueError("The teacher is already an EchoAtt student: convert the model it was made from.")
    check_base_family(config)
    _check_rule(settings)
    if is_searched(settings):
        ratio = settings.ratio if not settings.target else None
        make_space(config, ratio, settings.protected_layers, settings.block_size, settings.list_moves())
        return None
    num_layers = config.get_text_config().num_hidden_layers
    alike = torch.ones(num_layers, num_layers)
    plan = make_plan(settings, config, AttentionSimilarity(None, 1, alike, alike))
    return plan if not needs_similarity(settings, config) else None


def check_calibration(settings: CompressionSettings, rows: list[dict]) -> None:
    """Check that there are rows to judge by, where students are tuned or compared. Raises `ValueError` if there are none."""
    if is_searched(settings.plan) or settings.calibration.align or settings.calibration.refit:
        hold_out(rows)
