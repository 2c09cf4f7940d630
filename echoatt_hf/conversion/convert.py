"""Teacher and plan to student: what is inherited, what is dropped, and what that saves."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..configuration_echoatt import read_layer_plan
from ..modeling_echoatt import FUSED_MODULES, EchoAttForCausalLM
from ..models.predictions import compare_predictions
from ..models.sizes import count_kv_bytes_per_token, name_dtype
from ..outputs.provenance import describe_teacher
from ..planning.sharing import SharingPlan
from .alignment import get_parameters, set_parameters
from .tuning import find_tuned, hold_out, tune_student


__all__ = ["ConversionReport", "convert"]

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # its number, in the name of a parameter


@dataclass(frozen=True)
class ConversionReport:
    """
    What a conversion did.

    Args:
        layer_plan (`list[int | str]`): the plan, of the teacher's layers, see [`SharingPlan`].
        copied (`list[str]`): parameters the student inherits, by the teacher's names.
        cut (`list[str]`): fused projections of the teacher of which the student inherits a part: values and output gates in
            echo layers, queries in those that use the keys and values of others.
        dropped (`list[str]`): parameters of the teacher that the student does without.
        teacher_parameters, student_parameters (`int`): number of parameters, tied ones counted once.
        teacher_kv_bytes_per_token, student_kv_bytes_per_token (`int`): bytes of KV cache for each token.
        kv_bytes_dtype (`str`): the type in which these bytes are counted, that of the models in memory; empty in reports of
            earlier versions, which did not say.
        kl (`dict[str, float]`): KL(teacher || student) on calibration rows held out, in nats per token: `"copied"`, and
            `"tuned"` if the echo layers were tuned, which is kept if it lowers it.
        aligned (`dict[int, list[int]]`): for each echo layer whose heads were aligned, the head of the teacher that is now
            in each place.
        refitted (`dict[int, float]`): for each echo layer, if they were refitted, the squared error of the attention
            output that is left, as a share of what it was before.
        taken_up (`dict[int, float]`): for each layer of the student whose MLP was refitted so that it takes up the part of
            dropped layers after it, the squared error of the hidden states that is left.
        teacher (`dict[str, str]`): the teacher, see [`describe_teacher`].
        method (`dict`): `method`, where it was one of others than a plan, its `settings`, and its `targets`.
    """

    layer_plan: list[int | str]
    copied: list[str]
    cut: list[str]
    dropped: list[str]
    teacher_parameters: int
    student_parameters: int
    teacher_kv_bytes_per_token: int
    student_kv_bytes_per_token: int
    kv_bytes_dtype: str = ""
    kl: dict[str, float] = field(default_factory=dict)
    aligned: dict[int, list[int]] = field(default_factory=dict)
    refitted: dict[int, float] = field(default_factory=dict)
    taken_up: dict[int, float] = field(default_factory=dict)
    teacher: dict[str, str] = field(default_factory=dict)
    method: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict) -> "ConversionReport":
        """The report of what [`ConversionReport.to_dict`] returned, or that of version 0.2.0."""
        plan = {"layer_plan": content["echo_sources"]} if "echo_sources" in content else {}
        return cls(**{name: value for name, value in content.items() if name != "echo_sources"} | plan)

    def __str__(self) -> str:
        dtype = f", in {self.kv_bytes_dtype}" if self.kv_bytes_dtype else ""
        return "\n".join(
            [
                f"plan         {SharingPlan(self.layer_plan)}",
                f"copied       {len(self.copied)} tensors",
                *self._describe_cut(),
                f"dropped      {_name_modules(self.dropped)}",
                f"parameters   {_change(self.teacher_parameters, self.student_parameters)}",
                f"KV bytes     {_change(self.teacher_kv_bytes_per_token, self.student_kv_bytes_per_token)} per token{dtype}",
                *self._describe_tuning(),
            ]
        )

    def _describe_cut(self) -> list[str]:
        moves, lines = [move for move, _ in read_layer_plan(self.layer_plan)], []
        for move, kept in {"echo": "values and gates", "kv": "queries"}.items():
            cut = [name for name in self.cut if moves[int(_LAYER.search(name)[0])] == move]
            if cut:
                lines.append(f"cut          {_name_modules(cut)}; {kept} are kept")
        return lines

    def _describe_tuning(self) -> list[str]:
        if not self.kl:
            return []
        values = [f"{value:.4f} {name}" if name != "copied" else f"{value:.4f}" for name, value in self.kl.items()]
        counts = {"aligned": len(self.aligned), "refitted": len(self.refitted), "taking up": len(self.taken_up)}
        layers = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        kept = f" ({layers or 'not kept'})" if len(values) > 1 else ""
        return [f"KL           {' → '.join(values)}{kept} nats per token"]


def convert(
    teacher: PreTrainedModel | str,
    plan: Sequence[int | str],
    rows: Sequence[dict] | None = None,
    *,
    similarity: AttentionSimilarity | None = None,
    align: bool = True,
    refit: bool = True,
    share_weights: bool = False,
    progress: bool = False,
) -> tuple[EchoAttForCausalLM, ConversionReport]:
    """
    Convert a teacher into a student, and report what was done.

    Without rows of text the weights are copied. With them the echo layers are brought closer to the teacher before any
    training: their heads are aligned with those of their sources, and their output projections refitted in closed form.
    Each is kept only if it lowers KL(teacher || student) on the last quarter of the rows.

    Args:
        teacher (`PreTrainedModel` or `str`):
            A causal language model of a supported family, or the name or path of one. It is left untouched.
        plan (`SharingPlan` or sequence of `int` or `str`):
            For each layer the index of the layer whose attention weights it uses, or another move, see [`SharingPlan`].
        rows (sequence of `dict`, *optional*):
            Calibration text: rows with `input_ids` of T tokens, as returned by [`pack_rows`]. A refit wants many times as
            many tokens as the model's hidden size.
        similarity ([`AttentionSimilarity`], *optional*):
            Of the teacher, for the alignment; measured on the rows if not given.
        align (`bool`, *optional*, defaults to `True`):
            Align heads, see [`align_heads`].
        refit (`bool`, *optional*, defaults to `True`):
            Refit output projections, see [`refit_outputs`].
        share_weights (`bool`, *optional*, defaults to `False`):
            Give the student the teacher's own weights, frozen, see [`EchoAttForCausalLM.from_teacher`].
        progress (`bool`, *optional*, defaults to `False`):
            Show progress bars.

    Returns:
        `tuple`: [`EchoAttForCausalLM`] and [`ConversionReport`].

    Raises:
        `ValueError`: the teacher is not a plain decoder language model, the plan does not fit it, or there is only one
            row.
    """
    if isinstance(teacher, (str, Path)):
        from ..models.loading import load_model

        teacher = load_model(teacher)
    plan, tuning = SharingPlan(plan), {}
    student = EchoAttForCausalLM.from_teacher(teacher, plan, share_weights)
    if rows is not None and plan.changed_layers:
        tuning = _tune(student, teacher, plan, rows, similarity, align, refit, progress)
    inherited = dict(_name_in_teacher(student, plan))
    names = [name for name, _ in teacher.named_parameters()]
    missing = [name for name in names if name not in inherited]
    new = inherited.keys() - set(names)
    cut = [name for name in missing if _names_of_kept(name) & new]
    report = ConversionReport(
        layer_plan=list(plan),
        copied=[name for name in names if name in inherited],
        cut=cut,
        dropped=[name for name in missing if name not in cut],
        teacher_parameters=teacher.num_parameters(),
        student_parameters=student.num_parameters(),
        teacher_kv_bytes_per_token=count_kv_bytes_per_token(teacher),
        student_kv_bytes_per_token=count_kv_bytes_per_token(student),
        kv_bytes_dtype=name_dtype(teacher),
        teacher=describe_teacher(teacher),
        **tuning,
    )
    return student, report


def _tune(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    plan: SharingPlan,
    rows: Sequence[dict],
    similarity: AttentionSimilarity | None,
    align: bool,
    refit: bool,
    progress: bool,
) -> dict[str, dict]:
    """Tune the changed layers, and keep it if it helps. Returns what the report says of it."""
    train, held_out = hold_out(rows)
    modules = find_tuned(student, plan)
    before = {name: get_parameters(module) for name, module in modules.items()}
    kl = {"copied": compare_predictions(student, held_out, teacher).kl}
    if not (align or refit) or not before:
        return {"kl": kl}
    if align and similarity is None:
        similarity = measure_on_rows(teacher, rows, progress=progress)
    tuned, taken_up = tune_student(
        student,
        teacher,
        train,
        held_out,
        similarity if align else None,
        refit=refit,
        teacher_layers=plan.kept_layers,
        progress=progress,
    )
    if not (tuned or taken_up):
        return {"kl": kl}
    kl["tuned"] = compare_predictions(student, held_out, teacher).kl
    if not kl["tuned"] < kl["copied"]:
        for name, module in modules.items():
            set_parameters(module, before[name])
        return {"kl": kl}
    return {
        "kl": kl,
        "aligned": {layer: each.order for layer, each in tuned.items() if each.order is not None},
        "refitted": {layer: each.share for layer, each in tuned.items() if each.share < 1},
        "taken_up": {layer: share for layer, share in taken_up.items() if share < 1},
    }


def _name_in_teacher(student: EchoAttForCausalLM, plan: SharingPlan) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a student that are none of its own, by the names that they have in its teacher."""
    for name, parameter in student.language_model.named_parameters():
        if plan.dropped_layers:
            name = _LAYER.sub(lambda number: str(plan.kept_layers[int(number[0])]), name, count=1)
        yield name, parameter


def _names_of_kept(name: str) -> set[str]:
    """Names of the parameters that a layer may keep of a fused one."""
    *path, module, parameter = name.split(".")
    return {".".join([*path, kept, parameter]) for kept in ("q_proj", FUSED_MODULES.get(module, module))}


def _name_modules(parameters: list[str]) -> str:
    modules = sorted({name.rsplit(".", 1)[0] for name in parameters})
    return f"{len(parameters)} tensors: {', '.join(modules) or 'none'}"


def _change(before: int, after: int) -> str:
    return f"{before:,} → {after:,} ({(after - before) / before:+.1%})"
