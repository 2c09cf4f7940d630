"""
A student as a program of its own, for runtimes that take graphs: exported, run, and compared with the student.

    pip install onnx onnxscript onnxruntime executorch     # what is missing is left out, and so is AOTInductor without g++
    python examples/export.py student --output exported

It prints a row for each program: how far its logits are from the student's, on other inputs than it was traced with.
"""

import argparse
import importlib
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from echoatt_hf import load_model


PROGRAMS = ("torch.export", "AOTInductor", "ONNX", "ONNX, any length", "ONNX with cache", "ExecuTorch with cache")
NEEDED = {"ONNX": ("onnx", "onnxscript", "onnxruntime"), "ExecuTorch": ("executorch",)}
CONTEXT = 32  # tokens that the cache of a program for ExecuTorch has room for


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder or repository of a student")
    parser.add_argument("--output", type=Path, required=True, help="folder for the programs, made if it is not there")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="all that can be made, if not given")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    model = load_model(options.student, dtype=torch.float32).eval()
    print("| program | largest difference of logits | MiB |")
    print("|---|---:|---:|")
    for name in options.program or PROGRAMS:
        reason = find_reason_against(name)
        if reason is not None:
            print(f"| {name} | left out: {reason} | |")
            continue
        difference = max(export_and_compare(name, model, options.output))
        size = sum(file.stat().st_size for file in files_of(name, options.output))
        print(f"| {name} | {difference:.2g} | {size / 2**20:,.1f} |")


def find_reason_against(name: str) -> str | None:
    """What a program cannot be made without, and is not there."""
    if find_spec("transformers.exporters") is None:
        return "transformers has no exporters, a later one has"
    if name == "AOTInductor" and shutil.which("g++") is None:
        return "there is no compiler g++"
    missing = [package for package in NEEDED.get(name.split()[0].strip(","), ()) if find_spec(package) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def export_and_compare(name: str, model: PreTrainedModel, output: Path) -> Iterator[float]:
    """Make a program in `output` and yield the largest difference of its logits, for one call after the other."""
    traced = make_inputs(model, 2, 12)
    lengths = (12,) if name == "ONNX" else (12, 31)  # the one of fixed shapes takes its own
    if name == "ONNX with cache":
        export("Onnx", name, model, make_inputs(model, 2, 4, past=9), output, any_length=True)
        run = load_exported(name, output)
        for past in (5, 20):
            yield compare(model, run, lambda past=past: make_inputs(model, 2, 4, past))
        return
    if name == "ExecuTorch with cache":
        yield export_for_executorch(model, output / file_of(name))
        return
    if name == "AOTInductor":
        program = export("Dynamo", name, model, traced, output, any_length=True)
        run = compile_ahead(program, output / file_of(name))
    else:
        kind = "Dynamo" if name == "torch.export" else "Onnx"
        export(kind, name, model, traced, output, any_length=len(lengths) > 1)
        run = load_exported(name, output)
    for length in lengths:
        yield compare(model, run, lambda length=length: make_inputs(model, 2, length))


def make_inputs(model: PreTrainedModel, rows: int, length: int, past: int = 0) -> dict:
    """Random tokens; with `past`, as many of them before, which a cache holds."""
    tokens = torch.randint(
        3, model.config.vocab_size, (rows, past + length), generator=torch.manual_seed(past + length)
    )
    inputs = {"input_ids": tokens[:, past:], "attention_mask": torch.ones_like(tokens), "use_cache": past > 0}
    if past:
        inputs["past_key_values"] = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=tokens[:, :past], past_key_values=inputs["past_key_values"])
    return inputs


def export(kind: str, name: str, model: PreTrainedModel, inputs: dict, output: Path, any_length: bool):
    """Export by transformers, of fixed shapes or for any number of rows and tokens."""
    exporters = importlib.import_module("transformers.exporters")
    exporter, config = (getattr(exporters, f"{kind}{part}") for part in ("Exporter", "Config"))
    exported = exporter().export(model, inputs, config=config(dynamic=any_length))
    if name != "AOTInductor":
        exported.save_pretrained(output / file_of(name))
    return exported.program


def load_exported(name: str, output: Path) -> Callable:
    from transformers.exporters.base import ExportedModel

    return ExportedModel.from_pretrained(output / file_of(name))


def export_for_executorch(model: PreTrainedModel, path: Path) -> float:
    """A program that takes token by token, with a static cache in it, by XNNPACK. Returns the largest difference of logits."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from transformers.integrations.executorch import convert_and_export_with_cache

    tokens, before = make_inputs(model, 1, 12)["input_ids"], model.generation_config
    size = {"batch_size": 1, "max_cache_len": CONTEXT}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=size)
    try:
        exported = convert_and_export_with_cache(model)
    finally:
        model.generation_config = before
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    forward = Runtime.get().load_program(path).load_method("forward")
    steps = [[tokens[:, at : at + 1].contiguous(), torch.tensor([at])] for at in range(tokens.shape[1])]
    found = torch.cat([forward.execute(step)[0].clone() for step in steps], dim=1)
    with torch.no_grad():
        return (found - model(tokens, use_cache=False).logits).abs().max().item()


def compile_ahead(program, path: Path) -> Callable:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def compare(model: PreTrainedModel, run: Callable, make: Callable) -> float:
    with torch.no_grad():
        expected = model(**make()).logits
        inputs = make()
        found = run(**{name: value for name, value in inputs.items() if name != "use_cache"})
    logits = found["logits"] if "logits" in found else found[0]
    return (logits - expected).abs().max().item()


def file_of(name: str) -> str:
    ending = {"AOTInductor": ".pt2", "ExecuTorch with cache": ".pte"}.get(name, "")
    return name.lower().replace(",", "").replace(" ", "-") + ending


def files_of(name: str, output: Path) -> list[Path]:
    made = output / file_of(name)
    return [made] if made.is_file() else [file for file in made.rglob("*") if file.is_file()]


if __name__ == "__main__":
    main()
