"""How like all others each layer is: the ranking of the EchoAtt paper. Pure Python, no model needed."""

from collections.abc import Sequence
from itertools import takewhile


__all__ = ["find_kept_layers", "mean_similarities", "rank_layers"]


def mean_similarities(similarity: Sequence[Sequence[float]]) -> list[float]:
    """
    The mean similarity of each layer to all others, the curve of the paper's figure 1.

    Args:
        similarity (matrix `(L, L)`): similarity of layers. A layer without attention, such as a recurrent one, has 0 on the
            diagonal and does not count.

    Returns:
        `list[float]`: one per layer, 0 for layers without attention.
    """
    layers = [layer for layer, row in enumerate(similarity) if row[layer] > 0]
    means = [0.0] * len(similarity)
    for layer in layers:
        others = [float(similarity[layer][other]) for other in layers if other != layer]
        means[layer] = sum(others) / max(len(others), 1)
    return means


def rank_layers(similarity: Sequence[Sequence[float]]) -> list[int]:
    """The layers that have attention, those with the largest mean similarity first, see [`mean_similarities`]."""
    means = mean_similarities(similarity)
    layers = [layer for layer, row in enumerate(similarity) if row[layer] > 0]
    return sorted(layers, key=means.__getitem__, reverse=True)


def find_kept_layers(similarity: Sequence[Sequence[float]]) -> list[int]:
    """
    The layers that the paper keeps as they are: those below the largest gap between neighbours in the ranking that are among
    the first or last layers.

    What is not printed is our reading: of the layers below the gap those are kept that are consecutive from either end of
    the model, and not one that is unlike the others in its middle; and the gap is looked for in the lower half of the
    ranking, as what is kept are exceptions.

    Args:
        similarity (matrix `(L, L)`): similarity of layers, as in [`mean_similarities`].

    Returns:
        `list[int]`: in order of layers.

    Source: arXiv 2409.14595, section 3.1.
    """
    means, ranking = mean_similarities(similarity), rank_layers(similarity)
    gaps = {cut: means[ranking[cut - 1]] - means[ranking[cut]] for cut in range(len(ranking) // 2 + 1, len(ranking))}
    cut = max(gaps, key=gaps.__getitem__, default=None)
    if cut is None or gaps[cut] <= 0:
        return []
    below, layers = {*ranking[cut:]}, sorted(ranking)
    first, last = (set(takewhile(below.__contains__, order)) for order in (layers, reversed(layers)))
    return sorted(first | last)
