"""
Files of text, read document by document.

The readers are our own, not the builders of `datasets`: they name the file and the line of a fault, keep a text such as
"NA" or "12" as it is, where pandas makes a gap or a number of it, and keep the names of whole files.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


__all__ = ["check_text", "describe_suffixes", "find_columns", "find_files", "iterate_file", "kind_of"]

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""A line that is exactly this ends a document inside a plain text file."""

TEXT, JSON, PARQUET, TABLE = "text", "JSON", "parquet", "table"
KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), TEXT),
    **dict.fromkeys((".jsonl", ".json"), JSON),
    ".parquet": PARQUET,
    **dict.fromkeys((".csv", ".tsv"), TABLE),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

CONTENTS = (("text",), ("messages",), ("conversations",), ("prompt", "completion"))
"""The columns that a row may have for a text or a conversation, one of these kinds."""

CHAT_OPTIONS = ("tools", "chat_template_kwargs")
"""The columns with what a chat template is given beside a conversation."""

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the data."""

# With the line break before it, which ends the line before the separator and is no part of the document.
_SEPARATOR_LINE = re.compile(rf"\n?^[ \t]*{re.escape(DOCUMENT_SEPARATOR)}[ \t]*(?:\n|\Z)", re.MULTILINE)


def kind_of(file: Path) -> str | None:
    """What a file holds, by its suffix before that of a compression; `None` if it is not known."""
    suffixes = file.name.lower().split(".")[1:]
    is_compressed = bool(suffixes) and f".{suffixes[-1]}" in COMPRESSIONS
    if is_compressed:
        suffixes.pop()
    kind = KINDS.get(f".{suffixes[-1]}") if suffixes else None
    return None if is_compressed and kind == PARQUET else kind  # which compresses its own columns


def describe_suffixes() -> str:
    """The suffixes of files that can be read."""
    return f"{', '.join(KINDS)}; all but parquet may be compressed, {', '.join(COMPRESSIONS)}"


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """
    Files of a folder, at any depth: those that are read, and those that are left out.

    Where there are files of rows (JSON lines, parquet, CSV), the plain text beside them, such as a README or a licence, is
    about the data and is left out. Hidden files count as neither.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
        and file.is_file()
    )
    kinds = {file: kind_of(file) for file in files if file.name not in _METADATA}
    rows = [file for file, kind in kinds.items() if kind not in (TEXT, None)]
    taken = rows or [file for file, kind in kinds.items() if kind == TEXT]
    return taken, sorted({*files}.difference(taken))


def iterate_file(file: Path, text_column: str | None) -> Iterator[tuple[dict, str, bool]]:
    """
    The rows of a file with what [`find_columns`] takes of them, where each one is, and whether it is the whole file. In
    plain text a row is a document. Raises `ValueError` where it cannot be read.
    """
    kind = kind_of(file)
    if kind == TEXT:
        texts = _SEPARATOR_LINE.split(_read_text(file))
        yield from (({text_column or "text": text}, repr(str(file)), len(texts) == 1) for text in texts)
        return
    read = {JSON: _json_rows, PARQUET: _parquet_rows, TABLE: _table_rows}[kind]
    yield from ((row, place, False) for row, place in read(file, text_column))


def check_text(text: str, place: str) -> str:
    """The text. Raises `ValueError` if it holds half of a surrogate pair, which no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {text[error.start]!r}, at character {error.start} of the text, is half of a surrogate pair and no "
            "character: mend or delete it."
        ) from None
    return text


def find_columns(columns: Iterable[str], text_column: str | None, place: str) -> list[str]:
    """
    The columns to read of a table or row: those of `CONTENTS` that are there, or the one that is named, and `CHAT_OPTIONS`.

    Args:
        columns (iterable of `str`): all columns.
        text_column (`str`, *optional*): the one with the text or conversation, if it is named.
        place (`str`): what a message calls the table or row.

    Raises:
        `ValueError`: none of the columns holds a text or conversation.
    """
    columns = list(columns)
    known = CONTENTS if text_column is None else ((text_column,),)
    found = [kind for kind in known if set(kind) <= set(columns)]
    if not found:
        names = [" with ".join(map(repr, kind)) for kind in known]
        raise ValueError(
            f"{place} has no column {' or '.join(names)}; its columns are {', '.join(columns) or 'none'}. Name the one "
            "that holds the text or the conversations with text_column (--text-column)."
        )
    return [name for kind in found for name in kind] + [name for name in CHAT_OPTIONS if name in columns]


@contextmanager
def _open(file: Path) -> Iterator[io.BufferedReader]:
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix.lower())) as stream:
            yield io.BufferedReader(stream)
    except OSError as error:  # of the decompression
        if file.suffix.lower() not in COMPRESSIONS or isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{str(file)!r} cannot be decompressed ({error}): get it anew.") from error


def _read_text(file: Path) -> str:
    with _open(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not UTF-8 text (byte {error.start}): convert it or leave it out."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(file: Path, text_column: str | None) -> Iterator[tuple[dict, str]]:
    with _open(file) as lines:
        is_array = lines.peek(1)[:1] == b"["
        for number, line in enumerate([lines.read()] if is_array else lines, start=1):
            if not line.strip():
                continue
            place = f"{str(file)!r}, line {number}"
            try:
                content = json.loads(line)
            except json.JSONDecodeError as error:
                place = f"{str(file)!r}, line {number + error.lineno - 1}"
                raise ValueError(f"{place}: not JSON ({error.msg}). Each line must be an object.") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8. Convert the file.") from error
            for index, row in enumerate(content if is_array else [content]):
                place = f"{str(file)!r}, item {index}" if is_array else place
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: {type(row).__name__} where an object should be.")
                yield {name: row[name] for name in find_columns(row, text_column, f"{place},")}, place


def _parquet_rows(file: Path, text_column: str | None) -> Iterator[tuple[dict, str]]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(file)!r} is not a parquet file: {error}") from error
    number = 0
    with table:
        columns = find_columns(table.schema_arrow.names, text_column, repr(str(file)))
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                yield row, f"{str(file)!r}, row {number}"
                number += 1


def _table_rows(file: Path, text_column: str | None) -> Iterator[tuple[dict, str]]:
    csv.field_size_limit(2**31 - 1)  # a document is a field
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    with _open(file) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter)
        try:
            columns = find_columns(reader.fieldnames or (), text_column, repr(str(file)))
            for row in reader:
                yield {name: row[name] for name in columns}, f"{str(file)!r}, line {reader.line_num}"
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(file)!r}, line {reader.line_num + 1}: not {delimiter!r}-separated text ({error})."
            ) from error
