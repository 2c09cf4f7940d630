"""
Memory and time of a training step with a teacher, with the losses in chunks and from all logits at once.

Memory is what a step needs beyond one with all parameters, gradients and hidden states but the logits of one token in a
row: of the process on a CPU (on Linux), of what is allocated on a GPU if there is one. Time is that of the same steps, one
by one in turn.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echoatt_hf import EchoAttForCausalLM, EchoAttTrainer, EchoAttTrainingArguments
from echoatt_hf.benchmark.memory import peak_memory
from echoatt_hf.outputs.files import write_whole
from echoatt_hf.outputs.provenance import describe_environment
from echoatt_hf.outputs.tables import format_markdown


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


def measure_peak(trainer: EchoAttTrainer, tokens: int, how: str) -> int:
    """Bytes at the peak of a step beyond what is held before."""
    step(trainer, tokens, how)  # what libraries load when they are first used
    trainer.model.zero_grad()
    with peak_memory(trainer.model.device) as peak:
        step(trainer, tokens, how)
    if peak.bytes is None:
        raise SystemExit("this system does not tell the peak of a process; use Linux or a GPU")
    return peak.bytes


def measure_seconds(trainer: EchoAttTrainer, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step, by how the loss is computed."""
    seconds = {"whole": [], "chunks": []}
    for _ in range(repeats):
        for how, found in seconds.items():
            start = time.perf_counter()
            step(trainer, tokens, how)
            found.append(time.perf_counter() - start)
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
    args = parser.parse_args()
    lines = [["vocabulary", "all logits (MiB)", "in chunks (MiB)", "ratio", "tokens/s, chunks : all"]]
    results = []
    for vocab_size in args.vocab_sizes:
        trainer = make_trainer(vocab_size, args.divergence)
        peaks = {how: measure_peak(trainer, args.tokens, how) for how in ("states", "whole", "chunks")}
        whole, chunks = (peaks[how] - peaks["states"] for how in ("whole", "chunks"))
        seconds = measure_seconds(trainer, args.tokens, args.repeats)
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
