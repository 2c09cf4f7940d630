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
from ..models.layerwise import (
    find_layers,
    keep_layer_outputs,
    run_through,
    run_to_call,
    run_until,
    starting_at,
    states_of,
)
from ..planning.sharing import SharingPlan
from ..text.rows import batch_rows
from .alignment import EchoParameters, align_layer, find_changed, get_parameters, replace_parameter, set_parameters
from .regression import NormalEquations, add_to_projection, solve_ridge
from .taking_up import find_candidates, find_takers


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


class TakingUp:
    """
    A projection that takes up the part of dropped layers after it: sums over the tokens of batches, then the best ridge.

    Args:
        projection (`nn.Module`): see [`find_takers`]. Its parameters are replaced, not written to.
    """

    def __init__(self, projection: nn.Module):
        self._projection, self._equations = projection, (NormalEquations(), NormalEquations())

    def add(self, part: int, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        """Add the tokens of a batch to `part`, see [`LayerTuning.add`]: inputs `(N, I)` of it, and what is missing `(N, O)`."""
        self._equations[part].add(self._projection, inputs, missing.to(inputs.device))

    def finish(self) -> float:
        """Solve, and put the best parameters in. Returns the squared error that is left on the rows held out, as a share."""
        change, share = solve_ridge(*self._equations)
        if change is not None:
            add_to_projection(self._projection, change)
        return share


def find_tuned(student: EchoAttForCausalLM, plan: SharingPlan) -> dict[str, nn.Module]:
    """
    All modules of a student that [`tune_student`] may tune, by a name for files: the attention of changed layers, and the
    projections that may take up dropped ones.

    Args:
        student ([`EchoAttForCausalLM`]): the student.
        plan ([`SharingPlan`]): the plan it was made with, of the teacher's layers.
    """
    followed = find_followed(plan.kept_layers, len(plan))
    attentions = {str(layer): attention for layer, attention in find_changed(student).items()}
    return attentions | {f"{layer}.mlp": each for layer, each in find_candidates(student, list(followed)).items()}


def find_followed(teacher_layers: Sequence[int], num_layers: int) -> dict[int, int]:
    """For each layer of a student that is followed by dropped layers of its teacher the last of these."""
    ends = [*teacher_layers[1:], num_layers]
    return {
        layer: end - 1
        for layer, (original, end) in enumerate(zip(teacher_layers, ends, strict=True))
        if end - 1 > original
    }


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
) -> tuple[dict[int, TunedLayer], dict[int, float]]:
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
        `tuple`: a dictionary of [`TunedLayer`] by changed layer, and one of what is left of the squared error, as a share, by
        layer that took up dropped ones, see [`TakingUp`].

    Raises:
        `ValueError`: there are no rows, or none held out.
    """
    if not rows or not held_out_rows:
        raise ValueError(f"A refit needs rows and held-out rows; there are {len(rows)} and {len(held_out_rows)}.")
    changed, tuned, moves = find_changed(student), {}, read_layer_plan(student.config.plan)
    teacher_layers = list(teacher_layers or range(len(moves)))
    followed = find_followed(teacher_layers, teacher.config.get_text_config().num_hidden_layers)
    takers, taken_up = find_takers(student, list(followed)) if refit else {}, {}

    def tune(layer: int) -> TunedLayer:
        source, heads = moves[layer][1], None
        if similarity is not None and source is not None:
            heads = similarity.between(teacher_layers[source], teacher_layers[layer])
        tuning = make_tuning(changed[layer], heads, refit)
        for state in states:
            expected, expected_before = state.advance_teacher(teacher, teacher_layers[layer])
            attend, states_before = state.advance(student, layer, changed[layer])
            if residual_share and states_before is not None:
                missing_before = (expected_before.to(states_before.device) - states_before).flatten(0, -2)
                expected = expected + residual_share * missing_before.to(expected.device)
            tuning.add(state.part, attend, expected)
        return tuning.finish()

    with inference(student, teacher):
        states = [
            _BatchState(part, batch)
            for part, each in enumerate((rows, held_out_rows))
            for batch in batch_rows(each, batch_size)
        ]
        for layer in tqdm(sorted({*changed, *takers}), desc="tune", disable=not progress, leave=False):
            if layer in changed:
                tuned[layer] = tune(layer)
            if layer in takers:
                tuning = TakingUp(takers[layer])
                for state in states:
                    after = state.advance_through(teacher, followed[layer])
                    tuning.add(state.part, *state.compare_block(student, layer, takers[layer], after))
                taken_up[layer] = tuning.finish()
    return tuned, taken_up


class _BatchState:
    """
    How far both models have come with a batch: of each the output of one layer is kept, and of the student what is recorded of
    sources that later layers use.

    Args:
        part (`int`): 0 to fit on, 1 to judge by.
        batch (`BatchEncoding`): tokens.
    """

    def __init__(self, part: int, batch: BatchEncoding):
        self.part, self._batch = part, batch
        self._records, self._start, self._output = EchoRecords(), 0, None
        self._teacher_start, self._teacher_output = 0, None

    def advance_teacher(self, teacher: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Compute the teacher up to the end of a layer with attention. Returns what its output projection puts out, `(N, O)`, and
        the hidden states before the layer, `(B, T, O)`.
        """
        layers, before, expected = find_layers(teacher), {}, []
        projection = find_output_projection(find_attention_modules(teacher)[layer])
        hooks = [projection.register_forward_hook(lambda module, args, output: expected.append(output.detach()))]
        if layers is not None:
            hooks.append(layers[layer].register_forward_pre_hook(partial(_keep_states, before, layer)))
        try:
            if layers is not None:
                self.advance_through(teacher, layer)
            else:
                run_through(projection, partial(teacher, **self._batch.to(teacher.device), use_cache=False))
        finally:
            for hook in hooks:
                hook.remove()
        return expected[0].flatten(0, -2), before.get(layer)

    def advance_through(self, teacher: PreTrainedModel, layer: int) -> torch.Tensor:
        """Compute the teacher up to the end of a layer. Returns the hidden states after it, `(N, O)`."""
        layers = find_layers(teacher)
        forward = partial(teacher, **self._batch.to(teacher.device), use_cache=False)
        with starting_at(layers, self._teacher_start, self._teacher_output), keep_layer_outputs(layers) as outputs:
            run_through(layers[layer], forward)
        self._teacher_start, self._teacher_output = layer + 1, outputs[layer]
        return states_of(outputs[layer]).flatten(0, -2)

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
            self._forget_records(student.config.plan)
        return partial(echo, *args, **kwargs), before.get(layer)

    def _forget_records(self, plan: Sequence[int | str]) -> None:
        """Forget what is recorded of sources that only layers use which are not computed again."""
        needed = {source for _, source in read_layer_plan(plan)[self._start :]}
        for recorded in (self._records.by_layer, self._records.keys_values):
            for source in [source for source in recorded if source < self._start and source not in needed]:
                del recorded[source]

    def compare_block(
        self, student: EchoAttForCausalLM, layer: int, projection: nn.Module, after: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The inputs `(N, I)` of a projection of a layer, and what the hidden states after the layer lack, `(N, O)`, of those that
        they should be.
        """
        layers, seen = find_layers(student), {}
        forward = partial(student, **self._batch.to(student.device), use_cache=False, echo_records=self._records)
        hooks = [
            projection.register_forward_hook(lambda module, args, output: seen.update(inputs=args[0])),
            layers[layer].register_forward_hook(lambda module, args, output: seen.update(states=states_of(output))),
        ]
        try:
            with starting_at(layers, self._start, self._output):
                run_through(layers[layer], forward)
        finally:
            for hook in hooks:
                hook.remove()
        states = seen["states"].flatten(0, -2)
        return seen["inputs"].flatten(0, -2), after.to(states.device) - states


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
    tuned, _ = tune_student(student, teacher, rows, held_out_rows, batch_size=batch_size, progress=progress)
    return {layer: each.share for layer, each in tuned.items()}


def hold_out(rows: Sequence[dict]) -> tuple[Sequence[dict], Sequence[dict]]:
    """Calibration rows to fit on, and the last quarter, to judge by. Raises `ValueError` if there are not two rows."""
    if len(rows) < 2:
        raise ValueError(f"Calibration needs at least 2 rows, some of them held out; there are {len(rows)}.")
    count = max(len(rows) // 4, 1)
    return rows[:-count], rows[-count:]
