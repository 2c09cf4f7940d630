"""DirectShare and PostShare: attention heads that use the weights of the heads they are most like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..conversion.dropping import copy_model
from ..conversion.student import make_student
from ..distillation.losses import target_mask
from ..distillation.trainer import EchoAttTrainer
from ..modeling_echoatt import EchoAttForCausalLM, get_head_dim, tie_heads
from ..models.families import find_attention_modules, find_output_projection


__all__ = [
    "HEAD_PARTS",
    "POST_SHARE_SETTINGS",
    "HeadPair",
    "PostShareTrainer",
    "count_saved",
    "direct_share",
    "head_distance",
    "make_shared_student",
    "match_heads",
]

HEAD_PARTS = ("qk", "q", "k", "v", "qkv")
"""By which projections heads are compared."""

POST_SHARE_SETTINGS = {
    "stage2_learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
}
"""Arguments of PostShare's training, as published; with 128 rows of 4096 tokens in a step, and no stage 1."""


class HeadPair(NamedTuple):
    """
    A head and the one it is most like. Of grouped queries a head is a head of keys and values, with all its queries.

    Args:
        layer, head (`int`): which head.
        source_layer, source_head (`int`): the head of an earlier layer whose weights it uses.
        similarity (`float`): cosine of their weights.
    """

    layer: int
    head: int
    source_layer: int
    source_head: int
    similarity: float


def match_heads(model: PreTrainedModel, rate: float | None, parts: str = "qk") -> list[HeadPair]:
    """
    Find the heads that are most like a head of an earlier layer, by their weights. No text is needed.

    Args:
        model (`PreTrainedModel`): causal language model with separate projections of queries, keys and values.
        rate (`float`): share of all heads that are to use the weights of others, 0.3 in the paper; `None` for as many as can.
        parts (`str`, *optional*, defaults to `"qk"`):
            By what heads are compared: the cosine of their weights of queries and keys as one vector, or of those that
            `"q"`, `"k"`, `"v"` or `"qkv"` names.

    Returns:
        `list` of [`HeadPair`]: `int(rate * heads)` pairs, the most similar first.

    Raises:
        `ValueError`: the rate is out of range, `parts` is not known, or the family projects several things together.

    Source: DirectShare, arXiv 2402.11819, section 3.
    """
    if parts not in HEAD_PARTS:
        raise ValueError(f"parts is {parts!r}; it must be one of {', '.join(HEAD_PARTS)}.")
    projections = _find_projections(model)
    vectors = {layer: _head_vectors(each, parts) for layer, each in projections.items()}
    pairs = []
    for layer, found in vectors.items():
        best: list[HeadPair | None] = [None] * len(found)
        for other, candidates in vectors.items():
            if other >= layer or projections[other].shapes() != projections[layer].shapes():
                continue
            cosines, sources = (found @ candidates.to(found.device).T).max(dim=1)
            for head, (cosine, source) in enumerate(zip(cosines.tolist(), sources.tolist(), strict=True)):
                if best[head] is None or cosine > best[head].similarity:
                    best[head] = HeadPair(layer, head, other, source, cosine)
        pairs += [pair for pair in best if pair is not None]
    total = sum(map(len, vectors.values()))
    count = len(pairs) if rate is None else int(rate * total)
    if not 1 <= count <= len(pairs):
        raise ValueError(
            f"rate is {rate}, which is {count} of {total} heads: it must be at least one head and at most the {len(pairs)} that "
            "have heads of their shape in an earlier layer."
        )
    return sorted(pairs, key=lambda pair: -pair.similarity)[:count]


def _head_vectors(projections: "_Projections", parts: str) -> torch.Tensor:
    """The weights of each head as one vector of length 1, `(heads, N)`, float32."""
    weights = projections.by_head()
    vectors = torch.cat([weights[f"{part} weight"].detach().float().flatten(1) for part in parts], dim=1)
    return torch.nn.functional.normalize(vectors, dim=1)


@torch.no_grad()
def direct_share(model: PreTrainedModel, pairs: Sequence[HeadPair]) -> PreTrainedModel:
    """
    Let heads use the weights of others, in place: those of queries, keys and values, with their biases, and of the output.

    A head gets the weights that its source has before anything is shared, also where the source itself uses those of
    another head. What the heads compute, and the cache, stay their own: only parameters can be saved.

    Args:
        model (`PreTrainedModel`): causal language model.
        pairs (sequence of [`HeadPair`]): which heads, as from [`match_heads`].

    Raises:
        `ValueError`: a pair does not fit the model.
    """
    projections = _find_projections(model)
    _check_pairs(projections, pairs)
    # From the last layer down: what lies before a layer is then as it was.
    for pair in sorted(pairs, key=lambda pair: -pair.layer):
        theirs = projections[pair.source_layer].by_head()
        for name, ours in projections[pair.layer].by_head().items():
            ours[pair.head].copy_(theirs[name][pair.source_head])
    return model


def make_shared_student(model: PreTrainedModel, pairs: Sequence[HeadPair]) -> EchoAttForCausalLM:
    """
    A student as [`direct_share`] makes it, in which weights that heads share exist once: in memory, in training, where they
    change as one, and in its files.

    Of a chain, a head that uses the weights that its source had before that one was replaced keeps them.

    Args:
        model (`PreTrainedModel`): causal language model, left untouched.
        pairs (sequence of [`HeadPair`]): which heads, as from [`match_heads`].

    Raises:
        `ValueError`: a pair does not fit the model.
    """
    student = make_student(
        direct_share(copy_model(model), pairs), range(model.config.get_text_config().num_hidden_layers)
    )
    shared = {"{}.{}".format(*place): "{}.{}".format(*holder) for place, holder in _find_holders(pairs).items()}
    tie_heads(student, shared)
    student.config.shared_heads = shared
    return student


def count_saved(model: PreTrainedModel, pairs: Sequence[HeadPair]) -> int:
    """
    Parameters that a student of [`make_shared_student`] has less than its model.

    Args:
        model (`PreTrainedModel`): causal language model.
        pairs (sequence of [`HeadPair`]): which heads, as from [`match_heads`].
    """
    sizes = {
        layer: sum(tensor[0].numel() for tensor in projections.by_head().values())
        for layer, projections in _find_projections(model).items()
    }
    return sum(sizes[layer] for layer, _ in _find_holders(pairs))


def _find_holders(pairs: Sequence[HeadPair]) -> dict[tuple[int, int], tuple[int, int]]:
    """For each head, as layer and index, that needs no weights of its own, the one that has the same."""
    had = {(pair.layer, pair.head): (pair.source_layer, pair.source_head) for pair in pairs}
    first: dict[tuple[int, int], tuple[int, int]] = {}  # of what each place had at first
    found = {place: first.setdefault(had.get(place, place), place) for place in sorted({*had, *had.values()})}
    return {place: holder for place, holder in found.items() if holder != place}


def head_distance(model: PreTrainedModel, pairs: Sequence[HeadPair]) -> torch.Tensor:
    """
    PostShare's constraint: how far the weights of heads are from those they are to use.

    Args:
        model (`PreTrainedModel`): causal language model in training.
        pairs (sequence of [`HeadPair`]): which heads, as from [`match_heads`].

    Returns:
        `torch.Tensor`, a scalar in float32 with gradients: the sum of the Euclidean distances of the weights of queries, of
        keys and of values, mean over pairs.
    """
    projections = _find_projections(model)
    _check_pairs(projections, pairs)
    return _head_distance(projections, pairs)


class PostShareTrainer(EchoAttTrainer):
    """
    An [`EchoAttTrainer`] that draws heads to those whose weights they will use: PostShare.

    It minimises half of what the stage minimises and half of [`head_distance`]. The paper trains on text alone: with
    `stage1_steps=0` and [`POST_SHARE_SETTINGS`]. After training [`direct_share`] makes the model with the same pairs.

    Args:
        pairs (sequence of [`HeadPair`]): which heads, as from [`match_heads`] before training.
        kwargs: everything that [`EchoAttTrainer`] takes.

    Raises:
        `ValueError`: a pair does not fit the model, or its weights are divided among processes.

    Example:

    ```python
    >>> pairs = match_heads(model, rate=0.3)
    >>> args = EchoAttTrainingArguments(stage1_steps=0, stage2_steps=1000, **POST_SHARE_SETTINGS)
    >>> PostShareTrainer(model=model, args=args, train_dataset=rows, data_collator=collate_rows, pairs=pairs).train()
    >>> direct_share(model, pairs)
    ```

    Source: PostShare, arXiv 2402.11819, section 3.
    """

    def __init__(self, *args, pairs: Sequence[HeadPair], **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "FSDP or ZeRO-3 divides the weights among processes, but the distance of heads needs whole ones: launch with "
                "DDP or ZeRO-2."
            )
        if not pairs:
            raise ValueError("pairs is empty: give those of match_heads.")
        self._projections, self._pairs = _find_projections(self.model), list(pairs)
        _check_pairs(self._projections, self._pairs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Half of the loss of [`EchoAttTrainer`] and half of the distance of heads; the former alone while evaluating."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        # What the micro-batches of a step give is added up: the distance by the share of the tokens that each has.
        share, processes = 1.0, 1
        if num_items_in_batch is not None:
            share = target_mask(inputs["labels"]).sum() / num_items_in_batch
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        distance = share * _head_distance(self._projections, self._pairs)
        self._add_parts({"heads": distance})
        loss, *outputs = found if return_outputs else (found,)
        loss = 0.5 * loss + 0.5 * processes * distance
        return (loss, *outputs) if return_outputs else loss


@dataclass(frozen=True)
class _Projections:
    """The projections of a layer, and the heads of keys and values that they are for."""

    heads: int
    by_name: dict[str, nn.Linear]

    def by_head(self) -> dict[str, torch.Tensor]:
        """What each head has of the weights and biases, by name, as views `(heads, ...)`. Biases of outputs are no head's."""
        found = {}
        for name in "qkv":
            for kind, tensor in self.by_name[name].named_parameters():
                found[f"{name} {kind}"] = tensor.unflatten(0, (self.heads, -1))
        found["o weight"] = self.by_name["o"].weight.unflatten(1, (self.heads, -1)).transpose(0, 1)
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a head has."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.by_head().items()}


def _find_projections(model: PreTrainedModel) -> dict[int, _Projections]:
    """The projections of a model by layer, in the order of layers."""
    found = {}
    for layer, attention in find_attention_modules(model).items():
        named = {name: getattr(attention, f"{name}_proj", None) for name in "qkv"}
        named["o"] = find_output_projection(attention)
        if not all(isinstance(each, nn.Linear) for each in named.values()):
            raise ValueError(
                f"Heads cannot be shared in the family {model.config.model_type!r}: it has no linear q_proj, k_proj and "
                "v_proj of their own. Take another method."
            )
        found[layer] = _Projections(named["k"].out_features // get_head_dim(attention), named)
    return found


def _check_pairs(projections: dict[int, _Projections], pairs: Sequence[HeadPair]) -> None:
    """Check that pairs are heads of a model, each used once, with a source of the same shape before it."""
    seen = set()
    for pair in pairs:
        places = [(pair.layer, pair.head), (pair.source_layer, pair.source_head)]
        missing = [
            place for place in places if place[0] not in projections or not 0 <= place[1] < projections[place[0]].heads
        ]
        if missing:
            raise ValueError(f"{pair} does not fit the model: its layer {missing[0][0]} has no head {missing[0][1]}.")
        if pair.source_layer >= pair.layer or places[0] in seen:
            raise ValueError(f"{pair} does not fit: a head has one source, in an earlier layer.")
        if projections[pair.layer].shapes() != projections[pair.source_layer].shapes():
            raise ValueError(f"{pair} does not fit the model: the shapes of the two heads differ.")
        seen.add(places[0])


def _head_distance(projections: dict[int, _Projections], pairs: Sequence[HeadPair]) -> torch.Tensor:
    weights = {layer: each.by_head() for layer, each in projections.items()}
    total = torch.zeros(())
    for pair in pairs:
        for name in ("q weight", "k weight", "v weight"):
            ours, theirs = weights[pair.layer][name][pair.head], weights[pair.source_layer][name][pair.source_head]
            total = total.to(ours.device) + (ours - theirs.to(ours.device)).float().norm()
    return total / len(pairs)
