"""How fast a student is, beside its teacher, other small models, and what counting allows at most."""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models.devices import synchronize
from ..models.loading import load_tokenizer
from ..models.sizes import count_kv_bytes_per_token
from ..outputs.provenance import describe_environment, without_paths
from ..settings import BENCHMARK_CHOICES, BenchmarkSettings
from ..text.documents import load_documents
from ..text.rows import pack_rows
from .contenders import EAGER, TEACHER, Contender, describe_contender, make_contenders
from .costs import Costs, count_costs, is_replayed
from .memory import peak_memory
from .shapes import SHAPES
from .steps import DECODED_TOKENS, STEPS


__all__ = ["run_benchmark"]


BOUNDS = {measure: "bytes" if measure == "decode" else "operations" for measure in BENCHMARK_CHOICES["measure"]}


@dataclass(frozen=True)
class Cell:
    """What is measured: `tokens` is the length of rows, and in decoding the context."""

    measure: str
    batch_size: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.measure} {self.batch_size} x {self.tokens}"


def run_benchmark(
    settings: BenchmarkSettings, teacher: str = "TinyLlama-1.1B", student: str = "0.41", *, progress: bool = False
) -> dict:
    """
    Measure a student beside its teacher and the baselines of the settings.

    All are in one process and take turns, each time in another order, and so do training steps of all kinds, so that what
    else the machine does meets all of them; each ratio is the median over rounds of the teacher's time to the model's in
    the same round. Models share one copy of the weights where they have the same. Decoding is timed in steps of four tokens
    with a dynamic cache. It is made anew for each step, and not timed: there is the cache of one model at a time.

    Args:
        settings ([`BenchmarkSettings`]):
            What to measure, and how often.
        teacher (`str`, *optional*, defaults to `"TinyLlama-1.1B"`):
            A named shape, `"builtin"`, a folder, or a repository of the Hub.
        student (`str`, *optional*, defaults to `"0.41"`):
            A folder or repository of a student, source indices such as `"0,1,1,1,4"`, a plan's `.json` file, or the
            sharing ratio of evenly spread blocks.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `dict`: `environment`, `settings`, `models`, `left_out`, why a baseline is not among them, and `cells`, as JSON can
            hold it.

    Raises:
        `ValueError`: a setting is unknown, or the student is none of this teacher's.
        `FileNotFoundError`: a model cannot be loaded.
    """
    cells = _make_cells(settings)
    contenders, left_out = make_contenders(settings, teacher, student)
    costs = {each.name: count_costs(each.model) for each in contenders}
    rounds = settings.warmup + settings.repeats
    results = []
    number = sum(map(len, cells)) * rounds * len(contenders)
    with tqdm(total=number, desc="benchmark", disable=not progress, leave=False) as bar:
        for group in cells:
            bar.set_description(" and ".join(map(str, group)))
            prompt = _make_prompt(settings, teacher, contenders[0].model, group[0])
            results += _measure_together(settings, group, contenders, costs, prompt, bar)
    return {
        "environment": describe_environment(),
        "settings": without_paths({"teacher": teacher, "student": student, **asdict(settings)}),
        "models": {each.name: describe_contender(each) for each in contenders},
        "left_out": left_out,
        "cells": results,
    }


def _make_cells(settings: BenchmarkSettings) -> list[list[Cell]]:
    """What is measured, in groups that are measured together: training steps of all kinds, to be compared."""
    rows = [(settings.rows, length) for length in settings.length]
    decoding = list(itertools.product(settings.batch_size, settings.context))
    steps = [measure for measure in settings.measure if measure not in ("prefill", "decode")]
    groups = [
        [Cell(measure, *size) for measure in measures if measure in settings.measure]
        for measures, sizes in ((["prefill"], rows), (["decode"], decoding), (steps, rows))
        for size in sizes
    ]
    return [group for group in groups if group]


def _make_prompt(settings: BenchmarkSettings, name: str, teacher: PreTrainedModel, cell: Cell) -> torch.Tensor:
    """Token rows `(B, T)`: of the text that was asked for, or random."""
    if settings.prompts is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(teacher.config.vocab_size, (cell.batch_size, cell.tokens), generator=generator)
    else:
        if name in SHAPES:
            raise ValueError(f"prompts are given, but the shape {name!r} has no tokenizer: name a model that has one.")
        rows = pack_rows(load_documents(settings.prompts), load_tokenizer(name, teacher), cell.tokens)
        tokens = torch.tensor([rows[index % len(rows)]["input_ids"] for index in range(cell.batch_size)])
    return tokens.to(teacher.device)


def _measure_together(
    settings: BenchmarkSettings,
    cells: list[Cell],
    contenders: list[Contender],
    costs: dict[str, Costs | None],
    prompt: torch.Tensor,
    bar: tqdm,
) -> list[dict]:
    """What is found for each cell; models and cells take turns."""
    teacher, seconds, memory, errors, steps, replays = contenders[0].model, {}, {}, {}, {}, {}
    turns = [(cell, contender) for cell in cells for contender in contenders]
    for index in range(settings.warmup + settings.repeats):
        first = index % len(turns)
        for cell, contender in turns[first:] + turns[:first]:
            bar.update()
            step, key = None, (cell.measure, contender.name)
            if key in errors:
                continue
            for model in (teacher, contender.model):
                if model.config._attn_implementation != contender.attention:
                    model.set_attn_implementation(contender.attention)
            try:
                if index == 0:
                    _check_memory(settings, cell, contender, teacher)
                    replays[key] = is_replayed(contender.model.eval(), 1 if cell.measure == "decode" else 2)
                step = steps.get(key) or STEPS[cell.measure](settings, contender, teacher, prompt)
                if cell.measure != "decode":  # whose cache goes with it
                    steps[key] = step
                if index == 0:
                    with peak_memory(teacher.device) as peak:
                        step()
                    memory[key] = peak.bytes
                elif index < settings.warmup:
                    step()
                else:
                    seconds.setdefault(key, []).append(_time(step, teacher.device) / _tokens_in_step(cell))
            except (MemoryError, RuntimeError) as error:  # torch's own on a GPU, what its CPU allocator raises
                if not _is_out_of_memory(error):
                    raise
                errors[key] = f"out of memory: {str(error).splitlines()[0]}"
                steps.pop(key, None)
                seconds.pop(key, None)
                contender.model.zero_grad(set_to_none=True)
    teacher.set_attn_implementation(settings.attention)

    def summarize(cell: Cell, name: str) -> dict:
        key = cell.measure, name
        if key in errors:
            return {"error": errors[key]}
        times = seconds[key]
        return {
            "seconds": times,
            "median": float(np.median(times)),
            "memory_bytes": memory[key],
            "echoes": None if not has_echoes[name] else "replay" if replays[key] else "kept weights",
            "ceiling": _ceiling(cell, costs[TEACHER], costs[name], replays[key]),
            "speedup": _ratios(seconds.get((cell.measure, TEACHER)), times),
            "speedup_over_eager": _ratios(seconds.get((cell.measure, EAGER)), times),
            "speedup_over_training": _ratios(seconds.get(("training", name)), times),
        }

    names = [contender.name for contender in contenders]
    has_echoes = {each.name: bool(getattr(each.model.config, "echo_layers", [])) for each in contenders}
    return [
        {**asdict(cell), "bound": BOUNDS[cell.measure], "models": {name: summarize(cell, name) for name in names}}
        for cell in cells
    ]


def _tokens_in_step(cell: Cell) -> int:
    return DECODED_TOKENS if cell.measure == "decode" else 1


def _ratios(others: list[float] | None, times: list[float]) -> dict[str, float] | None:
    """Median and quartiles of how many times faster, round by round."""
    if others is None:
        return None
    low, median, high = np.percentile(np.array(others) / np.array(times), [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def _ceiling(cell: Cell, teacher: Costs | None, model: Costs | None, replays: bool) -> float | None:
    """How many times faster than the teacher what is counted allows the model to be, in the way that it is computed."""
    if teacher is None or model is None:
        return None
    return _cost(cell, teacher, teacher, False) / _cost(cell, teacher, model, replays)


def _cost(cell: Cell, teacher: Costs, model: Costs, replays: bool) -> int:
    """Bytes of a step of decoding, operations of all others."""
    size = cell.batch_size, cell.tokens
    if cell.measure == "decode":
        return model.decode_bytes(*size, replays=replays)
    if cell.measure == "prefill":
        return model.forward_operations(*size, replays=replays)
    asked = teacher.forward_operations(*size) if cell.measure in ("distillation", "adapters") else 0
    return asked + model.training_operations(*size, replays=replays, frozen=cell.measure == "adapters")


def _time(step: Callable[[], None], device: torch.device) -> float:
    """Seconds that a step takes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def available_memory() -> int:
    """Bytes of memory of the machine that are not taken."""
    return psutil.virtual_memory().available


def _check_memory(settings: BenchmarkSettings, cell: Cell, contender: Contender, teacher: PreTrainedModel) -> None:
    """
    Check that a cell will roughly fit: a CPU's memory is given without asking, and a process that then uses too much of it
    is ended.
    """
    if teacher.device.type != "cpu":
        return
    config, item = teacher.config, teacher.dtype.itemsize
    tokens = cell.batch_size * (1 if cell.measure == "decode" else cell.tokens)
    needed = tokens * config.vocab_size * 4 * {"prefill": 1, "decode": 1, "training": 3}.get(cell.measure, 5)
    if cell.measure in ("prefill", "decode"):
        copies = 3 if cell.measure == "decode" else 1  # while the cache grows, and in the warm-up
        needed += copies * cell.batch_size * cell.tokens * count_kv_bytes_per_token(contender.model)
        layers = 1
    else:
        layers = config.num_hidden_layers
        if cell.measure != "adapters":  # gradients and optimizer states
            needed += contender.model.num_parameters() * item * (3 if settings.optimizer == "adamw" else 1)
        needed += tokens * layers * (12 * config.hidden_size + 5 * config.intermediate_size) * item
    if contender.attention == "eager":
        needed += 3 * layers * tokens * cell.tokens * config.num_attention_heads * max(item, 4)
    if needed > available_memory():
        raise MemoryError(f"about {needed / 2**30:.1f} GiB needed, {available_memory() / 2**30:.1f} GiB free")


# Results
