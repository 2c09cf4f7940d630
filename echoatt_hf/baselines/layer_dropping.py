"""Other ways to make a model smaller, to compare with: whole layers left out, keys and values shared, random plans."""

import copy
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..evaluation.held_out import evaluate_model
from ..modeling_echoatt import SourceConfig, find_attention_modules
from ..planning.sharing import SharingPlan, count_echo_layers, inner_groups


__all__ = ["check_same_model", "choose_layers_to_drop", "draw_plan", "drop_layers", "share_keys_values"]

SHARE_KEYS_VALUES = "share_keys_values"


def draw_plan(num_layers: int, ratio: float, seed: int, layer_types: Sequence[str] | None = None) -> SharingPlan:
    """
    A sharing plan drawn at random among those that are valid and keep the first and the last layer plain.

    Args:
        num_layers (`int`): layers of the model.
        ratio (`float`): sharing ratio, echo layers / layers.
        seed (`int`): seed of the draw.
        layer_types (sequence of `str`, *optional*): attention type of each layer; an echo has that of its source.

    Raises:
        `ValueError`: the ratio is impossible for the depth.
    """
    generator, types = random.Random(seed), layer_types or [None] * num_layers
    inner = [layer for group in inner_groups(num_layers, 1, layer_types) for layer in group]
    able = [echo for echo in inner if types[echo] in types[:echo]]
    count = count_echo_layers(num_layers, ratio, len(able))
    while True:
        sources, echoes = list(range(num_layers)), generator.sample(able, count)
        for echo in echoes:
            allowed = [layer for layer in range(echo) if layer not in echoes and types[layer] == types[echo]]
            sources[echo] = generator.choice(allowed) if allowed else -1
        if -1 not in sources:
            return SharingPlan(sources, layer_types)


def drop_layers(model: PreTrainedModel, dropped: Sequence[int], share_weights: bool = False) -> PreTrainedModel:
    """
    A copy of a model without some of its decoder layers.

    Args:
        model (`PreTrainedModel`): causal language model whose decoder layers are in one list; left untouched.
        dropped (sequence of `int`): layers to leave out.
        share_weights (`bool`, *optional*, defaults to `False`): with the model's own weights, not copies of them.

    Raises:
        `ValueError`: the model has no list of decoder layers.
    """
    smaller = copy.deepcopy(model, {id(each): each for each in model.parameters()} if share_weights else {})
    config = smaller.config.get_text_config()
    count = config.num_hidden_layers
    kept = [layer for layer in range(count) if layer not in dropped]
    found = [
        (module, name)
        for module in smaller.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise ValueError(
            f"Layers cannot be dropped from the family {config.model_type!r}: it has {len(found)} lists of {count} "
            "modules where one, of its decoder layers, is expected. Leave the method 'layer dropping' out."
        )
    owner, name = found[0]
    layers = nn.ModuleList(getattr(owner, name)[layer] for layer in kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(owner, name, layers)
    for key, value in list(vars(config).items()):  # such as the attention type of each layer
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, key, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
    return smaller


@torch.no_grad()
def check_same_model(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Check that a model without some layers is the same after it was saved and loaded: its family may say no."""
    tokens = torch.arange(8, device=model.device)[None]
    logits = [each.eval()(input_ids=tokens, use_cache=False).logits for each in (model, loaded)]
    if not torch.allclose(*logits, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"Layers cannot be dropped from the family {model.config.model_type!r}: its configuration gives other "
            "layers. Leave the method 'layer dropping' out."
        )


def choose_layers_to_drop(teacher: PreTrainedModel, rows: Sequence[dict], parameters: int) -> list[int]:
    """
    Inner layers to leave out, until at least so many parameters are saved. Greedy: each time the one without which
    KL(teacher || student) is smallest.

    Args:
        teacher (`PreTrainedModel`): the model to take layers from; the first and the last one stay.
        rows (sequence of `dict`): rows with `input_ids` of T tokens to measure on.
        parameters (`int`): parameters to save.

    Raises:
        `ValueError`: the inner layers have fewer parameters.
    """
    dropped: list[int] = []
    while teacher.num_parameters() - drop_layers(teacher, dropped, True).num_parameters() < parameters:
        inner = range(1, teacher.config.get_text_config().num_hidden_layers - 1)
        left = [layer for layer in inner if layer not in dropped]
        if not left:
            raise ValueError(f"The inner layers together have fewer than the {parameters:,} parameters to save.")
        kl = {
            layer: evaluate_model(drop_layers(teacher, [*dropped, layer], True), rows, teacher=teacher)["kl"]
            for layer in left
        }
        dropped.append(min(kl, key=kl.get))
    return sorted(dropped)


class KeysAndValues:
    """Keys and values of one forward pass by layer: handed down as a keyword argument, made new for each pass."""

    def __init__(self):
        self.by_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class SharingConfig(SourceConfig):
    """View of the configuration that a layer's attention sees: all of it, but attention goes through the sharing."""

    def __init__(self, config: Any):
        super().__init__(config)
        self._attn_implementation = SHARE_KEYS_VALUES


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
    config = module.config.config
    if shared is None:
        raise ValueError(f"The family {config.model_type!r} does not hand keyword arguments on to its attention.")
    if module.key_value_source == module.layer_idx:
        shared.by_layer[module.layer_idx] = key, value
    key, value = shared.by_layer[module.key_value_source]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return attention(module, query, key, value, attention_mask, **kwargs)


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
        attention.config, attention.key_value_source = SharingConfig(attention.config), sources[layer]
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
