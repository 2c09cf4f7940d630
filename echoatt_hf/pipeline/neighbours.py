"""Students made by other methods than a plan of ours: KVSharer, LaCo and DirectShare."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from ..baselines.direct_share import make_shared_student, match_heads
from ..baselines.kvsharer import plan_like_kvsharer
from ..baselines.laco import collapse_layers
from ..conversion.convert import ConversionReport, convert
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.dtypes import cast_weights
from ..models.loading import load_placed, load_tokenizer
from ..models.sizes import count_kv_bytes_per_token
from ..outputs.files import check_output_folder
from ..outputs.provenance import describe_teacher
from ..settings import CompressionSettings, MethodSettings, PlanSettings, options_of
from .preparation import load_calibration_rows
from .steps import write_converted


__all__ = ["convert_by_method"]


def convert_by_method(
    settings: CompressionSettings, method: MethodSettings, output: str | Path, *, overwrite: bool = False
) -> dict:
    """
    Write the student that a method of others makes, with its tokenizer, `conversion.json`, a model card, and `method.json`,
    which says what was tried.

    Args:
        settings ([`CompressionSettings`]):
            The teacher, the text and the calibration rows; no plan.
        method ([`MethodSettings`]):
            The method and its settings.
        output (`str` or `Path`):
            Folder to write.
        overwrite:
            See [`compress`].

    Returns:
        `dict`: the content of `conversion.json`.

    Raises:
        `ValueError`: a plan is given, or a setting does not fit the model.
    """
    check_output_folder(Path(output), overwrite)
    if given := options_of(PlanSettings, asdict(settings.plan)):
        raise ValueError(f"{' '.join(given)} is given, but the method {method.method!r} makes the plan: leave it out.")
    teacher, dtype = load_placed(settings.teacher, settings.dtype)
    tokenizer = load_tokenizer(settings.teacher, teacher)
    make, tokens, most = _METHODS[method.method]
    rows = load_calibration_rows(settings, tokenizer, teacher) if tokens else []
    rows = [{"input_ids": row["input_ids"][:tokens]} for row in rows[:most]]
    student, report, tried = make(teacher, rows, **method.options())
    report = replace(report, teacher=describe_teacher(teacher))
    cast_weights(student, dtype)
    about = {
        "method": method.method,
        "settings": method.options(),
        "rows": len(rows),
        "row_length": tokens,
        **tried,
    }
    more = {"method.json": json.dumps(about, indent=2) + "\n"}
    write_converted(output, student, tokenizer, report, more, overwrite)
    return report.to_dict()


_Made = tuple[EchoAttForCausalLM, ConversionReport, dict]
"""A student, what it has of its teacher, and what was tried."""


def _kvsharer(teacher: PreTrainedModel, rows: list[dict], **options) -> _Made:
    names = {"kv_order": "order", "kv_distance": "distance", "keep_above": "threshold"}
    count = options.pop("shared_layers", teacher.config.num_hidden_layers // 4)
    found = plan_like_kvsharer(teacher, rows, count, **{names[name]: value for name, value in options.items()})
    student, report = convert(teacher, found.plan, align=False, refit=False)
    return student, report, {"asked": count, "tried": [asdict(trial) for trial in found.tried]}


def _laco(teacher: PreTrainedModel, rows: list[dict], **options) -> _Made:
    names = {"keep_above": "threshold"}
    settings = {names.get(name, name.removeprefix("merge_")): value for name, value in options.items()}
    found = collapse_layers(teacher, rows, **settings)
    student, report = convert(found.model, range(len(found.layers)), align=False, refit=False)
    report = replace(
        report,
        layer_plan=[layer if layer == group[0] else "drop" for group in found.layers for layer in group],
        teacher_parameters=teacher.num_parameters(),
        teacher_kv_bytes_per_token=count_kv_bytes_per_token(teacher),
    )
    about = {name: getattr(found, name) for name in ("layers", "similarity", "similarity_without")}
    return student, report, {**about, "tried": [asdict(merge) for merge in found.tried]}


def _directshare(teacher: PreTrainedModel, rows: list[dict], **options) -> _Made:
    pairs = match_heads(teacher, options.get("head_rate", 0.3), options.get("head_parts", "qk"))
    student = make_shared_student(teacher, pairs)
    plain, report = convert(
        teacher, range(teacher.config.num_hidden_layers), align=False, refit=False, share_weights=True
    )
    del plain  # of which only what the report says of the teacher is needed
    report = replace(report, student_parameters=student.num_parameters())
    return student, report, {"pairs": [pair._asdict() for pair in pairs]}


# What makes the student, the tokens of a row that it is given, and how many rows at most.
_METHODS: dict[str, tuple[Callable, int | None, int]] = {
    "kvsharer": (_kvsharer, 64, 30),
    "laco": (_laco, 20, 5),
    "directshare": (_directshare, None, 0),
}
