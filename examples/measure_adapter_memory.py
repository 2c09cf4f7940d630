"""
How much memory a teacher, a student and the training of the student take, with adapters and without.

On a random model of the Llama family: the most memory that the process held (on Linux; on a GPU: that PyTorch allocated)
beyond what it held before there was a model. Rows of text are short, so that it is weights, gradients and states of the
optimizer that count.

    python examples/measure_adapter_memory.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from echoatt_hf import (
    EchoAttTrainer,
    EchoAttTrainingArguments,
    SharingPlan,
    add_lora,
    collate_rows,
    convert,
    load_model,
    merge_lora,
    share_weights,
)
from echoatt_hf.benchmark.memory import peak_memory
from echoatt_hf.models.devices import default_device
from echoatt_hf.outputs.tables import format_markdown


MIB = 2**20
WAYS = {
    "all weights": "convert(teacher, plan), all weights trained",
    "adapters": "convert(teacher, plan, share_weights=True), adapters trained",
    "adapters, merged": "the same, then merge_lora",
    "loaded apart": "both loaded from their folders, adapters trained",
    "loaded, shared": "both loaded from their folders, share_weights(student, teacher), adapters trained",
}


def make_config(layers: int, hidden_size: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_attention_heads=max(hidden_size // 64, 1),
        vocab_size=8192,
        tie_word_embeddings=True,
    )


def train(way: str, folder: Path, rank: int) -> None:
    """Load or convert, and train for two steps."""
    teacher = load_model(str(folder / "teacher")).to(default_device())
    if way.startswith("loaded"):
        student = load_model(str(folder / "student"))
        if way == "loaded, shared":
            share_weights(student, teacher)
        student = student.to(default_device())
    else:
        plan = SharingPlan.from_ratio(teacher.config.num_hidden_layers, 0.41)
        student, _ = convert(teacher, plan, share_weights=way != "all weights")
    model = student if way == "all weights" else add_lora(student, rank)
    rows = Dataset.from_list([{"input_ids": list(range(16))}] * 4)
    args = EchoAttTrainingArguments(
        str(folder / "run"),
        stage1_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=default_device() == "cpu",
    )
    EchoAttTrainer(model=model, teacher=teacher, args=args, train_dataset=rows, data_collator=collate_rows).train()
    if way == "adapters, merged":
        merge_lora(model)


def measure(way: str, folder: Path, rank: int) -> int:
    train(way, folder / "small", rank)  # what libraries load when they are first used
    with peak_memory(torch.device(default_device())) as peak:
        train(way, folder / "large", rank)
    if peak.bytes is None:
        raise SystemExit("this system does not tell the peak of a process; use Linux or a GPU")
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--layers", type=int, default=12, help="layers of the teacher")
    parser.add_argument("--hidden-size", type=int, default=768, help="hidden size of the teacher")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    arguments = parser.parse_args()
    lines = [["", "peak (MiB)", "of the teacher"]]
    with tempfile.TemporaryDirectory() as name:
        for size, layers, hidden_size in (("small", 6, 64), ("large", arguments.layers, arguments.hidden_size)):
            folder = Path(name) / size
            teacher = LlamaForCausalLM(make_config(layers, hidden_size))
            teacher.save_pretrained(folder / "teacher")
            convert(teacher, SharingPlan.from_ratio(layers, 0.41))[0].save_pretrained(folder / "student")
        weights = sum(parameter.nbytes for parameter in teacher.parameters())
        del teacher
        for way, description in WAYS.items():
            peak = measure(way, Path(name), arguments.rank)
            lines.append([description, f"{peak / MIB:,.0f}", f"{peak / weights:.2f} x"])
    print(f"teacher: {weights / MIB:,.0f} MiB\n\n{format_markdown(lines)}")


if __name__ == "__main__":
    main()
