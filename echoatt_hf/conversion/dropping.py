"""Whole layers left out of a model."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


__all__ = ["check_same_model", "drop_layers"]


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
            "modules where one, of its decoder layers, is expected."
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
            "layers."
        )
