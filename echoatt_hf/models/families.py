"""What the families call things in their attention, for those who look into it: conversion, analysis, the benchmark."""

from collections.abc import Iterable, Sequence

from torch import nn

from ..modeling_echoatt import (
    KNOWN_MODULES,
    OUTPUT_MODULES,
    PROJECTIONS,
    KVAttention,
    can_share,
    find_eager_attention,
    find_fused_modules,
    find_shareable,
    get_head_dim,
)


__all__ = [
    "check_same_heads",
    "count_query_features",
    "count_value_features",
    "find_attention_modules",
    "find_output_projection",
    "has_experts",
]


def find_attention_modules(model: nn.Module, needed: Iterable[int] = ()) -> dict[int, nn.Module]:
    """
    The attention modules of a decoder whose weights can be shared.

    Args:
        model (`nn.Module`):
            Model of a family of transformers.
        needed (iterable of `int`, *optional*):
            Layers that must have one. Others may do without, such as the recurrent layers of a hybrid.

    Returns:
        `dict[int, nn.Module]`: attention modules by layer, in the order of layers.

    Raises:
        `ValueError`: a layer that needs one, or every layer, has no attention or one that cannot be shared.
    """
    found = find_shareable(model)
    missing = [layer for layer in needed if layer not in found]
    if missing or not found:
        family = getattr(model.config, "model_type", type(model).__name__)
        raise ValueError(f"EchoAtt does not support the family {family!r} yet: {_why_not(model, found, missing)}.")
    return found


def _why_not(model: nn.Module, found: dict[int, nn.Module], missing: Sequence[int]) -> str:
    """Why the first missing layer, or every layer if none is found, has no attention that can be shared."""
    reasons = {}
    for module in model.modules():
        is_attention = hasattr(module, "layer_idx") and any(hasattr(module, name) for name in PROJECTIONS)
        if is_attention and not can_share(module):
            reasons.setdefault(
                module.layer_idx, f"its attention {type(module).__name__} {_unsupported_reason(module)}"
            )
    if reasons and not found:
        return next(iter(reasons.values()))
    which = f"its layer {missing[0]}" if missing and found else "it"
    nothing = f"{which} has no attention with query, key and value projections, separate or fused"
    return reasons.get(missing[0], nothing) if missing else nothing


def _unsupported_reason(attention: nn.Module) -> str:
    """What an attention module does that an echo layer cannot take over: which part of `can_share` fails."""
    if find_eager_attention(attention) is None:
        return "does not call the attention interface of transformers"
    unknown = [name for name, _ in attention.named_children() if name not in KNOWN_MODULES]
    if unknown:
        return f"has the modules {', '.join(unknown)}"
    if not any(hasattr(attention, name) for name in OUTPUT_MODULES):
        return f"has no output projection named {' or '.join(OUTPUT_MODULES)}"
    parameters = [name for name, _ in attention.named_parameters(recurse=False) if name not in KNOWN_MODULES]
    if parameters:
        return f"has parameters of its own: {', '.join(parameters)}"
    return "has no value projection"


def check_same_heads(attentions: dict[int, nn.Module], sources: dict[int, int]) -> None:
    """
    Check that layers have heads like those of their sources.

    Args:
        attentions (`dict[int, nn.Module]`): attention modules of the teacher, as from [`find_attention_modules`].
        sources (`dict[int, int]`): for each layer that uses another the layer it uses.

    Raises:
        `ValueError`: they differ.
    """
    for layer, source in sources.items():
        shapes = [(get_head_dim(each), count_value_features(each)) for each in (attentions[layer], attentions[source])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Layer {layer} cannot echo layer {source}: their heads differ (head size and value features "
                f"{shapes[0]} and {shapes[1]}). Choose a source with the same heads."
            )


def find_output_projection(attention: nn.Module) -> nn.Module:
    """
    The output projection of an attention module.

    Args:
        attention (`nn.Module`): attention module, as from [`find_attention_modules`].
    """
    return next(getattr(attention, name) for name in OUTPUT_MODULES if hasattr(attention, name))


def count_query_features(attention: nn.Module) -> int:
    """
    Features of the queries of an attention module, its heads times their size.

    Args:
        attention (`nn.Module`): attention module, as from [`find_attention_modules`].
    """
    return attention.config.num_attention_heads * get_head_dim(attention)


def count_value_features(attention: nn.Module) -> int:
    """
    Features of the values of an attention module, its key-value heads times their size.

    Args:
        attention (`nn.Module`): attention module, as from [`find_attention_modules`].
    """
    if isinstance(attention, KVAttention):
        return attention.kv_features
    if hasattr(attention, "v_proj"):
        return attention.v_proj.out_features
    return next(iter(find_fused_modules(attention).values()))


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts, of whose weights a token needs a part."""
    return any("experts" in name for name, _ in model.named_modules())
