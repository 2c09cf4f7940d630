"""The models that a benchmark measures: teacher, student, and other small ones."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..conversion.dropping import drop_layers
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.devices import default_device
from ..models.loading import load_config, load_model
from ..models.sizes import count_kv_bytes_per_token
from ..planning.from_settings import make_plan
from ..planning.sharing import SharingPlan
from ..settings import BenchmarkSettings, PlanSettings
from .shapes import SHAPES


__all__ = []

TEACHER = "teacher"


STUDENT = "student"


EAGER = "eager teacher"


DROPPED = "layers dropped"


SHARING = "KV sharing"


_SIZES = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)


@dataclass(frozen=True)
class Contender:
    """A model to measure, and the attention implementation it and its teacher run in."""

    name: str
    model: PreTrainedModel
    attention: str


def make_contenders(settings: BenchmarkSettings, teacher: str, student: str) -> tuple[list[Contender], dict[str, str]]:
    """What is measured, and why baselines that were asked for are not, by name."""
    dtype, device = getattr(torch, settings.dtype), default_device()
    if teacher in SHAPES or settings.random_init:
        config = _make_config(settings, teacher)
        plan = _read_plan(student, config)  # what is wrong is said before anything is made
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        if settings.layers is not None:
            raise ValueError("layers is given, which needs a model with random weights: give --random-init too.")
        plan = _read_plan(student, load_config(teacher))
        model = load_model(teacher, dtype)
    model = model.to(device)
    try:
        model.set_attn_implementation(settings.attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"attention is {settings.attention!r}, which this model cannot use here: {reason}") from error
    if plan is None:
        shared = _load_student(student, model, dtype).to(device)
        shared.set_attn_implementation(settings.attention)
    else:
        shared = EchoAttForCausalLM.from_teacher(model, plan, share_weights=True)
    left_out = {}
    contenders = [Contender(TEACHER, model, settings.attention), Contender(STUDENT, shared, settings.attention)]
    if "eager" in settings.baseline:
        contenders.append(Contender(EAGER, model, "eager"))
    if "layers" in settings.baseline:
        contenders.append(Contender(DROPPED, _drop_as_many(model, shared), settings.attention))
    if "kv" in settings.baseline:
        plan = SharingPlan(plan or shared.config.plan)
        if not plan.echo_layers:
            left_out[SHARING] = "no layer of the student echoes, so that it would be no other model"
        elif len(plan) != model.config.get_text_config().num_hidden_layers:
            left_out[SHARING] = (
                "it is not known which layers of the teacher the student lacks: give the plan in its place"
            )
        else:
            sharing = EchoAttForCausalLM.from_teacher(model, plan.with_kv(), share_weights=True)
            contenders.append(Contender(SHARING, sharing, settings.attention))
    return contenders, left_out


def _make_config(settings: BenchmarkSettings, teacher: str) -> PreTrainedConfig:
    known = SHAPES[teacher] if teacher in SHAPES else load_config(teacher).to_dict()
    if settings.layers is not None:
        known = {name: value for name, value in known.items() if name != "layer_types"}
        known["num_hidden_layers"] = settings.layers
    return AutoConfig.for_model(**known)


def _read_plan(student: str, config: PreTrainedConfig) -> list[int | str] | None:
    """The plan that `student` says, or `None` where it names a model."""
    try:
        settings = PlanSettings(plan="spread", ratio=float(student))
    except ValueError:
        if not student.endswith(".json") and "," not in student:
            return None
        settings = PlanSettings(plan=student)
    return list(make_plan(settings, config))


def _load_student(student: str, teacher: PreTrainedModel, dtype: torch.dtype) -> EchoAttForCausalLM:
    model = load_model(student, dtype)
    if not isinstance(model, EchoAttForCausalLM):
        raise ValueError(f"{student!r} is a {type(model).__name__}, not a student: give one, or a plan.")
    configs = [model.config.text_config, teacher.config]
    for name in _SIZES:
        values = [getattr(config, name, None) for config in configs]
        is_smaller = name == "num_hidden_layers" and values[0] < values[1]  # without layers that were dropped
        if values[0] != values[1] and not is_smaller:
            raise ValueError(
                f"The student {student!r} is none of this teacher's: its {name} is {values[0]!r}, the teacher's "
                f"{values[1]!r}."
            )
    return model


def _drop_as_many(teacher: PreTrainedModel, student: PreTrainedModel) -> PreTrainedModel:
    """The teacher without the fewest of its inner layers, the last ones, that save as many parameters as the student."""
    last = teacher.config.num_hidden_layers - 1
    for count in range(1, last):
        smaller = drop_layers(teacher, range(last - count, last), share_weights=True)
        if smaller.num_parameters() <= student.num_parameters():
            return smaller
    raise ValueError("The inner layers together have fewer parameters than the student saves: leave 'layers' out.")


def describe_contender(contender: Contender) -> dict:
    parameters = list(contender.model.parameters())
    return {
        "attention": contender.attention,
        "layers": contender.model.config.num_hidden_layers,
        "layer_plan": getattr(contender.model.config, "plan", None),
        "parameters": contender.model.num_parameters(),
        "weight_bytes": sum(each.numel() * each.element_size() for each in parameters),
        "kv_bytes_per_token": count_kv_bytes_per_token(contender.model),
    }
