"""Folders of runs that are not finished, and what a report says of where a run was made."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .configuration_echoatt import ECHOATT_VERSION
from .data import STDLIB
from .outputs import check_output_file, check_output_folder, replace_folder, write_whole
from .settings import CompressionSettings, DataSettings
from .teachers import builtin_teacher_path


__all__ = [
    "describe_data",
    "describe_environment",
    "describe_teacher",
    "resumable_search",
    "unfinished_run",
    "without_paths",
]


@contextmanager
def resumable_search(
    settings: CompressionSettings, output: Path | None, overwrite: bool, resume: bool
) -> Iterator[Path | None]:
    """The file beside `output` in which a search keeps what it has measured; it goes when the block ends well."""
    if output is None or settings.plan.plan != "effect":
        yield None
        return
    work = _open_work_folder(output, settings.to_json(), overwrite, resume, check_output_file)
    state = work / "measured.json"
    try:
        yield state
    except Exception:
        if not state.exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)


@contextmanager
def unfinished_run(output: Path, settings: str, overwrite: bool, resume: bool) -> Iterator[Path]:
    """
    The folder of a run that is not finished. When the block ends well, its folder `student` takes the place of
    `output`; when it fails, what a resumed run can use is kept.
    """
    work = _open_work_folder(output, settings, overwrite, resume)
    try:
        yield work
    except Exception as error:
        # After a wrong setting a run with the same settings would only fail again.
        worth_keeping = ["checkpoints"]
        if not isinstance(error, ValueError):
            worth_keeping += ["measured.json", "conversion.json"]
        if not any((work / name).exists() for name in worth_keeping):
            shutil.rmtree(work, ignore_errors=True)
        raise
    replace_folder(work / "student", output)
    shutil.rmtree(work)


def _open_work_folder(
    output: Path,
    settings: str,
    overwrite: bool,
    resume: bool,
    check_output: Callable[[Path, bool], None] = check_output_folder,
) -> Path:
    """The folder of an unfinished run: a new one, or the one to resume, which must have been made by equal settings."""
    check_output(output, overwrite or resume)
    work = output.with_name(output.name + ".partial")
    file = work / "settings.json"
    if file.exists() and resume:
        if file.read_text() != settings:
            raise ValueError(
                f"The unfinished run in {str(work)!r} has other settings: resume it with the same ones, or start anew "
                "with --overwrite."
            )
        return work
    if work.exists() and not overwrite and not resume:
        raise FileExistsError(
            f"{str(work)!r} holds an unfinished run: continue it with --resume, or start anew with --overwrite."
        )
    if resume:
        check_output(output, overwrite)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_whole(file, settings)
    return work


def describe_environment() -> dict[str, str]:
    """Versions and hardware, without anything that identifies the machine or its user."""
    device = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "echoatt_hf": ECHOATT_VERSION,
        "commit": _commit(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": device,
    }


def _commit() -> str:
    """Commit of a source checkout of this package, with a mark if files were changed; empty elsewhere."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def describe_teacher(teacher: PreTrainedModel, revision: str | None = None) -> dict[str, str]:
    """
    What a report says of a teacher.

    Args:
        teacher (`PreTrainedModel`): the teacher.
        revision (`str`, *optional*): the branch it was loaded from, whose commit is looked up in the cache of the Hub.

    Returns:
        `dict`: its `name`; of one from the Hub, its `repository` and, if the branch is known, its `revision`; of the
        built-in one, its `license`. Empty of one that was made in memory.
    """
    name = teacher.name_or_path
    if name == str(builtin_teacher_path()):
        return {"name": "the built-in teacher of echoatt_hf", "license": "apache-2.0"}
    if Path(name).exists():
        return {"name": Path(name).resolve().name} if name else {}
    cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    if not isinstance(cached, str):
        return {"name": Path(name).name}
    commit = {"revision": Path(cached).parent.name} if revision else {}
    return {"name": name, "repository": name, **commit}


def describe_data(settings: DataSettings) -> dict:
    """What a report says of the text: `names` of its parts, `repositories` of the Hub, and the `language` where it is known."""
    names, repositories = [], []
    for name in settings.data:
        is_local = Path(name).expanduser().exists()
        if name != STDLIB and not is_local:
            repositories.append(name)
        stdlib = f"the standard library of Python {platform.python_version()}"
        names.append(stdlib if name == STDLIB else Path(name).name if is_local else name)
    described = {"names": names, "repositories": repositories}
    return described | ({"language": "code"} if settings.data == [STDLIB] else {})


def without_paths(settings: dict) -> dict:
    """Settings as they may be published: of a path that is nobody else's business, its last part."""

    def shorten(value):
        if isinstance(value, dict):
            return {name: shorten(item) for name, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".."))):
            return Path(value).name
        return value

    return shorten(settings)
