"""
Memory and time of a training step with a teacher, with the losses in chunks and from all logits at once.

Memory is what a step needs beyond one with all parameters, gradients and hidden states but the logits of one token in a
row: the peak of the process on a CPU, each step in one of its own, and of what is allocated on a GPU, if there is one.
Time is that of the same steps, one by one in turn in one process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echoatt_hf import EchoAttForCausalLM, EchoAttTrainer, EchoAttTrainingArguments
from echoatt_hf.outputs import format_markdown, write_whole
from echoatt_hf.runs import describe_environment


VOCAB_SIZES = [32_000, 151_936]
ROWS = 4


def make_trainer(vocab_size: int, divergence: str) -> EchoAttTrainer:
    """A trainer of a small student whose vocabulary is that of a large one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    teacher = LlamaForCausalLM(config)
    args = EchoAttTrainingArguments(
        tempfile.mkdtemp(), stage1_steps=1, divergence=divergence, ce_weight=0.1, report_to="none"
    )
    return EchoAttTrainer(model=EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3]), teacher=teacher, args=args)


def step(trainer: EchoAttTrainer, tokens: int, how: str) -> None:
    """Forward and backward pass of `tokens` tokens, with gradients of every parameter."""
    model = trainer.model.train()
    batch = torch.randint(model.config.vocab_size, (ROWS, tokens // ROWS), device=model.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if how == "states":
        with torch.no_grad():
            expected = trainer.teacher(batch, logits_to_keep=1).logits
        loss = (model(batch, logits_to_keep=1).logits - expected).square().mean()
    else:
        loss = trainer.compute_loss(model, {"input_ids": batch, "labels": batch}, return_outputs=how == "whole")
        loss = loss[0] if how == "whole" else loss
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_peak(vocab_size: int, divergence: str, tokens: int, how: str) -> int:
    """Bytes at the peak of a step, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", how, "--vocab-sizes", str(vocab_size)]
    command += ["--divergence", divergence, "--tokens", str(tokens)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout.split()[-1])


def print_peak(vocab_size: int, divergence: str, tokens: int, how: str) -> None:
    trainer = make_trainer(vocab_size, divergence)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step(trainer, tokens, how)
        print(torch.cuda.max_memory_allocated())
        return
    step(trainer, tokens, how)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def measure_seconds(vocab_size: int, divergence: str, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step, by how the loss is computed."""
    trainer = make_trainer(vocab_size, divergence)
    seconds = {"whole": [], "chunks": []}
    for number in range(repeats + 1):  # the first one warms up
        for how, found in seconds.items():
            start = time.perf_counter()
            step(trainer, tokens, how)
            found.extend([time.perf_counter() - start] if number else [])
    return {how: statistics.median(found) for how, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=VOCAB_SIZES)
    parser.add_argument("--divergence", default="forward", help="as of EchoAttTrainingArguments")
    parser.add_argument("--tokens", type=int, default=2048, help=f"in a step, of {ROWS} rows (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="steps to take the median time of (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--peak-of", choices=["states", "whole", "chunks"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args.vocab_sizes[0], args.divergence, args.tokens, args.peak_of)
        return
    lines = [["vocabulary", "all logits (MiB)", "in chunks (MiB)", "ratio", "tokens/s, chunks : all"]]
    results = []
    for vocab_size in args.vocab_sizes:
        case = (vocab_size, args.divergence, args.tokens)
        peaks = {how: measure_peak(*case, how) for how in ("states", "whole", "chunks")}
        whole, chunks = (peaks[how] - peaks["states"] for how in ("whole", "chunks"))
        seconds = measure_seconds(*case, args.repeats)
        speed = seconds["whole"] / seconds["chunks"]
        results.append({"vocab_size": vocab_size, "peak_bytes": peaks, "seconds": seconds})
        mib = [f"{extra / 2**20:,.0f}" for extra in (whole, chunks)]
        lines.append([f"{vocab_size:,}", *mib, f"{chunks / whole:.2f}", f"{speed:.2f}"])
    print(format_markdown(lines))
    if args.output is not None:
        report = {"tokens": args.tokens, "divergence": args.divergence, "results": results}
        write_whole(args.output, json.dumps(report | {"environment": describe_environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
