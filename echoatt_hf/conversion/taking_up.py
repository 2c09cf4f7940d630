"""
What takes up the part of a dropped layer: the output projection of the MLP of the layer before it, refitted in closed form so
that the hidden states after it come close to those after the dropped one.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..modeling_echoatt import find_shareable
from ..models.inference import inference
from ..models.layerwise import find_layers, states_of
from .alignment import input_dim


__all__ = ["find_candidates", "find_takers"]


def find_takers(model: PreTrainedModel, layers: list[int]) -> dict[int, nn.Module]:
    """
    The projections that can take up what comes after some layers: of [`find_candidates`] those of which all that they put out is
    added to the hidden states. Two small forward passes find that out of each.

    Args:
        model (`PreTrainedModel`): a causal language model, teacher or student.
        layers (`list[int]`): layers that are followed by dropped ones.

    Returns:
        `dict[int, nn.Module]`: by layer. Layers with several experts, or with a norm after the MLP, have none.
    """
    decoder_layers = find_layers(model)
    candidates = find_candidates(model, layers).items()
    return {layer: each for layer, each in candidates if _is_added(model, decoder_layers[layer], each)}


def find_candidates(model: PreTrainedModel, layers: list[int]) -> dict[int, nn.Module]:
    """The one linear layer of each layer, outside of its attention, that puts out hidden states. Arguments as in [`find_takers`]."""
    decoder_layers, size = find_layers(model), model.config.get_text_config().hidden_size
    attentions, found = find_shareable(model), {}
    for layer in layers if decoder_layers is not None else ():
        in_attention = {*attentions[layer].modules()} if layer in attentions else {}
        outputs = [
            module
            for module in decoder_layers[layer].modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and module not in in_attention
            and module.weight.shape[1 - input_dim(module)] == size
        ]
        if len(outputs) == 1:
            found[layer] = outputs[0]
    return found


def _is_added(model: PreTrainedModel, block: nn.Module, projection: nn.Module) -> bool:
    """Whether what a projection puts out is added to the hidden states as it is."""
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    states, moved = [], None
    for is_moved in (False, True):

        def move(module, args, output, is_moved=is_moved):
            nonlocal moved
            moved = output / 2 if is_moved else moved
            return output + moved if is_moved else None

        def keep(module, args, output):
            states.append(states_of(output))

        hooks = [projection.register_forward_hook(move), block.register_forward_hook(keep)]
        try:
            with inference(model):
                model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if moved is None:  # not called
        return False
    error = (states[1] - states[0] - moved.view_as(states[0])).float().norm()
    return bool(error <= 0.05 * moved.float().norm())
