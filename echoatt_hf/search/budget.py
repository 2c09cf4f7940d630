"""What plans save, counted layer by layer, and what a search is to save."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..configuration_echoatt import read_entry
from ..models.families import count_value_features, find_attention_modules, has_experts
from ..models.layerwise import find_layers
from ..settings import Target


__all__ = ["Budget", "PlanCosts", "PlanCounter", "are_met", "check_targets", "find_limits"]

# Of the keys and values of a layer: how many of the two are in a cache, and how many are read for each new token.
_CACHED = {"plain": 2, "echo": 1, "kv": 0, "skip attention": 0, "drop": 0}
_READ = {"plain": 2, "echo": 1, "kv": 2, "skip attention": 0, "drop": 0}


@dataclass(frozen=True)
class PlanCosts:
    """
    What a student of a plan costs, by counting.

    Args:
        parameters (`int`): number of parameters, tied ones counted once.
        kv_bytes_per_token (`int`): bytes of KV cache for each token, in the dtype of the teacher.
        decode_bytes (`int`): bytes that are read for each new token: weights, and the cache at the context that was asked for,
            within sliding windows too. Of a mixture of experts all are counted, though a token reads a few.
    """

    parameters: int
    kv_bytes_per_token: int
    decode_bytes: int


class PlanCounter:
    """
    Counts the costs of plans of a teacher.

    Args:
        teacher (`PreTrainedModel`): a causal language model.
        count_attention (`Callable`): parameters of the attention of a layer with a move, `count_attention(layer, move)`.
        decode_context (`int`): tokens in the cache, for `decode_bytes`.
    """

    def __init__(self, teacher: PreTrainedModel, count_attention: Callable[[int, str], int], decode_context: int):
        self._count_attention, self._context = count_attention, decode_context
        self._size, self._parameters = teacher.dtype.itemsize, teacher.num_parameters()
        self._layers, attentions = find_layers(teacher), find_attention_modules(teacher)
        self._features = {layer: count_value_features(each) for layer, each in attentions.items()}
        self._attention = {layer: _count(each) for layer, each in attentions.items()}
        # Of embeddings a token reads one row; those that are the head too are read whole.
        embeddings = {module.weight for module in teacher.modules() if isinstance(module, nn.Embedding)}
        self._unread = sum(each.numel() for each in embeddings - {teacher.get_output_embeddings().weight})

    def __call__(self, plan: Sequence[int | str]) -> PlanCosts:
        """The costs of the student of a plan."""
        saved = cached = read = 0
        for layer, entry in enumerate(plan):
            move = read_entry(layer, entry)[0]
            if move == "drop":
                saved += _count(self._layers[layer])
            elif move != "plain":
                saved += self._attention[layer] - self._count_attention(layer, move)
            features = self._features.get(layer, 0)  # hybrids have layers without attention
            cached, read = cached + features * _CACHED[move], read + features * _READ[move]
        parameters = self._parameters - saved
        decode = (parameters - self._unread + read * self._context) * self._size
        return PlanCosts(parameters, cached * self._size, decode)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_targets(teacher: PreTrainedModel, targets: Sequence[Target]) -> None:
    """
    Check that what targets name can be counted.

    Raises:
        `ValueError`: a target is of decoding, and the teacher is a mixture of experts.
    """
    if any(target.field == "decode_bytes" for target in targets) and has_experts(teacher):
        raise ValueError(
            "A target of decoding counts the bytes that are read for a token, but of the experts of this model a token reads a few, "
            "which are not counted: give a target of parameters or of kv-bytes."
        )


def find_limits(teacher: PlanCosts, targets: Sequence[Target]) -> dict[str, int]:
    """What a student may cost at most, by the fields of [`PlanCosts`] that the targets name."""
    return {target.field: int(getattr(teacher, target.field) * target.share) for target in targets}


def are_met(limits: dict[str, int], costs: PlanCosts) -> bool:
    """Whether costs are within limits."""
    return all(getattr(costs, name) <= limit for name, limit in limits.items())


class Budget:
    """
    What a search is to save: a number of echo layers, or shares of what the teacher costs.

    Args:
        counter ([`PlanCounter`]): counts costs.
        teacher ([`PlanCosts`]): of the teacher.
        count (`int`, *optional*): echo layers.
        targets (sequence of [`Target`]): in place of them.
    """

    def __init__(self, counter: PlanCounter, teacher: PlanCosts, count: int | None, targets: Sequence[Target]):
        self._counter, self._count = counter, count
        self.limits = find_limits(teacher, targets)
        self._wanted = {name: getattr(teacher, name) - limit for name, limit in self.limits.items()}

    def left(self, plan: Sequence[int | str]) -> float:
        """What is left to save, in shares of each target, or echo layers; 0 where all is saved."""
        if self._count is not None:
            return self._count - sum(entry != layer for layer, entry in enumerate(plan))
        costs = self._counter(plan)
        return sum(max(0, getattr(costs, name) - limit) / self._wanted[name] for name, limit in self.limits.items())
