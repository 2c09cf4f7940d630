"""Folders of runs that are not finished, and what a report says of where a run was made."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import PartialState, load_checkpoint_in_model
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME

from ..configuration_echoatt import ECHOATT_VERSION
from ..models.loading import builtin_teacher_path, default_device
from ..outputs.files import (
    check_output_file,
    check_output_folder,
    explained_disk_errors,
    last_complete_checkpoint,
    replace_folder,
    seal_folder,
    write_whole,
)
from ..settings import CompressionSettings, DataSettings
from ..text.documents import STDLIB


__all__ = [
    "describe_data",
    "describe_environment",
    "describe_teacher",
    "processes",
    "resumable_search",
    "train_from_last_checkpoint",
    "unfinished_run",
    "whole_state",
    "without_paths",
]


def processes() -> PartialState:
    """`PartialState`: the processes that were launched together, as by `accelerate launch`, and which one this is."""
    return PartialState(cpu=default_device() == "cpu")


def train_from_last_checkpoint(trainer: Trainer) -> None:
    """
    Train from the last complete checkpoint in the trainer's `output_dir`, or from the start if there is none.

    Checkpoints are sealed as they become complete. From that of the last step nothing is trained; `Trainer` itself would
    make one step more.

    Raises:
        `ValueError`: the checkpoint has a file that is not as it was written.
    """
    trainer.add_callback(_SealCheckpoints())
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            if trainer.is_fsdp_enabled:  # whose states are for a model that it has divided
                load_checkpoint_in_model(trainer.model, checkpoint)
            else:
                trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()  # which `Trainer` leaves open when it fails, over what is said of it


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """
    Args:
        trainer (`Trainer`): a trainer that has trained, in each process that was launched.

    Returns:
        `dict` or `None`: the weights of its model, whole in the main process, where each process has a part of them;
        `None` where the model itself has all of them.
    """
    if trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model)
    if is_deepspeed_zero3_enabled() and trainer.model_wrapped is not trainer.model:  # there was something to train
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


class _SealCheckpoints(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()  # each may write a part
        if state.is_world_process_zero:
            seal_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
def unfinished_run(
    output: Path, settings: str, overwrite: bool, resume: bool, result: str = "student"
) -> Iterator[Path]:
    """
    The folder of a run that is not finished. When the block ends well, its folder `result` takes the place of
    `output`; when it fails, what a resumed run can use is kept. Of several processes all enter, on folders that they
    share, and the main one makes and moves them.
    """
    state = processes()
    work = _work_folder(output)
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
    except Exception as error:
        if not state.is_main_process:
            raise
        # After a wrong setting a run with the same settings would only fail again.
        worth_keeping = ["checkpoints", "store/manifest.json"]
        if not isinstance(error, ValueError):
            worth_keeping += ["measured.json", "conversion.json"]
        if not any((work / name).exists() for name in worth_keeping):
            shutil.rmtree(work, ignore_errors=True)
        raise
    state.wait_for_everyone()
    if state.is_main_process:
        replace_folder(work / result, output)
        (work / "settings.json").unlink()  # without which nothing resumes from what is left if this is the end
        shutil.rmtree(work)


def _work_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _open_work_folder(
    output: Path,
    settings: str,
    overwrite: bool,
    resume: bool,
    check_output: Callable[[Path, bool], None] = check_output_folder,
) -> Path:
    """The folder of an unfinished run: a new one, or the one to resume, which must have been made by equal settings."""
    check_output(output, overwrite or resume)
    work = _work_folder(output)
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
