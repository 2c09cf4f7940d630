"""Sharing plans drawn at random."""

import random
from collections.abc import Sequence

from ..planning.sharing import SharingPlan, count_echo_layers, inner_groups


__all__ = ["draw_plan"]


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
