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


__all__ = ["check_column", "check_text", "describe_suffixes", "find_files", "iterate_file", "kind_of"]

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


def iterate_file(file: Path, text_column: str) -> Iterator[tuple[str, bool]]:
    """The documents of a file, and whether it is one document as a whole. Raises `ValueError` where it cannot be read."""
    kind = kind_of(file)
    if kind == TEXT:
        texts = _SEPARATOR_LINE.split(_read_text(file))
        yield from ((text, len(texts) == 1) for text in texts)
        return
    read = {JSON: _json_texts, PARQUET: _parquet_texts, TABLE: _table_texts}[kind]
    for value, place in read(file, text_column):
        yield as_text(value, text_column, place), False


def as_text(value, text_column: str, place: str) -> str:
    """A value of a column as a text, empty for a gap. Raises `ValueError` if it is not one."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"Column {text_column!r} of {place} holds {type(value).__name__}, not text: name another.")
    return check_text(value or "", place)


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


def check_column(columns: Iterable[str], text_column: str, place: str) -> None:
    """Raises `ValueError` if there is no such column."""
    if text_column not in columns:
        raise ValueError(
            f"{place} has no column {text_column!r}; its columns are {', '.join(columns) or 'none'}. Name the one "
            "that holds the text with text_column (--text-column)."
        )


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


def _json_texts(file: Path, text_column: str) -> Iterator[tuple[object, str]]:
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
                check_column(row, text_column, f"{place},")
                yield row[text_column], place


def _parquet_texts(file: Path, text_column: str) -> Iterator[tuple[object, str]]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(file)!r} is not a parquet file: {error}") from error
    number = 0
    with table:
        check_column(table.schema_arrow.names, text_column, repr(str(file)))
        for batch in table.iter_batches(batch_size=64, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                yield text, f"{str(file)!r}, row {number}"
                number += 1


def _table_texts(file: Path, text_column: str) -> Iterator[tuple[object, str]]:
    csv.field_size_limit(2**31 - 1)  # a document is a field
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    with _open(file) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter)
        try:
            check_column(reader.fieldnames or (), text_column, repr(str(file)))
            for row in reader:
                yield row[text_column], f"{str(file)!r}, line {reader.line_num}"
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(file)!r}, line {reader.line_num + 1}: not {delimiter!r}-separated text ({error})."
            ) from error
