"""
What a stored teacher costs and saves: students distilled from the same rows in the same order, live and from stores.

On the built-in teacher and the sources of the Python standard library, offline, on a CPU:

    python examples/measure_stored_teacher.py

The first table says how good the student is after the same steps. `renormalised` is the other way to treat what is not
in the top k: the teacher's k probabilities are divided by their sum, and the student is pushed to give no other token any
probability. It is not in the package.

The second one says how fast a step of training is, live and from a store, its rows read from the files: medians of steps
that take turns in one process. Storing a token pays when it is used more often than the last column says.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from echoatt_hf import (
    EchoAttTrainer,
    EchoAttTrainingArguments,
    StoredTeacher,
    collate_rows,
    convert,
    evaluate_model,
    write_stored_teacher,
)
from echoatt_hf.analysis.similarity import measure_on_rows
from echoatt_hf.distillation.two_stages import train_two_stages
from echoatt_hf.models.devices import default_device
from echoatt_hf.models.loading import load_model, load_tokenizer
from echoatt_hf.outputs.provenance import describe_environment
from echoatt_hf.outputs.tables import format_markdown
from echoatt_hf.pipeline.preparation import load_rows
from echoatt_hf.planning.from_settings import make_plan
from echoatt_hf.settings import DataSettings, DistillationSettings, PlanSettings
from echoatt_hf.text.documents import STDLIB


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What a stored teacher costs and saves.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", default="builtin", help="'builtin', a folder, or a repository of the Hub")
    add("--data", action="append", help="file, folder or data set; may be repeated; the standard library if not given")
    add("--ratio", type=float, default=0.41, help="sharing ratio of the plan by similarity")
    add("--top-k", type=int, nargs="+", default=[8, 32, 128], help="tokens to keep")
    add("--steps", type=int, default=120, help="steps of distillation")
    add("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    add("--batch-size", type=int, default=8, help="rows in a step")
    add("--row-length", type=int, default=256, help="tokens in a row")
    add("--evaluation-rows", type=int, default=128, help="held-out rows")
    add("--rounds", type=int, default=30, help="timed steps of each kind")
    return parser.parse_args(arguments)


class Renormalised(StoredTeacher):
    """A stored teacher without the mass that is not in the top k."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = super().__getitem__(index)
        row["teacher_logprobs"][:, -1] = np.finfo(np.float16).min
        return row


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Lines of the two tables; stores and checkpoints are made in `folder`."""
    data = DataSettings(
        data=arguments.data or [STDLIB],
        row_length=arguments.row_length,
        evaluation_rows=arguments.evaluation_rows,
    )
    teacher = load_model(arguments.teacher).to(default_device())
    tokenizer = load_tokenizer(arguments.teacher, teacher)
    rows, held_out_rows = load_rows(data, tokenizer, teacher)
    similarity = measure_on_rows(teacher, list(rows.shuffle(seed=0).take(48)), progress=True)
    plan = make_plan(PlanSettings(plan="similarity", ratio=arguments.ratio), teacher.config, similarity)
    rows = list(rows.shuffle(seed=0).take(arguments.steps * arguments.batch_size))

    def write(name: str, rows: list[dict], top_k: int) -> Path:
        write_stored_teacher(folder / name, teacher, tokenizer, rows, top_k=top_k, batch_size=arguments.batch_size)
        return folder / name

    paths = {top_k: write(f"k{top_k}", rows, top_k) for top_k in arguments.top_k}
    kinds = {"live": rows}
    kinds |= {f"top {top_k}": StoredTeacher(path) for top_k, path in paths.items()}
    kinds |= {f"top {top_k}, renormalised": Renormalised(path) for top_k, path in paths.items()}

    quality = [["", "bytes/token", "in the top k", "perplexity", "KL (nats)"]]
    for name, train_rows in kinds.items():
        student, _ = convert(teacher, plan)
        settings = DistillationSettings(
            steps=arguments.steps,
            stage2_steps=0,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
            warmup_steps=min(20, arguments.steps),
        )
        train_two_stages(student, teacher, train_rows, settings, folder / f"checkpoints of {name}")
        result = evaluate_model(student, held_out_rows, teacher=teacher)
        stored = train_rows.manifest if name != "live" else None
        quality.append(
            [
                name,
                f"{stored['bytes_per_token']:,}" if stored else "",
                f"{1 - stored['rest_mass']:.2%}" if stored else "",
                f"{result['perplexity']:.3f}",
                f"{result['kl']:.4f}",
            ]
        )
        print(format_markdown([quality[0], quality[-1]]), flush=True)

    steps = {}
    for name, train_rows in kinds.items():
        if "renormalised" not in name:
            steps[name] = _training_step(convert(teacher, plan)[0], teacher, train_rows, arguments, folder)
    for top_k in arguments.top_k:
        steps[f"store {top_k}"] = _storing_step(write, rows, top_k, arguments)
    seconds = time_in_turns(steps, arguments.rounds)
    # A step here has no optimizer's part, which is the same for all.
    speed = [["", "step (ms)", "tokens/s", "against live", "storing as much (ms)", "pays after"]]
    tokens = arguments.batch_size * arguments.row_length
    for name in [name for name in steps if not name.startswith("store")]:
        line = [name, f"{seconds[name] * 1e3:.0f}", f"{tokens / seconds[name]:,.0f}"]
        if name == "live":
            speed.append([*line, "1.00", "", ""])
            continue
        storing, saved = seconds[name.replace("top", "store")], seconds["live"] - seconds[name]
        pays = f"{storing / saved:.1f} uses" if saved > 0 else "never"
        speed.append([*line, f"{seconds['live'] / seconds[name]:.2f}", f"{storing * 1e3:.0f}", pays])
    return quality, speed


def _training_step(student, teacher, rows, arguments: argparse.Namespace, folder: Path) -> Callable[[], float]:
    """A function that makes one step, from reading its rows to the gradients; the seconds it took."""
    trainer = EchoAttTrainer(
        model=student,
        teacher=None if isinstance(rows, StoredTeacher) else teacher,
        args=EchoAttTrainingArguments(
            str(folder / "timed"),
            per_device_train_batch_size=arguments.batch_size,
            report_to="none",
            use_cpu=default_device() == "cpu",
        ),
        train_dataset=rows,
        data_collator=collate_rows,
    )
    batches = _forever(trainer.get_train_dataloader())

    def step() -> float:
        start = time.perf_counter()
        batch = next(batches)
        trainer.training_step(trainer.model, batch, batch["labels"][:, 1:].numel()).item()
        taken = time.perf_counter() - start
        trainer.model.zero_grad()
        return taken

    return step


def _forever(loader: Iterable[dict]) -> Iterator[dict]:
    while True:
        yield from loader


def _storing_step(write: Callable, rows: list[dict], top_k: int, arguments: argparse.Namespace) -> Callable[[], float]:
    """A function that stores the rows of one step; the seconds it took, a quarter of a store of four times as many."""
    names = (f"timed {top_k} {number}" for number in count())

    def step() -> float:
        name = next(names)
        start = time.perf_counter()
        path = write(name, rows[: 4 * arguments.batch_size], top_k)
        taken = time.perf_counter() - start
        shutil.rmtree(path)
        return taken / 4

    return step


def time_in_turns(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each step, all in turns; the first round, which warms up, does not count."""
    times = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(step())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    arguments = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tables = measure(arguments, Path(folder))
    for table in tables:
        print(f"\n{format_markdown(table, left=0)}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in describe_environment().items() if value))


if __name__ == "__main__":
    main()
