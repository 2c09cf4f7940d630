"""
Changed layers tuned to their teacher in closed form: the order of their heads, and their output projections.

Whether the heads of a layer that uses another are put in the order of its source's is decided together with the refit of its outputs:
both orders are fitted, and the one that comes closer to the teacher's attention output on rows held out is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity
from ..configuration_echoatt import read_layer_plan
from ..modeling_echoatt import EchoAttForCausalLM, EchoRecords, SkippedAttention
from ..models.devices import to_float64
from ..models.families import find_attention_modules, find_output_projection
from ..models.inference import inference
from ..models.layerwise import find_layers, keep_layer_outputs, run_to_call, run_until, starting_at
from ..text.rows import batch_rows
from .alignment import EchoParameters, align_layer, find_changed, get_parameters, replace_parameter, set_parameters
from .regression import NormalEquations, add_to_projection, solve_ridge


__all__ = ["LayerTuning", "TunedLayer", "hold_out", "refit_outputs", "tune_student"]


@dataclass(frozen=True)
class TunedLayer:
    """
    A changed layer after tuning.

    Args:
        parameters (`dict[str, nn.Parameter]`): of its attention.
        order (`list[int]`, *optional*): the head of the teacher that is now in each place, if they were put in another
            order.
        error (`float`): squared error of the attention output on the rows held out, summed over tokens and features.
        share (`float`): that error as a share of what it was before the refit; 1 where the projection is as it was.
    """

    parameters: EchoParameters
    order: list[int] | None
    error: float
    share: float


class LayerTuning:
    """
    One layer that is being tuned: sums over the tokens of batches, then the best of what was tried.

    Args:
        echo (`EchoAttention` or `KVAttention`): attention module of the layer. It has its parameters of before when this object is made, and
            any in between; [`LayerTuning.finish`] puts the best ones in.
        similarity (`torch.Tensor` of shape `(H, H)`, *optional*): of the heads of its source with its own, see
            [`match_heads`]; the order of heads stays without it.
        refit (`bool`): refit the output projection.
    """

    def __init__(self, echo: nn.Module, similarity: torch.Tensor | None, refit: bool):
        self._echo, self._refit, self._projection = echo, refit, find_output_projection(echo)
        self._variants: list[tuple[list[int] | None, EchoParameters]] = [(None, get_parameters(echo))]
        if similarity is not None:
            order = align_layer(echo, similarity)
            if order != sorted(order):
                self._variants.append((order, get_parameters(echo)))
            set_parameters(echo, self._variants[0][1])
        self._equations = [(NormalEquations(), NormalEquations()) for _ in self._variants]

    def add(self, part: int, attend: Callable[[], object], expected: torch.Tensor) -> None:
        """
        Add the tokens of a batch.

        Args:
            part (`int`): 0 to fit on, 1 to judge by.
            attend (`Callable`): calls the attention module.
            expected (`torch.Tensor` of shape `(N, O)`): what its output projection should put out.
        """
        for (_, parameters), equations in zip(self._variants, self._equations, strict=True):
            set_parameters(self._echo, parameters)
            inputs, output = run_until(self._projection, attend)
            if self._refit or part == 1:
                missing = expected.to(output.device) - output
                equations[part].add(self._projection, inputs, missing, solvable=self._refit)

    def finish(self) -> TunedLayer:
        """Solve, and put the best parameters into the layer."""
        tried = []
        for (order, parameters), (train, held_out) in zip(self._variants, self._equations, strict=True):
            change, share = solve_ridge(train, held_out) if self._refit else (None, 1.0)
            tried.append((share * float(held_out.squares), share, order, parameters, change))
        error, share, order, parameters, change = min(tried, key=lambda each: each[0])
        set_parameters(self._echo, parameters)
        if change is not None:
            add_to_projection(self._projection, change)
        return TunedLayer(get_parameters(self._echo), order, error, share)


class ConstantTuning:
    """
    A layer without attention that is being tuned: its constant becomes the mean of what the teacher's attention puts out.
    Arguments and methods are as in [`LayerTuning`].
    """

    def __init__(self, skipped: SkippedAttention, similarity: None, refit: bool):
        self._skipped, self._refit = skipped, refit
        self._parts = [(0.0, 0.0, 0), (0.0, 0.0, 0)]  # sum, sum of squares, tokens

    def add(self, part: int, attend: Callable[[], object], expected: torch.Tensor) -> None:
        """See [`LayerTuning.add`]."""
        expected = to_float64(expected)
        total, squares, count = self._parts[part]
        self._parts[part] = total + expected.sum(0), squares + expected.square().sum(), count + len(expected)

    def finish(self) -> TunedLayer:
        """See [`LayerTuning.finish`]."""
        (total, _, count), (held_out, squares, held_out_count) = self._parts
        mean = total / count if self._refit else torch.zeros_like(total)
        error = float(squares - 2 * (mean @ held_out) + held_out_count * (mean @ mean))
        share = error / max(float(squares), torch.finfo(torch.float64).tiny)
        if share < 1:
            constant = self._skipped.constant
            replace_parameter(self._skipped, "constant", mean.to(constant.device, constant.dtype))
        else:
            error, share = float(squares), 1.0
        return TunedLayer(get_parameters(self._skipped), None, error, share)


def make_tuning(module: nn.Module, similarity: torch.Tensor | None, refit: bool) -> LayerTuning | ConstantTuning:
    """The tuning of a changed layer. Arguments as in [`LayerTuning`]."""
    tuning = ConstantTuning if isinstance(module, SkippedAttention) else LayerTuning
    return tuning(module, similarity, refit)


def tune_student(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    held_out_rows: Sequence[dict],
    similarity: AttentionSimilarity | None = None,
    *,
    refit: bool = True,
    residual_share: float = 0.0,
    teacher_layers: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[int, TunedLayer]:
    """
    Tune the changed layers of a student, in place.

    Layer by layer from below, as each layer sees what the tuned ones below it give. Both models run once over the rows: a
    pass goes on from the layer where the last one stopped.

    Args:
        student ([`EchoAttForCausalLM`]):
            A student that has just been converted. Parameters that change are replaced, not written to.
        teacher (`PreTrainedModel`):
            The model it was made from.
        rows (sequence of `dict`):
            Rows with `input_ids` of T tokens, as returned by [`pack_rows`]. About ten times as many tokens as a layer has
            head features are needed.
        held_out_rows (sequence of `dict`):
            Other rows, on which orders of heads and regularisation are chosen.
        similarity ([`AttentionSimilarity`], *optional*):
            Of the teacher, for the order of heads, which stays without it.
        refit (`bool`, *optional*, defaults to `True`):
            Refit output projections.
        residual_share (`float`, *optional*, defaults to 0.0):
            Share of what is missing in the residual stream before the layer that its attention is to make up for.
        teacher_layers (sequence of `int`, *optional*):
            For each layer of the student that of the teacher it was made from, where layers were dropped.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `dict[int, TunedLayer]`: by changed layer.

    Raises:
        `ValueError`: there are no rows, or none held out.
    """
    if not rows or not held_out_rows:
        raise ValueError(f"A refit needs rows and held-out rows; there are {len(rows)} and {len(held_out_rows)}.")
    changed, tuned, moves = find_changed(student), {}, read_layer_plan(student.config.plan)
    teacher_layers = teacher_layers or range(len(moves))
    with inference(student, teacher):
        states = [
            _BatchState(part, batch, teacher, {layer: teacher_layers[layer] for layer in changed})
            for part, each in enumerate((rows, held_out_rows))
            for batch in batch_rows(each, batch_size)
        ]
        for layer, echo in tqdm(changed.items(), desc="tune", disable=not progress, leave=False):
            source, heads = moves[layer][1], None
            if similarity is not None and source is not None:
                heads = similarity.heads[teacher_layers[source], teacher_layers[layer]]
            tuning = make_tuning(echo, heads, refit)
            for state in states:
                attend, states_before = state.advance(student, layer, echo)
                expected, expected_before = state.expected.pop(layer)
                if residual_share and states_before is not None:
                    missing_before = (expected_before.to(states_before.device) - states_before).flatten(0, -2)
                    expected = expected + residual_share * missing_before.to(expected.device)
                tuning.add(state.part, attend, expected)
            tuned[layer] = tuning.finish()
    return tuned


class _BatchState:
    """
    How far a student has come with a batch, and what the teacher gives where its changed layers are.

    Args:
        layers (`dict[int, int]`): for each changed layer of the student, in order, that of the teacher.

    Attributes:
        part (`int`): 0 to fit on, 1 to judge by.
        expected (`dict[int, tuple[torch.Tensor, torch.Tensor]]`): by layer, what the teacher's output projection puts out,
            `(N, O)`, and the hidden states before the layer, `(B, T, O)`.
    """

    def __init__(self, part: int, batch: BatchEncoding, teacher: PreTrainedModel, layers: dict[int, int]):
        self.part, self._batch = part, batch
        self._records, self._start, self._output = EchoRecords(), 0, None
        attentions, self.expected, before = find_attention_modules(teacher), {}, {}
        hooks, decoder_layers, last = [], find_layers(teacher), max(layers)
        for layer, original in layers.items():
            projection = find_output_projection(attentions[original])
            if decoder_layers is not None:
                hooks.append(decoder_layers[original].register_forward_pre_hook(partial(_keep_states, before, layer)))
            if layer != last:
                hooks.append(projection.register_forward_hook(partial(self._keep_expected, before, layer)))
        forward = partial(teacher, **batch.to(teacher.device), use_cache=False)
        try:
            _, output = run_until(find_output_projection(attentions[layers[last]]), forward)
        finally:
            for hook in hooks:
                hook.remove()
        self.expected[last] = output, before.get(last)

    def _keep_expected(self, before: dict, layer: int, module, args, output) -> None:
        self.expected[layer] = output.detach().flatten(0, -2), before.get(layer)

    def advance(
        self, student: EchoAttForCausalLM, layer: int, echo: nn.Module
    ) -> tuple[Callable[[], object], torch.Tensor | None]:
        """
        Compute the student up to the attention of a layer. Returns a function that calls that attention, and the hidden
        states before the layer, `(B, T, O)`.
        """
        layers, before = find_layers(student), {}
        forward = partial(student, **self._batch.to(student.device), use_cache=False, echo_records=self._records)
        hooks = []
        if layers is not None:
            hooks.append(layers[layer].register_forward_pre_hook(partial(_keep_states, before, layer)))
        try:
            with starting_at(layers, self._start, self._output), keep_layer_outputs(layers) as outputs:
                args, kwargs = run_to_call(echo, forward)
        finally:
            for hook in hooks:
                hook.remove()
        if layers is not None:  # those that were skipped return their output, too
            self._start, self._output = layer, outputs[layer - 1]
        return partial(echo, *args, **kwargs), before.get(layer)


def _keep_states(kept: dict[int, torch.Tensor], layer: int, module, args) -> None:
    if args:
        kept[layer] = args[0].detach()


def refit_outputs(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    held_out_rows: Sequence[dict],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[int, float]:
    """
    Refit the output projections of the changed layers, in place: what the heads of a layer put out with the attention
    weights of another is combined so that it comes as close as possible to what the teacher's layer puts out.

    [`tune_student`] without another order of heads. Ridge regression of what is missing on the head outputs, so that
    strong regularisation gives back the weights that were copied. Its strength is chosen on rows held out; where none
    lowers the error there, the layer keeps its weights.

    Args:
        student, teacher, rows, held_out_rows, batch_size, progress:
            As in [`tune_student`].

    Returns:
        `dict[int, float]`: for each changed layer the squared error of its attention output on the rows held out, as a
        share of what it was before; 1 where the weights are kept.

    Raises:
        `ValueError`: there are no rows, or none held out.
    """
    tuned = tune_student(student, teacher, rows, held_out_rows, batch_size=batch_size, progress=progress)
    return {layer: each.share for layer, each in tuned.items()}


def hold_out(rows: Sequence[dict]) -> tuple[Sequence[dict], Sequence[dict]]:
    """Calibration rows to fit on, and the last quarter, to judge by. Raises `ValueError` if there are not two rows."""
    if len(rows) < 2:
        raise ValueError(f"Calibration needs at least 2 rows, some of them held out; there are {len(rows)}.")
    count = max(len(rows) // 4, 1)
    return rows[:-count], rows[-count:]
