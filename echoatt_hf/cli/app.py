"""The command line: `echoatt compress`, and the steps of the pipeline one by one."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from ..settings import (
    BenchmarkSettings,
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DistillationSettings,
    EvaluationSettings,
    ExportSettings,
    MethodSettings,
    PlanSettings,
    ScoringSettings,
    ServingSettings,
    StoredTeacherSettings,
    StoreSettings,
    StudentSettings,
    ZeroShotSettings,
    default_of,
    name_gguf_file,
)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: echoatt compress builtin --output student. An error is one line; --debug shows where it came from.",
)

# Bad input, files and disks, losses that are not finite, and models that do not fit into memory.
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError)

# What several processes do together, and what says itself how to divide it. All else is the work of one.
DIVIDED_COMMANDS = ("compress", "distill", "evaluate")

Teacher = Annotated[
    str,
    typer.Argument(
        help="'builtin', a folder, a repository of the Hub (owner/name or owner/name@revision), or a .gguf file, also of a "
        "repository: owner/name/file.gguf."
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        help="GGUF file in the folder or repository of the teacher, or of the model where there is no teacher: the same as "
        "its name with /file.gguf."
    ),
]
Output = Annotated[Path, typer.Option(help="What to write.", show_default=False)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of the weights, and of the student that is saved: 'float32', 'bfloat16', 'float16', or 'auto', that of "
        "the checkpoint (bfloat16 of a quantized GGUF file), with which a CPU computes in float32. What is trained is in "
        "float32 meanwhile."
    ),
]
Similarity = Annotated[
    Path | None,
    typer.Option(help="similarity.json of `echoatt analyze`; measured anew where it is needed and not given."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"echoatt_hf {version('echoatt-hf')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """EchoAtt for Hugging Face: smaller, faster students of decoder language models, by sharing attention."""


def with_settings(**groups: type) -> Callable:
    """
    Turn parameters that hold settings into one command-line option per field.

    Args:
        groups: name of a parameter of the command, and the dataclass whose fields become options.
    """

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        parameters = [parameter for name, parameter in signature.parameters.items() if name not in groups]
        for group in groups.values():
            hints = get_type_hints(group)
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default_of(field),
                    annotation=Annotated[hints[field.name], _option(field, hints[field.name], group.panel)],
                )
                for field in fields(group)
            ]

        @functools.wraps(command)
        def run(**values):
            # Methods of others keep nothing to go on from.
            keeps = "resume" in values and values["output"] is not None and values.get("method") is None
            with one_line_errors(can_resume=keeps):
                _quiet_libraries()
                if command.__name__ not in DIVIDED_COMMANDS:
                    _check_one_process(command.__name__)
                for parameter, group in groups.items():
                    values[parameter] = group(**{field.name: values.pop(field.name) for field in fields(group)})
                command(**values)

        run.__signature__ = signature.replace(
            parameters=[parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _check_one_process(name: str) -> None:
    if "WORLD_SIZE" in os.environ:  # else torch need not be imported
        from ..models.devices import check_one_process

        check_one_process(f"`echoatt {name.replace('_', '-')}` is")


def _option(field, kind: type, panel: str):
    name, names = field.name.replace("_", "-"), []
    if kind in (bool, bool | None):
        names = [f"--{name}" if default_of(field) is False else f"--{name}/--no-{name}"]
    return typer.Option(*names, help=field.metadata["help"], rich_help_panel=panel)


@app.command(epilog="Example: echoatt compress builtin --output student")
@with_settings(
    plan=PlanSettings, calibration=CalibrationSettings, data=DataSettings, distillation=DistillationSettings
)
def compress(
    plan: PlanSettings,
    calibration: CalibrationSettings,
    data: DataSettings,
    distillation: DistillationSettings,
    output: Output,
    teacher: Teacher = "builtin",
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Make a student from a teacher: analyze, plan, convert, distill, evaluate."""
    from ..pipeline.steps import compress
    from ..planning.sharing import SharingPlan
    from ..publishing.card import format_table

    settings = CompressionSettings(
        teacher=name_gguf_file(teacher, gguf_file),
        plan=plan,
        calibration=calibration,
        data=data,
        distillation=distillation,
        dtype=dtype,
    )
    report = compress(settings, output, overwrite=overwrite, resume=resume)
    print(f"\n{SharingPlan.from_dict(report['plan'])}")
    for name, kl in report.get("search", {}).get("kl", {}).items():
        print(f"KL of the plan by {name}, untrained: {kl:.4f} nats")
    print(f"\n{format_table(report['results'])}\n\n{_describe_rate(report)}\nwritten to {output}")


def _describe_rate(report: dict) -> str:
    settings = report["settings"]["distillation"]
    return f"The peak learning rate was {settings['learning_rate']:g}; --learning-rate gives another."


@app.command(epilog="Example: echoatt analyze TEACHER --data text.txt --output analysis")
@with_settings(data=DataSettings)
def analyze(
    data: DataSettings,
    output: Output,
    teacher: Teacher = "builtin",
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    calibration_rows: Annotated[int, typer.Option(help="Rows on which similarity is measured.")] = 48,
    calibration_seed: Annotated[int, typer.Option(help="Seed with which these rows are drawn.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure how similarly the layers of a model attend: similarity.json, .safetensors for heads, and a figure, .png."""
    from ..pipeline.steps import analyze

    calibration = CalibrationSettings(calibration_rows=calibration_rows, calibration_seed=calibration_seed)
    teacher = name_gguf_file(teacher, gguf_file)
    settings = CompressionSettings(teacher=teacher, calibration=calibration, data=data, dtype=dtype)
    layers = analyze(settings, output, overwrite=overwrite)["layers"]
    print("layer  most similar earlier layer")
    for layer in range(1, len(layers)):
        best = max(range(layer), key=layers[layer].__getitem__)
        print(f"{layer:5}  {best} ({layers[layer][best]:.3f})")
    print(f"\nwritten to {output}")


@app.command(epilog="Example: echoatt plan TEACHER --data text.txt --ratio 0.3 --output plan.json")
@with_settings(plan=PlanSettings, calibration=CalibrationSettings, data=DataSettings)
def plan(
    plan: PlanSettings,
    calibration: CalibrationSettings,
    data: DataSettings,
    teacher: Teacher = "builtin",
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    similarity: Similarity = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the plan to.")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Choose which layers echo which. Prints the plan as a line of layers and as JSON."""
    from ..pipeline.steps import plan as make_plan
    from ..planning.sharing import SharingPlan
    from ..search.effect import PlanSearch

    teacher = name_gguf_file(teacher, gguf_file)
    settings = CompressionSettings(teacher=teacher, plan=plan, calibration=calibration, data=data, dtype=dtype)
    found = make_plan(settings, output, similarity=similarity, overwrite=overwrite, resume=resume)
    made = SharingPlan.from_dict(found["plan"])
    if "search" in found:
        print(f"{PlanSearch(made, **found['search'])}\n")
    print(made)
    print(made.to_json() if output is None else f"written to {output}\n", end="")


@app.command(epilog="Example: echoatt convert TEACHER --plan plan.json --data text.txt --output converted")
@with_settings(plan=PlanSettings, method=MethodSettings, calibration=CalibrationSettings, data=DataSettings)
def convert(
    plan: PlanSettings,
    method: MethodSettings,
    calibration: CalibrationSettings,
    data: DataSettings,
    output: Output,
    teacher: Teacher = "builtin",
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    similarity: Similarity = None,
    from_student: Annotated[
        str | None,
        typer.Option(
            help="Folder or repository of a distilled student of the teacher: layers of the teacher are put back into it, one "
            "by one, and the one with the ratio is written."
        ),
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Make a student that inherits the teacher's weights, tuned to it but not trained; or a larger one of a distilled one."""
    from ..conversion.convert import ConversionReport
    from ..pipeline.neighbours import convert_by_method
    from ..pipeline.sizes import convert_student
    from ..pipeline.steps import convert
    from ..planning.sharing import SharingPlan
    from ..publishing.card import format_table

    teacher = name_gguf_file(teacher, gguf_file)
    settings = CompressionSettings(teacher=teacher, plan=plan, calibration=calibration, data=data, dtype=dtype)
    if method.method is not None:
        for name, value in (("similarity", similarity), ("from_student", from_student), ("resume", resume or None)):
            if value is not None:
                raise ValueError(f"{name} is given, but the method {method.method!r} has no use for it: leave it out.")
        report = convert_by_method(settings, method, output, overwrite=overwrite)
        print(f"{ConversionReport.from_dict(report)}\n\nwritten to {output}")
        return
    if from_student is not None:
        if similarity is not None:
            raise ValueError("similarity is given, but the student has its plan: leave it out.")
        report = convert_student(settings, from_student, output, overwrite=overwrite, resume=resume)
        print(f"{SharingPlan.from_dict(report['plan'])}\n")
        print(f"{format_table(report['put_back']['sizes'])}\n\nwritten to {output}")
        return
    report = convert(settings, output, similarity=similarity, overwrite=overwrite, resume=resume)
    print(f"{ConversionReport.from_dict(report)}\n\nwritten to {output}")


@app.command(epilog="Example: echoatt store-teacher TEACHER --data text.txt --output store")
@with_settings(data=DataSettings, store=StoredTeacherSettings)
def store_teacher(
    data: DataSettings,
    store: StoredTeacherSettings,
    output: Output,
    teacher: Teacher = "builtin",
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Keep what a teacher says of each token of a text, to distil from without it."""
    from ..pipeline.steps import store_teacher

    settings = StoreSettings(teacher=name_gguf_file(teacher, gguf_file), data=data, store=store, dtype=dtype)
    manifest = store_teacher(settings, output, overwrite=overwrite, resume=resume)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{manifest['tokens']:,} tokens in {manifest['rows']:,} rows and {len(manifest['shards']):,} files")
    print(f"{manifest['bytes_per_token']:,} bytes per token, {size / 2**20:,.1f} MiB")
    print(f"{1 - manifest['rest_mass']:.2%} of the probability is that of the top {manifest['top_k']}")
    print(f"\nwritten to {output}")


@app.command(epilog="Example: echoatt distill converted --teacher TEACHER --data text.txt --output student")
@with_settings(data=DataSettings, distillation=DistillationSettings)
def distill(
    data: DataSettings,
    distillation: DistillationSettings,
    student: Annotated[str, typer.Argument(help="Folder or repository of a converted student.")],
    output: Output,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The model the student was made from; 'builtin' if there is no stored teacher either. With one, it is "
            "only compared with."
        ),
    ] = None,
    stored_teacher: Annotated[
        Path | None, typer.Option(help="Folder of `echoatt store-teacher`, in place of teacher and data.")
    ] = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Distil a student from its teacher in two stages, in one process or under `accelerate launch`."""
    from ..models.devices import processes
    from ..pipeline.steps import distill
    from ..publishing.card import format_table

    stored = str(stored_teacher) if stored_teacher is not None else None
    settings = StudentSettings(student, name_gguf_file(teacher, gguf_file), stored, data, distillation, dtype)
    report = distill(settings, output, overwrite=overwrite, resume=resume)
    if processes().is_main_process:
        print(f"\n{format_table(report['results'])}\n\n{_describe_rate(report)}\nwritten to {output}")


@app.command(epilog="Example: echoatt evaluate student --teacher TEACHER --data text.txt")
@with_settings(data=DataSettings, scoring=ScoringSettings)
def evaluate(
    data: DataSettings,
    scoring: ScoringSettings,
    model: Annotated[str, typer.Argument(help="Folder or repository of a student or any causal language model.")],
    teacher: Annotated[str | None, typer.Option(help="Model to compare with: agreement and KL.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a forward pass.")] = 8,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the results to.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Evaluate a model on held-out text: perplexity, agreement with its teacher, and how it goes on by itself; also on answers."""
    from ..evaluation.continuations import format_continuations
    from ..evaluation.held_out import format_positions
    from ..models.devices import processes
    from ..pipeline.steps import evaluate

    if teacher is None:
        model = name_gguf_file(model, gguf_file)
    else:
        teacher = name_gguf_file(teacher, gguf_file)
    settings = EvaluationSettings(model, teacher, data, batch_size, dtype, scoring)
    results = evaluate(settings, output, overwrite=overwrite)
    if not processes().is_main_process:
        return
    positions, continuations = results.pop("by_position", None), results.pop("continuations", None)
    for name, value in results.items():
        print(f"{name:17} {value:,}" if isinstance(value, int) else f"{name:17} {value:.5f}")
    if positions is not None:
        print(f"\n{format_positions(positions)}\n")
    if continuations is not None:
        print(f"\n{format_continuations(continuations)}\n")
    if output is not None:
        print(f"written to {output}")


@app.command(epilog="Example: echoatt zero-shot student --task piqa=piqa.jsonl --output student/zero_shot.json")
@with_settings()
def zero_shot(
    model: Annotated[str, typer.Argument(help="Folder or repository of a student or any causal language model.")],
    task: Annotated[
        list[str],
        typer.Option(
            help="NAME=FILE of JSON lines, or NAME=FOLDER of such files, whose mean is taken. May be repeated.",
            show_default=False,
        ),
    ],
    limit: Annotated[int | None, typer.Option(help="Questions to take of each file, the first ones.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a forward pass.")] = 16,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the results to.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Evaluate a model on multiple choice, last words and minimal pairs, by the rules of lm-evaluation-harness."""
    from ..evaluation.zero_shot import format_zero_shot
    from ..pipeline.steps import zero_shot

    model = name_gguf_file(model, gguf_file)
    settings = ZeroShotSettings(model, _parse_tasks(task), limit, batch_size, dtype)
    results = zero_shot(settings, output, overwrite=overwrite)
    print(format_zero_shot(results))
    if output is not None:
        print(f"\nwritten to {output}")


@app.command(epilog="Example: echoatt benchmark TEACHER student --preset decode")
@with_settings(settings=BenchmarkSettings)
def benchmark(
    settings: BenchmarkSettings,
    teacher: Annotated[
        str,
        typer.Argument(
            help="'builtin', a folder, a repository of the Hub, a .gguf file, or, with random weights, TinyLlama-1.1B, "
            "SmolLM2-135M, SmolLM2-360M, Qwen2.5-0.5B or Llama-3.2-1B."
        ),
    ] = "TinyLlama-1.1B",
    student_or_plan: Annotated[
        str,
        typer.Argument(
            help="A student, source indices such as 0,1,1,1,4, a plan's .json file, or the ratio of evenly spread blocks."
        ),
    ] = "0.41",
    gguf_file: GgufFile = None,
    output: Annotated[Path | None, typer.Option(help="Folder for benchmark.json, .md and .png.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the speed and memory of a student beside its teacher, and beside what counting allows at most."""
    from ..benchmark.report import format_benchmark, write_benchmark
    from ..benchmark.speed import run_benchmark
    from ..outputs.files import check_output_folder, whole_folder

    if output is not None:
        check_output_folder(output, overwrite)
    teacher = name_gguf_file(teacher, gguf_file)
    results = run_benchmark(settings, teacher, student_or_plan, progress=True)
    print(format_benchmark(results))
    if output is not None:
        with whole_folder(output, overwrite) as folder:
            write_benchmark(results, folder)
        print(f"\nwritten to {output}")


def _parse_tasks(arguments: list[str]) -> dict[str, str]:
    tasks = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not name or not path:
            raise ValueError(f"--task is {argument!r}; give NAME=FILE or NAME=FOLDER, such as piqa=piqa.jsonl.")
        if name in tasks:
            raise ValueError(f"--task names {name!r} twice: give each file or folder a name of its own.")
        tasks[name] = path
    return tasks


@app.command(epilog="Example: echoatt export student --to mlx --output student-mlx")
@with_settings()
def export(
    student: Annotated[str, typer.Argument(help="Folder or repository of a student.")],
    output: Output,
    to: Annotated[
        str,
        typer.Option(help="'mlx': for mlx_lm, with the model file that it runs; of llama, mistral, qwen2 and qwen3."),
    ] = "mlx",
    overwrite: Overwrite = False,
) -> None:
    """Write a student in the form that another runtime loads."""
    from ..pipeline.steps import export

    print("\n".join(export(ExportSettings(student, to), output, overwrite=overwrite)))
    print(f'\nwritten to {output}; to run it: mlx_lm.generate --model {output} --trust-remote-code --prompt "..."')


@app.command(epilog="Example: echoatt push student OWNER/NAME --dry-run")
@with_settings()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a student, as `echoatt compress` writes it.", metavar="DIR")
    ],
    repository: Annotated[str, typer.Argument(help="Repository of the Hub, with its owner.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence, by the Hub's name; if not given, that of the card or of the teacher.")
    ] = None,
    commit_message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload EchoAtt student",
    mlx: Annotated[
        bool, typer.Option("--mlx", help="Send the model file of mlx_lm too, as `echoatt export --to mlx` adds it.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE:TEXT that a check of the texts finds, to be sent all the same; * stands for anything. May be repeated.",
            metavar="PATTERN",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and list what would be sent.")] = False,
) -> None:
    """Publish a student on the Hub, in one commit, after checks of all that is sent."""
    from ..publishing.push import push_student

    print(
        push_student(
            folder,
            repository,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            license=license,
            commit_message=commit_message,
            mlx=mlx,
            allow=allow or (),
            dry_run=dry_run,
        )
    )


@app.command(epilog="Example: echoatt serve student --port 8000")
@with_settings(settings=ServingSettings)
def serve(
    settings: ServingSettings,
    model: Annotated[
        str,
        typer.Argument(help="'builtin', a folder or a repository of the Hub: a student or any causal language model."),
    ],
) -> None:
    """Serve a model over HTTP, with the interface of OpenAI: completions and chat. Remote code is not run."""
    from ..serving.server import check_server, serve

    name = check_server(model, settings)
    print(f"{model} at http://{settings.host}:{settings.port}/v1, as the model {name!r}", flush=True)
    serve(name, settings)


@app.command()
def env() -> None:
    """Print versions and hardware, to paste into an issue."""
    from ..outputs.provenance import describe_environment

    described = describe_environment()
    described |= {name: version(name) for name in ("accelerate", "datasets", "evaluate", "huggingface-hub", "peft")}
    for name, value in described.items():
        print(f"- {name}: {value or 'unknown'}")


@contextmanager
def one_line_errors(can_resume: bool) -> Iterator[None]:
    """End with one line and exit code 2 for what the user can put right, 1 for a bug; with `--debug` a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on" if can_resume else ""
        print(f"\nechoatt: stopped{hint}", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message, is_misuse = " ".join(str(error).split()), isinstance(error, EXPECTED_ERRORS)
        if not is_misuse and _is_memory_error(error):
            message, is_misuse = f"There is not enough memory ({message}): give fewer or shorter rows.", True
        if not is_misuse:
            message = f"{type(error).__name__}: {message} (this is a bug: run again with --debug, and report it)"
        print(f"echoatt: error: {message}", file=sys.stderr)
        raise typer.Exit(2 if is_misuse else 1) from None


def _is_memory_error(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from ..models.devices import is_memory_error

    return is_memory_error(error)


def main() -> None:
    """Run the command line."""
    app(args=[argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="echoatt")


def _quiet_libraries() -> None:
    """Progress bars of loading and saving single files, and informational logs, say nothing a user of this acts on."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_warning()
