"""Every layer with every change that a plan may make to it, tuned by itself: what a search for a plan compares."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity
from ..configuration_echoatt import read_entry
from ..modeling_echoatt import EchoRecords, SkippedAttention
from ..models.families import find_attention_modules, find_output_projection
from ..models.inference import inference
from ..models.layerwise import find_layers, keep_layer_outputs, replaced, run_through, run_until, states_of
from ..models.recording import recording
from ..text.rows import batch_rows
from .alignment import EchoParameters, find_changed, get_parameters, input_dim, set_parameters
from .student import make_student
from .taking_up import find_takers
from .tuning import TakingUp, make_tuning


__all__ = ["Pair", "TunedPairs"]

Pair = tuple[int, int | str]
"""A layer and its entry in a plan: an echo and its source, a layer and `"kv N"`, `"skip attention"` or `"drop"`."""


class TunedPairs:
    """
    Layers with changes of a plan, each aligned and refitted by itself, with the inputs that it has in the teacher.

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family.
        similarity ([`AttentionSimilarity`]):
            Of the teacher.
        pairs (sequence of `tuple[int, int | str]`):
            Layers and their entries in plans, sorted by layer.
        rows, held_out_rows, batch_size:
            As in [`tune_student`].
        align, refit (`bool`, *optional*, defaults to `True`):
            What to do.

    Attributes:
        parameters (`dict[tuple[int, int | str], dict]`): those of the pairs that are tuned and kept.
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
        # By kind of change and layer. One student of each kind has all its layers.
        self._modules: dict[tuple[str, int], nn.Module] = {}
        layers: dict[str, set[int]] = {}
        for layer, entry in pairs:
            layers.setdefault(read_entry(layer, entry)[0], set()).add(layer)
        for move, changed in layers.items():
            if move != "drop":
                found = find_changed(make_student(teacher, self._plan_with(move, changed), share_weights=True))
                self._modules |= {(move, layer): module for layer, module in found.items()}
        self._original = {key: get_parameters(module) for key, module in self._modules.items()}
        self._layers = find_layers(teacher)
        if "drop" in layers and self._layers is None:
            raise ValueError("The layers of this model are not in one list: none can be dropped.")
        self._returns_tuple: bool | None = None
        # By dropped layer, what takes up its part.
        before = [layer - 1 for layer in sorted(layers.get("drop", ())) if layer > 0]
        self._takers = {layer + 1: each for layer, each in find_takers(teacher, before).items()} if refit else {}
        self._taken_up = {layer: get_parameters(each) for layer, each in self._takers.items()}
        self.parameters: dict[Pair, EchoParameters] = {}

    def _plan_with(self, move: str, changed: set[int]) -> list[int | str]:
        """A plan that changes some layers; those that need a source have the first one of their type."""
        config = self._teacher.config.get_text_config()
        plan: list[int | str] = list(range(config.num_hidden_layers))
        types = getattr(config, "layer_types", None) or [None] * len(plan)
        for layer in changed:
            if move == "skip attention":
                plan[layer] = move
            else:
                source = next(each for each in range(layer) if types[each] == types[layer] and each not in changed)
                plan[layer] = source if move == "echo" else f"kv {source}"
        return plan

    def tune(
        self,
        pairs: Iterable[Pair],
        *,
        after_group: Callable[[list[Pair]], None] | None = None,
        progress: bool = False,
    ) -> None:
        """
        Tune the pairs that are not, in as few passes over the rows as the memory for their equations allows.

        Args:
            pairs (iterable of `tuple[int, int | str]`): sorted by layer.
            after_group (`Callable`, *optional*): called with the pairs of each pass once they are tuned, and first with those
                that nothing is done to.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar.
        """
        missing = [pair for pair in pairs if pair not in self.parameters]
        for layer, entry in missing:
            is_tuned = layer in self._takers if entry == "drop" else self._align or self._refit
            if not is_tuned:
                self.parameters[layer, entry] = dict(self._original.get((read_entry(layer, entry)[0], layer), {}))
        untuned = [pair for pair in missing if pair in self.parameters]
        groups = self._group([pair for pair in missing if pair not in self.parameters])
        if untuned and after_group is not None:
            after_group(untuned)
        batches = [
            (part, batch) for part, rows in enumerate(self._parts) for batch in batch_rows(rows, self._batch_size)
        ]
        bar = tqdm(total=len(groups) * len(batches), desc="tune pairs", disable=not progress, leave=False)
        with bar, inference(self._teacher):
            for group in groups:
                tunings, dropped = {}, {layer for layer, entry in group if entry == "drop"}
                for layer, entry in group:
                    move, source = read_entry(layer, entry)
                    if move == "drop":
                        tunings[layer, entry] = TakingUp(self._takers[layer])
                        continue
                    module = self._become(layer, entry, self._original[move, layer])
                    heads = self._similarity.between(source, layer) if self._align and source is not None else None
                    tunings[layer, entry] = make_tuning(module, heads, self._refit)
                for part, batch in batches:
                    calls, expected, added = self._record(batch, {layer for layer, e in group if e != "drop"}, dropped)
                    for (layer, entry), tuning in tunings.items():
                        if entry == "drop":
                            tuning.add(part, *added[layer])
                        else:
                            tuning.add(part, calls[layer](self._become(layer, entry)), expected[layer])
                    bar.update()
                for (layer, entry), tuning in tunings.items():
                    if entry == "drop":
                        tuning.finish()
                        self.parameters[layer, entry] = get_parameters(self._takers[layer])
                        set_parameters(self._takers[layer], self._taken_up[layer])
                    else:
                        self._become(layer, entry)
                        self.parameters[layer, entry] = tuning.finish().parameters
                if after_group is not None:
                    after_group(group)

    def _group(self, pairs: list[Pair]) -> list[list[Pair]]:
        """Pairs that are tuned together: equations of all of them are in memory at once."""
        groups, free = [], 0.0
        attentions = find_attention_modules(self._teacher)
        for layer, entry in pairs:
            projection = self._takers[layer] if entry == "drop" else find_output_projection(attentions[layer])
            inputs = projection.weight.shape[input_dim(projection)]
            orders = 2 if self._align and entry != "drop" else 1
            is_fitted = self._refit and entry != "skip attention"
            needed = 2 * orders * 8 * inputs * sum(projection.weight.shape) if is_fitted else 0
            if not groups or needed > free:
                groups.append([])
                free = _memory_budget(projection.weight.device)
            groups[-1].append((layer, entry))
            free -= needed
        return groups

    def _record(
        self, batch: BatchEncoding, layers: set[int], blocks: set[int] = frozenset()
    ) -> tuple[dict[int, Any], dict[int, torch.Tensor], dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """
        By layer, a function that lets an attention module be called as the teacher calls its own; what the teacher's
        attention puts out, `(N, O)`; and of `blocks` the inputs `(N, I)` of what can take up the layer, if there is something,
        and what the whole layer adds to the hidden states, `(N, O)`.
        """
        attentions, records = find_attention_modules(self._teacher), EchoRecords()
        calls, expected, inputs, added = {}, {}, {}, {}

        def remember_call(layer, module, args, kwargs):
            calls[layer] = lambda module: partial(module, *args, **kwargs)

        def remember_output(layer, module, args, output):
            expected[layer] = output.detach().flatten(0, -2)

        def remember_block(layer, module, args, output):
            added[layer] = inputs.get(layer), (states_of(output) - args[0]).detach().flatten(0, -2)

        def remember_inputs(layer, module, args, output):
            inputs[layer] = args[0].detach().flatten(0, -2)

        with ExitStack() as stack:
            stack.enter_context(recording(attentions.values()))
            for layer in layers:
                hook = attentions[layer].register_forward_pre_hook(partial(remember_call, layer), with_kwargs=True)
                stack.callback(hook.remove)
                projection = find_output_projection(attentions[layer])
                stack.callback(projection.register_forward_hook(partial(remember_output, layer)).remove)
            for layer in blocks:
                hook = self._layers[layer].register_forward_hook(partial(remember_block, layer))
                stack.callback(hook.remove)
                if layer in self._takers:
                    hook = self._takers[layer].register_forward_hook(partial(remember_inputs, layer))
                    stack.callback(hook.remove)
            forward = partial(self._teacher, **batch.to(self._teacher.device), use_cache=False, echo_records=records)
            last = max((*layers, *blocks))
            run_through(self._layers[last] if last in blocks else find_output_projection(attentions[last]), forward)
        return calls, expected, added

    def effects(
        self,
        pairs: Iterable[Pair],
        batches: Sequence[BatchEncoding],
        gradients: Sequence[dict[int | tuple[int, str], torch.Tensor]],
    ) -> dict[Pair, float]:
        """
        What the pairs are expected to do to the predictions: KL(teacher || student) of a student with that change alone, to
        second order, in nats per token. The mean over tokens and samples of (g · δ)² / 2, where δ is how much the
        attention output of the layer changes, or the hidden states after it where it is dropped, and g the gradient of the
        log-likelihood of a sampled token by it.

        Args:
            pairs (iterable of `tuple[int, int | str]`): tuned pairs, sorted by layer.
            batches (sequence of `BatchEncoding`): tokens.
            gradients (sequence of `dict`): for each batch and layer, `(K, N, O)` of K samples, see [`sample_gradients`].
        """
        pairs, sums, tokens = list(pairs), {}, 0
        dropped = {layer for layer, entry in pairs if entry == "drop"}
        with inference(self._teacher):
            for batch, of_batch in zip(batches, gradients, strict=True):
                tokens += batch["input_ids"][:, 1:].numel()
                calls, expected, added = self._record(batch, {layer for layer, e in pairs if e != "drop"}, dropped)
                for layer, entry in pairs:
                    if entry == "drop":
                        change, slopes = self._left_out(layer, *added[layer]), of_batch[layer, "drop"]
                    else:
                        module = self._become(layer, entry, self.parameters[layer, entry])
                        change, slopes = self._output(module, calls[layer]) - expected[layer], of_batch[layer]
                    slopes = torch.einsum("kno,no->kn", slopes.float(), change.float())
                    found = slopes.square().sum().item() / 2 / len(slopes)
                    sums[layer, entry] = sums.get((layer, entry), 0.0) + found
        return {pair: value / tokens for pair, value in sums.items()}

    def _left_out(self, layer: int, inputs: torch.Tensor | None, added: torch.Tensor) -> torch.Tensor:
        """How the hidden states `(N, O)` change where a layer is dropped, and what it added is taken up, as far as it can be."""
        if inputs is None:
            return -added
        taker = self._takers[layer]
        before = taker(inputs)
        set_parameters(taker, self.parameters[layer, "drop"])
        taken_up = taker(inputs) - before
        set_parameters(taker, self._taken_up[layer])
        return taken_up - added

    def _output(self, module: nn.Module, call: Any) -> torch.Tensor:
        """What an attention module puts out `(N, O)`, before what a family does with it."""
        if isinstance(module, SkippedAttention):
            return module.constant
        return run_until(find_output_projection(module), call(module))[1]

    def keep(self, pairs: Iterable[Pair]) -> None:
        """Forget all other pairs, which are tuned anew if they are needed again."""
        kept = {*pairs}
        self.parameters = {pair: value for pair, value in self.parameters.items() if pair in kept}

    def count_parameters(self, layer: int, move: str) -> int:
        """Parameters of the attention of a layer with a change."""
        return sum(parameter.numel() for parameter in self._original[move, layer].values())

    def first_difference(self, plan: Sequence[int | str], other: Sequence[int | str]) -> int:
        """The first layer that does something else in another plan: also the one that takes up a dropped one."""
        differing = [layer for layer, entry in enumerate(plan) if other[layer] != entry]
        found = [
            layer - 1 if layer in self._takers and "drop" in (plan[layer], other[layer]) else layer
            for layer in differing
        ]
        return min(found, default=0)

    def _become(self, layer: int, entry: int | str, parameters: EchoParameters | None = None) -> nn.Module:
        """The attention module of a layer with an entry of a plan."""
        move, source = read_entry(layer, entry)
        module = self._modules[move, layer]
        if source is not None:
            setattr(module, {"echo": "echo_source", "kv": "kv_source"}[move], source)
        if parameters is not None:
            set_parameters(module, parameters)
        return module

    @contextmanager
    def in_place(self, plan: Sequence[int | str], *, record_all: bool = False) -> Iterator[None]:
        """
        Make the teacher the student of a plan, while the context lasts. Forward passes must be given
        `echo_records=EchoRecords()`.

        Args:
            plan (sequence of `int` or `str`): for each layer its entry.
            record_all (`bool`, *optional*, defaults to `False`): record layers that are no source too.
        """
        attentions = find_attention_modules(self._teacher)
        pairs = [(layer, entry) for layer, entry in enumerate(plan) if entry != layer]
        self.tune(pairs)
        names = {module: name for name, module in self._teacher.named_modules()}
        sources = {read_entry(layer, entry)[1] for layer, entry in pairs} - {None}
        recorded = {*attentions} - {layer for layer, _ in pairs} if record_all else sources
        dropped = [layer for layer, entry in pairs if entry == "drop"]
        taken_up = [layer for layer in dropped if layer in self._takers and layer - 1 not in dropped]
        changed = [(layer, entry) for layer, entry in pairs if entry != "drop"]
        try:
            for layer, entry in changed:
                module = self._become(layer, entry, self.parameters[layer, entry]).eval()
                self._teacher.set_submodule(names[attentions[layer]], module)
            for layer in taken_up:
                set_parameters(self._takers[layer], self.parameters[layer, "drop"])
            with recording(attentions[layer] for layer in recorded), self._without(dropped):
                yield
        finally:
            for layer, _ in changed:
                self._teacher.set_submodule(names[attentions[layer]], attentions[layer])
            for layer in taken_up:
                set_parameters(self._takers[layer], self._taken_up[layer])

    @contextmanager
    def _without(self, layers: list[int]) -> Iterator[None]:
        """Let layers hand on the hidden states that they get, while the context lasts."""
        if layers and self._returns_tuple is None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self._teacher.device)
            with keep_layer_outputs(self._layers) as outputs, inference(self._teacher):
                self._teacher(input_ids=ids, use_cache=False, echo_records=EchoRecords())
            self._returns_tuple = isinstance(outputs[0], tuple)

        def hand_on(hidden_states, *args, **kwargs):
            return (hidden_states,) if self._returns_tuple else hidden_states

        with replaced([self._layers[layer] for layer in layers], hand_on):
            yield


def sample_gradients(
    teacher: PreTrainedModel,
    batches: Sequence[BatchEncoding],
    layers: Sequence[int],
    blocks: Sequence[int] = (),
    samples: int = 4,
) -> list[dict[int | tuple[int, str], torch.Tensor]]:
    """
    Gradients of the log-likelihood of tokens that the teacher itself draws, by what its attention layers put out, and by the
    hidden states after layers: the square root of the Fisher information that [`TunedPairs.effects`] needs.

    Args:
        teacher (`PreTrainedModel`): a causal language model.
        batches (sequence of `BatchEncoding`): tokens; each row is a pass of its own, which bounds the memory.
        layers (sequence of `int`): layers with attention.
        blocks (sequence of `int`, *optional*): layers that may be dropped.
        samples (`int`, *optional*, defaults to 4): tokens drawn for each place, and backward passes, K.

    Returns:
        `list[dict]`: for each batch and layer the gradients `(K, N, O)` by the output of its output projection, of the N
        tokens of the batch, in the teacher's dtype; for `(layer, "drop")` by the hidden states after a layer of `blocks`.
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
        decoder_layers = find_layers(teacher) if blocks else None
        for layer in blocks:
            hook = decoder_layers[layer].register_forward_hook(partial(_keep_output, outputs, (layer, "drop")))
            stack.callback(hook.remove)
        wanted = [*layers, *((layer, "drop") for layer in blocks)]
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            rows = []
            for index in range(len(batch["input_ids"])):
                row = {name: value[index : index + 1] for name, value in batch.items()}
                rows.append(_sample_row(teacher, row, outputs, wanted, samples, generator))
            found.append({key: torch.cat([row[key] for row in rows], dim=1) for key in wanted})
    return found


def _sample_row(
    teacher, row, outputs: dict, keys: Sequence[int | tuple[int, str]], samples: int, generator
) -> dict[int | tuple[int, str], torch.Tensor]:
    """Gradients `(K, T, O)` of one row."""
    logits = teacher(**row, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
    log_probs = logits.log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp(), samples, replacement=True, generator=generator)  # (T - 1, K)
    likelihoods = log_probs.gather(-1, drawn).sum(0)  # (K,)
    wanted = [outputs[key] for key in keys]
    gradients = [
        torch.autograd.grad(likelihoods[sample], wanted, retain_graph=sample < samples - 1)
        for sample in range(samples)
    ]
    return {key: torch.stack([each[place].flatten(0, -2) for each in gradients]) for place, key in enumerate(keys)}


def _keep_output(outputs: dict, key: int | tuple[int, str], module, args, output) -> None:
    outputs[key] = states_of(output)


def _memory_budget(device: torch.device) -> float:
    """Bytes that the equations of a group may take: a quarter of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free / 4
