"""Tables, curves and the plot of `reproduce_paper.py`, from what it measured."""

import math
from itertools import pairwise
from pathlib import Path

from echoatt_hf.evaluation.continuations import format_repeated, format_side_by_side
from echoatt_hf.outputs.tables import format_markdown


Curve = list[tuple[int, float]]


def make_curve(eval_log: list, untrained: float, trained: float, steps: int, tokens_per_step: int) -> Curve:
    """
    Held-out perplexity against tokens trained on.

    Args:
        eval_log (`list`): steps and losses that were logged on the way.
        untrained, trained (`float`): perplexity before and after, on the same rows.
        steps (`int`): steps of the training.
        tokens_per_step (`int`): tokens in a step.
    """
    between = [(step * tokens_per_step, math.exp(loss)) for step, loss in eval_log if step < steps]
    return [(0, untrained), *between, (steps * tokens_per_step, trained)]


def tokens_to_reach(curve: Curve, perplexity: float) -> float | None:
    """Tokens after which a curve first comes down to a perplexity, on straight lines between its points."""
    if curve[0][1] <= perplexity:
        return 0.0
    for (start, above), (end, below) in pairwise(curve):
        if below <= perplexity:
            return start + (end - start) * (above - perplexity) / (above - below)
    return None


def compare(runs: list[dict], ratio: float) -> dict | None:
    """When `ours` reaches the final perplexity of `paper`, in tokens and as a share of the tokens of `paper`."""
    curves = {run["method"]: run["curve"] for run in runs if run["ratio"] == ratio and "curve" in run}
    if not {"ours", "paper"} <= curves.keys():
        return None
    total, perplexity = curves["paper"][-1]
    tokens = tokens_to_reach(curves["ours"], perplexity)
    share = None if tokens is None else tokens / total
    return {"ratio": ratio, "perplexity": perplexity, "tokens": tokens, "paper_tokens": total, "share": share}


def describe(comparison: dict) -> str:
    """The comparison in a sentence."""
    start = f"Ratio {comparison['ratio']}: `ours`"
    goal = f"the final perplexity of `paper`, {comparison['perplexity']:.3f}"
    if comparison["tokens"] is None:
        return f"{start} does not reach {goal}."
    if comparison["tokens"] == 0:
        return f"{start} has {goal}, or a lower one, before any training."
    tokens, total = comparison["tokens"], comparison["paper_tokens"]
    return f"{start} reaches {goal}, after {tokens:,.0f} tokens, {comparison['share']:.0%} of its {total:,}."


def describe_left_out(left_out: list[dict]) -> list[str]:
    """Which methods could not be had at which ratio, and why, an item of a list for each reason."""
    methods: dict[tuple, list[str]] = {}
    for each in left_out:
        methods.setdefault((each["ratio"], each["reason"]), []).append(f"`{each['method']}`")
    return [f"- Ratio {ratio}, {', '.join(names)}: {reason}" for (ratio, reason), names in methods.items()]


def make_report(results: dict) -> str:
    """The results as Markdown: the tables, and how `ours` compares with `paper`."""
    parts = [f"Teacher {results['teacher']}, text {', '.join(results['data'])}."]
    for name, title in (("main", "Methods"), ("targets", "At equal savings"), ("ablation", "Ablation")):
        runs = [run for run in results["runs"] if run["table"] == name]
        if runs:
            parts += [f"## {title}", _format_table(runs, results["teacher_evaluations"])]
    if found := results["teacher_evaluations"].get("continuations"):
        parts += [
            f"Repeated 4-grams: mean and standard error of {found['prompts']:,} greedy continuations of "
            f"{found['new_tokens']:,} tokens; of the text itself {format_repeated(found, 'text')}."
        ]
    if results["left_out"]:
        parts += ["## Left out", "\n".join(describe_left_out(results["left_out"]))]
    sentences = [describe(comparison) for comparison in results["tokens_to_reach_paper"]]
    if sentences:
        parts += ["## Tokens to reach `paper`", "\n".join(f"- {sentence}" for sentence in sentences)]
        parts += ["Read off the curve of the rows of `--curve-rows`, on straight lines between its points."]
    return "\n\n".join(parts) + "\n"


def _format_table(runs: list[dict], teacher: dict) -> str:
    others = [name for name in teacher if name.startswith(("text ", "task "))]
    header = ["ratio", "method", "steps", "rate", "perplexity", "agreement", "KL (nats)"]
    header += ["repeated 4-grams"] if "continuations" in teacher else []
    header += [name.removeprefix("text ").removeprefix("task ") for name in others]
    lines = [[*header, "parameters", "KV bytes/token"], ["", "teacher", "", "", *_format_evaluations(teacher, others)]]
    for run in runs:
        steps, rate = _format_training(run["distillation"])
        lines.append([str(run["ratio"]), run["method"], steps, rate, *_format_evaluations(run["evaluations"], others)])
    return format_markdown(lines, left=1)


def _format_training(distillation: dict | None) -> tuple[str, str]:
    """Steps and peak learning rate: that of stage 2 where there is no other stage."""
    if distillation is None:
        return "", ""
    on_text = distillation["stage2_steps"] == distillation["steps"]
    rate = distillation["stage2_learning_rate" if on_text else "learning_rate"]
    return f"{distillation['steps']:,}", f"{rate:g}"


def _format_evaluations(evaluations: dict, others: list[str]) -> list[str]:
    held_out = evaluations["held-out"]
    cells = [f"{held_out['perplexity']:.3f}", f"{held_out['agreement']:.1%}", f"{held_out['kl']:.4f}"]
    if "continuations" in evaluations:
        cells.append(format_repeated(evaluations["continuations"]))
    for name in others:
        result = evaluations[name]
        cells.append(f"{result['acc']:.1%}" if "acc" in result else f"{result['perplexity']:.2f}")
    return [*cells, f"{held_out['parameters']:,}", f"{held_out['kv_bytes_per_token']:,}"]


def make_side_by_side(results: dict) -> str:
    """What the text, the teacher and each student go on with, prompt by prompt, as Markdown."""
    of_teacher = results["teacher_evaluations"]["continuations"]["texts"]
    texts = [{name: line[name] for name in ("prompt", "text")} | {"teacher": line["model"]} for line in of_teacher]
    for run in results["runs"]:
        for line, found in zip(texts, run["evaluations"]["continuations"]["texts"], strict=True):
            line[f"{run['ratio']} {run['method']}"] = found["model"]
    return format_side_by_side(texts)


def plot_curves(results: dict, path: Path) -> None:
    """Held-out perplexity against tokens, a panel for each ratio, a curve for each method that was trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    runs = [run for run in results["runs"] if run["table"] == "main" and "curve" in run]
    ratios = list(dict.fromkeys(run["ratio"] for run in runs)) or [None]
    figure, panels = pyplot.subplots(
        1, len(ratios), figsize=(4.5 * len(ratios), 4.5), layout="constrained", sharey=True, squeeze=False
    )
    for axes, ratio in zip(panels[0], ratios, strict=True):
        for run in (run for run in runs if run["ratio"] == ratio):
            tokens, perplexities = zip(*run["curve"], strict=True)
            axes.plot([count / 1e6 for count in tokens], perplexities, label=run["method"], marker=".", markersize=3)
        teacher = results["teacher_evaluations"]["curve"]["perplexity"]
        axes.axhline(teacher, color="black", linestyle="--", label="teacher")
        axes.set(title=f"sharing ratio {ratio}", xlabel="tokens of distillation (millions)", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(1.5, 2, 3, 5)))
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("held-out perplexity")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
