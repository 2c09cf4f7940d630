"""The slow reference of a student: its teacher, in which layers reuse the attention weights of others."""

import copy
import sys
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


ORACLE_ATTENTION = "test_oracle"


class SharedWeights:
    """The attention weights of the last forward pass of one oracle, by source layer."""

    def __init__(self, plan: Sequence[int]):
        self.plan = list(plan)
        self.of: dict[int, torch.Tensor] = {}


def make_oracle(teacher: nn.Module, plan: Sequence[int]) -> nn.Module:
    """
    A copy of the teacher whose echo layers multiply the weights their source's eager attention returned with their own
    values. The family's code runs unmodified but for what it calls through the attention interface, so it needs the
    whole input at each pass: `use_cache=False`.
    """
    oracle = copy.deepcopy(teacher)
    oracle.set_attn_implementation(ORACLE_ATTENTION)
    shared = SharedWeights(plan)
    for module in oracle.modules():
        module.shared_weights = shared
    return oracle


def oracle_attention(module, query, key, value, attention_mask, **kwargs):
    shared = module.shared_weights
    source = shared.plan[module.layer_idx]
    if source != module.layer_idx:
        weights = shared.of[source]
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
        return (weights @ value).transpose(1, 2).contiguous(), weights
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, shared.of[source] = eager(module, query, key, value, attention_mask, **kwargs)
    return output, shared.of[source]


AttentionInterface.register(ORACLE_ATTENTION, oracle_attention)
AttentionMaskInterface.register(ORACLE_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
