"""The figure of an analysis: how like all others each layer is, and each pair of layers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..configuration_echoatt import read_layer_plan
from .ranking import find_kept_layers, mean_similarities


__all__ = ["plot_similarity"]

# Up to so many layers each pair has its number written into it.
MOST_WITH_NUMBERS = 32


def plot_similarity(
    similarity: Sequence[Sequence[float]], path: str | Path, about: str, plan: Iterable[int | str] | None = None
) -> None:
    """
    Write a figure as PNG: above, the mean similarity of each layer to all others, below, the similarity of all pairs.

    The layers that the paper's rule keeps as they are have an open square, see [`find_kept_layers`]; those that echo in the
    plan are red, and their sources in the heat map are framed.

    Args:
        similarity (matrix `(L, L)`):
            Similarity of layers.
        path (`str` or `Path`):
            File to write.
        about (`str`):
            What was measured, for the title.
        plan (`SharingPlan`, *optional*):
            Sharing plan.
    """
    # Not of pyplot, whose backend is that of whoever calls this.
    from matplotlib.figure import Figure

    moves = read_layer_plan(list(plan or []))
    size, pairs = len(similarity), [(layer, source) for layer, (_, source) in enumerate(moves) if source is not None]
    side = min(max(0.36 * size, 5.0), 10.0)  # of the heat map, inches
    figure = Figure(figsize=(side + 1.6, 1.3 * side + 1.4), layout="constrained")
    curve, image = figure.subplots(2, 1, height_ratios=(0.3, 1), sharex=True)
    figure.suptitle("Attention similarity of layers\n" + "\n".join(_wrapped(about)), fontsize=10)
    _draw_means(curve, similarity, [echo for echo, _ in pairs])
    _draw_pairs(image, similarity, pairs, side)
    for axes in (curve, image):
        axes.set_xticks(range(0, size, _tick_step(size)))
    image.set_yticks(range(0, size, _tick_step(size)))
    figure.colorbar(image.images[0], ax=image, shrink=0.8)
    figure.savefig(path, dpi=120)


def _draw_means(axes, similarity: Sequence[Sequence[float]], echoes: list[int]) -> None:
    means, kept = mean_similarities(similarity), find_kept_layers(similarity)
    axes.plot(range(len(means)), means, color="tab:blue", marker="o", markersize=4, zorder=1)
    axes.scatter(
        kept, [means[layer] for layer in kept], s=90, marker="s", facecolors="none", edgecolors="black",
        label="kept as it is by the paper's rule",
    )  # fmt: skip
    if echoes:
        axes.scatter(echoes, [means[layer] for layer in echoes], s=36, color="red", zorder=2, label="echo in the plan")
    axes.set(ylabel="mean similarity\nto all others", ylim=(0, 1))
    axes.tick_params(labelbottom=True)
    axes.grid(alpha=0.3)
    if kept or echoes:
        axes.legend(fontsize=8)


def _draw_pairs(axes, similarity: Sequence[Sequence[float]], pairs: list[tuple[int, int]], side: float) -> None:
    from matplotlib.patches import Rectangle

    size = len(similarity)
    axes.imshow(similarity, vmin=0, vmax=1, cmap="viridis", aspect="equal")
    axes.set(xlabel="layer (red frames: row echoes column)" if pairs else "layer", ylabel="layer")
    if size <= MOST_WITH_NUMBERS:
        for row, values in enumerate(similarity):
            for column, value in enumerate(values):
                color, text = "black" if value > 0.6 else "white", f"{value:.2f}".removeprefix("0")
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=min(7.0, 21 * side / size), color=color
                )
    for echo, source in pairs:
        width = 2 if size <= MOST_WITH_NUMBERS else 1.2
        axes.add_patch(Rectangle((source - 0.5, echo - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=width))


def _tick_step(size: int) -> int:
    return 1 if size <= 32 else 2 if size <= 48 else 5


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    return wrap(text, 62)
