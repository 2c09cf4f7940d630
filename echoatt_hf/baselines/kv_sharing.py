"""Layers that use the keys and values of others, with queries of their own."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling_echoatt import View, view_attention
from ..models.families import find_attention_modules


__all__ = ["share_keys_values"]

SHARE_KEYS_VALUES = "share_keys_values"


class KeysAndValues:
    """Keys and values of one forward pass by layer: handed down as a keyword argument, made new for each pass."""

    def __init__(self):
        self.by_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class NoProjection(nn.Module):
    """In the place of a key or value projection that is not needed: zeros, which nobody reads."""

    # What the cache would have to hold.
    out_features = 0

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.features)


def attend_with_shared(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    shared: KeysAndValues | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function: remember keys and values of a source, or take those of the source, after rotary embedding."""
    config = module.config.viewed
    if shared is None:
        raise ValueError(f"The family {config.model_type!r} does not hand keyword arguments on to its attention.")
    if module.key_value_source == module.layer_idx:
        shared.by_layer[module.layer_idx] = key, value
    key, value = shared.by_layer[module.key_value_source]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return attention(view_attention(module), query, key, value, attention_mask, **kwargs)


AttentionInterface.register(SHARE_KEYS_VALUES, attend_with_shared)


def share_keys_values(model: PreTrainedModel, sources: Sequence[int]) -> PreTrainedModel:
    """
    Let layers use keys and values of earlier ones with queries of their own, in place, as cross-layer attention (CLA)
    and KVSharer do. In a cache they have nothing.

    Args:
        model (`PreTrainedModel`): causal language model with separate projections of keys and values.
        sources (sequence of `int`): for each layer the layer whose keys and values it uses, as in [`SharingPlan`].

    Raises:
        `ValueError`: the family projects keys and values together with the queries, or the heads differ.
    """
    attentions = find_attention_modules(model)
    sharing = [(attentions[layer], attentions[source]) for layer, source in enumerate(sources) if layer != source]
    for attention, source in sharing:
        if not hasattr(attention, "k_proj") or not hasattr(attention, "v_proj"):
            raise ValueError(
                f"Keys and values cannot be shared in the family {model.config.model_type!r}: it has no k_proj and "
                "v_proj of their own. Leave the method 'KV sharing' out."
            )
        if attention.k_proj.out_features != source.k_proj.out_features:
            raise ValueError(
                f"Layer {attention.layer_idx} cannot use the keys of layer {source.layer_idx}: their heads differ."
            )
    for layer, attention in attentions.items():
        attention.config = View(attention.config, _attn_implementation=SHARE_KEYS_VALUES)
        attention.key_value_source = sources[layer]
        if layer != sources[layer]:
            attention.k_proj, attention.v_proj = (
                NoProjection(each.out_features) for each in (attention.k_proj, attention.v_proj)
            )
            for name in {"k_norm", "k_layernorm", "key_layernorm"} & {name for name, _ in attention.named_children()}:
                setattr(attention, name, nn.Identity())
            attention.register_forward_pre_hook(_without_cache, with_kwargs=True)
    model.register_forward_pre_hook(_hand_down, with_kwargs=True)
    return model


def _hand_down(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "shared": KeysAndValues()}


def _without_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "past_key_values": None}
