"""LaCo: layers near the output are merged into a layer before them, wherever the last hidden states stay alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.dropping import copy_model, drop_layers, list_layers
from .trials import LastStates, check_threshold


__all__ = ["LACO_PRESETS", "LACO_RULES", "Collapse", "Merge", "collapse_layers", "merge_layers"]

LACO_RULES = ("code", "paper")
"""How layers are merged: as the code that LaCo's authors released does it, or by the formula in the paper."""

LACO_PRESETS = {
    "llama2-7b": {"size": 4, "lowest": 1, "highest": 32, "interval": 2, "threshold": 0.65},
    "llama2-13b": {"size": 6, "lowest": 1, "highest": 40, "interval": 2, "threshold": 0.75},
    "notebook-13b": {"size": 7, "lowest": 0, "highest": 39, "interval": 1, "threshold": 0.45},
}
"""Settings of [`collapse_layers`] that were published: those of the paper, and of the released notebook."""


@dataclass(frozen=True)
class Merge:
    """
    A merge that was tried.

    Args:
        layers (`tuple[int, ...]`): the layers of the teacher that the merged layer would stand for, those before it first.
        similarity (`float`): cosine of the last hidden states with the teacher's.
        is_kept (`bool`): whether it was above the threshold.
    """

    layers: tuple[int, ...]
    similarity: float
    is_kept: bool


@dataclass(frozen=True)
class Collapse:
    """
    What LaCo made of a model.

    Args:
        model (`PreTrainedModel`): a plain model of the family with fewer layers.
        layers (`list[list[int]]`): for each of its layers those of the teacher that it stands for. The norms are those of
            the first.
        threshold (`float`): cosine that a merge had to exceed.
        tried (`list` of [`Merge`]): the merges, in the order in which they were tried.
        similarity (`float`): cosine of the model's last hidden states with the teacher's.
        similarity_without (`float`): the same where these layers are left out and nothing is merged.
    """

    model: PreTrainedModel
    layers: list[list[int]]
    threshold: float
    tried: list[Merge]
    similarity: float
    similarity_without: float


def collapse_layers(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    *,
    size: int = 4,
    lowest: int = 1,
    highest: int | None = None,
    interval: int = 2,
    threshold: float = 0.65,
    rule: str = "code",
) -> Collapse:
    """
    Merge layers of a model, beginning near its output.

    Layer `l = highest - size` is the first that the `size - 1` layers after it are merged into. Where the last hidden states
    stay alike the merge is kept, and `l` goes down by `interval`; else by one; until it is below `lowest`.

    Args:
        teacher (`PreTrainedModel`): causal language model whose decoder layers are in one list; left untouched.
        rows (sequence of `dict`): rows with `input_ids` to compare on. The paper has five sentences of some words.
        size (`int`, *optional*, defaults to 4): layers that one merge makes one of, C in the paper.
        lowest (`int`, *optional*, defaults to 1): the first layer that may be merged into, L.
        highest (`int`, *optional*): the layer after the last one that is merged at first, H; all layers if not given.
        interval (`int`, *optional*, defaults to 2): layers to go down after a merge that is kept, I.
        threshold (`float`, *optional*, defaults to 0.65): cosine that a merge has to exceed, T.
        rule (`str`, *optional*, defaults to `"code"`): see [`merge_layers`].

    Returns:
        [`Collapse`]

    Raises:
        `ValueError`: a setting is out of range, the layers are not in one list, or those to merge are of different kinds.

    Source: LaCo, arXiv 2402.11187, algorithm 1, and the notebooks of its authors.
    """
    _check_rule(rule)
    check_threshold(threshold)
    count = len(list_layers(teacher))
    highest = count if highest is None else highest
    if size < 2:
        raise ValueError(f"size is {size}; it must be at least 2, a layer and one to merge into it.")
    if interval < 1:
        raise ValueError(f"interval is {interval}; it must be at least 1.")
    if not 0 <= lowest <= highest - size or highest > count:
        raise ValueError(
            f"lowest is {lowest}, highest {highest} and size {size}, for a model of {count} layers: lowest must be at least "
            f"0 and at most highest - size, and highest at most {count}."
        )
    states, model, tried = LastStates(teacher, rows), copy_model(teacher, share_weights=True), []
    layers, similarity = [[layer] for layer in range(count)], 1.0
    base = highest - size
    while base >= lowest:
        rear = min(size - 1, len(layers) - base - 1)
        merged = merge_layers(model, base, rear, rule, share_weights=True)
        found = states.similarity(merged)
        stands_for = sum(layers[base : base + rear + 1], [])
        tried.append(Merge(tuple(stands_for), found, found > threshold))
        if found > threshold:
            model, similarity = merged, found
            layers[base : base + rear + 1] = [stands_for]
            base -= interval
            if base >= len(layers):
                base = len(layers) - 1 - size
        else:
            base -= 1
    left_out = [layer for each in layers for layer in each[1:]]
    without = states.similarity(drop_layers(teacher, left_out, share_weights=True))
    return Collapse(copy_model(model), layers, threshold, tried, similarity, without)


def merge_layers(
    model: PreTrainedModel, base: int, rear: int, rule: str = "code", share_weights: bool = False
) -> PreTrainedModel:
    """
    A copy of a model in which some layers are merged into the one before them. Norms stay that layer's; all other weights
    are merged.

    Args:
        model (`PreTrainedModel`): causal language model whose decoder layers are in one list; left untouched.
        base (`int`): the layer that others are merged into.
        rear (`int`): how many layers after it are merged.
        rule (`str`, *optional*, defaults to `"code"`):
            `"paper"`: the printed rule, `W_base + sum of (W_other - W_base)`. `"code"`: that of the released code, which
            adds one difference after the other, each from the sum so far, so that the weights of the last layer are left.
            The printed rule makes models of little use where it merges more than two layers.
        share_weights (`bool`, *optional*, defaults to `False`): with the model's own weights where nothing is merged.

    Raises:
        `ValueError`: there are no such layers, they are of different kinds, or the rule is not known.
    """
    _check_rule(rule)
    layers = list_layers(model)
    if not 0 <= base <= base + rear < len(layers):
        raise ValueError(
            f"Layers {base} to {base + rear} are to be merged; the model has the layers 0 to {len(layers) - 1}."
        )
    found = [_weights(layers[layer]) for layer in range(base, base + rear + 1)]
    for offset, weights in enumerate(found):
        differing = found[0].keys() ^ weights.keys() or {
            name for name, weight in weights.items() if weight.shape != found[0][name].shape
        }
        if differing:
            raise ValueError(
                f"Layer {base + offset} cannot be merged into layer {base}: only one of them has {min(differing)!r}, or it has "
                "another shape. Give settings by which layers of one kind are merged."
            )
    merged = drop_layers(model, range(base + 1, base + rear + 1), share_weights)
    for name, weight in found[0].items():
        if rule == "code":
            value = found[-1][name].detach().clone()
        else:
            total = weight.detach().float()
            for other in found[1:]:
                total = total + (other[name].detach().float().to(weight.device) - weight.detach().float())
            value = total.to(weight.dtype)
        path, _, leaf = name.rpartition(".")
        module = list_layers(merged)[base].get_submodule(path)
        setattr(module, leaf, nn.Parameter(value.to(weight.device), requires_grad=weight.requires_grad))
    return merged


def _weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a layer by name, but for those of its norms."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in layer.named_modules()
        if "norm" not in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _check_rule(rule: str) -> None:
    if rule not in LACO_RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(LACO_RULES)}.")
