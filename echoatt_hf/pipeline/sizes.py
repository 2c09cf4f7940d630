"""One distillation, several sizes: a distilled student with layers of its teacher put back, evaluated and written."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_echoatt import EchoAttConfig
from ..conversion.putting_back import StudentSize, find_sizes, put_back
from ..evaluation.held_out import evaluate_model
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.checks import check_same_tokenizer
from ..models.dtypes import as_saved
from ..models.loading import load_config, load_json, load_placed, load_tokenizer
from ..models.sizes import describe_sizes
from ..outputs.files import check_output_folder, whole_folder, write_whole
from ..outputs.provenance import describe_data, describe_environment, describe_teacher, without_paths
from ..planning.sharing import SharingPlan, check_ratio
from ..publishing.card import count_tokens
from ..settings import CalibrationSettings, CompressionSettings, PlanSettings, options_of
from .preparation import load_calibration_rows, load_held_out_rows
from .training import write_student
from .unfinished import resumable


__all__ = ["convert_student"]


def convert_student(
    settings: CompressionSettings,
    student: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> dict:
    """
    Put layers of the teacher back into a distilled student, see [`find_sizes`], and write the student of the ratio that is
    asked for, as [`compress`] writes it. All sizes on the way are evaluated, and those above it.

    Args:
        settings ([`CompressionSettings`]):
            The teacher, the text, the ratio, and the rows to measure on, `search_rows`. Plan and tuning are the student's.
        student (`str`):
            Folder or repository of the distilled student.
        output (`str` or `Path`):
            Folder to write.
        overwrite, resume:
            See [`compress`]. What was measured is kept in the folder `<output>.partial` until the student is written.

    Returns:
        `dict`: the content of `report.json`; `put_back` has the sizes.

    Raises:
        `ValueError`: it is no student, not one of this teacher, the ratio is not below its own, or a setting is given that
            the student has already.
    """
    check_output_folder(Path(output), overwrite)
    _check_settings(settings)
    count = _count_changed_layers(settings, student)
    used = _used_settings(settings, student)
    with resumable(used, Path(output), overwrite, resume, check_output_folder) as state:
        (teacher, _), (smallest, dtype) = (load_placed(name, settings.dtype) for name in (settings.teacher, student))
        tokenizer = load_tokenizer(student, smallest)
        check_same_tokenizer(smallest, teacher, tokenizer)
        rows = load_calibration_rows(settings, tokenizer, teacher)[: settings.plan.search_rows]
        held_out_rows = load_held_out_rows(settings.data, tokenizer, teacher)
        sizes = find_sizes(smallest, teacher, rows, state=state, progress=True)
        evaluations = state.with_name("evaluations.json")
        results = json.loads(evaluations.read_text()) if evaluations.exists() else []
        for size in sizes[len(results) :]:
            results.append(_evaluate(size, smallest, teacher, held_out_rows, tokenizer, dtype))
            write_whole(evaluations, json.dumps(results))
        chosen = next(
            index for index, size in enumerate(sizes) if len(SharingPlan(size.layer_plan).changed_layers) == count
        )
        size = sizes[chosen]
        larger = put_back(smallest, teacher, size.layers, size.teacher_share)
        report = {
            "teacher": describe_teacher(teacher),
            "data": describe_data(settings.data),
            "plan": SharingPlan(size.layer_plan).to_dict(),
            "put_back": {
                "settings": without_paths(used),
                "layers": size.layers,
                "teacher_share": size.teacher_share,
                "sizes": results,
            },
            **_describe_distillation(student),
            "results": results[: chosen + 1],
            "environment": describe_environment(),
        }
        with whole_folder(Path(output), overwrite) as folder:
            write_student(folder, larger, tokenizer, report, dtype, name=Path(output).resolve().name)
    return report


def _used_settings(settings: CompressionSettings, student: str) -> dict:
    """The settings that matter here, with the student."""
    return {"from_student": student} | {
        name: value for name, value in asdict(settings).items() if name != "distillation"
    }


def _check_settings(settings: CompressionSettings) -> None:
    """Refuse what a student that is there has already: a plan, and tuned echo layers."""
    used, tuned = PlanSettings(), CalibrationSettings()
    plan = replace(settings.plan, ratio=used.ratio, search_rows=used.search_rows)
    tuning = replace(
        settings.calibration, calibration_rows=tuned.calibration_rows, calibration_seed=tuned.calibration_seed
    )
    given = options_of(PlanSettings, asdict(plan)) + options_of(CalibrationSettings, asdict(tuning))
    if given:
        raise ValueError(
            f"{' '.join(given)} is given, but the student has its plan and is tuned already: leave it out. The ratio says "
            "which size is written."
        )


def _count_changed_layers(settings: CompressionSettings, student: str) -> int:
    """Number of changed layers of the student that is asked for."""
    config = load_config(student)
    if not isinstance(config, EchoAttConfig):
        raise ValueError(
            f"{student!r} is of type {config.model_type!r}, not an EchoAtt student: run `echoatt convert`."
        )
    number, own = len(config.plan), len(SharingPlan(config.plan).changed_layers)
    count = check_ratio(number, settings.plan.ratio)
    if count >= own:
        raise ValueError(
            f"ratio is {settings.plan.ratio}, {count} of {number} layers; it must be below that of the student, "
            f"{own / number:.2f}, {own} layers, as layers are put back."
        )
    return count


def _evaluate(
    size: StudentSize,
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> dict:
    """What is measured of a size as it is saved, in `dtype`: weights that were drawn to the teacher's are rounded then."""
    model = put_back(student, teacher, size.layers, size.teacher_share)
    ratio = len(SharingPlan(size.layer_plan).changed_layers) / len(size.layer_plan)
    with as_saved(model, dtype, model.dtype):
        result = evaluate_model(model, rows, teacher=teacher, tokenizer=tokenizer, description=f"evaluate {ratio:.2f}")
    measured = {"calibration_kl": size.kl, **{name: value for name, value in size.to_dict().items() if name != "kl"}}
    name = f"{ratio:.2f}, as distilled" if not size.layers else f"{ratio:.2f}, layer {size.layers[-1]} back"
    return {"name": name, "ratio": ratio, **measured, **result, **describe_sizes(model)}


def _describe_distillation(student: str) -> dict:
    """How the student was distilled, as far as its own report says."""
    report = load_json(student, "report.json")
    if "settings" not in report:
        return {}
    steps = {name: report["settings"]["distillation"][name] for name in ("steps", "stage2_steps")}
    return steps | {"tokens": count_tokens(report)}
