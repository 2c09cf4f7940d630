"""
What a model costs to run, counted: operations and bytes, and the speed-up they allow at most. All formulas are here.

For B rows of T new tokens that attend to S tokens (S = T in a prefill, the context in decoding):

- Linear layers, the head included: 2 · B · T operations for each weight.
- Attention: 2 · B · T · S · H · D operations for Q Kᵀ and as many for A · V in each layer. An echo layer that multiplies the
  weights its source has kept has the second alone. One that replays the call has both, as the teacher has. Pairs that the
  mask hides are counted, as PyTorch's own counter does, though good kernels leave them out.
- Backward pass: two products for each one of the forward pass, so training is three times it; one of them is the gradient
  of the weights in a linear layer, which frozen ones do without.
- Decoding reads each weight once, of the input embedding a few rows only, and for each row keys and values of the context:
  both in most layers, values alone in an echo layer with kept weights. An echo layer that replays reads the keys of its
  source again. A layer that uses the keys and values of another reads them all the same. A dynamic cache also copies what
  it holds in each step: it reads and writes all of it to append a token.

Norms, softmax, activations, adapters and the optimizer are not counted. A ceiling is the teacher's cost over the model's, in
the way that the model is computed. It says what the shared weights can give to code that is bound by what is counted, and
is no bound for code that is not: an eager softmax, launching kernels, expanding heads.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..modeling_echoatt import AttentionRecord, EchoAttention, KVAttention
from ..models.families import count_query_features, count_value_features, find_attention_modules, has_experts


__all__ = ["Costs", "count_costs", "is_replayed"]


@dataclass(frozen=True)
class Costs:
    """
    What decides the costs of a dense model. Methods take `replays`: whether echo layers repeat the attention call of their
    source, see [`is_replayed`]; it makes no difference to a model without echo layers.

    Args:
        linear_weights (`int`): weights of linear layers.
        query_features (`int`): features of queries, H · D, summed over the layers that compute attention weights.
        echo_features (`int`): H · D summed over echo layers.
        output_features (`int`): H · D summed over all layers with attention.
        weight_bytes (`int`): bytes of weights that decoding reads.
        kv_bytes (`int`): bytes of keys and values that attention reads for each token of the context, without those that
            echo layers read again when they replay.
        echo_key_bytes (`int`): those.
        cache_bytes (`int`): bytes that a cache holds for each token of the context.
    """

    linear_weights: int
    query_features: int
    echo_features: int
    output_features: int
    weight_bytes: int
    kv_bytes: int
    echo_key_bytes: int
    cache_bytes: int

    def forward_operations(self, rows: int, tokens: int, context: int | None = None, *, replays: bool = False) -> int:
        """
        Operations of a forward pass, a multiplication and an addition counted as two.

        Args:
            rows (`int`): rows, B.
            tokens (`int`): new tokens of each, T.
            context (`int`, *optional*): tokens each attends to, S; T if not given.
        """
        context = tokens if context is None else context
        features = self.query_features + self.output_features + (self.echo_features if replays else 0)
        return 2 * rows * tokens * (self.linear_weights + context * features)

    def training_operations(self, rows: int, tokens: int, *, replays: bool = False, frozen: bool = False) -> int:
        """Operations of a forward and a backward pass, of `rows` rows of `tokens` tokens; of adapters alone if `frozen`."""
        of_weights = 2 * rows * tokens * self.linear_weights if frozen else 0
        return 3 * self.forward_operations(rows, tokens, replays=replays) - of_weights

    def decode_bytes(self, rows: int, context: int, *, replays: bool = False) -> int:
        """Bytes that a step of decoding moves, of `rows` rows with `context` tokens each in a dynamic cache."""
        read = self.kv_bytes + (self.echo_key_bytes if replays else 0)
        return self.weight_bytes + rows * context * (read + 2 * self.cache_bytes)


@torch.no_grad()
def is_replayed(model: PreTrainedModel, tokens: int) -> bool:
    """
    Whether the echo layers of a model, as it stands, repeat the attention call of their source for rows of so many new
    tokens; if not, they multiply the attention weights that it kept. `False` without echo layers.

    Args:
        model (`PreTrainedModel`): a causal language model, in the mode and the attention implementation that count.
        tokens (`int`): 1 as in decoding, or more.
    """
    seen = []

    def remember(module, args, kwargs):
        seen.append(kwargs["echo_records"].get(module.echo_source, args[0].device if args else model.device))

    echoes = [module for module in model.modules() if isinstance(module, EchoAttention)]
    hooks = [echo.register_forward_pre_hook(remember, with_kwargs=True) for echo in echoes]
    try:
        model(input_ids=torch.zeros(1, min(tokens, 2), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return any(isinstance(record, AttentionRecord) for record in seen)


def count_costs(model: PreTrainedModel) -> Costs | None:
    """
    Count what decides the costs of a model.

    Args:
        model (`PreTrainedModel`): a causal language model, a teacher, a student or one of the baselines.

    Returns:
        `Costs`, or `None` for a model with experts or other weights than those of linear layers, of which a token may
        need a part. Attention within a sliding window is counted as if it were full.
    """
    if has_experts(model):
        return None
    linear, counted = 0, set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            linear += module.weight.numel()
            counted.add(id(module.weight))
    weight_bytes = 0
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings - counted:
            continue
        if parameter.ndim > 1 and id(parameter) not in counted:
            return None
        weight_bytes += parameter.numel() * parameter.element_size()
    queries = echoing = read = replayed = cached = 0
    for attention in find_attention_modules(model).values():
        features = count_query_features(attention)
        values, shares = count_value_features(attention), isinstance(attention, KVAttention)
        if isinstance(attention, EchoAttention):
            echoing, read, replayed, cached = echoing + features, read + values, replayed + values, cached + values
        else:
            queries, read, cached = queries + features, read + 2 * values, cached + (0 if shares else 2 * values)
    size = model.dtype.itemsize
    return Costs(
        linear_weights=linear,
        query_features=queries,
        echo_features=echoing,
        output_features=queries + echoing,
        weight_bytes=weight_bytes,
        kv_bytes=read * size,
        echo_key_bytes=replayed * size,
        cache_bytes=cached * size,
    )
