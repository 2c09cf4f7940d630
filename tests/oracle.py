"""The slow reference of a student: its teacher, in which layers reuse the attention weights, or keys and values, of others."""

import copy
import sys
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from echoatt_hf.configuration_echoatt import read_layer_plan


ORACLE_ATTENTION = "test_oracle"


class SharedWeights:
    """
    The attention weights of the last forward pass of one oracle, by source layer: what they are, and what eager attention
    says they are, which leaves sinks out in some families. And its keys and values.
    """

    def __init__(self, plan: Sequence[int | str]):
        self.moves = read_layer_plan(list(plan))
        self.keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.of: dict[int, torch.Tensor] = {}
        self.returned: dict[int, torch.Tensor] = {}


def make_oracle(teacher: nn.Module, plan: Sequence[int | str]) -> nn.Module:
    """
    A copy of the teacher whose echo layers multiply the weights of their source's eager attention with their own values, and
    whose kv layers attend to the keys and values of theirs. The family's code runs unmodified but for what it calls through
    the attention interface, so it needs the whole input at each pass: `use_cache=False`.
    """
    oracle = copy.deepcopy(teacher)
    oracle.set_attn_implementation(ORACLE_ATTENTION)
    shared = SharedWeights(plan)
    for module in oracle.modules():
        module.shared_weights = shared
    return oracle


def oracle_attention(module, query, key, value, attention_mask, **kwargs):
    shared = module.shared_weights
    move, source = shared.moves[module.layer_idx]
    if move == "kv":
        key, value = shared.keys_values[source]
    shared.keys_values[module.layer_idx] = key, value
    if move == "echo":
        weights = shared.of[source]
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
        return (weights @ value).transpose(1, 2).contiguous(), shared.returned[source]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    # Values of one position each show the weight it has, sinks and all.
    positions = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    layer = module.layer_idx
    shared.of[layer] = eager(module, query, key, positions, attention_mask, **kwargs)[0].transpose(1, 2)
    output, shared.returned[layer] = eager(module, query, key, value, attention_mask, **kwargs)
    return output, shared.returned[layer]


AttentionInterface.register(ORACLE_ATTENTION, oracle_attention)
AttentionMaskInterface.register(ORACLE_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
