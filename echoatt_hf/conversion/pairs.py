"""Every layer as an echo of every source it may have, tuned by itself: what a search for a plan compares."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity
from ..modeling_echoatt import EchoRecords
from ..models.families import find_attention_modules, find_output_projection
from ..models.inference import inference
from ..models.layerwise import run_until
from ..models.recording import recording
from ..text.rows import batch_rows
from .alignment import EchoParameters, get_parameters, set_parameters
from .student import make_student
from .tuning import LayerTuning


__all__ = ["Pair", "TunedPairs"]

Pair = tuple[int, int]
"""An echo layer and its source."""


class TunedPairs:
    """
    Layers as echoes of sources, each aligned and refitted by itself, with the inputs that it has in the teacher.

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family.
        similarity ([`AttentionSimilarity`]):
            Of the teacher.
        pairs (sequence of `tuple[int, int]`):
            Pairs of an echo and its source, sorted by echo.
        rows, held_out_rows, batch_size:
            As in [`tune_student`].
        align, refit (`bool`, *optional*, defaults to `True`):
            What to do.

    Attributes:
        parameters (`dict[tuple[int, int], dict]`): those of the pairs that are tuned and kept.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        similarity: AttentionSimilarity,
        pairs: Sequence[Pair],
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
        plan = [first_source.get(layer, layer) for layer in range(len(similarity.heads))]
        student = make_student(teacher, plan, share_weights=True)
        self._modules = find_attention_modules(student.language_model)
        self._original = {echo: get_parameters(self._modules[echo]) for echo in first_source}
        self.parameters: dict[Pair, EchoParameters] = {}

    def tune(self, pairs: Iterable[Pair], *, progress: bool = False) -> None:
        """
        Tune the pairs that are not, in as few passes over the rows as the memory for their equations allows.

        Args:
            pairs (iterable of `tuple[int, int]`): sorted by echo.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar.
        """
        missing = [pair for pair in pairs if pair not in self.parameters]
        if not (self._align or self._refit):
            self.parameters |= {(echo, source): dict(self._original[echo]) for echo, source in missing}
            return
        groups = self._group(missing)
        batches = [
            (part, batch) for part, rows in enumerate(self._parts) for batch in batch_rows(rows, self._batch_size)
        ]
        bar = tqdm(total=len(groups) * len(batches), desc="tune pairs", disable=not progress, leave=False)
        with bar, inference(self._teacher):
            for group in groups:
                tunings = {}
                for echo, source in group:
                    module = self._become(echo, self._original[echo], source)
                    heads = self._similarity.heads[source, echo] if self._align else None
                    tunings[echo, source] = LayerTuning(module, heads, self._refit)
                for part, batch in batches:
                    calls = self._record(batch, {echo for echo, _ in group})
                    for (echo, source), tuning in tunings.items():
                        attend, expected = calls[echo]
                        self._modules[echo].echo_source = source
                        tuning.add(part, attend, expected)
                    bar.update()
                self.parameters |= {pair: tuning.finish().parameters for pair, tuning in tunings.items()}

    def _group(self, pairs: list[Pair]) -> list[list[Pair]]:
        """Pairs that are tuned together: equations of all of them are in memory at once."""
        groups, free = [], 0.0
        for echo, source in pairs:
            projection = find_output_projection(self._modules[echo])
            features, outputs = sorted(projection.weight.shape)
            needed = 2 * (1 + self._align) * 8 * features * (features + outputs) if self._refit else 0
            if not groups or needed > free:
                groups.append([])
                free = _memory_budget(projection.weight.device)
            groups[-1].append((echo, source))
            free -= needed
        return groups

    def _record(self, batch: BatchEncoding, layers: set[int]) -> dict[int, tuple[Any, torch.Tensor]]:
        """By layer, a function that calls its echo module as the teacher calls its own, and what the teacher puts out."""
        attentions, records, calls, expected = find_attention_modules(self._teacher), EchoRecords(), {}, {}
        last = max(layers)

        def remember_call(layer, module, args, kwargs):
            calls[layer] = partial(self._modules[layer], *args, **kwargs)

        def remember_output(layer, module, args, output):
            expected[layer] = output.detach().flatten(0, -2)

        with ExitStack() as stack:
            stack.enter_context(recording(attentions.values()))
            for layer in layers:
                hook = attentions[layer].register_forward_pre_hook(partial(remember_call, layer), with_kwargs=True)
                stack.callback(hook.remove)
                projection = find_output_projection(attentions[layer])
                stack.callback(projection.register_forward_hook(partial(remember_output, layer)).remove)
            forward = partial(self._teacher, **batch.to(self._teacher.device), use_cache=False, echo_records=records)
            run_until(find_output_projection(attentions[last]), forward)
        return {layer: (calls[layer], expected[layer]) for layer in layers}

    def effects(
        self, pairs: Iterable[Pair], batches: Sequence[BatchEncoding], gradients: Sequence[dict[int, torch.Tensor]]
    ) -> dict[Pair, float]:
        """
        What the pairs are expected to do to the predictions: KL(teacher || student) of a student with that echo alone, to
        second order, in nats per token. The mean over tokens and samples of (g · δ)² / 2, where δ is how much the
        attention output of the layer changes and g the gradient of the log-likelihood of a sampled token by it.

        Args:
            pairs (iterable of `tuple[int, int]`): tuned pairs, sorted by echo.
            batches (sequence of `BatchEncoding`): tokens.
            gradients (sequence of `dict[int, torch.Tensor]`): for each batch and layer, `(K, N, O)` of K samples, see
                [`sample_gradients`].
        """
        pairs, sums, tokens = list(pairs), {}, 0
        with inference(self._teacher):
            for batch, of_batch in zip(batches, gradients, strict=True):
                tokens += batch["input_ids"][:, 1:].numel()
                calls = self._record(batch, {echo for echo, _ in pairs})
                for echo, source in pairs:
                    module = self._become(echo, self.parameters[echo, source], source)
                    attend, expected = calls[echo]
                    _, output = run_until(find_output_projection(module), attend)
                    change = (output - expected).float()  # (N, O)
                    slopes = torch.einsum("kno,no->kn", of_batch[echo].float(), change)
                    found = slopes.square().sum().item() / 2 / len(slopes)
                    sums[echo, source] = sums.get((echo, source), 0.0) + found
        return {pair: value / tokens for pair, value in sums.items()}

    def keep(self, pairs: Iterable[Pair]) -> None:
        """Forget all other pairs, which are tuned anew if they are needed again."""
        kept = {*pairs}
        self.parameters = {pair: value for pair, value in self.parameters.items() if pair in kept}

    def _become(self, layer: int, parameters: EchoParameters, source: int) -> nn.Module:
        """The attention module of a layer, as an echo of `source`."""
        echo = self._modules[layer]
        echo.echo_source = source
        set_parameters(echo, parameters)
        return echo

    @contextmanager
    def in_place(self, plan: Sequence[int], *, record_all: bool = False) -> Iterator[None]:
        """
        Make the teacher the student of a plan, while the context lasts. Forward passes must be given
        `echo_records=EchoRecords()`.

        Args:
            plan (sequence of `int`): for each layer the layer it echoes, or itself.
            record_all (`bool`, *optional*, defaults to `False`): record layers that are no source too.
        """
        attentions = find_attention_modules(self._teacher)
        pairs = [(echo, source) for echo, source in enumerate(plan) if echo != source]
        self.tune(pairs)
        names = {module: name for name, module in self._teacher.named_modules()}
        recorded = {*attentions} - {echo for echo, _ in pairs} if record_all else {source for _, source in pairs}
        try:
            for echo, source in pairs:
                module = self._become(echo, self.parameters[echo, source], source).eval()
                self._teacher.set_submodule(names[attentions[echo]], module)
            with recording(attentions[layer] for layer in recorded):
                yield
        finally:
            for echo, _ in pairs:
                self._teacher.set_submodule(names[attentions[echo]], attentions[echo])


def sample_gradients(
    teacher: PreTrainedModel, batches: Sequence[BatchEncoding], layers: Sequence[int], samples: int = 4
) -> list[dict[int, torch.Tensor]]:
    """
    Gradients of the log-likelihood of tokens that the teacher itself draws, by what its attention layers put out: the
    square root of the Fisher information that [`TunedPairs.effects`] needs.

    Args:
        teacher (`PreTrainedModel`): a causal language model.
        batches (sequence of `BatchEncoding`): tokens; each row is a pass of its own, which bounds the memory.
        layers (sequence of `int`): layers with attention.
        samples (`int`, *optional*, defaults to 4): tokens drawn for each place, and backward passes, K.

    Returns:
        `list[dict[int, torch.Tensor]]`: for each batch and layer the gradients `(K, N, O)` by the output of its output
        projection, of the N tokens of the batch, in the teacher's dtype.
    """
    attentions = find_attention_modules(teacher)
    generator = torch.Generator(device=teacher.device).manual_seed(0)
    frozen = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    outputs, found = {}, []
    with inference(teacher), ExitStack() as stack:  # which ends first: each gives back the gradient mode it found
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        embeddings = teacher.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        stack.callback(hook.remove)
        for layer in layers:
            projection = find_output_projection(attentions[layer])
            hook = projection.register_forward_hook(partial(_keep_output, outputs, layer))
            stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            rows = []
            for index in range(len(batch["input_ids"])):
                row = {name: value[index : index + 1] for name, value in batch.items()}
                rows.append(_sample_row(teacher, row, outputs, layers, samples, generator))
            found.append({layer: torch.cat([row[layer] for row in rows], dim=1) for layer in layers})
    return found


def _sample_row(
    teacher, row, outputs: dict, layers: Sequence[int], samples: int, generator
) -> dict[int, torch.Tensor]:
    """Gradients `(K, T, O)` of one row."""
    logits = teacher(**row, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
    log_probs = logits.log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp(), samples, replacement=True, generator=generator)  # (T - 1, K)
    likelihoods = log_probs.gather(-1, drawn).sum(0)  # (K,)
    wanted = [outputs[layer] for layer in layers]
    gradients = [
        torch.autograd.grad(likelihoods[sample], wanted, retain_graph=sample < samples - 1)
        for sample in range(samples)
    ]
    return {
        layer: torch.stack([each[place].flatten(0, -2) for each in gradients]) for place, layer in enumerate(layers)
    }


def _keep_output(outputs: dict, layer: int, module, args, output) -> None:
    outputs[layer] = output


def _memory_budget(device: torch.device) -> float:
    """Bytes that the equations of a group may take: a quarter of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free / 4
