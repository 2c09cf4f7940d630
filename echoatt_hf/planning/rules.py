"""From a similarity matrix to a sharing plan."""

import math
from collections.abc import Sequence

from .sharing import SharingPlan, check_block_size, count_echo_layers, inner_groups


__all__ = ["plan_from_similarity"]


def plan_from_similarity(
    similarity: Sequence[Sequence[float]],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    protected_layers: int = 1,
    layer_types: Sequence[str] | None = None,
    block_size: int | None = None,
) -> SharingPlan:
    """
    The plan of consecutive blocks whose echoes are most similar to their sources.

    At a ratio, the sum over echo layers of the similarity to their source is as large as any plan of consecutive
    blocks with that many echo layers has it. At a threshold, the number of echo layers is open: every echo is at
    least that similar to its source, and the sum of what exceeds the threshold is as large as possible. Found by
    dynamic programming over the layers, in O(layers² x echo layers) steps.

    Args:
        similarity (matrix `(L, L)`):
            Similarity of layers, such as [`AttentionSimilarity.layers`].
        ratio (`float`, *optional*):
            Sharing ratio, echo layers / layers.
        threshold (`float`, *optional*):
            Least similarity of an echo to its source. Exactly one of `ratio` and `threshold` is needed.
        protected_layers (`int`, *optional*, defaults to 1):
            Layers kept plain at either end.
        layer_types (sequence of `str`, *optional*):
            Attention type of each layer. In families that mix them, blocks are consecutive among those of one type.
        block_size (`int`, *optional*):
            Most layers in a block, its source included.

    Returns:
        [`SharingPlan`]

    Raises:
        `ValueError`: both or none of ratio and threshold are given, the ratio is impossible for the depth, or no pair
            of layers reaches the threshold.
    """
    if (ratio is None) == (threshold is None):
        raise ValueError("Give either a ratio or a threshold.")
    check_block_size(block_size)
    num_layers = len(similarity)
    groups = inner_groups(num_layers, protected_layers, layer_types)
    capacity = sum(_capacity(len(group), block_size) for group in groups)
    offset = 0.0 if threshold is None else threshold
    # best[e]: largest total and its blocks with e echo layers in the groups seen so far.
    best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
    for group in groups:
        options = _best_blocks(group, similarity, offset, threshold is not None, block_size)
        merged: dict[int, tuple[float, list[list[int]]]] = {}
        for done, (total, blocks) in best.items():
            for more, (gain, added) in options.items():
                candidate = (total + gain, blocks + added)
                if done + more not in merged or candidate[0] > merged[done + more][0]:
                    merged[done + more] = candidate
        best = merged
    if ratio is not None:
        chosen = best[count_echo_layers(num_layers, ratio, capacity)][1]
    else:
        # Of equal totals the one with more echo layers: a layer exactly at the threshold adds nothing, but may echo.
        chosen = max(best.items(), key=lambda item: (item[1][0], item[0]))[1][1]
        if not chosen:
            pairs = [
                similarity[echo][source] for group in groups for source, echo in zip(group, group[1:], strict=False)
            ]
            closest = (
                f"the most similar pair has {max(pairs):.3f}. Lower the threshold" if pairs else "no two can share"
            )
            raise ValueError(
                f"No layer is at least {threshold} similar to the layer of its type before it; {closest}."
            )
    sources = list(range(num_layers))
    for block in chosen:
        for layer in block:
            sources[layer] = block[0]
    return SharingPlan(sources, layer_types)


def _capacity(layers: int, block_size: int | None) -> int:
    """Most echo layers in a group of layers."""
    return layers - math.ceil(layers / min(block_size or layers, layers))


def _best_blocks(
    group: list[int],
    similarity: Sequence[Sequence[float]],
    offset: float,
    only_positive: bool,
    block_size: int | None,
) -> dict[int, tuple[float, list[list[int]]]]:
    """For each possible number of echo layers in `group`: the largest total gain and the blocks that give it."""
    # tails[i]: the same for the layers group[i:].
    tails: list[dict[int, tuple[float, list[list[int]]]]] = [{} for _ in group] + [{0: (0.0, [])}]
    for start in reversed(range(len(group))):
        here = dict(tails[start + 1])  # group[start] stays plain
        gain = 0.0
        for end in range(start + 1, min(len(group), start + (block_size or len(group)))):
            step = float(similarity[group[end]][group[start]]) - offset
            if only_positive and step < 0:
                break
            gain += step
            for count, (total, blocks) in tails[end + 1].items():
                echoes = count + end - start
                if echoes not in here or gain + total > here[echoes][0]:
                    here[echoes] = (gain + total, [group[start : end + 1], *blocks])
        tails[start] = here
    return tails[0]
