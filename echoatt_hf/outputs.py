"""Outputs that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = [
    "check_output_file",
    "check_output_folder",
    "format_markdown",
    "last_complete_checkpoint",
    "replace_folder",
    "whole_folder",
    "write_whole",
]


def check_output_file(output: Path | None, overwrite: bool) -> None:
    """
    Check that a file can be written, where one is asked for.

    Raises:
        `FileExistsError`: it exists and `overwrite` is not given.
    """
    if output is not None and output.exists() and not overwrite:
        raise FileExistsError(f"{str(output)!r} exists: choose another file, or replace it with --overwrite.")


def check_output_folder(output: Path, overwrite: bool) -> None:
    """
    Check that a folder can be written to.

    Raises:
        `FileExistsError`: it is not empty and `overwrite` is not given, or it is a file.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"The output {str(output)!r} is a file: choose a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"The output folder {str(output)!r} is not empty: choose another, or replace it with --overwrite."
        )


def format_markdown(lines: list[list[str]], left: int = 0) -> str:
    """
    A Markdown table, which also reads well in a terminal.

    Args:
        lines (`list[list[str]]`): cells, the header first.
        left (`int`, *optional*, defaults to 0): the column that is aligned to the left; all others are to the right.

    Returns:
        `str`: lines of the table.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if column == left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    texts = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = enumerate(zip(line, widths, strict=True))
        padded = [cell.ljust(width) if column == left else cell.rjust(width) for column, (cell, width) in cells]
        texts.append(f"| {' | '.join(padded)} |")
    return "\n".join(texts)


@contextmanager
def whole_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Write a folder whole or not at all.

    Yields an empty folder beside `output` to write into. When the block ends well it takes the place of `output`; when
    it fails it is removed, and what was in `output` before stays as it was.

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
        yield folder
        replace_folder(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, output: Path) -> None:
    """Put `folder` in the place of `output`. If that fails, what was in `output` is put back."""
    if not output.exists():
        os.replace(folder, output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    os.replace(output, aside / output.name)
    try:
        os.replace(folder, output)
    except OSError:
        os.replace(aside / output.name, output)
        aside.rmdir()
        raise
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


def last_complete_checkpoint(folder: Path) -> str | None:
    """
    The last checkpoint of a `Trainer` whose save was not cut short: the trainer's state is what it writes last.

    Args:
        folder (`Path`): the `output_dir` of the trainer.

    Returns:
        `str` or `None`: the checkpoint's folder, nothing if there is none.
    """
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
