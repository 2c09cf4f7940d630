"""What a benchmark found: as tables, as JSON and as a picture."""

import json
from pathlib import Path

from ..outputs.tables import format_markdown


__all__ = ["format_benchmark", "plot_benchmark", "write_benchmark"]


def format_benchmark(results: dict) -> str:
    """
    The models and what was measured, as Markdown tables.

    Args:
        results (`dict`): as returned by [`run_benchmark`].

    Returns:
        `str`: two tables, and between them what is left out and why. "tokens/s" are those read, in decoding those written; "x teacher" is how many times faster than
        the teacher a model is, with quartiles over rounds, "x eager" than the eager teacher, and "x training" than in
        training; "echoes" how echo layers are computed, and "ceiling" how much faster than the teacher the count of
        operations or bytes allows the model to be in that way; "of it" the share of the ceiling that is reached; memory is
        what a step needs beyond weights and cache.
    """
    models = [_describe_model(name, facts) for name, facts in results["models"].items()]
    lines = [_describe_line(cell, name, found) for cell in results["cells"] for name, found in cell["models"].items()]
    left_out = [f"{name} is left out: {reason}." for name, reason in results.get("left_out", {}).items()]
    return "\n\n".join([_format_table(models), *left_out, _format_table(lines, left=3)])


def _format_table(lines: list[dict[str, str]], **options) -> str:
    """A table with the columns that are filled in any line, in the order of a line."""
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    return format_markdown([columns, *([line[name] for name in columns] for line in lines)], **options)


def _describe_model(name: str, facts: dict) -> dict[str, str]:
    return {
        "model": name,
        "attention": facts["attention"],
        "layers": str(facts["layers"]),
        "parameters": f"{facts['parameters']:,}",
        "weights": f"{facts['weight_bytes'] / 2**20:,.0f} MiB",
        "KV bytes/token": f"{facts['kv_bytes_per_token']:,}",
    }


def _describe_line(cell: dict, name: str, found: dict) -> dict[str, str]:
    """One result, of which what is not known is empty."""
    median, ratio, ceiling, memory = (found.get(key) for key in ("median", "speedup", "ceiling", "memory_bytes"))
    eager, training = found.get("speedup_over_eager"), found.get("speedup_over_training")
    tokens = cell["batch_size"] * (1 if cell["measure"] == "decode" else cell["tokens"])
    return {
        "measure": cell["measure"],
        "rows": str(cell["batch_size"]),
        "tokens": str(cell["tokens"]),
        "model": name,
        "time": found["error"] if "error" in found else _format_seconds(median),
        "tokens/s": _format_rate(tokens / median) if median else "",
        "x teacher": f"{ratio['median']:.3f}" if ratio else "",
        "quartiles": f"{ratio['low']:.3f} to {ratio['high']:.3f}" if ratio else "",
        "echoes": found.get("echoes") or "",
        "ceiling": f"{ceiling:.3f}" if ceiling else "",
        "of it": f"{ratio['median'] / ceiling:.2f}" if ratio and ceiling else "",
        "bound": cell["bound"] if ceiling else "",
        "x eager": f"{eager['median']:.3f}" if eager else "",
        "x training": f"{training['median']:.3f}" if training else "",
        "memory": f"{memory / 2**20:,.0f} MiB" if memory is not None else "",
    }


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def plot_benchmark(results: dict, path: Path) -> None:
    """
    Plot how many times faster than the teacher each model is, with quartiles, and its ceiling.

    Args:
        results (`dict`): as returned by [`run_benchmark`].
        path (`Path`): PNG file to write.
    """
    # Not of pyplot, whose backend is that of whoever calls this.
    from matplotlib.figure import Figure

    teacher, *names = results["models"]
    cells = results["cells"]
    figure = Figure(figsize=(2 + 1.6 * len(cells), 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=0.8, label=teacher)
    for offset, name in enumerate(names):
        place, color = (offset - (len(names) - 1) / 2) * 0.18, f"C{offset}"
        label, ceiling_label = name, "ceiling" if offset == 0 else None
        for index, cell in enumerate(cells):
            found = cell["models"][name]
            if not found.get("speedup"):
                continue
            ratio = found["speedup"]
            error = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axes.errorbar(index + place, ratio["median"], error, fmt="o", color=color, label=label, capsize=3)
            label = None
            if found["ceiling"] is not None:
                axes.plot(index + place, found["ceiling"], "_", color="black", markersize=14, label=ceiling_label)
                ceiling_label = None
    axes.set_xticks(range(len(cells)), [f"{c['measure']}\n{c['batch_size']} x {c['tokens']}" for c in cells])
    axes.set_ylabel("times faster than the teacher")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def write_benchmark(results: dict, folder: Path) -> None:
    """
    Write the results as `benchmark.json`, `benchmark.md` and `benchmark.png`.

    Args:
        results (`dict`): as returned by [`run_benchmark`].
        folder (`Path`): where to.
    """
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "benchmark.md").write_text(format_benchmark(results) + "\n")
    plot_benchmark(results, folder / "benchmark.png")
