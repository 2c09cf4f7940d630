"""
The steps of the pipeline: analyze, plan, convert, distill, evaluate; and all of them, up to a student that is ready to
publish. Each takes settings and where to write, and returns what it found as JSON can hold it.
"""

import json
import logging
import shlex
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..conversion.alignment import get_parameters, replace_parameter
from ..conversion.convert import ConversionReport
from ..conversion.tuning import find_tuned
from ..distillation.adapters import share_weights
from ..distillation.served_teacher import ServedTeacher
from ..distillation.stored_teacher import StoredTeacher, write_stored_teacher
from ..distillation.two_stages import make_training_arguments
from ..evaluation.continuations import evaluate_continuations, format_side_by_side
from ..evaluation.held_out import evaluate_model
from ..evaluation.zero_shot import evaluate_zero_shot, read_zero_shot_tasks
from ..modeling_echoatt import EchoAttForCausalLM
from ..models.checks import check_same_tokenizer
from ..models.devices import check_one_process, processes
from ..models.loading import load_config, load_folder, load_placed, load_tokenizer, load_typed
from ..outputs.files import beside, check_output_file, check_output_folder, whole_folder, write_whole
from ..outputs.provenance import (
    describe_conversion,
    describe_data,
    describe_teacher,
    without_paths,
)
from ..planning.sharing import SharingPlan
from ..publishing.card import write_model_card
from ..publishing.mlx import add_mlx_file, check_mlx
from ..publishing.push import stage_student
from ..settings import (
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DistillationSettings,
    EvaluationSettings,
    ExportSettings,
    PlanSettings,
    StoreSettings,
    StudentSettings,
    ZeroShotSettings,
    options_of,
    read_settings,
)
from ..text.rows import shuffle_rows
from .preparation import (
    check_calibration,
    check_plan,
    choose_plan,
    convert_teacher,
    convert_tuned,
    load_calibration_rows,
    load_held_out_rows,
    load_prompts,
    load_rows,
    plan_teacher,
)
from .training import RunModels, check_losses, check_one_gpu, fill_in_rate, load_rows_once, train_and_write
from .unfinished import resumable_search, unfinished_run


__all__ = [
    "analyze",
    "compress",
    "convert",
    "distill",
    "evaluate",
    "export",
    "plan",
    "store_teacher",
    "zero_shot",
]


logger = logging.getLogger(__name__)


def analyze(settings: CompressionSettings, output: str | Path, *, overwrite: bool = False) -> dict:
    """
    Measure how similarly the layers of a teacher attend, and write `similarity.json`, `similarity.safetensors` for the
    heads, and the figure `similarity.png`.

    Args:
        settings ([`CompressionSettings`]):
            Which teacher, which text, and on how many rows; the plan and the distillation do not matter.
        output (`str` or `Path`):
            Folder to write.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace an output that is there.

    Returns:
        `dict`: the content of `similarity.json`.
    """
    check_output_folder(Path(output), overwrite)
    model, _ = load_placed(settings.teacher, settings.dtype)
    rows = load_calibration_rows(settings, load_tokenizer(settings.teacher, model), model)
    similarity = measure_on_rows(model, rows, progress=True)
    with whole_folder(Path(output), overwrite) as folder:
        similarity.save(folder / "similarity.json")
        similarity.plot(folder / "similarity.png")
    return similarity.to_dict()


def plan(
    settings: CompressionSettings,
    output: str | Path | None = None,
    *,
    similarity: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict:
    """
    Choose the sharing plan that [`compress`] would choose. Until it is done, what a search has measured is kept in the
    folder `<output>.partial`.

    Args:
        settings ([`CompressionSettings`]):
            What to make; the distillation does not matter.
        output (`str` or `Path`, *optional*):
            JSON file to write the plan to. Beside it, what a search has found: all plans worth to have, with `.search.json` in
            place of its suffix `.json`, from which another target takes another one, and a plot of them, `.search.png`.
        similarity (`Path`, *optional*):
            `similarity.json` of the teacher, measured anew if it is needed and not given.
        overwrite, resume:
            See [`compress`].

    Returns:
        `dict`: `plan`, the content of the file, and `search`, of [`PlanSearch`], if there was a search.
    """
    output = Path(output) if output is not None else None
    check_output_file(output, overwrite)
    with resumable_search(settings, output, overwrite, resume, _check_search_files) as state:
        made, search = plan_teacher(settings, similarity, state)
        # Within, as what was measured goes when the block ends; and the plan last, as it says that all is there.
        if output is not None:
            if search is not None:
                found, figure = _search_files(output)
                write_whole(found, json.dumps(search.to_dict(), indent=2) + "\n")
                search.plot(figure)
            write_whole(output, made.to_json())
    return {"plan": made.to_dict()} | ({"search": search.to_dict()} if search is not None else {})


def _search_files(output: Path) -> tuple[Path, Path]:
    """What a search writes beside a plan."""
    return beside(output, ".search.json"), beside(output, ".search.png")


def _check_search_files(output: Path, overwrite: bool) -> None:
    for file in (output, *_search_files(output)):
        check_output_file(file, overwrite)


def convert(
    settings: CompressionSettings,
    output: str | Path,
    *,
    similarity: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict:
    """
    Write the student that [`compress`] would distil, with its tokenizer, `sharing_plan.json`, `conversion.json`
    and a model card.

    Args:
        settings ([`CompressionSettings`]):
            What to make; the distillation does not matter.
        output (`str` or `Path`):
            Folder for the student.
        similarity (`Path`, *optional*):
            See [`plan`].
        overwrite, resume:
            See [`compress`]. What a search has measured is kept in the folder `<output>.partial` until the student is written.

    Returns:
        `dict`: the content of `conversion.json`, of a [`ConversionReport`].
    """
    check_output_folder(Path(output), overwrite)
    with resumable_search(settings, Path(output), overwrite, resume, check_output_folder) as state:
        student, report, tokenizer = convert_teacher(settings, similarity, state)
        more = {"sharing_plan.json": SharingPlan(report.layer_plan).to_json()}
        write_converted(output, student, tokenizer, report, more, overwrite)
    return report.to_dict()


def write_converted(
    output: str | Path,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: ConversionReport,
    more: dict[str, str],
    overwrite: bool,
) -> None:
    """Write a student that is not trained: its tokenizer, `conversion.json`, the files of `more` and a model card with it."""
    with whole_folder(Path(output), overwrite) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, text in {"conversion.json": json.dumps(report.to_dict(), indent=2) + "\n", **more}.items():
            write_whole(folder / name, text)
        write_model_card(folder, name=Path(output).resolve().name)


def evaluate(settings: EvaluationSettings, output: str | Path | None = None, *, overwrite: bool = False) -> dict:
    """
    Evaluate a model on held-out text, see [`evaluate_model`] and [`evaluate_continuations`].

    Args:
        settings ([`EvaluationSettings`]):
            Which model, which text, and which teacher to compare with.
        output (`str` or `Path`, *optional*):
            JSON file to write. Beside it, with continuations, the first of them to be read, with `.continuations.md` in place
            of its suffix `.json`.
        overwrite:
            See [`compress`].

    Returns:
        `dict`: what [`evaluate_model`] returns, and as `continuations` what [`evaluate_continuations`] returns.
    """
    output, scoring = Path(output) if output is not None else None, settings.scoring
    side_by_side = beside(output, ".continuations.md") if output is not None and scoring.continuations else None
    for file in (output, side_by_side):
        check_output_file(file, overwrite)
    model, _ = load_placed(settings.model, settings.dtype)
    tokenizer = load_tokenizer(settings.model, model)
    rows = load_held_out_rows(settings.data, tokenizer, model, scoring)
    prompts = load_prompts(settings, tokenizer, model) if scoring.continuations else []
    teacher = load_placed(settings.teacher, settings.dtype)[0] if settings.teacher is not None else None
    results = evaluate_model(
        model,
        rows,
        teacher=teacher,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        position_buckets=scoring.position_buckets,
        description="evaluate" if processes().is_main_process else None,
        among_processes=True,
    )
    if prompts:
        results["continuations"] = evaluate_continuations(
            model,
            prompts,
            tokenizer,
            teacher=teacher,
            prompt_tokens=scoring.prompt_tokens,
            new_tokens=scoring.new_tokens,
            batch_size=settings.batch_size,
            description="continue" if processes().is_main_process else None,
            among_processes=True,
        )
    if output is not None and processes().is_main_process:
        if side_by_side is not None:
            write_whole(side_by_side, format_side_by_side(results["continuations"]["texts"][:SIDE_BY_SIDE]))
        about = {"model": settings.model, "teacher": settings.teacher, "scoring": asdict(scoring)}
        write_whole(output, json.dumps(about | results, indent=2) + "\n")
    return results


SIDE_BY_SIDE = 20
"""How many continuations are written to be read, the first ones."""

EXPORTERS = {"mlx": (check_mlx, add_mlx_file)}
"""How students are exported: a check of their configuration, and what is added to their folder."""


def export(settings: ExportSettings, output: str | Path, *, overwrite: bool = False) -> list[str]:
    """
    Write a student in the form that a runtime with model code of its own loads: a copy of its folder with what that
    runtime needs. It is still the student that transformers loads, and can be published with [`push_student`].

    Args:
        settings ([`ExportSettings`]):
            Which student, and for which runtime.
        output (`str` or `Path`):
            Folder to write.
        overwrite:
            See [`compress`].

    Returns:
        `list[str]`: names of the files, sorted.

    Raises:
        `ValueError`: it is no student, or the runtime cannot run it; the message says why.
    """
    output = Path(output)
    check, add = EXPORTERS[settings.to]
    check_output_folder(output, overwrite)
    check(load_config(settings.student))  # before the weights are fetched
    folder = load_folder(settings.student)
    with whole_folder(output, overwrite) as made, tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        stage_student(folder, staged)
        add(staged)
        write_model_card(staged, name=output.resolve().name)
        shutil.copytree(staged, made, dirs_exist_ok=True)
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


def zero_shot(settings: ZeroShotSettings, output: str | Path | None = None, *, overwrite: bool = False) -> dict:
    """
    Evaluate a model on questions, see [`evaluate_zero_shot`].

    Args:
        settings ([`ZeroShotSettings`]):
            Which model, and which files.
        output (`str` or `Path`, *optional*):
            JSON file to write.
        overwrite:
            See [`compress`].

    Returns:
        `dict`: what [`evaluate_zero_shot`] returns.
    """
    output = Path(output) if output is not None else None
    check_output_file(output, overwrite)
    read_zero_shot_tasks(settings.tasks, settings.limit)  # what is wrong in a file is said before a model is loaded
    model, _ = load_placed(settings.model, settings.dtype)
    tokenizer = load_tokenizer(settings.model, model)
    results = evaluate_zero_shot(
        model, tokenizer, settings.tasks, batch_size=settings.batch_size, limit=settings.limit, progress=True
    )
    if output is not None:
        measured = without_paths({"model": settings.model, "limit": settings.limit, "results": results})
        write_whole(output, json.dumps(measured, indent=2) + "\n")
    return results


def compress(
    settings: CompressionSettings, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> dict:
    """
    Make a student from a teacher: the whole pipeline, in one process.

    Until it is done, everything is kept in the folder `<output>.partial`; then the student takes the place of
    `output` at once. A run that was stopped goes on from there with `resume`.

    Args:
        settings ([`CompressionSettings`]):
            What to make.
        output (`str` or `Path`):
            Folder for the student: model, tokenizer, model card, `report.json`, `sharing_plan.json`,
            `similarity.json`, without the heads, and the figure `similarity.png`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace an output folder that is not empty, and an unfinished run.
        resume (`bool`, *optional*, defaults to `False`):
            Go on with an unfinished run.

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        `FileExistsError`: the output folder is not empty, or holds an unfinished run, and neither `overwrite` nor
            `resume` is given.
        `ValueError`: a setting is out of range or does not fit the teacher, several processes were launched, or several
            GPUs are visible.
        `DistillationInterrupted`: Ctrl-C; the run can be resumed.
    """
    two_commands = f"in place of `compress` run: {_describe_two_commands(settings, output)}"
    check_one_process("planning and conversion are", two_commands)
    check_output_folder(Path(output), overwrite or resume)
    settings = fill_in_rate(settings, settings.teacher, Path(output), resume)
    with unfinished_run(Path(output), settings, overwrite, resume) as work:
        # Whatever can be wrong is said before anything is measured.
        arguments = make_training_arguments(settings.distillation, work / "checkpoints")
        check_one_gpu(arguments, two_commands)
        made = check_plan(settings.plan, load_config(settings.teacher))
        if made is not None:
            check_losses(settings.distillation, made)
        teacher, dtype = load_placed(settings.teacher, settings.dtype)
        tokenizer = load_tokenizer(settings.teacher, teacher)
        train_rows, held_out_rows = load_rows(settings.data, tokenizer, teacher)
        rows = load_calibration_rows(settings, tokenizer, teacher)
        check_calibration(settings, rows)
        similarity_file = work / "similarity.json"
        if not similarity_file.exists():
            measure_on_rows(teacher, rows, progress=True).save(similarity_file)
        similarity = AttentionSimilarity.from_json(similarity_file)
        student, facts = _convert_once(work, settings, teacher, rows, similarity)
        plan = SharingPlan(facts["conversion"]["layer_plan"])
        models = RunModels(teacher, student, tokenizer, dtype)
        report = train_and_write(work, models, train_rows, held_out_rows, settings, facts)
        write_whole(work / "student" / "similarity.json", similarity.to_json())
        similarity.plot(work / "student" / "similarity.png", plan)
    return report


def _describe_two_commands(settings: CompressionSettings, output: str | Path) -> str:
    """The commands that make, step by step, what `compress` makes."""
    data = options_of(DataSettings, asdict(settings.data))
    dtype = ["--dtype", settings.dtype] if settings.dtype != "auto" else []
    start = options_of(PlanSettings, asdict(settings.plan)) + options_of(
        CalibrationSettings, asdict(settings.calibration)
    )
    training = options_of(DistillationSettings, asdict(settings.distillation))
    converted, teacher = f"{output}-converted", settings.teacher
    first = ["echoatt", "convert", teacher, *start, *data, *dtype, "--output", converted]
    second = ["accelerate", "launch", "-m", "echoatt_hf.cli", "distill", converted, "--teacher", teacher]
    return (
        f"`{shlex.join(first)}` and then `{shlex.join([*second, *training, *data, *dtype, '--output', str(output)])}`"
    )


def _convert_once(
    work: Path,
    settings: CompressionSettings,
    teacher: PreTrainedModel,
    rows: list[dict],
    similarity: AttentionSimilarity,
) -> tuple[EchoAttForCausalLM, dict]:
    """
    The converted student and the facts for the report. What was chosen and tuned is kept in `work`, so that a resumed run
    need not do it again.
    """
    facts_file, tuned_file = work / "conversion.json", work / "tuned.safetensors"
    share_weights = settings.distillation.lora_rank > 0
    if facts_file.exists():
        facts = json.loads(facts_file.read_text())
        plan = SharingPlan(facts["conversion"]["layer_plan"])
        student = EchoAttForCausalLM.from_teacher(teacher, plan, share_weights)
        tuned = load_file(tuned_file, device=str(teacher.device))
        for key, module in find_tuned(student, plan).items():
            for name in get_parameters(module):
                path, _, leaf = name.rpartition(".")
                replace_parameter(module.get_submodule(path), leaf, tuned[f"{key}.{name}"])
        return student, facts
    plan, search = choose_plan(
        settings.plan, settings.calibration, teacher, rows, similarity, work / "measured.json", progress=True
    )
    student, conversion = convert_tuned(teacher, plan, rows, similarity, settings.calibration, share_weights)
    facts = {"search": search.to_dict()} if search is not None else {}
    facts["conversion"] = conversion.to_dict()
    tuned = {
        f"{key}.{name}": parameter.detach().contiguous()
        for key, module in find_tuned(student, plan).items()
        for name, parameter in get_parameters(module).items()
    }
    save_file(tuned, tuned_file)
    write_whole(facts_file, json.dumps(facts))  # the last, as it says that all is there
    return student, facts


def store_teacher(
    settings: StoreSettings, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> dict:
    """
    Keep what a teacher says of a text, for distillation without it, see [`write_stored_teacher`].

    Args:
        settings ([`StoreSettings`]):
            Which teacher, which text, and what to keep.
        output, overwrite, resume:
            See [`compress`].

    Returns:
        `dict`: the manifest of the store.

    Raises:
        `ValueError`: a setting is out of range, a finished part of a resumed run is corrupt, or several processes were
            launched; or a server does not give what a store needs, see [`ServedTeacher`].
        `OSError`: there is no such teacher, or a server does not answer.
    """
    check_one_process("storing a teacher is")
    with unfinished_run(Path(output), settings, overwrite, resume, result="store") as work:
        store = settings.store
        if store.server is None:
            teacher, _ = load_placed(settings.teacher, settings.dtype)
        else:
            teacher = ServedTeacher(store.server, settings.teacher, store.server_model)
            teacher.check_length(settings.data.row_length)
        tokenizer = load_tokenizer(settings.teacher, teacher)
        rows, held_out_rows = load_rows(settings.data, tokenizer, teacher)
        rows = shuffle_rows(rows, store.seed, settings.data.shuffle_buffer)
        if store.rows is not None:
            rows = rows.take(store.rows)
        return write_stored_teacher(
            work / "store",
            teacher,
            tokenizer,
            rows,
            held_out_rows,
            top_k=store.top_k,
            shard_rows=store.shard_rows,
            batch_size=store.batch_size,
            about={
                "teacher": describe_teacher(teacher),
                "text": describe_data(settings.data),
                "data": without_paths(asdict(settings.data)),
            },
            progress=True,
        )


def distill(settings: StudentSettings, output: str | Path, *, overwrite: bool = False, resume: bool = False) -> dict:
    """
    Distil a student that is there, and write the result as [`compress`] does. In one process, or in each of several that
    `accelerate launch` started: they share the rows of a step and of an evaluation, and the main one reads the text, checks
    a stored teacher, and writes.

    Args:
        settings ([`StudentSettings`]):
            Which student, which teacher, live or stored, which text, and the training.
        output, overwrite, resume:
            See [`compress`].

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        `ValueError`: the student is not an EchoAtt model, or does not fit the teacher, see [`check_same_tokenizer`].
        `DistillationInterrupted`: see [`compress`]; several processes stop at once, without a checkpoint.
    """
    if processes().is_main_process:
        check_output_folder(Path(output), overwrite or resume)
    stored, facts = None, {}
    if settings.stored_teacher is not None:
        stored = StoredTeacher(settings.stored_teacher, progress=True)
        about = {name: value for name, value in stored.manifest.items() if name not in ("data", "shards")}
        about = {"folder": settings.stored_teacher, **about}
        settings = replace(settings, data=read_settings(DataSettings, stored.manifest["data"]), stored_teacher=about)
        facts = {"teacher": stored.manifest["teacher"], "data": stored.manifest["text"]}
    settings = fill_in_rate(settings, settings.student, Path(output), resume)
    with unfinished_run(Path(output), settings, overwrite, resume) as work:
        arguments = make_training_arguments(settings.distillation, work / "checkpoints")
        check_one_gpu(arguments, "start the same command with `accelerate launch -m echoatt_hf.cli distill ...`")
        model, dtype = load_typed(settings.student, settings.dtype)
        if not isinstance(model, EchoAttForCausalLM):
            raise ValueError(
                f"{settings.student!r} is a {type(model).__name__}, not an EchoAtt student: run `echoatt convert`."
            )
        original = load_placed(settings.teacher, settings.dtype)[0] if settings.teacher is not None else None
        if settings.distillation.lora_rank and original is not None:
            share_weights(model, original)
        models = RunModels(original, model.to(processes().device), load_tokenizer(settings.student, model), dtype)
        if original is not None:
            check_same_tokenizer(model, original, models.tokenizer)
        if stored is None:
            train_rows, held_out_rows = load_rows_once(work / "rows", settings.data, models)
        else:
            stored.check_student(model, models.tokenizer)
            if original is not None and processes().is_local_main_process:
                stored.check_teacher(original)
            train_rows, held_out_rows = stored, stored.held_out_rows
        facts["conversion"] = describe_conversion(settings.student)
        return train_and_write(work, models, train_rows, held_out_rows, settings, facts)
