"""Whole layers left out of a model."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.layerwise import find_layers


__all__ = ["cannot_drop", "check_layers_of_config", "check_same_model", "copy_model", "drop_layers", "list_layers"]


def copy_model(model: PreTrainedModel, share_weights: bool = False) -> PreTrainedModel:
    """
    A copy of a model.

    Args:
        model (`PreTrainedModel`): model, left untouched.
        share_weights (`bool`, *optional*, defaults to `False`): with the model's own weights, not copies of them.
    """
    return copy.deepcopy(model, {id(each): each for each in model.parameters()} if share_weights else {})


def list_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    The decoder layers of a model that can do with fewer of them.

    Raises:
        `ValueError`: they are not in one list.
    """
    layers = find_layers(model)
    if layers is None:
        config = model.config.get_text_config()
        raise ValueError(
            f"Layers cannot be dropped from the family {config.model_type!r}: its {config.num_hidden_layers} decoder layers "
            "are not in one list of modules."
        )
    return layers


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
    smaller = copy_model(model, share_weights)
    config = smaller.config.get_text_config()
    count, layers = config.num_hidden_layers, list_layers(smaller)
    kept = [layer for layer in range(count) if layer not in dropped]
    for layer in sorted({*dropped}, reverse=True):
        del layers[layer]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for key, value in list(vars(config).items()):  # such as the attention type of each layer
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, key, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
    return smaller


def cannot_drop(model: PreTrainedModel) -> ValueError:
    """The error for a family whose configuration says by the index of a layer what is in it."""
    return ValueError(
        f"Layers cannot be dropped from the family {model.config.get_text_config().model_type!r}: its configuration gives "
        "other layers than those that are left. Leave `drop` out of the moves."
    )


def check_layers_of_config(model: PreTrainedModel) -> None:
    """
    Check that the configuration of a model without some layers gives the layers that are left.

    Raises:
        `ValueError`: its weights have other names or shapes.
    """
    with torch.device("meta"):
        expected = type(model)(copy.deepcopy(model.config))
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (model, expected)]
    if shapes[0] != shapes[1]:
        raise cannot_drop(model)


@torch.no_grad()
def check_same_model(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Check that a model without some layers is the same after it was saved and loaded: its family may say no."""
    tokens = torch.arange(8, device=model.device)[None]
    logits = [each.eval()(input_ids=tokens, use_cache=False).logits for each in (model, loaded)]
    if not torch.allclose(*logits, rtol=1e-3, atol=1e-3):
        raise cannot_drop(model)
