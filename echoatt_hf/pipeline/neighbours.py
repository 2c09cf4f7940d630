"""Students made by other methods than a plan of ours: KVSharer, LaCo and DirectShare."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from ..baselines.direct_share import count_saved, make_shared_student, match_heads
from ..baselines.kvsharer import plan_like_kvsharer
from ..baselines.laco import collapse_layers
from ..benchmark.costs import count_costs
from ..conversion.convert import ConversionReport, convert
from ..conversion.student import make_student
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.dtypes import cast_weights
from ..models.loading import load_placed, load_tokenizer
from ..models.sizes import count_kv_bytes_per_token
from ..outputs.files import check_output_folder
from ..outputs.provenance import describe_teacher
from ..search.budget import PlanCosts, are_met, check_targets, find_limits
from ..settings import CompressionSettings, MethodSettings, PlanSettings, Target, options_of
from .preparation import load_calibration_rows
from .steps import write_converted


__all__ = ["Neighbour", "convert_by_method", "make_by_method"]


@dataclass(frozen=True)
class Neighbour:
    """
    What a method of others made.

    Args:
        student ([`EchoAttForCausalLM`]): the student.
        report ([`ConversionReport`]): what it has of its teacher.
        about (`dict`): the method, its settings, the text it was given, and what was tried.
    """

    student: EchoAttForCausalLM
    report: ConversionReport
    about: dict


def convert_by_method(
    settings: CompressionSettings, method: MethodSettings, output: str | Path, *, overwrite: bool = False
) -> dict:
    """
    Write the student that a method of others makes, with its tokenizer, `conversion.json`, a model card, and `method.json`,
    which says what was tried.

    Args:
        settings ([`CompressionSettings`]):
            The teacher, the text and the calibration rows; of the plan, targets alone.
        method ([`MethodSettings`]):
            The method and its settings.
        output (`str` or `Path`):
            Folder to write.
        overwrite:
            See [`compress`].

    Returns:
        `dict`: the content of `conversion.json`.

    Raises:
        `ValueError`: a plan is given, a setting does not fit the model, or the method does not reach a target.
    """
    check_output_folder(Path(output), overwrite)
    plan = replace(settings.plan, target=None, decode_context=PlanSettings().decode_context)
    if given := options_of(PlanSettings, asdict(plan)):
        raise ValueError(f"{' '.join(given)} is given, but the method {method.method!r} makes the plan: leave it out.")
    targets = settings.plan.list_targets()
    _check_targets(method, targets)
    teacher, dtype = load_placed(settings.teacher, settings.dtype)
    tokenizer = load_tokenizer(settings.teacher, teacher)
    rows = load_calibration_rows(settings, tokenizer, teacher) if _METHODS[method.method].tokens else []
    made = make_by_method(teacher, rows, method, targets, settings.plan.decode_context)
    cast_weights(made.student, dtype)
    more = {"method.json": json.dumps(made.about, indent=2) + "\n"}
    write_converted(output, made.student, tokenizer, made.report, more, overwrite)
    return made.report.to_dict()


def make_by_method(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    method: MethodSettings,
    targets: Sequence[Target] = (),
    decode_context: int = 2048,
) -> Neighbour:
    """
    The student that a method of others makes of a teacher.

    Targets take the place of the setting by which a method saves more or less: KVSharer shares as few layers as reach them,
    LaCo has the highest threshold, to a thousandth, and DirectShare the lowest rate.

    Args:
        teacher (`PreTrainedModel`): a causal language model of a supported family, left untouched.
        rows (sequence of `dict`): rows with `input_ids`, of which the method takes as much as its authors did.
        method ([`MethodSettings`]): the method and its settings.
        targets (sequence of [`Target`], *optional*): what to save.
        decode_context (`int`, *optional*, defaults to 2048): tokens in the cache, for the target `decode`.

    Returns:
        [`Neighbour`]

    Raises:
        `ValueError`: a setting does not fit the model, or the method does not reach a target.
    """
    _check_targets(method, targets)
    found, goal = _METHODS[method.method], None
    if targets:
        context = decode_context if any(target.quantity == "decode" for target in targets) else None
        check_targets(teacher, targets)
        goal = _Goal(find_limits(_count_costs(teacher, context), targets), context)
    rows = [{"input_ids": row["input_ids"][: found.tokens]} for row in rows[: found.rows]]
    student, report, tried = found.make(teacher, rows, goal, **method.options())
    if goal and not goal.is_reached_by(student):
        before, after = (_count_costs(model, goal.context) for model in (teacher, student))
        saved = (f"{name} {getattr(after, name) / getattr(before, name) - 1:.1%}" for name in goal.limits)
        raise ValueError(
            f"The method {method.method!r} does not reach the target: the most that it saves of this model is "
            f"{', '.join(saved)}. Give less, or another method."
        )
    named = {"method": method.method, "settings": method.options(), "targets": [asdict(each) for each in targets]}
    about = {**named, "rows": len(rows), "row_length": found.tokens, **tried}
    return Neighbour(student, replace(report, teacher=describe_teacher(teacher), method=named), about)


@dataclass(frozen=True)
class _Goal:
    """
    What a student may cost at most.

    Args:
        limits (`dict[str, int]`): by the fields of [`PlanCosts`].
        context (`int`, *optional*): tokens in the cache in decoding, if there is a limit for it.
    """

    limits: dict[str, int]
    context: int | None

    def is_reached_by(self, model: PreTrainedModel) -> bool:
        return are_met(self.limits, _count_costs(model, self.context))


def _count_costs(model: PreTrainedModel, context: int | None) -> PlanCosts:
    """The costs of a model; of decoding at a context, if it is given."""
    read = 0
    if context is not None:
        costs = count_costs(model)
        if costs is None:
            raise ValueError("target is decode=, which is not counted for this model: not all its weights are linear.")
        read = costs.weight_bytes + costs.kv_bytes * context
    return PlanCosts(model.num_parameters(), count_kv_bytes_per_token(model), read)


def _check_targets(method: MethodSettings, targets: Sequence[Target]) -> None:
    """Raise `ValueError` if a method has nothing to do with a target, or another setting says what it is to save."""
    found = _METHODS[method.method]
    for target in targets:
        if target.quantity not in found.saves:
            raise ValueError(
                f"target is {target.quantity}, of which the method {method.method!r} saves nothing; it saves "
                f"{' and '.join(found.saves)}."
            )
        if found.knob in method.options():
            value = method.options()[found.knob]
            raise ValueError(f"{found.knob} is {value}, but the target decides it: give one of the two.")


_Made = tuple[EchoAttForCausalLM, ConversionReport, dict]
"""A student, what it has of its teacher, and what was tried."""


def _kvsharer(teacher: PreTrainedModel, rows: list[dict], goal: _Goal | None, **options) -> _Made:
    names = {"kv_order": "order", "kv_distance": "distance", "keep_above": "threshold"}
    count = options.pop("shared_layers", teacher.config.get_text_config().num_hidden_layers // 4)
    if goal is not None:
        count = lambda plan: goal.is_reached_by(make_student(teacher, plan, share_weights=True))  # noqa: E731
    found = plan_like_kvsharer(teacher, rows, count, **{names[name]: value for name, value in options.items()})
    student, report = convert(teacher, found.plan, align=False, refit=False)
    asked = {"asked": count} if goal is None else {}
    return student, report, {**asked, "tried": [asdict(trial) for trial in found.tried]}


def _laco(teacher: PreTrainedModel, rows: list[dict], goal: _Goal | None, **options) -> _Made:
    names = {"keep_above": "threshold"}
    settings = {names.get(name, name.removeprefix("merge_")): value for name, value in options.items()}
    if goal is None:
        found = collapse_layers(teacher, rows, **settings)
    else:
        low, high = -1.0, 1.0
        found = collapse_layers(teacher, rows, **settings, threshold=low)
        while goal.is_reached_by(found.model) and high - low > 1e-3:
            threshold = (low + high) / 2
            candidate = collapse_layers(teacher, rows, **settings, threshold=threshold)
            if goal.is_reached_by(candidate.model):
                found, low = candidate, threshold
            else:
                high = threshold
    student, report = convert(found.model, range(len(found.layers)), align=False, refit=False)
    report = replace(
        report,
        layer_plan=[layer if layer == group[0] else "drop" for group in found.layers for layer in group],
        teacher_parameters=teacher.num_parameters(),
        teacher_kv_bytes_per_token=count_kv_bytes_per_token(teacher),
    )
    about = {name: getattr(found, name) for name in ("layers", "threshold", "similarity", "similarity_without")}
    return student, report, {**about, "tried": [asdict(merge) for merge in found.tried]}


def _directshare(teacher: PreTrainedModel, rows: list[dict], goal: _Goal | None, **options) -> _Made:
    parts, rate = options.get("head_parts", "qk"), options.get("head_rate", 0.3)
    pairs = match_heads(teacher, rate if goal is None else None, parts)
    if goal is not None:
        excess = teacher.num_parameters() - goal.limits["parameters"]
        enough = (count for count in range(1, len(pairs)) if count_saved(teacher, pairs[:count]) >= excess)
        pairs = pairs[: next(enough, len(pairs))]
    student = make_shared_student(teacher, pairs)
    plain, report = convert(
        teacher,
        range(teacher.config.get_text_config().num_hidden_layers),
        align=False,
        refit=False,
        share_weights=True,
    )
    del plain  # of which only what the report says of the teacher is needed
    report = replace(report, student_parameters=student.num_parameters())
    return student, report, {"pairs": [pair._asdict() for pair in pairs]}


@dataclass(frozen=True)
class _Method:
    """
    A method of others.

    Args:
        make (`Callable`): makes the student, from the teacher, the rows, what says whether a model saves enough, and settings.
        saves (`tuple[str, ...]`): what it saves, as targets name it.
        knob (`str`): the setting by which it saves more or less.
        tokens (`int`, *optional*): tokens of a row that it is given; no text at all if not given.
        rows (`int`): rows at most.
    """

    make: Callable[..., _Made]
    saves: tuple[str, ...]
    knob: str
    tokens: int | None = None
    rows: int = 0


_METHODS = {
    "kvsharer": _Method(_kvsharer, ("parameters", "kv-bytes"), "shared_layers", tokens=64, rows=30),
    "laco": _Method(_laco, ("parameters", "kv-bytes", "decode"), "keep_above", tokens=20, rows=5),
    "directshare": _Method(_directshare, ("parameters",), "head_rate"),
}
