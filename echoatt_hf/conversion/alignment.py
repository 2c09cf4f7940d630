"""Head alignment: the heads of an echo layer in the order in which its source attends most like them."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..analysis.similarity import AttentionSimilarity
from ..configuration_echoatt import read_layer_plan
from ..modeling_echoatt import EchoAttention, EchoAttForCausalLM, OwnAttention, get_head_dim
from ..models.families import count_value_features, find_output_projection


__all__ = ["align_heads", "match_heads", "permute_heads"]


def align_heads(student: EchoAttForCausalLM, similarity: AttentionSimilarity) -> dict[int, list[int]]:
    """
    Order the heads of every layer that uses another by the heads of its source, in place.

    An echo layer has the attention weights of its source, head by head. Which of its own heads gets which of them is
    free: the order is folded into the value and output projections, and costs nothing when the student runs. Where a layer
    uses keys and values of its source, the order is folded into the query and output projections.

    Args:
        student ([`EchoAttForCausalLM`]):
            A student that has just been converted.
        similarity ([`AttentionSimilarity`]):
            Of its teacher.

    Returns:
        `dict[int, list[int]]`: for each of these layers the head of the teacher that is now in each place.

    Raises:
        `ValueError`: the similarity is that of another model.
    """
    moves = read_layer_plan(student.config.plan)
    if len(similarity.layers) != len(moves):
        raise ValueError(
            f"The similarity is of {len(similarity.layers)} layers and the student has {len(moves)}: measure it on "
            "the teacher of this student."
        )
    return {
        layer: align_layer(attention, similarity.between(moves[layer][1], layer))
        for layer, attention in find_changed(student).items()
        if moves[layer][1] is not None
    }


def align_layer(attention: nn.Module, similarity: torch.Tensor) -> list[int]:
    """
    Order the heads of one layer, in place.

    Args:
        attention (`EchoAttention` or `KVAttention`):
            Attention module of the layer.
        similarity (`torch.Tensor` of shape `(H, H)`):
            Of the heads of its source with its own, see [`match_heads`].

    Returns:
        `list[int]`: the head of the teacher that is now in each place.
    """
    num_heads, num_kv_heads = count_heads(attention), count_kv_heads(attention)
    if len(similarity) != num_heads:
        raise ValueError(
            f"The similarity is of {len(similarity)} heads and layer {attention.layer_idx} has {num_heads}: measure it on "
            "the teacher of this student."
        )
    order = match_heads(similarity, num_kv_heads)
    permute_heads(attention, order)
    return order


def match_heads(similarity: torch.Tensor, num_kv_heads: int) -> list[int]:
    """
    The order of the heads of one layer that makes them most similar to those of another, place by place.

    Heads that share their values stay together: whole groups are assigned to groups, and heads within them.

    Args:
        similarity (`torch.Tensor` of shape `(H, H)`):
            `similarity[g, h]`: of head g of the source and head h of the echo.
        num_kv_heads (`int`):
            Number of groups of heads that share their values.

    Returns:
        `list[int]`: for each place the head of the echo layer. The sum of similarities is the largest possible.
    """
    size = len(similarity) // num_kv_heads
    blocks = similarity.double().numpy().reshape(num_kv_heads, size, num_kv_heads, size).swapaxes(1, 2)
    inner = np.array([[linear_sum_assignment(block, maximize=True)[1] for block in row] for row in blocks])
    totals = np.take_along_axis(blocks, inner[..., None], axis=-1).sum((-1, -2))
    groups = linear_sum_assignment(totals, maximize=True)[1]
    return [int(group * size + head) for place, group in enumerate(groups) for head in inner[place, group]]


def permute_heads(attention: nn.Module, order: Sequence[int]) -> None:
    """
    Put the heads of a layer that uses another in another order: in all that it has for each head.

    Args:
        attention (`EchoAttention` or `KVAttention`):
            Attention module of the layer; its parameters are replaced, not written to.
        order (sequence of `int`):
            For each place the head that comes there. Heads that share their values must stay together.

    Raises:
        `ValueError`: the order is no permutation, or separates heads that share their values.
    """
    num_heads, num_kv_heads = count_heads(attention), count_kv_heads(attention)
    order, size = np.asarray(order), num_heads // num_kv_heads
    if sorted(order.tolist()) != list(range(num_heads)):
        raise ValueError(f"The order {order.tolist()} is no permutation of {num_heads} heads.")
    groups = order.reshape(num_kv_heads, size) // size
    if (groups != groups[:, :1]).any():
        raise ValueError(
            f"The order {order.tolist()} separates heads that share their values: keep each {size} of them together."
        )
    output = find_output_projection(attention)
    _reorder(output, input_dim(output), order)
    if isinstance(attention, EchoAttention):
        _reorder(attention.v_proj, 0, groups[:, 0])
        if attention.echo_gate is not None:
            _reorder(getattr(attention, attention.echo_gate), 0, order)
        return
    # Queries, with what goes with them: gates, norms of all heads together, sinks.
    for child in attention.children():
        weight = getattr(child, "weight", None)
        is_by_head = weight is not None and weight.shape[0] % num_heads == 0 and weight.shape[0] >= num_heads
        if child is not output and is_by_head and (weight.dim() == 2 or weight.shape[0] > get_head_dim(attention)):
            _reorder(child, 0, order)
    for name, parameter in list(attention.named_parameters(recurse=False)):
        if parameter.shape == (num_heads,):
            index = torch.from_numpy(order).to(parameter.device)
            replace_parameter(attention, name, parameter.detach().index_select(0, index))


def find_changed(student: EchoAttForCausalLM) -> dict[int, nn.Module]:
    """The attention modules of the layers that a plan changes, by layer."""
    found = {module.layer_idx: module for module in student.modules() if isinstance(module, OwnAttention)}
    return dict(sorted(found.items()))


EchoParameters = dict[str, nn.Parameter]
"""Parameters of an attention by name. What replaced them is undone by putting them back."""


def get_parameters(attention: nn.Module) -> EchoParameters:
    """The parameters of an attention, themselves, not copies."""
    return dict(attention.named_parameters())


def set_parameters(attention: nn.Module, parameters: EchoParameters) -> None:
    """Put parameters into an attention."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(attention.get_submodule(path), leaf, parameter)


def count_heads(attention: nn.Module) -> int:
    """Number of heads of a layer."""
    output = find_output_projection(attention)
    return output.weight.shape[input_dim(output)] // get_head_dim(attention)


def count_kv_heads(attention: nn.Module) -> int:
    """Number of heads of values that a layer uses."""
    return count_value_features(attention) // get_head_dim(attention)


def input_dim(projection: nn.Module) -> int:
    """The dimension of a projection's weight that its inputs are along."""
    return 0 if isinstance(projection, Conv1D) else 1


def replace_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a module another tensor as parameter, trainable or frozen as the one before, which is not written to."""
    requires_grad = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=requires_grad))


def _reorder(projection: nn.Module, dim: int, order: np.ndarray) -> None:
    """Reorder equal parts of a projection's features: of its outputs, with the bias, or of its inputs."""
    is_output = dim != input_dim(projection)
    index = torch.from_numpy(order).to(projection.weight.device)
    for name, parameter in list(projection.named_parameters()):
        if name == "weight" or is_output:
            along = dim if name == "weight" else 0
            parts = parameter.detach().unflatten(along, (len(order), -1)).index_select(along, index)
            replace_parameter(projection, name, parts.flatten(along, along + 1))
