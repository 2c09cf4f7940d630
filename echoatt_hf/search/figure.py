"""The plans that a search has found worth having, as a picture: KL against what is saved."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..configuration_echoatt import read_layer_plan


__all__ = ["plot_frontier"]

_NAMES = {"parameters": "parameters", "kv_bytes_per_token": "KV cache", "decode_bytes": "bytes read for a token"}
_MARKS = {"echo": "o", "kv": "s", "skip attention": "^", "drop": "v"}


def plot_frontier(teacher: dict[str, int], frontier: Sequence[dict], path: Path) -> None:
    """
    Plot KL(teacher || student) of plans against what they save.

    Args:
        teacher, frontier: of [`PlanSearch`].
        path (`Path`): PNG file to write.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(_NAMES), sharey=True), _NAMES.items(), strict=True):
        for point in frontier:
            moves = [move for move, _ in read_layer_plan(point["layer_plan"]) if move != "plain"]
            mark = _MARKS[max({*moves}, key=moves.count)] if moves else "o"  # the move that most layers have
            axes.plot(100 * (1 - point[name] / teacher[name]), point["kl"], mark, color="tab:blue", markersize=4)
        # The least KL at each saving, or more.
        best, least = [], float("inf")
        for point in sorted(frontier, key=lambda point: (point[name], point["kl"])):
            if point["kl"] < least:
                least = point["kl"]
                best.append((100 * (1 - point[name] / teacher[name]), least))
        if best:
            axes.step(*zip(*best, strict=True), where="post", color="tab:orange")
        axes.set_xlabel(f"saved: {label} (%)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("KL to the teacher (nats)")
    figure.suptitle("Plans that were measured, untrained; by most of their layers ○ echo, □ kv, △ skip, ▽ drop")
    figure.savefig(path, format="png", dpi=120)
