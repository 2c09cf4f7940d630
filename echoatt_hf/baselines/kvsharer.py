"""KVSharer: layers use the keys and values of the layers that theirs differ from most."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..conversion.student import make_student
from ..models.families import find_attention_modules
from ..models.inference import inference
from ..planning.sharing import SharingPlan
from ..text.rows import stack_rows
from .trials import LastStates, check_threshold


__all__ = [
    "KV_DISTANCES",
    "KV_ORDERS",
    "KeyValuePlan",
    "Trial",
    "measure_kv_distances",
    "plan_like_kvsharer",
]

logger = logging.getLogger(__name__)

KV_DISTANCES = ("code", "paper")
"""How keys and values of two layers are compared: as the code of KVSharer's authors does it, or as their paper says."""

KV_ORDERS = ("dissimilar", "similar")
"""Which pairs of layers are tried first."""


@dataclass(frozen=True)
class Trial:
    """
    A pair of layers that was tried.

    Args:
        layer (`int`): the layer that gives up its keys and values.
        source (`int`): the layer whose keys and values it would use.
        distance (`float`): distance of the pair, see [`measure_kv_distances`]; of the layer that it names, where that shares
            itself and `source` is the one it shares with.
        similarity (`float`): cosine of the last hidden states with the teacher's.
        is_kept (`bool`): whether it was above the threshold.
    """

    layer: int
    source: int
    distance: float
    similarity: float
    is_kept: bool


@dataclass(frozen=True)
class KeyValuePlan:
    """
    Which layers use the keys and values of others.

    Args:
        plan ([`SharingPlan`]): the layers that use those of layer N are `"kv N"`.
        tried (`list` of [`Trial`]): the pairs, in the order in which they were tried.
        is_enough (`bool`): whether as many layers share as were to.
    """

    plan: SharingPlan
    tried: list[Trial]
    is_enough: bool

    @property
    def shared_layers(self) -> list[int]:
        """`list[int]`: the layers that use the keys and values of another."""
        return self.plan.kv_layers


def plan_like_kvsharer(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    count: int | Callable[[SharingPlan], bool],
    *,
    order: str = "dissimilar",
    distance: str = "code",
    threshold: float = 0.5,
) -> KeyValuePlan:
    """
    Choose layers that use the keys and values of others, by the rule of KVSharer.

    Pairs of layers are tried in the order of their distance. The upper layer takes the keys and values of the lower one, or
    of the layer that the lower one has them from; layers that had taken them from the upper one follow. Where the last
    hidden states stay alike it is kept.

    Args:
        teacher (`PreTrainedModel`): causal language model of a supported family.
        rows (sequence of `dict`): rows with `input_ids` to measure on. The paper has 30 sentences, cut at 64 tokens.
        count (`int` or `Callable`):
            Layers that are to share, C in the paper, which has 12.5 %, 25 % and 37.5 % of all. Or what says of a plan
            whether enough layers share.
        order (`str`, *optional*, defaults to `"dissimilar"`):
            Which pairs are tried first: the most `"dissimilar"`, which is what the paper found, or the most `"similar"`.
        distance (`str`, *optional*, defaults to `"code"`): see [`measure_kv_distances`].
        threshold (`float`, *optional*, defaults to 0.5): cosine that a pair has to exceed, T in the paper.

    Returns:
        [`KeyValuePlan`]: with too few layers, and a warning, if no more pair is above the threshold.

    Raises:
        `ValueError`: a setting is out of range, or the family is not supported.

    Source: KVSharer, arXiv 2410.18517, section 3, and the code of its authors.
    """
    if order not in KV_ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(KV_ORDERS)}.")
    check_threshold(threshold)
    distances = measure_kv_distances(teacher, rows, distance)
    uppers = {upper for upper, _ in distances}
    if not callable(count) and not 1 <= count <= len(uppers):
        raise ValueError(
            f"count is {count}; it must be from 1 to {len(uppers)}, the layers with a layer of their kind before them."
        )
    pairs = sorted(distances, key=distances.get, reverse=order == "dissimilar")
    text_config = teacher.config.get_text_config()
    types, sources = getattr(text_config, "layer_types", None), list(range(text_config.num_hidden_layers))
    states, tried, is_enough = LastStates(teacher, rows), [], False
    for upper, lower in pairs:
        if sources[upper] != upper:
            continue
        source = sources[lower]
        candidate = [source if each == upper else each for each in sources]
        plan = SharingPlan(candidate, types).with_kv()
        similarity = states.similarity(make_student(teacher, plan, share_weights=True))
        tried.append(Trial(upper, source, distances[upper, lower], similarity, similarity > threshold))
        if similarity > threshold:
            sources = candidate
            is_enough = count(plan) if callable(count) else len(plan.kv_layers) == count
        if is_enough:
            break
    plan = SharingPlan(sources, types).with_kv()
    if not is_enough:
        wanted = "layers that are too few" if callable(count) else f"of the {count} layers"
        logger.warning(
            f"{len(plan.kv_layers)} {wanted} share keys and values: with every other pair the last hidden states have a cosine "
            f"of {threshold} or less with the teacher's. Lower the threshold, or take fewer layers."
        )
    return KeyValuePlan(plan, tried, is_enough)


def measure_kv_distances(
    model: PreTrainedModel, rows: Sequence[dict], distance: str = "code"
) -> dict[tuple[int, int], float]:
    """
    How far the keys, after rotary embedding, and the values of layers are from each other.

    Those of a layer are averaged over rows, position by position. Only rows as long as the first one count.

    Args:
        model (`PreTrainedModel`): causal language model.
        rows (sequence of `dict`): rows with `input_ids`.
        distance (`str`, *optional*, defaults to `"code"`):
            `"code"`: the Euclidean distance of keys of one head and position, mean over heads and positions; the same of
            values; the mean of both. `"paper"`: keys and values of a layer are flattened and averaged with each other, and
            the Euclidean distance is that of what results.

    Returns:
        `dict[tuple[int, int], float]`: by pairs (upper layer, lower layer) of one attention type and heads of one shape.

    Raises:
        `ValueError`: there are no rows, the distance is not known or the family not supported.
    """
    if distance not in KV_DISTANCES:
        raise ValueError(f"distance is {distance!r}; it must be one of {', '.join(KV_DISTANCES)}.")
    if not len(rows):
        raise ValueError("There are no rows to measure on: give at least one.")
    attentions = find_attention_modules(model)
    rows = [row for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])]
    means: dict[int, list[torch.Tensor]] = {}
    with inference(model):
        for row in rows:
            cache = _KeepingCache(config=model.config)
            model(**stack_rows([row]).to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            for layer in attentions:
                states = [each[0].float().cpu() / len(rows) for each in cache.given[layer]]  # (H_kv, T, D)
                means[layer] = [a + b for a, b in zip(means[layer], states, strict=True)] if layer in means else states
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * (max(means) + 1)
    return {
        (upper, lower): _distance(means[upper], means[lower], distance)
        for upper in means
        for lower in means
        if lower < upper
        and types[lower] == types[upper]
        and [each.shape for each in means[lower]] == [each.shape for each in means[upper]]
    }


def _distance(states: list[torch.Tensor], others: list[torch.Tensor], distance: str) -> float:
    """Distance of keys and values `(H_kv, T, D)` of two layers."""
    if distance == "code":
        parts = [(a - b).norm(dim=-1).mean() for a, b in zip(states, others, strict=True)]
        return (sum(parts) / 2).item()
    first, second = (sum(each.flatten() for each in both) / 2 for both in (states, others))
    return (first - second).norm().item()


class _KeepingCache(DynamicCache):
    """A cache that remembers what each layer gave it last, also of a layer whose window drops some of it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.given[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
