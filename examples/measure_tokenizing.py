"""
How fast documents become rows, beside the tokenizer alone on the same documents.

    python examples/measure_tokenizing.py TEACHER --data novels --data stories --megabytes 100 --characters 4000

The documents are those of the data, with --characters cut into shorter ones. They are repeated until there is enough text,
each time with other numbers in them, so that none is there twice. The rows are made by `pack_rows`, with nothing of it in the
cache of `datasets`. Each way runs in a process of its own. Memory is what this and the processes that it starts hold at
most, without files that are mapped. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import datasets
import psutil
from datasets import Dataset, Features, Value, load_from_disk
from transformers import AutoTokenizer

from echoatt_hf import load_documents, pack_rows
from echoatt_hf.outputs.files import write_whole
from echoatt_hf.outputs.provenance import describe_environment
from echoatt_hf.outputs.tables import format_markdown


BATCH = 1000
"""Documents that the tokenizer alone is given together, as `datasets.map` does by default."""


def iterate_texts(sources: tuple[str, ...], size: int, characters: int | None) -> Iterator[dict[str, str]]:
    """Texts of so many bytes together."""
    documents = load_documents(sources)
    written = 0
    for copy in count():
        for document in documents:
            # Another number in each copy, as a word of its own.
            text = document["text"].replace(" the ", f" the {copy} ") if copy else document["text"]
            step = characters or len(text)
            for start in range(0, len(text), step):
                piece = text[start : start + step]
                yield {"text": piece}
                written += len(piece.encode())
                if written >= size:
                    return


def make_documents(sources: tuple[str, ...], size: int, characters: int | None, folder: Path) -> int:
    """Write the documents to be mapped into memory, and say how many they are."""
    texts = Dataset.from_generator(
        iterate_texts,
        features=Features({"text": Value("large_string")}),
        gen_kwargs={"sources": sources, "size": size, "characters": characters},
        cache_dir=str(folder / "cache"),
    )
    texts.save_to_disk(str(folder / "documents"))
    shutil.rmtree(folder / "cache")
    return len(texts)


def tokenize_alone(teacher: str, folder: Path) -> int:
    """Tokens of all documents, by the tokenizer and nothing else, on all cores."""
    tokenizer, tokens = AutoTokenizer.from_pretrained(teacher), 0
    for batch in load_from_disk(str(folder / "documents")).iter(BATCH):
        found = tokenizer(batch["text"], return_attention_mask=False, verbose=False)
        tokens += sum(map(len, found["input_ids"]))
    return tokens


def make_rows(teacher: str, folder: Path, row_length: int, processes: int) -> int:
    """Tokens of the rows."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        documents = load_documents(load_from_disk(str(folder / "documents")))
        return len(pack_rows(documents, tokenizer, row_length, num_proc=processes)) * row_length


def held_bytes(process: psutil.Process) -> int:
    """Memory that a process holds, without files that are mapped; what several share counts in parts."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def watch(found: dict) -> None:
    """Keep the peak of what this process and those that it starts hold."""
    process = psutil.Process()
    while True:
        held = sum(map(held_bytes, [process, *process.children(recursive=True)]))
        found["bytes"] = max(found.get("bytes", 0), held)
        time.sleep(0.2)


def measure(queue: multiprocessing.SimpleQueue, call: Callable, arguments: tuple) -> None:
    """Put what a call takes: seconds, those of all processors together, bytes, and the tokens that it makes."""
    found = {}
    threading.Thread(target=watch, args=(found,), daemon=True).start()
    before, start = sum(os.times()[:4]), time.perf_counter()
    found["tokens"] = call(*arguments)
    found["seconds"], found["cpu_seconds"] = time.perf_counter() - start, sum(os.times()[:4]) - before
    queue.put(found)


def measure_apart(call: Callable, *arguments) -> dict:
    """[`measure`] in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(queue, call, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{call.__name__} ended with {process.exitcode}")
    return queue.get()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="folder or repository of the Hub with a tokenizer")
    parser.add_argument("--data", action="append", required=True, help="as of echoatt, may be repeated")
    parser.add_argument("--megabytes", type=float, default=100, help="of text (default %(default)s)")
    parser.add_argument("--characters", type=int, help="cut documents into ones of so many characters")
    parser.add_argument("--row-length", type=int, default=512, help="default %(default)s")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="as --num-proc (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        size = round(options.megabytes * 1e6)
        number = make_documents(tuple(options.data), size, options.characters, folder)
        ways = {"the tokenizer alone": (tokenize_alone, options.teacher, folder)}
        for processes in options.processes:
            ways[f"rows, --num-proc {processes}"] = (make_rows, options.teacher, folder, options.row_length, processes)
        figures = {}
        for way, call in ways.items():
            figures[way] = measure_apart(*call)
            print(f"{way}: {figures[way]}", flush=True)
    alone = figures["the tokenizer alone"]
    lines = [["", "seconds", "x", "processor seconds", "x", "MB/s", "memory (MiB)"]]
    for way, found in figures.items():
        ratios = {name: f"{found[name] / alone[name]:.2f}" for name in ("seconds", "cpu_seconds")}
        times = [f"{found['seconds']:.0f}", ratios["seconds"], f"{found['cpu_seconds']:.0f}", ratios["cpu_seconds"]]
        lines.append([way, *times, f"{size / 1e6 / found['seconds']:.2f}", f"{found['bytes'] / 2**20:,.0f}"])
    print(f"\n{options.megabytes:,g} MB in {number:,} documents, {alone['tokens']:,} tokens\n")
    print(format_markdown(lines))
    if options.output is not None:
        report = {"bytes": size, "documents": number, "figures": figures, "environment": describe_environment()}
        write_whole(options.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
