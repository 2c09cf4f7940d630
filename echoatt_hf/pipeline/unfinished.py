"""Folders of runs that are not finished: made, resumed, and put in the place of the output at the end."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..models.devices import processes
from ..outputs.files import check_output_folder, explained_disk_errors, replace_folder, write_whole
from ..planning.from_settings import is_searched
from ..settings import MAY_CHANGE_ON_RESUME, CompressionSettings, describe_settings, differing_settings


__all__ = ["resumable", "resumable_search", "unfinished_run", "work_folder"]

# What a resumed run goes on from.
WORTH_KEEPING = ("checkpoints", "store/manifest.json", "similarity.json", "measured.json", "conversion.json")


@contextmanager
def resumable_search(
    settings: CompressionSettings,
    output: Path | None,
    overwrite: bool,
    resume: bool,
    check_output: Callable[[Path, bool], None],
) -> Iterator[Path | None]:
    """[`resumable`] of the search for a plan, if there is one."""
    if output is None or not is_searched(settings.plan):
        yield None
        return
    with resumable(settings, output, overwrite, resume, check_output) as state:
        yield state


@contextmanager
def resumable(
    settings: Any, output: Path, overwrite: bool, resume: bool, check_output: Callable[[Path, bool], None]
) -> Iterator[Path]:
    """The file beside `output` in which a run keeps what it has measured; it goes when the block ends well."""
    work = _open_work_folder(output, settings, overwrite, resume, check_output)
    state = work / "measured.json"
    try:
        yield state
    except Exception:
        if not state.exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)


@contextmanager
def unfinished_run(
    output: Path, settings: Any, overwrite: bool, resume: bool, result: str = "student"
) -> Iterator[Path]:
    """
    The folder of a run that is not finished. When the block ends well, its folder `result` takes the place of
    `output`; when it fails, what a resumed run can use is kept. Of several processes all enter, on folders that they
    share, and the main one makes and moves them.
    """
    state = processes()
    work = work_folder(output)
    if state.is_main_process:
        _open_work_folder(output, settings, overwrite, resume)
    state.wait_for_everyone()
    if not work.exists():
        raise FileNotFoundError(
            f"Process {state.process_index} does not see the folder {str(work)!r} that the main one made: give an output "
            "on a file system that all machines share."
        )
    try:
        with explained_disk_errors(output):
            yield work
    except Exception:
        if not state.is_main_process:
            raise
        # Whatever the error: what was measured may have taken hours, and what was wrong may be put right elsewhere.
        if not any((work / name).exists() for name in WORTH_KEEPING):
            shutil.rmtree(work, ignore_errors=True)
        raise
    state.wait_for_everyone()
    if state.is_main_process:
        replace_folder(work / result, output)
        (work / "settings.json").unlink()  # without which nothing resumes from what is left if this is the end
        shutil.rmtree(work)


def _check_settings(work: Path, before: dict, now: dict) -> None:
    """Check that an unfinished run goes on to what it began with. Raises `ValueError`, which names what differs."""
    differing = differing_settings(before, now)
    if wrong := [name for name in differing if name not in MAY_CHANGE_ON_RESUME]:
        values = ", ".join(f"{name} was {differing[name][0]!r} and is {differing[name][1]!r}" for name in wrong)
        others = [name for name in MAY_CHANGE_ON_RESUME if name.split(".")[0] in now["settings"]]
        may_change = f" (only {', '.join(others)} may differ)" if others else ""
        raise ValueError(
            f"The unfinished run in {str(work)!r} has other settings: {values}. Resume it with the same ones{may_change}, or "
            "start anew with --overwrite."
        )


def work_folder(output: Path) -> Path:
    """The folder in which a run is until it is finished."""
    return output.parent / f"{output.name}.partial"  # `with_name` fails for `.`, which the check of outputs refuses


def _open_work_folder(
    output: Path,
    settings: Any,
    overwrite: bool,
    resume: bool,
    check_output: Callable[[Path, bool], None] = check_output_folder,
) -> Path:
    """The folder of an unfinished run: a new one, or the one to resume, which must have been made by equal settings."""
    work = work_folder(output)
    if work.exists() and not overwrite and not resume:
        raise FileExistsError(
            f"{str(work)!r} holds an unfinished run: continue it with --resume, or start anew with --overwrite."
        )
    check_output(output, overwrite or resume)
    file, described = work / "settings.json", describe_settings(settings)
    if file.exists() and resume:
        _check_settings(work, json.loads(file.read_text()), described)
        write_whole(file, json.dumps(described, indent=2) + "\n")
        return work
    if resume:
        check_output(output, overwrite)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_whole(file, json.dumps(described, indent=2) + "\n")
    return work
