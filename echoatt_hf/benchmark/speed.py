"""How fast a student is, beside its teacher, other small models, and what counting allows at most."""

import copy
import itertools
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..baselines.layer_dropping import drop_layers, share_keys_values
from ..conversion.convert import count_kv_bytes_per_token
from ..distillation.adapters import add_lora
from ..distillation.losses import LogitLosses, TeacherDivergence, TokenLoss, divergence_from_stored, keep_top
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.heads import OutputHead
from ..models.loading import default_device, load_config, load_model, load_tokenizer
from ..outputs.files import format_markdown
from ..pipeline.preparation import make_plan
from ..pipeline.runs import describe_environment, without_paths
from ..settings import BENCHMARK_CHOICES, BenchmarkSettings, PlanSettings
from ..text.documents import load_documents, pack_rows
from .costs import Costs, count_costs
from .memory import peak_memory


__all__ = ["SHAPES", "format_benchmark", "plot_benchmark", "run_benchmark", "write_benchmark"]

# Configurations of known models, as their repositories have them: what decides their speed.
SHAPES = {
    "TinyLlama-1.1B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "SmolLM2-360M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}

TRAINING = "training"
TEACHER, STUDENT, EAGER, DROPPED, SHARING = "teacher", "student", "eager teacher", "layers dropped", "KV sharing"
BOUNDS = {measure: "bytes" if measure == "decode" else "operations" for measure in BENCHMARK_CHOICES["measure"]}
DECODED_TOKENS = 4
ADAPTER_RANK = 16
STORED_TOKENS = 64


@dataclass(frozen=True)
class Contender:
    """A model to measure, and the attention implementation it and its teacher run in."""

    name: str
    model: PreTrainedModel
    attention: str


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
    with a dynamic cache, which goes on growing by them.

    Args:
        settings ([`BenchmarkSettings`]):
            What to measure, and how often.
        teacher (`str`, *optional*, defaults to `"TinyLlama-1.1B"`):
            A named shape, `"builtin"`, a folder, or a repository of the Hub.
        student (`str`, *optional*, defaults to `"0.41"`):
            A folder or repository of a student, source indices such as `"0,1,1,1,4"`, a plan's `.json` file, or the
            sharing ratio of the paper's blocks.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `dict`: `environment`, `settings`, `models` and `cells`, as JSON can hold it.

    Raises:
        `ValueError`: a setting is unknown, or the student is none of this teacher's.
        `FileNotFoundError`: a model cannot be loaded.
    """
    cells = _make_cells(settings)
    contenders = _make_contenders(settings, teacher, student)
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
        "models": {each.name: _describe(each) for each in contenders},
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


# Models


def _make_contenders(settings: BenchmarkSettings, teacher: str, student: str) -> list[Contender]:
    dtype, device = getattr(torch, settings.dtype), default_device()
    if teacher in SHAPES or settings.random_init:
        config = _make_config(settings, teacher)
        plan = _read_plan(student, config)  # what is wrong is said before anything is made
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        if settings.layers is not None:
            raise ValueError("layers is given, which needs a model with random weights: give --random-init too.")
        plan = _read_plan(student, load_config(teacher))
        model = load_model(teacher, dtype)
    model = model.to(device)
    try:
        model.set_attn_implementation(settings.attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"attention is {settings.attention!r}, which this model cannot use here: {reason}") from error
    if plan is None:
        shared = _load_student(student, model, dtype).to(device)
        shared.set_attn_implementation(settings.attention)
    else:
        shared = EchoAttForCausalLM.from_teacher(model, plan, share_weights=True)
    contenders = [Contender(TEACHER, model, settings.attention), Contender(STUDENT, shared, settings.attention)]
    if "eager" in settings.baseline:
        contenders.append(Contender(EAGER, model, "eager"))
    if "layers" in settings.baseline:
        contenders.append(Contender(DROPPED, _drop_as_many(model, shared), settings.attention))
    if "kv" in settings.baseline:
        copied = copy.deepcopy(model, {id(each): each for each in model.parameters()})
        sharing = share_keys_values(copied, shared.config.echo_sources)
        contenders.append(Contender(SHARING, sharing, settings.attention))
    return contenders


def _make_config(settings: BenchmarkSettings, teacher: str) -> PreTrainedConfig:
    known = SHAPES[teacher] if teacher in SHAPES else load_config(teacher).to_dict()
    if settings.layers is not None:
        known = {name: value for name, value in known.items() if name != "layer_types"}
        known["num_hidden_layers"] = settings.layers
    return AutoConfig.for_model(**known)


def _read_plan(student: str, config: PreTrainedConfig) -> list[int] | None:
    """The plan that `student` says, or `None` where it names a model."""
    try:
        settings = PlanSettings(plan="blocks", ratio=float(student))
    except ValueError:
        if not student.endswith(".json") and "," not in student:
            return None
        settings = PlanSettings(plan=student)
    return list(make_plan(settings, config))


def _load_student(student: str, teacher: PreTrainedModel, dtype: torch.dtype) -> EchoAttForCausalLM:
    model = load_model(student, dtype)
    if not isinstance(model, EchoAttForCausalLM):
        raise ValueError(f"{student!r} is a {type(model).__name__}, not a student: give one, or a plan.")
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        values = [getattr(each, name, None) for each in (model.config.text_config, teacher.config)]
        if values[0] != values[1]:
            raise ValueError(
                f"The student {student!r} is none of this teacher's: its {name} is {values[0]!r}, the teacher's "
                f"{values[1]!r}."
            )
    return model


def _drop_as_many(teacher: PreTrainedModel, student: PreTrainedModel) -> PreTrainedModel:
    """The teacher without the fewest of its inner layers, the last ones, that save as many parameters as the student."""
    last = teacher.config.num_hidden_layers - 1
    for count in range(1, last):
        smaller = drop_layers(teacher, range(last - count, last), share_weights=True)
        if smaller.num_parameters() <= student.num_parameters():
            return smaller
    raise ValueError("The inner layers together have fewer parameters than the student saves: leave 'layers' out.")


def _describe(contender: Contender) -> dict:
    parameters = list(contender.model.parameters())
    return {
        "attention": contender.attention,
        "layers": contender.model.config.num_hidden_layers,
        "echo_sources": getattr(contender.model.config, "echo_sources", None),
        "parameters": contender.model.num_parameters(),
        "weight_bytes": sum(each.numel() * each.element_size() for each in parameters),
        "kv_bytes_per_token": count_kv_bytes_per_token(contender.model),
    }


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


# Measuring


def _measure_together(
    settings: BenchmarkSettings,
    cells: list[Cell],
    contenders: list[Contender],
    costs: dict[str, Costs | None],
    prompt: torch.Tensor,
    bar: tqdm,
) -> list[dict]:
    """What is found for each cell; models and cells take turns."""
    teacher, seconds, memory, errors, steps = contenders[0].model, {}, {}, {}, {}
    turns = [(cell, contender) for cell in cells for contender in contenders]
    for index in range(settings.warmup + settings.repeats):
        first = index % len(turns)
        for cell, contender in turns[first:] + turns[:first]:
            bar.update()
            key = cell.measure, contender.name
            if key in errors:
                continue
            for model in (teacher, contender.model):
                if model.config._attn_implementation != contender.attention:
                    model.set_attn_implementation(contender.attention)
            try:
                if index == 0:
                    _check_memory(settings, cell, contender, teacher)
                    steps[key] = _MEASURES[cell.measure](settings, contender, teacher, prompt)
                    with peak_memory(teacher.device) as peak:
                        steps[key]()
                    memory[key] = peak.bytes
                elif index < settings.warmup:
                    steps[key]()
                else:
                    seconds.setdefault(key, []).append(_time(steps[key], teacher.device) / _tokens_in_step(cell))
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
            "ceiling": _ceiling(cell, costs[TEACHER], costs[name]),
            "speedup": _ratios(seconds.get((cell.measure, TEACHER)), times),
            "speedup_over_eager": _ratios(seconds.get((cell.measure, EAGER)), times),
            "speedup_over_training": _ratios(seconds.get((TRAINING, name)), times),
        }

    names = [contender.name for contender in contenders]
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


def _ceiling(cell: Cell, teacher: Costs | None, model: Costs | None) -> float | None:
    if teacher is None or model is None:
        return None
    if cell.measure == "decode":
        return teacher.decode_bytes(cell.batch_size, cell.tokens) / model.decode_bytes(cell.batch_size, cell.tokens)
    before, after = (_operations(cell, teacher, each) for each in (teacher, model))
    return before / after


def _operations(cell: Cell, teacher: Costs, model: Costs) -> int:
    size = cell.batch_size, cell.tokens
    if cell.measure == "prefill":
        return model.forward_operations(*size)
    asked = teacher.forward_operations(*size) if cell.measure in ("distillation", "adapters") else 0
    return asked + model.training_operations(*size, frozen=cell.measure == "adapters")


def _prefill(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A forward pass that fills a cache, with the logits of all tokens."""
    model = contender.model.eval()

    @torch.inference_mode()
    def step():
        model(prompt, past_key_values=DynamicCache(config=model.config), use_cache=True)

    return step


@torch.inference_mode()
def _decode(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A few tokens of each row after a context that is in the cache."""
    model, context = contender.model.eval(), prompt.shape[1]
    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        start = prompt[:1, : min(context, 128)]
        model(start, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            if layer.is_initialized:  # what is in it does not change the speed
                layer.keys, layer.values = (_repeat(each, prompt.shape) for each in (layer.keys, layer.values))
    else:
        model(prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, -1:]

    @torch.inference_mode()
    def step():
        for _ in range(DECODED_TOKENS):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


def _repeat(states: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """States `(1, H, S, D)` repeated to as many rows and tokens as `shape`."""
    rows, tokens = shape
    times = -(-tokens // states.shape[2])
    return states.repeat(rows, 1, times, 1)[:, :, :tokens].contiguous()


def _train(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """Forward, backward and optimizer step on the text alone."""
    return _make_training_step(
        settings, contender.model, lambda model: model(prompt, labels=prompt, use_cache=False).loss
    )


def _distill(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A forward pass of the teacher, and a training step on the KL to it, as [`EchoAttTrainer`] computes it."""
    teacher_head = OutputHead(teacher)

    def ask() -> TokenLoss:
        with torch.no_grad(), teacher_head.last_states() as kept:
            teacher(prompt, use_cache=False, logits_to_keep=1)
        return TeacherDivergence("forward", teacher_head.logits(kept))

    return _make_distillation_step(settings, contender.model, prompt, ask)


def _distill_adapters(
    settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor
):
    """As `_distill`, of adapters beside weights that the models share."""
    weights = {id(each): each for each in contender.model.parameters()}
    adapted = add_lora(copy.deepcopy(contender.model, weights), ADAPTER_RANK)
    return _distill(settings, replace(contender, model=adapted), teacher, prompt)


def _distill_stored(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A training step on the KL to what a stored teacher holds, in memory already."""
    with torch.no_grad():
        logits = teacher(prompt, use_cache=False).logits
        log_probs, ids = keep_top(logits, min(STORED_TOKENS, logits.shape[-1] - 1))
    divergence = divergence_from_stored("forward", ids, log_probs)
    return _make_distillation_step(settings, contender.model, prompt, lambda: divergence)


def _make_distillation_step(
    settings: BenchmarkSettings, model: PreTrainedModel, prompt: torch.Tensor, ask: Callable[[], TokenLoss]
) -> Callable[[], None]:
    head = OutputHead(model)

    def loss(model: PreTrainedModel) -> torch.Tensor:
        losses = LogitLosses({"kl": ask()}, {"kl": 1.0}, prompt, prompt.numel())
        with head.computes(losses, nullcontext):
            return model(prompt, use_cache=False, logits_to_keep=1).loss

    return _make_training_step(settings, model, loss)


_MEASURES = {
    "prefill": _prefill,
    "decode": _decode,
    TRAINING: _train,
    "distillation": _distill,
    "adapters": _distill_adapters,
    "stored": _distill_stored,
}


def _make_training_step(
    settings: BenchmarkSettings, model: PreTrainedModel, loss: Callable[[PreTrainedModel], torch.Tensor]
) -> Callable[[], None]:
    optimizers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    adapters_alone = isinstance(model, PeftModel)
    trained = {id(each): each for name, each in model.named_parameters() if "lora_" in name or not adapters_alone}
    # So small a rate that weights, which the models share, stay what they are.
    optimizer = optimizers[settings.optimizer](trained.values(), lr=1e-12)

    def step():
        model.train()
        for parameter in model.parameters():  # which other models may share
            parameter.requires_grad_(id(parameter) in trained)
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()

    return step


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
    start = time.perf_counter()
    step()
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
    if teacher.device.type == "cuda":
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


def format_benchmark(results: dict) -> str:
    """
    The models and what was measured, as Markdown tables.

    Args:
        results (`dict`): as returned by [`run_benchmark`].

    Returns:
        `str`: two tables. "tokens/s" are those read, in decoding those written; "x teacher" is how many times faster than
        the teacher a model is, with quartiles over rounds, "x eager" than the eager teacher, and "x training" than in
        training; "ceiling" how much faster than the teacher the count of operations or bytes allows it to be; "of it" the
        share of the ceiling that is reached; memory is what a step needs beyond weights and cache.
    """
    models = [_describe_model(name, facts) for name, facts in results["models"].items()]
    lines = [_describe_line(cell, name, found) for cell in results["cells"] for name, found in cell["models"].items()]
    return f"{_format_table(models)}\n\n{_format_table(lines, left=3)}"


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in results["models"] if name != TEACHER]
    cells = results["cells"]
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(cells), 4), layout="constrained")
    axes.axhline(1, color="black", linewidth=0.8, label=TEACHER)
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
    pyplot.close(figure)


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
