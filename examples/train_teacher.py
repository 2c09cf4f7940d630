"""
Train a small Llama-type teacher from scratch, with a tokenizer of its own.

With no arguments but --output it makes the built-in teacher of `echoatt_hf`, from the sources of the Python standard
library:

    python examples/train_teacher.py --output runs/teacher

A larger one, on any text (a folder, a file, JSON lines, parquet, or a data set of the Hub):

    python examples/train_teacher.py --output runs/novels --data path/to/novels --layers 20 --hidden-size 384 \
        --intermediate-size 1024 --heads 6 --kv-heads 2 --vocab-size 8192 --row-length 1024 --tokens 300e6 --bf16 --compile

Stopped, it goes on where it was with --resume. The output folder is a model folder (safetensors, tokenizer, card,
`results.json`, loss curve) that `AutoModelForCausalLM.from_pretrained` loads.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from echoatt_hf.distillation.checkpoints import train_from_last_checkpoint
from echoatt_hf.evaluation.held_out import evaluate_model
from echoatt_hf.text.documents import STDLIB, load_documents, split_documents
from echoatt_hf.text.rows import collate_rows, pack_rows


END_OF_TEXT = "<|endoftext|>"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--data", action="append", help="file, folder or data set name; may be repeated")
    parser.add_argument("--text-column", default="text", help="column of the text in tables and data sets")
    parser.add_argument("--held-out-fraction", type=float, default=0.05, help="share of documents kept for the test")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=352)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--row-length", type=int, default=256, help="tokens in a training row, and longest context")
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens to train on")
    parser.add_argument("--batch-size", type=int, default=32, help="rows in a step, over all accumulation steps")
    parser.add_argument("--accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile, which needs a C++ compiler")
    parser.add_argument("--save-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser.parse_args()


def train_tokenizer(documents, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((document["text"] for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    transformers.set_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            max_position_embeddings=arguments.row_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(arguments: argparse.Namespace, model: LlamaForCausalLM, rows, checkpoints: Path) -> tuple[int, list[dict]]:
    """Train the model. Returns the steps of the training, and the log of the first one and of every tenth."""
    steps = math.ceil(arguments.tokens / (arguments.batch_size * arguments.row_length))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=arguments.batch_size // arguments.accumulation_steps,
            gradient_accumulation_steps=arguments.accumulation_steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=min(100, steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=arguments.bf16,
            torch_compile=arguments.compile,
            use_cpu=not torch.cuda.is_available(),
            logging_first_step=True,  # a training of a few steps has a curve too
            logging_steps=10,
            save_steps=arguments.save_steps,
            save_total_limit=2,
            seed=arguments.seed,
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=collate_rows,
    )
    train_from_last_checkpoint(trainer)
    return trainer.state.global_step, [entry for entry in trainer.state.log_history if "loss" in entry]


def plot_losses(log: list[dict], tokens_per_step: int, held_out_loss: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    millions = [entry["step"] * tokens_per_step / 1e6 for entry in log]
    axes.plot(millions, [entry["loss"] for entry in log], label="training rows")
    axes.axhline(
        held_out_loss, color="black", linestyle="--", label=f"held-out documents at the end: {held_out_loss:.3f}"
    )
    axes.set(xlabel="tokens trained on (millions)", ylabel="loss (nats per token)", ylim=(None, log[0]["loss"]))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_card(path: Path, results: dict) -> None:
    shape = results["shape"]
    path.write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- echoatt
- teacher
---

# {shape["layers"]}-layer Llama-type teacher, {results["parameters"] / 1e6:.2f} M parameters

A decoder language model trained from scratch, to be the teacher of EchoAtt students. It is small: it exists so that
the whole pipeline runs offline in minutes, not to be useful by itself.

| | |
|---|---|
| layers / hidden size / MLP size | {shape["layers"]} / {shape["hidden_size"]} / {shape["intermediate_size"]} |
| attention heads / KV heads | {shape["heads"]} / {shape["kv_heads"]} |
| vocabulary | {results["vocab_size"]} (byte-level BPE of its own, tied embeddings) |
| data | {results["data"]} |
| documents (training / held out) | {results["documents"]["train"]} / {results["documents"]["held_out"]} |
| tokens trained on | {results["tokens"] / 1e6:.1f} M, of {results["unique_tokens"] / 1e6:.1f} M different ones |
| held-out loss | {results["held_out"]["loss"]:.4f} nats per token, {results["held_out"]["tokens"]} tokens |
| held-out perplexity | {results["held_out"]["perplexity"]:.3f} |
| held-out bits per byte | {results["held_out"]["bits_per_byte"]:.4f} |
| weights stored in | {results["save_dtype"]} |
| trained with | {results["versions"]}, {results["hardware"]} |

Whole documents are held out, by a hash of their names; the figures are over all of them, at the training row length
of {shape["row_length"]} tokens, with the weights as stored.

![loss curve](loss_curve.png)

Made by:

    {results["command"]}
"""
    )


def main() -> None:
    arguments = parse_arguments()
    checkpoints = arguments.output / "checkpoints"
    if (arguments.output / "results.json").exists():
        sys.exit(f"{arguments.output} holds a finished teacher: choose another --output, or remove it first.")
    if checkpoints.exists() and not arguments.resume:
        sys.exit(f"{checkpoints} holds an unfinished run: continue with --resume, or remove it first.")
    documents = load_documents(arguments.data or [STDLIB], text_column=arguments.text_column)
    train_documents, held_out_documents = split_documents(documents, arguments.held_out_fraction)
    if checkpoints.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.output)
    else:
        tokenizer = train_tokenizer(train_documents, arguments.vocab_size)
        tokenizer.save_pretrained(arguments.output)
    rows = pack_rows(train_documents, tokenizer, arguments.row_length)
    held_out_rows = pack_rows(held_out_documents, tokenizer, arguments.row_length)
    model = build_model(arguments, tokenizer)
    print(
        f"{model.num_parameters():,} parameters; {len(rows) * arguments.row_length:,} training tokens in "
        f"{len(train_documents)} documents; {len(held_out_documents)} documents held out",
        flush=True,
    )
    start = time.time()
    steps, log = train(arguments, model, rows, checkpoints)
    model.config.use_cache = True  # which Trainer turns off
    model = model.to("cpu", getattr(torch, arguments.save_dtype))
    model.save_pretrained(arguments.output)
    held_out = evaluate_model(model.float(), held_out_rows, tokenizer=tokenizer, description="evaluate")
    tokens_per_step = arguments.batch_size * arguments.row_length
    results = {
        "command": "python " + shlex.join(["examples/train_teacher.py", *sys.argv[1:]]),
        "data": ", ".join(
            f"Python {platform.python_version()} standard library" if data == STDLIB else Path(data).name
            for data in arguments.data or [STDLIB]
        ),
        "shape": {
            key: getattr(arguments, key)
            for key in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "row_length")
        },
        "vocab_size": len(tokenizer),
        "parameters": model.num_parameters(),
        "documents": {"train": len(train_documents), "held_out": len(held_out_documents)},
        "unique_tokens": len(rows) * arguments.row_length,
        "tokens": steps * tokens_per_step,
        "held_out": held_out,
        "save_dtype": arguments.save_dtype,
        "seed": arguments.seed,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "last_session_s": round(time.time() - start, 1),
        "loss_curve": [[entry["step"] * tokens_per_step, round(entry["loss"], 4)] for entry in log],
    }
    plot_losses(log, tokens_per_step, held_out["loss"], arguments.output / "loss_curve.png")
    write_card(arguments.output / "README.md", results)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"held out: {held_out['perplexity']:.3f} perplexity, {held_out['bits_per_byte']:.4f} bits per byte")


if __name__ == "__main__":
    main()
