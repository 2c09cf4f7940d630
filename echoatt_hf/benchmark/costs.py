"""
What a model costs to run, counted: operations and bytes, and the speed-up they allow at most. All formulas are here.

For B rows of T new tokens that attend to S tokens (S = T in a prefill, the context in decoding):

- Linear layers, the head included: 2 · B · T operations for each weight.
- Attention: 2 · B · T · S · H · D operations for Q Kᵀ and as many for A · V in each layer. An echo layer has the second
  alone. Pairs that the mask hides are counted, as PyTorch's own counter does, though good kernels leave them out.
- Backward pass: two products for each one of the forward pass, so training is three times it; one of them is the gradient
  of the weights in a linear layer, which frozen ones do without. The backward of Q Kᵀ, two products for dQ and dK, is
  the source's alone, as the forward is: one sum of dA suffices for a block.
- Decoding reads each weight once, of the input embedding a few rows only, and keys and values of the context: both in
  most layers, values alone in an echo layer. A layer that uses the keys and values of another reads them all the same.

Norms, softmax, activations, adapters, the optimizer and what a cache copies are not counted. A ceiling is the teacher's
cost over the model's. It says what the shared weights can give to code that is bound by what is counted, and is no bound
for code that is not: an eager softmax, launching kernels, expanding heads.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..baselines.kv_sharing import NoProjection
from ..modeling_echoatt import EchoAttention, count_query_features, count_value_features, find_attention_modules


__all__ = ["Costs", "count_costs"]


@dataclass(frozen=True)
class Costs:
    """
    What decides the costs of a dense model.

    Args:
        linear_weights (`int`): weights of linear layers.
        query_features (`int`): features of queries, H · D, summed over the layers that compute attention weights.
        output_features (`int`): H · D summed over all layers with attention.
        weight_bytes (`int`): bytes of weights that decoding reads.
        kv_bytes (`int`): bytes of keys and values that decoding reads for each token of the context.
    """

    linear_weights: int
    query_features: int
    output_features: int
    weight_bytes: int
    kv_bytes: int

    def forward_operations(self, rows: int, tokens: int, context: int | None = None) -> int:
        """
        Operations of a forward pass, a multiplication and an addition counted as two.

        Args:
            rows (`int`): rows, B.
            tokens (`int`): new tokens of each, T.
            context (`int`, *optional*): tokens each attends to, S; T if not given.
        """
        context = tokens if context is None else context
        return 2 * rows * tokens * (self.linear_weights + context * (self.query_features + self.output_features))

    def training_operations(self, rows: int, tokens: int, *, frozen: bool = False) -> int:
        """Operations of a forward and a backward pass, of `rows` rows of `tokens` tokens; of adapters alone if `frozen`."""
        of_weights = 2 * rows * tokens * self.linear_weights if frozen else 0
        return 3 * self.forward_operations(rows, tokens) - of_weights

    def decode_bytes(self, rows: int, context: int) -> int:
        """Bytes that one step of decoding `rows` rows with `context` tokens each reads."""
        return self.weight_bytes + rows * context * self.kv_bytes


def count_costs(model: PreTrainedModel) -> Costs | None:
    """
    Count what decides the costs of a model.

    Args:
        model (`PreTrainedModel`): a causal language model, a teacher, a student or one of the baselines.

    Returns:
        `Costs`, or `None` for a model with experts or other weights than those of linear layers, of which a token may
        need a part. Attention within a sliding window is counted as if it were full.
    """
    linear, counted = 0, set()
    for name, module in model.named_modules():
        if "experts" in name:
            return None
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
    queries = outputs = kv_features = 0
    for attention in find_attention_modules(model).values():
        is_echo = isinstance(attention, EchoAttention)
        outputs += count_query_features(attention)
        queries += 0 if is_echo else count_query_features(attention)
        shares = isinstance(getattr(attention, "v_proj", None), NoProjection)
        values = attention.v_proj.features if shares else count_value_features(attention)
        kv_features += values if is_echo else 2 * values
    return Costs(linear, queries, outputs, weight_bytes, kv_features * model.dtype.itemsize)
