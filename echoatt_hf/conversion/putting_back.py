"""
Several sizes of one distilled student: layers of its teacher are put back into it, one by one, in the order of what they cost.

Source: "Boomerang distillation", arXiv 2510.05064. There the whole layers of the teacher come back, as here. What this adds: as
echo layers leave, the weights that made up for them are drawn back to the teacher's too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling_echoatt import EchoAttForCausalLM
from ..models.checks import hash_weights
from ..models.heads import OutputHead, predict
from ..models.inference import inference
from ..models.layerwise import find_layers
from ..models.predictions import sum_predictions
from ..outputs.measured import Measured
from ..planning.sharing import SharingPlan
from ..text.rows import batch_rows, hash_rows
from .alignment import find_changed
from .student import _check_teacher, _make_student


__all__ = ["StudentSize", "find_sizes", "put_back"]


SHARE_STEP = 1 / 8
"""Steps in which the teacher's share is tried."""

LEAST_COSINE = 0.5
"""Cosine of a student's weights with its teacher's, below which they are no relatives. Distilled students have 0.9 and more."""


@dataclass(frozen=True)
class StudentSize:
    """
    One of the sizes of a student.

    Args:
        layer_plan (`list[int | str]`): the plan, see [`SharingPlan`].
        layers (`list[int]`): the layers of the teacher that are back, in the order in which they came.
        teacher_share (`float`): how far the weights that both models have are drawn to the teacher's, see [`put_back`].
        kl (`float`): KL(teacher || student) on the rows it was measured on, in nats per token.
    """

    layer_plan: list[int | str]
    layers: list[int]
    teacher_share: float
    kl: float

    def to_dict(self) -> dict:
        """The size as JSON can hold it."""
        return asdict(self)


def put_back(
    student: EchoAttForCausalLM, teacher: PreTrainedModel, layers: Sequence[int], teacher_share: float = 0.0
) -> EchoAttForCausalLM:
    """
    A larger student: some changed layers of a student are whole layers of its teacher again.

    Args:
        student ([`EchoAttForCausalLM`]):
            A distilled student, without adapters. It is left untouched.
        teacher (`PreTrainedModel`):
            The model it was made from. It is left untouched.
        layers (sequence of `int`):
            Layers of the student that its plan changes, such as echo layers. Attention, MLP and norms of the teacher come back together: what a training made of
            the values of an echo does not fit attention weights of its own.
        teacher_share (`float`, *optional*, defaults to 0.0):
            How far all other weights are drawn to the teacher's: 0 leaves the student's, 1 takes the teacher's. The attention of
            the changed layers that are left stays the student's.

    Returns:
        [`EchoAttForCausalLM`]: the student, in evaluation mode, with weights of its own.

    Raises:
        `ValueError`: the plan does not change a layer, the student has adapters, or it was made from another teacher.
    """
    _check_student(student, teacher)
    changed = SharingPlan(student.config.plan).changed_layers
    others = sorted({*layers} - {*changed})
    if others:
        raise ValueError(f"The plan of the student does not change layers {others}: put back some of {changed}.")
    if not 0 <= teacher_share <= 1:
        raise ValueError(f"teacher_share is {teacher_share}; it must be from 0 to 1.")
    larger = _put_back(student, teacher, layers, teacher_share)
    for tensor in (*larger.parameters(), *larger.buffers()):
        tensor.data = tensor.data.clone()
    return larger.requires_grad_(True)


def find_sizes(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    *,
    batch_size: int = 8,
    state: Path | None = None,
    progress: bool = False,
) -> list[StudentSize]:
    """
    The order in which the layers of a teacher are best put back into its student.

    Each time that layer comes back that lowers KL(teacher || student) most, and then the other weights are drawn to the
    teacher's for as long as that lowers it. With n changed layers that takes about n²/2 + 2n measurements. Beside both models
    there is one more copy of the weights in memory.

    Args:
        student, teacher:
            See [`put_back`].
        rows (sequence of `dict`):
            Rows to measure on, with `input_ids` of T tokens, as returned by [`pack_rows`].
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.
        state (`Path`, *optional*):
            JSON file that keeps what was measured, from which a search that was stopped goes on.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `list` of [`StudentSize`]: from the student itself to that with one changed layer.

    Raises:
        `ValueError`: there are no rows, the student has adapters, it was made from another teacher, or what `state` holds was
            measured on something else.
    """
    _check_student(student, teacher)
    if not rows:
        raise ValueError("There are no rows to measure on: give text that fills at least one.")
    echoes = SharingPlan(student.config.plan).changed_layers
    total = len(echoes) * (len(echoes) + 1) // 2
    kept = Measured(state, lambda: _describe(student, teacher, rows), "delete it, or give another file")
    with inference(student, teacher), tqdm(total=total, desc="put back", disable=not progress, leave=False) as bar:
        measure = _Measure(student, teacher, list(batch_rows(rows, batch_size)), kept)
        layers, share, kl = [], 0.0, measure([], 0.0)
        sizes = [StudentSize(student.config.plan, [], share, kl)]
        bar.update()
        while len(layers) < len(echoes) - 1:
            found = {}
            for layer in (layer for layer in echoes if layer not in layers):
                found[layer] = measure([*layers, layer], share)
                bar.update()
            best = min(found, key=found.get)
            layers, kl = [*layers, best], found[best]
            while share < 1 and (closer := measure(layers, share + SHARE_STEP)) < kl:
                share, kl = share + SHARE_STEP, closer
            sizes.append(StudentSize(_plan_with(student, layers), layers, share, kl))
    return sizes


def _describe(student: EchoAttForCausalLM, teacher: PreTrainedModel, rows: Sequence[dict]) -> dict:
    """What the KL of a size depends on."""
    models = {"student": student, "teacher": teacher}
    return {name: f"{hash_weights(model)} {model.dtype}" for name, model in models.items()} | {
        "plan": str(student.config.plan),
        "rows_sha256": hash_rows(rows),
    }


class _Measure:
    """KL(teacher || student) of the students that [`put_back`] makes, in nats per token, each measured once."""

    def __init__(self, student: EchoAttForCausalLM, teacher: PreTrainedModel, batches: list, state: Measured):
        self._student, self._teacher, self._batches, self._state = student, teacher, batches, state
        head = OutputHead.find(teacher, among_processes=False)
        self._logits = [predict(teacher, head, batch) for batch in batches]

    def __call__(self, layers: Sequence[int], teacher_share: float) -> float:
        key = f"{sorted(layers)} {teacher_share}"
        if key not in self._state:
            self._state[key] = self._measure(layers, teacher_share)
        return self._state[key]

    def _measure(self, layers: Sequence[int], teacher_share: float) -> float:
        model = _put_back(self._student, self._teacher, layers, teacher_share)
        head = OutputHead.find(model, among_processes=False)
        total = tokens = 0
        for batch, expected in zip(self._batches, self._logits, strict=True):
            total += sum_predictions(predict(model, head, batch), expected, batch["input_ids"])[1].item()
            tokens += batch["input_ids"][:, 1:].numel()
        return total / tokens


def _put_back(
    student: EchoAttForCausalLM, teacher: PreTrainedModel, layers: Sequence[int], teacher_share: float
) -> EchoAttForCausalLM:
    """[`put_back`], without checks, with the models' own weights where they are taken as they are, frozen."""
    larger = _make_student(teacher, _plan_with(student, layers), share_weights=True)
    model, own = larger.language_model, student.language_model.state_dict()
    names = {module: f"{name}." for name, module in model.named_modules()}
    decoder_layers = find_layers(model)
    from_teacher = tuple(names[decoder_layers[layer]] for layer in layers)
    from_student = tuple(names[attention] for attention in find_changed(larger).values())
    state = {}
    for name, value in model.state_dict().items():
        # Families keep some tensors in float32, whatever the dtype of the model.
        dtype = own[name].dtype if name in own else student.dtype if value.dtype == teacher.dtype else value.dtype
        value = value.to(student.device, dtype)
        if not name.startswith(from_teacher):
            is_drawn = teacher_share > 0 and value.is_floating_point() and not name.startswith(from_student)
            value = own[name].lerp(value, teacher_share) if is_drawn else own[name]
        state[name] = value
    model.load_state_dict(state, assign=True)
    larger.tie_weights()
    larger.config.dtype, larger.config.echo_decode = student.dtype, student.config.echo_decode
    return larger.requires_grad_(False).eval()


def _plan_with(student: EchoAttForCausalLM, layers: Sequence[int]) -> list[int | str]:
    """The student's plan, but that some layers stay as they are. All sources do, so it stays a plan."""
    return [layer if layer in layers else entry for layer, entry in enumerate(student.config.plan)]


def _check_student(student: EchoAttForCausalLM, teacher: PreTrainedModel) -> None:
    """Check that a student is a plain model in memory that was made from a teacher, as far as weights can tell."""
    has_adapters = any(isinstance(module, BaseTunerLayer) for module in student.modules())
    if has_adapters:
        raise ValueError("The student has adapters in it: merge them into its weights (`merge_and_unload`).")
    if not isinstance(student, EchoAttForCausalLM):
        raise ValueError(
            f"The student is a {type(student).__name__}, not an EchoAtt student: nothing can be put back."
        )
    if not all(parameter.is_floating_point() for parameter in student.parameters()):
        raise ValueError("The student is quantized: put layers back into the one it was made from.")
    if student.config.shared_heads:
        raise ValueError("The student has heads that share weights (shared_heads): layers are not put back into it.")
    if not SharingPlan(student.config.plan).changed_layers:
        raise ValueError("The student has no echo layers: nothing can be put back.")
    _check_teacher(teacher)
    remedy = "Give the teacher the student was made from."
    depths = len(student.config.plan), teacher.config.num_hidden_layers
    if depths[0] != depths[1]:
        raise ValueError(f"The student has {depths[0]} layers and the teacher {depths[1]}. {remedy}")
    twin = _make_student(teacher, student.config.plan, share_weights=True).language_model
    if find_layers(twin) is None:
        raise ValueError(
            f"The layers of the family {teacher.config.model_type!r} are not in one list: none can be put back."
        )
    own, theirs = student.language_model.state_dict(), twin.state_dict()
    for name in sorted({*own} | {*theirs}):
        shapes = [list(state[name].shape) if name in state else "nothing" for state in (own, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"In {name!r} the student has {shapes[0]} and a student of the teacher {shapes[1]}. {remedy}"
            )
    cosine = _cosine(own, theirs)
    if cosine < LEAST_COSINE:
        raise ValueError(
            f"The student's weights are unlike the teacher's (cosine {cosine:.2f}; of a distilled student at least "
            f"{LEAST_COSINE}). {remedy}"
        )


def _cosine(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Cosine of all matrices of two models together. Echo layers, whose heads may have another order, are a small part."""
    products = [0.0, 0.0, 0.0]
    for name, value in one.items():
        if value.ndim > 1:
            pair = value.float().flatten(), other[name].to(value.device).float().flatten()
            for index, (left, right) in enumerate((pair, (pair[0],) * 2, (pair[1],) * 2)):
                products[index] += float(left @ right)
    return products[0] / max(products[1] * products[2], 1e-24) ** 0.5
