"""Outputs that are written whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


__all__ = [
    "beside",
    "check_output_file",
    "check_output_folder",
    "explained_disk_errors",
    "hash_file",
    "last_complete_checkpoint",
    "replace_folder",
    "seal_folder",
    "whole_folder",
    "write_whole",
]


def check_output_file(output: Path | None, overwrite: bool) -> None:
    """
    Check that a file can be written, where one is asked for.

    Raises:
        `FileExistsError`: it exists and `overwrite` is not given, or it is a folder.
        `FileNotFoundError`: there is no folder to write it into.
        `ValueError`: it is a mount point, which cannot be replaced.
    """
    if output is None:
        return
    if output.is_dir():
        raise FileExistsError(f"The output {str(output)!r} is a folder: choose a file.")
    if os.path.ismount(output):
        raise ValueError(
            f"The output {str(output)!r} is a mount point, which cannot be replaced: choose another file."
        )
    if output.exists() and not overwrite:
        raise FileExistsError(f"{str(output)!r} exists: choose another file, or replace it with --overwrite.")
    if not output.parent.is_dir():
        raise FileNotFoundError(
            f"The output {str(output)!r} cannot be written, as there is no folder {str(output.parent)!r}: make it, or "
            "choose another file."
        )
    _check_writable(output.parent)


def beside(output: Path, suffix: str) -> Path:
    """The file beside a JSON file that has `suffix` in place of its `.json`, and after the name of a file without it."""
    return output.with_name(output.name.removesuffix(".json") + suffix)


def check_output_folder(output: Path, overwrite: bool) -> None:
    """
    Check that a folder can be written, and put in its place when it is finished. Before the work, as that would be lost.

    Raises:
        `FileExistsError`: it is not empty and `overwrite` is not given, or it is a file.
        `NotADirectoryError`: it would lie in a file.
        `ValueError`: it cannot be renamed: it is a mount point, or has no name of its own, as `.` and `..`.
    """
    has_name = output.name not in ("", "..")
    if not has_name or os.path.ismount(output):
        what = "is a mount point" if has_name else "has no name of its own"
        raise ValueError(
            f"The output {str(output)!r} {what}, so that no finished folder can take its place: give a folder in it, such as "
            f"{str(output / 'out')!r}."
        )
    if os.path.lexists(output) and not output.is_dir():  # a link to nothing, too
        raise FileExistsError(f"The output {str(output)!r} is a file: choose a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"The output folder {str(output)!r} is not empty: choose another, or replace it with --overwrite."
        )
    # Folders that are missing on the way are made.
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"The output {str(output)!r} would lie in {str(nearest)!r}, a file: choose a folder.")
    _check_writable(nearest)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {str(folder)!r} cannot be written to: choose another output.")


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SEAL = "checksums.json"


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """
    Say what could not be written, and how much room there is, when the disk is full.

    The errors of safetensors and torch then are no `OSError`, and that of torch does not say what the matter is.

    Args:
        folder (`Path`): what is written in the block.

    Raises:
        `OSError`: the disk or the quota is full, a file is larger than allowed, or the disk fails.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder.parent).free
        number = error.errno if isinstance(error, OSError) else _disk_error_number(str(error), free)
        if number not in DISK_ERRORS:
            raise
        raise OSError(
            number,
            f"{os.strerror(number)}: {str(folder)!r} cannot be written, its disk has {free / 2**20:,.1f} MiB left. Make "
            "room and run the same command again, with --resume where it has it",
        ) from error


def _disk_error_number(message: str, free: int) -> int | None:
    if found := re.search(r"\(os error (\d+)\)", message):  # safetensors
        return int(found.group(1))
    if "unexpected pos" in message or "PytorchStreamWriter" in message:  # torch, which does not say why
        return errno.ENOSPC if free < 2**20 else errno.EIO
    return None


@contextmanager
def whole_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Write a folder whole or not at all.

    Yields an empty folder beside `output` to write into. When the block ends well it takes the place of `output`, see
    [`replace_folder`]; when it fails it is removed, and what was in `output` before stays as it was.

    Args:
        output (`Path`): the folder to make.
        overwrite (`bool`, *optional*, defaults to `False`): replace a folder that is not empty.

    Raises:
        `FileExistsError`: `output` is not empty and `overwrite` is not given.
    """
    check_output_folder(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        with explained_disk_errors(output):
            yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    replace_folder(folder, output)


def replace_folder(folder: Path, output: Path) -> None:
    """
    Put a finished folder in the place of `output`.

    Raises:
        `OSError`: that fails. What was in `output` is put back, and `folder` stays where it is; the message says where.
    """
    aside = None
    try:
        if output.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
            os.replace(output, aside / output.name)
        os.replace(folder, output)
    except OSError as error:
        if aside is not None:
            if os.path.lexists(aside / output.name):
                os.replace(aside / output.name, output)
            aside.rmdir()
        raise OSError(
            error.errno,
            f"{error.strerror}: {str(output)!r} cannot be replaced. What was made is whole, in {str(folder)!r}: move it from "
            "there to where it is to be",
        ) from error
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text in UTF-8."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def seal_folder(folder: Path) -> None:
    """Write `checksums.json`: that all files of a folder are there, and what each was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
    write_whole(folder / SEAL, json.dumps(hashes, indent=2) + "\n")


def last_complete_checkpoint(folder: Path) -> str | None:
    """
    The last checkpoint of a `Trainer` whose save was not cut short: which has been sealed.

    Args:
        folder (`Path`): the `output_dir` of the trainer.

    Returns:
        `str` or `None`: the checkpoint's folder, nothing if there is none.

    Raises:
        `ValueError`: one of its files is missing or not as it was written; the message names it.
    """
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{SEAL}")]
    if not complete:
        return None
    last = max(complete, key=lambda path: int(path.name.split("-")[1]))
    try:
        hashes = json.loads((last / SEAL).read_text())
    except ValueError:
        hashes = {SEAL: ""}
    for name, expected in hashes.items():
        path = last / name
        if not path.is_file() or hash_file(path) != expected:
            state = "corrupt" if path.is_file() else "missing"
            raise ValueError(
                f"The checkpoint {str(last)!r} is damaged, its file {name!r} is {state}: delete that folder, and the same "
                "command with --resume goes on from the checkpoint before, or from the start."
            )
    return str(last)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
