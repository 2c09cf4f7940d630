"""Closed-form refit: the output projections of echo layers, by ridge regression on the teacher's attention output."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity
from ..modeling_echoatt import EchoAttForCausalLM, EchoRecords, find_attention_modules, find_output_projection
from ..models.devices import to_float64
from ..models.inference import inference
from ..models.recording import recording
from ..text.rows import batch_rows
from .alignment import (
    EchoParameters,
    align_layer,
    find_echoes,
    get_parameters,
    input_dim,
    replace_parameter,
    set_parameters,
)


__all__ = ["refit_outputs"]

# Regularisation that is tried, in units of the mean eigenvalue of the normal equations.
RIDGES = tuple(10.0**exponent for exponent in range(-6, 3))


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
    Refit the output projections of the echo layers, in place: what the heads of a layer put out with the attention
    weights of another is combined so that it comes as close as possible to what the teacher's layer puts out.

    Layer by layer from below, as each layer sees what the refitted ones below it give. Ridge regression of what is
    missing on the head outputs, so that strong regularisation gives back the weights that were copied. Its strength is
    chosen on rows held out; where none lowers the error there, the layer keeps its weights.

    Args:
        student ([`EchoAttForCausalLM`]):
            A student that has just been converted. Parameters that change are replaced, not written to.
        teacher (`PreTrainedModel`):
            The model it was made from.
        rows (sequence of `dict`):
            Rows with `input_ids` of T tokens, as returned by [`pack_rows`]. A few times as many tokens as a layer has
            head features are needed.
        held_out_rows (sequence of `dict`):
            Other rows, on which the regularisation is chosen.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `dict[int, float]`: for each echo layer the squared error of its attention output on the rows held out, as a
        share of what it was before; 1 where the weights are kept.

    Raises:
        `ValueError`: there are no rows, or none held out.
    """
    if not rows or not held_out_rows:
        raise ValueError(f"A refit needs rows and held-out rows; there are {len(rows)} and {len(held_out_rows)}.")
    errors = {}
    with inference(student, teacher):
        targets = find_attention_modules(teacher)
        for layer, echo in tqdm(find_echoes(student).items(), desc="refit", disable=not progress, leave=False):
            projection, target = find_output_projection(echo), find_output_projection(targets[layer])
            train, held_out = (
                _accumulate((student, projection), (teacher, target), batch_rows(part, batch_size))
                for part in (rows, held_out_rows)
            )
            change, errors[layer] = _solve(train, held_out)
            if change is not None:
                _add(projection, change)
    return errors


class TunedEchoes:
    """
    Every layer as an echo of every source it may have: aligned and refitted by itself, with the inputs that it has in
    the teacher. Made when they are needed, as there are many.

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family.
        similarity ([`AttentionSimilarity`]):
            Of the teacher.
        pairs (sequence of `tuple[int, int]`):
            Pairs of an echo and its source.
        rows, held_out_rows, batch_size:
            As in [`refit_outputs`].
        align, refit (`bool`, *optional*, defaults to `True`):
            What to do.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        similarity: AttentionSimilarity,
        pairs: Sequence[tuple[int, int]],
        rows: Sequence[dict],
        held_out_rows: Sequence[dict],
        *,
        align: bool = True,
        refit: bool = True,
        batch_size: int = 8,
    ):
        self._teacher, self._similarity, self._parts = teacher, similarity, (rows, held_out_rows)
        self._align, self._refit, self._batch_size = align, refit, batch_size
        first_source = dict(reversed(pairs))
        plan = [first_source.get(layer, layer) for layer in range(len(similarity.layers))]
        student = EchoAttForCausalLM.from_teacher(teacher, plan, share_weights=True)
        self._modules = find_attention_modules(student.language_model)
        self._original = {echo: get_parameters(self._modules[echo]) for echo in first_source}
        self.parameters: dict[tuple[int, int], EchoParameters] = {}

    def tune(self, layer: int, sources: Sequence[int]) -> None:
        """Tune a layer as an echo of several sources, in one pass over the rows."""
        echo = self._modules[layer]
        for source in sources:
            set_parameters(echo, self._original[layer])
            if self._align:
                align_layer(echo, self._similarity.between(source, layer))
            self.parameters[layer, source] = get_parameters(echo)
        if not (self._refit and sources):
            return
        projection = find_output_projection(echo)
        equations = {source: (_NormalEquations(), _NormalEquations()) for source in sources}
        with inference(self._teacher):
            for part, rows in enumerate(self._parts):
                for batch in batch_rows(rows, self._batch_size):
                    records, (args, kwargs), expected = _record_layer(self._teacher, layer, batch)
                    for source in sources:
                        call = partial(self._become(layer, source), *args, **kwargs | {"echo_records": records})
                        inputs, output = run_until(projection, call)
                        equations[source][part].add(projection, inputs, expected - output)
        for source in sources:
            change, _ = _solve(*equations[source])
            self._become(layer, source)
            if change is not None:
                _add(projection, change)
            self.parameters[layer, source] = get_parameters(echo)

    def keep(self, layer: int, sources: Sequence[int]) -> None:
        """Forget a layer as an echo of all other sources, which are tuned anew if they are needed again."""
        for pair in [pair for pair in self.parameters if pair[0] == layer and pair[1] not in sources]:
            del self.parameters[pair]

    def _become(self, layer: int, source: int) -> nn.Module:
        """The attention module of a layer, as an echo of `source`."""
        echo = self._modules[layer]
        echo.echo_source = source
        set_parameters(echo, self.parameters[layer, source])
        return echo

    @contextmanager
    def in_place(self, plan: Sequence[int]) -> Iterator[None]:
        """
        Make the teacher the student of a plan, while the context lasts. Forward passes must be given
        `echo_records=EchoRecords()`.

        Args:
            plan (sequence of `int`): for each layer the layer it echoes, or itself.
        """
        attentions = find_attention_modules(self._teacher)
        echo_layers = [layer for layer, source in enumerate(plan) if layer != source]
        for layer in echo_layers:
            if (layer, plan[layer]) not in self.parameters:
                self.tune(layer, [plan[layer]])
        names = {module: name for name, module in self._teacher.named_modules()}
        try:
            for layer in echo_layers:
                self._teacher.set_submodule(names[attentions[layer]], self._become(layer, plan[layer]).eval())
            with recording(attentions[source] for source in {plan[layer] for layer in echo_layers}):
                yield
        finally:
            for layer in echo_layers:
                self._teacher.set_submodule(names[attentions[layer]], attentions[layer])


def _record_layer(teacher: PreTrainedModel, layer: int, batch: BatchEncoding):
    """Records of the layers up to `layer`, the arguments of its attention, and what its output projection puts out."""
    attentions, call, records = find_attention_modules(teacher), [], EchoRecords()

    def remember(module, args, kwargs):
        call.extend((args, dict(kwargs)))

    with recording(attentions.values()), attentions[layer].register_forward_pre_hook(remember, with_kwargs=True):
        _, expected = run_until(
            find_output_projection(attentions[layer]),
            partial(teacher, **batch.to(teacher.device), use_cache=False, echo_records=records),
        )
    return records, call, expected


def hold_out(rows: Sequence[dict]) -> tuple[Sequence[dict], Sequence[dict]]:
    """Calibration rows to fit on, and the last quarter, to judge by. Raises `ValueError` if there are not two rows."""
    if len(rows) < 2:
        raise ValueError(f"Calibration needs at least 2 rows, some of them held out; there are {len(rows)}.")
    count = max(len(rows) // 4, 1)
    return rows[:-count], rows[-count:]


@dataclass
class _NormalEquations:
    """Sums over tokens for the regression of what is missing, R `(N, O)`, on head outputs X `(N, I)`, in float64."""

    gram: torch.Tensor | float = 0.0  # Xᵀ X
    cross: torch.Tensor | float = 0.0  # Xᵀ R
    squares: torch.Tensor | float = 0.0  # sum of R²

    def add(self, projection: nn.Module, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        """Add the tokens of a batch: inputs of the projection and what its output lacks."""
        inputs, missing = to_float64(inputs), to_float64(missing)
        if getattr(projection, "bias", None) is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=-1)
        self.gram = self.gram + inputs.T @ inputs
        self.cross = self.cross + inputs.T @ missing
        self.squares = self.squares + missing.square().sum()

    def error(self, change: torch.Tensor) -> float:
        """Squared error with the change `(I, O)`, as a share of that without."""
        error = self.squares - 2 * (change * self.cross).sum() + (change * (self.gram @ change)).sum()
        return (error / self.squares.clamp_min(torch.finfo(torch.float64).tiny)).item()


def _accumulate(
    student: tuple[PreTrainedModel, nn.Module],
    teacher: tuple[PreTrainedModel, nn.Module],
    batches: Iterable[BatchEncoding],
) -> _NormalEquations:
    """Normal equations of one layer; models come with the output projection of that layer."""
    equations = _NormalEquations()
    for batch in batches:
        (inputs, output), (_, expected) = (
            run_until(module, partial(model, **batch.to(model.device), use_cache=False))
            for model, module in (student, teacher)
        )
        equations.add(student[1], inputs, expected.to(output.device) - output)
    return equations


def _solve(train: _NormalEquations, held_out: _NormalEquations) -> tuple[torch.Tensor | None, float]:
    """The change `(I, O)` of the best ridge and its error on what is held out; `None` if no change lowers it."""
    values, vectors = torch.linalg.eigh(train.gram)
    rotated, scale = vectors.T @ train.cross, values.mean()
    best, least = None, 1.0
    for ridge in RIDGES:
        change = vectors @ (rotated / (values.clamp_min(0) + ridge * scale)[:, None])
        error = held_out.error(change)
        if error < least:
            best, least = change, error
    return best, least


def _add(projection: nn.Module, change: torch.Tensor) -> None:
    """Add a change `(I, O)`, with a last row for the bias if there is one, to an output projection."""
    features = change[: projection.weight.shape[input_dim(projection)]]
    changes = {"weight": features if input_dim(projection) == 0 else features.T, "bias": change[-1]}
    for name, parameter in list(projection.named_parameters()):
        changed = to_float64(parameter.detach())
        changed = changed + changes[name].to(changed.device)
        replace_parameter(projection, name, changed.to(parameter.dtype).to(parameter.device))


class _Reached(Exception):
    """A forward pass has come to the module that was asked for."""


def run_until(module: nn.Module, forward: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a forward pass no further than `module`. Returns its inputs `(N, I)` and outputs `(N, O)` for all tokens."""
    found = []

    def stop(module, args, output):
        found.extend(tensor.detach().flatten(0, -2) for tensor in (args[0], output))
        raise _Reached

    with module.register_forward_hook(stop), suppress(_Reached):
        forward()
    return found[0], found[1]
