"""
Peak memory of each command by counting, as a Markdown table; and with --measure what a model of random weights takes.

Counted are weights and what grows with tokens; left out are the libraries, what allocators keep, and norms. All weights are
in bfloat16, the student has evenly spread blocks.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from echoatt_hf import SharingPlan, convert, evaluate_model, measure_attention_similarity
from echoatt_hf.benchmark.memory import peak_memory
from echoatt_hf.benchmark.shapes import SHAPES
from echoatt_hf.models.heads import ACCELERATOR_CHUNKS, CHUNK_BYTES
from echoatt_hf.text.rows import batch_rows


LLAMA_3_1 = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
COUNTED = {
    "1 B": SHAPES["TinyLlama-1.1B"],
    "8 B": LLAMA_3_1
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 B": LLAMA_3_1
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
RATIO, RANK, HALF, FLOAT, DOUBLE = 0.41, 16, 2, 4, 8
H100_OPERATIONS = 0.4 * 989e12


@dataclass(frozen=True)
class Sizes:
    """What memory depends on: of a model, of its student, and of the text."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    queries: int
    keys: int
    is_tied: bool
    sources: int
    echoes: int
    tokens: int
    calibration_rows: int
    chunk: int

    @property
    def weights(self) -> int:
        layer = self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def student(self) -> int:
        return self.weights - self.echoes * self.hidden * (self.queries + self.keys)

    def forward(self, rows: int) -> int:
        """The widest place of a forward pass without gradients: the states, and three tensors within an MLP."""
        return rows * self.tokens * (2 * self.hidden + 3 * self.inner) * HALF

    @property
    def equations(self) -> int:
        """Of a layer: two orders of heads, on tokens to fit on and to judge by."""
        return 4 * self.queries * (self.queries + self.hidden) * DOUBLE


def sizes_of(shape: dict, tokens: int, calibration_rows: int, chunk: int) -> Sizes:
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    size = shape.get("head_dim", shape["hidden_size"] // heads)
    sources = list(SharingPlan.from_ratio(layers, RATIO))
    return Sizes(
        layers=layers,
        hidden=shape["hidden_size"],
        inner=shape["intermediate_size"],
        vocabulary=shape["vocab_size"],
        heads=heads,
        queries=heads * size,
        keys=shape["num_key_value_heads"] * size,
        is_tied=shape["tie_word_embeddings"],
        # Of a layer and later ones; most of them at any layer.
        sources=max(len({source for source in sources[layer:] if source < layer}) for layer in range(layers)),
        echoes=sum(layer != source for layer, source in enumerate(sources)),
        tokens=tokens,
        calibration_rows=calibration_rows,
        chunk=chunk,
    )


def evaluate(one: Sizes) -> int:
    return HALF * (one.weights + one.student) + one.forward(8) + 6 * one.chunk


def analyze(one: Sizes) -> int:
    """Eager attention of 4 rows: scores, their softmax in float32, and what is kept of it; queries and keys of all layers."""
    scores = 4 * one.heads * one.tokens**2 * (HALF + FLOAT + HALF)
    kept = 4 * one.tokens * one.layers * (one.queries + one.keys) * HALF
    return HALF * one.weights + max(scores, one.forward(4)) + kept + (one.layers * one.heads) ** 2 * (FLOAT + DOUBLE)


def convert_(one: Sizes) -> int:
    """
    The states of both models at one layer, and what the student has recorded of the sources of later echoes, for all calibration
    rows, while 8 rows are computed; before and after, the two are compared on what is held out.
    """
    recorded = one.sources * (one.queries + 2 * one.keys)
    kept = one.calibration_rows * one.tokens * (2 * one.hidden + recorded) * HALF
    tuning = kept + one.equations + 3 * DOUBLE * one.queries**2 + one.forward(8)
    return HALF * (one.weights + one.student) + max(tuning, one.forward(8) + 6 * one.chunk)


def search(one: Sizes) -> int:
    """Four tuned sources of each layer, gradients of four samples by each layer, and states and records of 8 rows."""
    tuned = 4 * one.layers * one.hidden * (one.queries + one.keys) * HALF
    gradients = 4 * 8 * one.tokens * one.layers * one.hidden * HALF
    return HALF * one.weights + tuned + gradients + one.equations + one.forward(8)


def store(one: Sizes) -> int:
    return HALF * one.weights + one.forward(8) + 3 * one.chunk


def distill(one: Sizes) -> int:
    """One row in a micro-batch, checkpointed layers: weights, gradients and AdamW in float32, and a gradient of the head."""
    states = one.tokens * one.layers * one.hidden * HALF + 2 * one.forward(1)
    return 16 * one.student + HALF * one.weights + states + FLOAT * one.vocabulary * one.hidden + 8 * one.chunk


def distill_adapters(one: Sizes) -> int:
    width = 4 * one.hidden + 2 * one.queries + 2 * one.keys + 3 * (one.hidden + one.inner)
    states = one.tokens * one.layers * one.hidden * HALF + 2 * one.forward(1)
    return HALF * (one.weights + one.student) + 16 * RANK * one.layers * width + states + 8 * one.chunk


def benchmark(one: Sizes) -> int:
    """Decoding of 8 rows: a cache is copied as it grows, and once more while it is made; models share their weights."""
    return HALF * one.weights + 3 * 8 * one.tokens * 2 * one.layers * one.keys * HALF


COMMANDS: dict[str, tuple[str, Callable[[Sizes], int], Callable[[Sizes], float]]] = {
    "evaluate --teacher": (
        "2(P + S) + W(8) + 6C",
        evaluate,
        lambda one: 128 * one.tokens * 2 * (one.weights + one.student),
    ),
    "store-teacher": ("2P + W(8) + 3C", store, lambda one: 2**30 * 2 * one.weights),
    "analyze": (
        "2P + max(32HT², W(4)) + 8TL(Q + K) + 12(LH)²",
        analyze,
        lambda one: one.calibration_rows * one.tokens * 2 * one.weights,
    ),
    "convert": (
        "2(P + S) + W(8) + max(2NT(2D + Z(Q + 2K)) + 32Q(Q + D) + 24Q², 6C)",
        convert_,
        lambda one: one.calibration_rows * one.tokens * 6 * one.weights,
    ),
    "plan --plan effect": ("2P + 8LD(Q + K) + 64TLD + 32Q(Q + D) + W(8)", search, None),
    "distill --bf16 --gradient-checkpointing": (
        "16S + 2P + 2TLD + 2W(1) + 4VD + 8C",
        distill,
        lambda one: 2**20 * (2 * one.weights + 8 * one.student),
    ),
    "distill --bf16 --gradient-checkpointing --lora-rank 16": (
        "2(P + S) + 16A + 2TLD + 2W(1) + 8C",
        distill_adapters,
        None,
    ),
    "benchmark --measure decode --batch-size 8": ("2P + 96TLK", benchmark, None),
}


def print_counted(tokens: int, calibration_rows: int) -> None:
    counted = [
        sizes_of(shape, tokens, calibration_rows, CHUNK_BYTES * ACCELERATOR_CHUNKS) for shape in COUNTED.values()
    ]
    print(f"| command | bytes | {' | '.join(f'{name} (GiB)' for name in COUNTED)} | seconds |")
    print("|---|---|" + "---:|" * (len(COUNTED) + 1))
    for name, (formula, count, operations) in COMMANDS.items():
        cells = " | ".join(f"{count(one) / 2**30:,.1f}" for one in counted)
        seconds = (
            "" if operations is None else ", ".join(f"{operations(one) / H100_OPERATIONS:,.0f}" for one in counted)
        )
        print(f"| `{name}` | {formula} | {cells} | {seconds} |")


def print_measured(shape: str, tokens: int, calibration_rows: int) -> None:
    torch.manual_seed(0)
    one = sizes_of(SHAPES[shape], tokens, calibration_rows, CHUNK_BYTES)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]), dtype=torch.bfloat16).eval()
    rows = [
        {"input_ids": torch.randint(one.vocabulary, (tokens,)).tolist()} for _ in range(max(8, one.calibration_rows))
    ]
    print("| command | counted beyond the models (MiB) | measured (MiB) |\n|---|---:|---:|", flush=True)

    evaluate_model(teacher, [{"input_ids": [0, 1, 2, 3]}])  # what a first pass loads is not counted

    def show(name: str, counted: int, work: Callable) -> object:
        with peak_memory(teacher.device) as peak:
            result = work()
        print(f"| `{name}` | {counted / 2**20:,.0f} | {(peak.bytes or 0) / 2**20:,.0f} |", flush=True)
        return result

    batches, plan = list(batch_rows(rows[:4], 4)), list(SharingPlan.from_ratio(one.layers, RATIO))
    similarity = show(
        "analyze", analyze(one) - HALF * one.weights, lambda: measure_attention_similarity(teacher, batches)
    )
    counted = convert_(one) - HALF * one.weights  # which makes the student
    student, _ = show(
        "convert",
        counted,
        lambda: convert(teacher, plan, rows[: one.calibration_rows], similarity=similarity),
    )
    counted = evaluate(one) - HALF * (one.weights + one.student)
    show("evaluate --teacher", counted, lambda: evaluate_model(student, rows[:8], teacher=teacher))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--calibration-rows", type=int, default=48)
    parser.add_argument("--measure", choices=list(SHAPES), help="measure a model of this shape in place of counting")
    options = parser.parse_args(arguments)
    if options.measure:
        print_measured(options.measure, options.row_length, options.calibration_rows)
    else:
        print_counted(options.row_length, options.calibration_rows)


if __name__ == "__main__":
    main()
