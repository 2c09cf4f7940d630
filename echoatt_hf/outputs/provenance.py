"""What a report says of where, from what and with what a result was made."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..configuration_echoatt import ECHOATT_VERSION
from ..models.devices import describe_device
from ..models.loading import builtin_teacher_path, load_json
from ..settings import DataSettings
from ..text.documents import STDLIB


__all__ = ["describe_conversion", "describe_data", "describe_environment", "describe_teacher", "without_paths"]


def describe_environment() -> dict[str, str]:
    """Versions and hardware, without anything that identifies the machine or its user."""
    return {
        "echoatt_hf": ECHOATT_VERSION,
        "commit": _commit(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": describe_device(),
    }


def _commit() -> str:
    """Commit of a source checkout of this package, with a mark if files were changed; empty elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def describe_teacher(teacher: PreTrainedModel) -> dict[str, str]:
    """
    What a report says of a teacher.

    Args:
        teacher (`PreTrainedModel`): the teacher.

    Returns:
        `dict`: its `name`; of one from the Hub, its `repository` and, if the commit is known, its `revision`; of a GGUF
        file, its `gguf_file`; of the built-in one, its `license`. Empty of one that was made in memory.
    """
    name, gguf_file = teacher.name_or_path, getattr(teacher, "loaded_gguf_file", None)
    if gguf_file is not None and Path(name).exists():
        return {"name": Path(gguf_file).stem, "gguf_file": gguf_file}
    if name == str(builtin_teacher_path()):
        return {"name": "the built-in teacher of echoatt_hf", "license": "apache-2.0"}
    if Path(name).exists():
        return {"name": Path(name).resolve().name} if name else {}
    commit = getattr(teacher, "loaded_commit", None)  # of what `load_model` loaded
    if commit is None and not isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
        return {"name": Path(name).name}
    described = {"name": name, "repository": name, "revision": commit, "gguf_file": gguf_file}
    return {key: value for key, value in described.items() if value}


def describe_conversion(student: str | Path) -> dict:
    """
    What is known of how a student was converted, from the files beside it.

    Args:
        student (`str` or `Path`): its folder or repository, as for [`load_model`].

    Returns:
        `dict`: what a [`ConversionReport`] says, as `echoatt convert` or `echoatt compress` wrote it; empty if nothing is known.
    """
    try:
        return load_json(student, "conversion.json") or load_json(student, "report.json").get("conversion", {})
    except OSError:  # made in memory, or its folder is gone
        return {}


def describe_data(settings: DataSettings) -> dict:
    """What a report says of the text: `names` of its parts, `repositories` of the Hub, and the `language` where it is known."""
    names, repositories = [], []
    stdlib = f"the standard library of Python {platform.python_version()}"
    for name in (source.path for source in settings.sources):
        is_local = Path(name).expanduser().exists()
        if name != STDLIB and not is_local:
            repositories.append(name)
        names.append(stdlib if name == STDLIB else Path(name).name if is_local else name)
    described = {"names": names, "repositories": repositories}
    return described | ({"language": "code"} if names == [stdlib] else {})


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
