"""Text as a data set of documents: files, folders and any `datasets` data set, and what of it is held out."""

import hashlib
import logging
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from ..settings import STDLIB, DataSource
from .chats import read_document
from .readers import (
    DOCUMENT_SEPARATOR,
    describe_suffixes,
    find_columns,
    find_files,
    iterate_file,
    kind_of,
)
from .rows import cache_file, iterate_table


__all__ = ["STDLIB", "check_held_out", "holds_chats", "load_documents", "split_documents"]

logger = logging.getLogger(__name__)

# `large_string`: together the documents may hold more than the 2 GiB that the offsets of `string` can address.
DOCUMENT_FEATURES = Features({"text": Value("large_string"), "name": Value("string"), "chat": Value("string")})

_READERS_VERSION = 2
"""Part of the fingerprint of documents in the cache: raise it when files are read in another way."""

# Left out of `STDLIB`: tests (some systems ship Python without them), tables of data, and what a build generates.
_STDLIB_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}

# The metadata block by which a README marks its folder as a data set repository.
_DATA_SET_CARD = re.compile(r"---\n(?:(?!---\n).*\n)*?(?:configs|dataset_info):")

_DATA_SETS = (Dataset, IterableDataset, DatasetDict, IterableDatasetDict)

# A file with its name in the data, or a table; and the column that holds the text, if it is named.
_Part = tuple[tuple[Path, str] | Dataset | IterableDataset, str | None]


def load_documents(
    data: str
    | Path
    | DataSource
    | Dataset
    | IterableDataset
    | Iterable[str | Path | DataSource | Dataset | IterableDataset],
    *,
    text_column: str | None = None,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Load texts and conversations as a data set of documents with the columns `text`, `name` and `chat`.

    A row of data is a text, `text`, or a conversation: `messages`, each with `role` and `content`, ShareGPT's
    `conversations`, with `from` and `value`, or `prompt` with `completion`, both text or both messages. Columns `tools` and
    `chat_template_kwargs` are kept for the chat template.

    What is read from files is kept in the cache of `datasets` and mapped into memory from there. A data set that is mapped
    into memory stays so.

    Args:
        data (`str`, `Path`, [`DataSource`], `Dataset`, `IterableDataset` or an iterable of these):
            `"stdlib"` (sources of the running Python's standard library), a text file, a JSON lines, parquet, CSV or TSV
            file, a folder with such files at any depth, a folder written by `save_to_disk`, a local copy of a data
            set repository, the name of a data set on the Hub, or a data set. In a plain text file a line
            `<|endoftext|>` separates documents; a file without one is one document. In all others a row is one. Files
            but parquet may be compressed, `.gz`, `.zst` or `.bz2`. Of a folder with files of rows the plain text beside
            them is left out; what is left out is logged.
        text_column (`str`, *optional*):
            Column that holds the text or the conversation, in tables and data sets. It need not be named if it is one of
            those above, and the only one.
        name (`str`, *optional*):
            Configuration of a data set repository, as in `datasets.load_dataset(path, name)`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to take of a data set that has several.
        revision (`str`, *optional*):
            Branch, tag or commit of a data set on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` that reads as it goes. An `IterableDataset` in `data` is always streamed.

    Returns:
        `Dataset` or `IterableDataset`: documents that are not blank. `name` is the path, below the folder that was
        given, of a document that is a whole file; it is empty for one of many in a file or data set. The `text` of a
        conversation is its JSON, and `chat` says where it was read; of a plain text it is empty.

    Raises:
        `FileNotFoundError`: no such path, or no data set that can be loaded.
        `ValueError`: no text in it, no column with text or conversations, a row with several of them, messages in a form
            that is not known, no such split, or a file that cannot be read.
    """
    is_one = isinstance(data, (str, Path, DataSource, *_DATA_SETS))
    groups: list[list[_Part]] = []
    for part in [data] if is_one else data:
        source = part
        if not isinstance(part, DataSource):
            source = DataSource(part, name, split, revision, text_column)
        found = [(item, source.text_column) for item in _find_parts(source, streaming)]
        if next(_iterate_documents(found), None) is None:
            raise ValueError(f"data {_describe(source.path)} holds no text: give files with text in them.")
        groups.append(found)
    if not groups:
        raise ValueError("data is empty: give at least one file, folder or data set name.")
    if streaming or any(isinstance(item, IterableDataset) for group in groups for item, _ in group):
        return IterableDataset.from_generator(
            _iterate_documents, features=DOCUMENT_FEATURES, gen_kwargs={"parts": sum(groups, [])}
        )
    loaded = [_load_parts(group) for group in groups]
    if len(loaded) == 1:
        return loaded[0]
    return concatenate_datasets(
        [part if part.features == DOCUMENT_FEATURES else part.cast(DOCUMENT_FEATURES) for part in loaded]
    )


def holds_chats(documents: Dataset | IterableDataset) -> bool:
    """Whether there are conversations among the documents; of streamed ones, among the first 16."""
    if "chat" not in (documents.column_names or ["chat"]):
        return False
    if isinstance(documents, IterableDataset):
        return any(next(documents.iter(16), {"chat": []})["chat"])
    batches = documents.select_columns(["chat"]).with_format("arrow").iter(batch_size=10_000)
    return any(pc.any(pc.not_equal(batch["chat"], "")).as_py() for batch in batches)


def check_held_out(sources: list[DataSource], held_out: list[DataSource]) -> None:
    """Check that no file or split is both to train on and held out. Raises `ValueError` if one is."""
    known = {identity for source in sources for identity in _identify(source)}
    for source in held_out:
        common = known.intersection(_identify(source))
        if common:
            place = next(iter(sorted(map(str, common))))
            raise ValueError(
                f"held_out_data {str(source.path)!r} is text to train on too ({place}): give another file or split "
                "(--held-out-split), or leave it out, and some documents of the data are held out."
            )


def _identify(source: DataSource) -> set:
    """What a source reads: files, or a split of a data set."""
    path = Path(source.path)
    if source.path != STDLIB and path.is_file():
        return {path.resolve()}
    if source.path != STDLIB and path.is_dir() and not _is_saved_data_set(path) and not _is_data_set_repository(path):
        return {file.resolve() for file in find_files(path)[0]}
    place = str(path.resolve()) if path.is_dir() and source.path != STDLIB else str(source.path)
    if place == STDLIB or (path / "state.json").exists():  # which have no splits
        return {place}
    return {f"{place}, {source.name or 'default'}, {source.split}, {source.revision or 'main'}"}


def split_documents(
    documents: Dataset | IterableDataset, held_out_fraction: float = 0.05
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """
    Split documents into training and held-out ones, whole documents only.

    A document is held out if a hash of its name (of its text where it has no name) falls under the fraction: the
    same document is on the same side in every run, in any order, and when more documents are added. Where this
    would leave one side empty, the document nearest to the fraction changes sides, unless the data is streamed.

    Args:
        documents (`Dataset` or `IterableDataset`):
            As returned by [`load_documents`].
        held_out_fraction (`float`, *optional*, defaults to 0.05):
            Expected fraction of documents to hold out, in (0, 1).

    Returns:
        `tuple`: training documents and held-out documents.

    Raises:
        `ValueError`: the fraction is out of range, or there is only one document.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}; it must be between 0 and 1, both excluded.")
    if isinstance(documents, IterableDataset):
        return (
            documents.filter(_is_on_side, fn_kwargs={"threshold": held_out_fraction, "held_out": False}),
            documents.filter(_is_on_side, fn_kwargs={"threshold": held_out_fraction, "held_out": True}),
        )
    positions = [
        _split_position({"name": name, "text": text})
        for batch in documents.iter(batch_size=64)
        for name, text in zip(batch["name"], batch["text"], strict=True)
    ]
    distinct = sorted(set(positions))
    if len(distinct) < 2:
        raise ValueError(
            "The data is a single document, of which nothing can be held out: give several files, separate the "
            f"documents of a text file by lines {DOCUMENT_SEPARATOR!r}, or give held-out text of its own."
        )
    # Few documents may all fall on one side: keep at least one on each.
    threshold = min(max(held_out_fraction, distinct[1]), distinct[-1])
    return (
        documents.select([index for index, position in enumerate(positions) if position >= threshold]),
        documents.select([index for index, position in enumerate(positions) if position < threshold]),
    )


def _split_position(document: dict) -> float:
    # Not the place in a file: it changes when documents are added before. Nor the blank around the text.
    key = document["name"] or document["text"].strip()
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _is_on_side(document: dict, threshold: float, held_out: bool) -> bool:
    return (_split_position(document) < threshold) == held_out


def _find_parts(source: DataSource, streaming: bool) -> list[tuple[Path, str] | Dataset | IterableDataset]:
    data = source.path
    if isinstance(data, (Dataset, IterableDataset)):
        return [data]
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        return [_pick_split(data, source.split)]
    if data == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return [(file, file.relative_to(root).as_posix()) for file in _stdlib_files(root)]
    path = Path(data)
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(
                f"data file {str(data)!r} has the suffix {path.suffix!r}; known are {describe_suffixes()}. "
                "Rename or convert it."
            )
        return [(path, path.name)]
    if path.is_dir():
        if _is_saved_data_set(path):
            return _find_parts(replace(source, path=load_from_disk(str(path))), streaming)
        taken, left_out = find_files(path)
        if taken and not _is_data_set_repository(path):
            _log_files(path, taken, left_out)
            return [(file, file.relative_to(path).as_posix()) for file in taken]
    elif _looks_like_path(data):
        raise FileNotFoundError(f"data {str(data)!r}: no such file or folder (looked from {str(Path.cwd())!r}).")
    return [_load_named(source, streaming)]


def _log_files(folder: Path, taken: list[Path], left_out: list[Path]) -> None:
    """One line that says what of a folder is read, and what is not."""
    counts = Counter("".join(file.suffixes[-2:]) or file.name for file in taken)
    read = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    names = ", ".join(file.relative_to(folder).as_posix() for file in left_out[:5])
    more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    said = f"data {str(folder)!r}: {len(taken)} files are read ({read}); left out: {names or 'none'}{more}"
    logger.log(logging.WARNING if left_out else logging.INFO, said)


def _load_named(source: DataSource, streaming: bool) -> Dataset | IterableDataset:
    data = str(source.path)
    try:
        return load_dataset(data, source.name, split=source.split, revision=source.revision, streaming=streaming)
    except Exception as error:  # datasets raises a different type for every way a name can fail to load
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"data {data!r} is neither a file or folder of text ({describe_suffixes()}) nor a data set that "
            f"can be loaded ({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the "
            f"spelling, or give {STDLIB!r} for the Python standard library's sources."
        ) from error


def _load_parts(parts: list[_Part]) -> Dataset:
    """The documents of one source, which is a data set or files."""
    data, text_column = parts[0]
    if isinstance(data, Dataset):
        return _documents_of(data, text_column)
    # `from_generator` knows its arguments only, and files may change.
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for (file, _), _ in parts)]
    try:
        return Dataset.from_generator(
            _iterate_stamped,
            features=DOCUMENT_FEATURES,
            gen_kwargs={"parts": tuple(parts), "stamps": tuple(stamps), "version": _READERS_VERSION},
        )
    except DatasetGenerationError as error:
        raise error.__cause__ from None


def _iterate_stamped(parts: tuple[_Part, ...], stamps: tuple, version: int) -> Iterator[dict[str, str]]:
    return _iterate_documents(parts)


def _documents_of(data: Dataset, text_column: str | None) -> Dataset:
    """A data set of documents. Text stays as it lies in memory or on disk, without a copy."""
    columns = find_columns(data.column_names, text_column, "The data set")
    if len(columns) > 1 or data.features[columns[0]] not in (Value("string"), Value("large_string")):
        read = partial(_read_batch, text_column=text_column, version=_READERS_VERSION)
        data = data.select_columns(columns).with_format(None)
        return data.map(
            read,
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=columns,
            features=DOCUMENT_FEATURES,
            cache_file_name=cache_file(data, read),
            desc="read",
        )
    (text_column,) = columns
    data = data.select_columns([text_column]).with_format("arrow")
    filled, number = [], 0
    for batch in data.iter(batch_size=64):
        is_filled = pc.not_equal(pc.binary_length(pc.utf8_trim_whitespace(batch[text_column])), 0)
        filled += [number + index for index, found in enumerate(is_filled.to_pylist()) if found]
        number += len(is_filled)
    if len(filled) < len(data):
        data = data.select(filled)
    data = data.with_format(None)
    if text_column != "text":
        data = data.rename_column(text_column, "text")
    for name in ("name", "chat"):
        data = data.add_column(name, [""] * len(data), feature=DOCUMENT_FEATURES[name])
    return data


def _read_batch(batch: dict[str, list], indices: list[int], text_column: str | None, version: int) -> dict[str, list]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    found = [_as_document(row, text_column, _describe_row(index)) for index, row in zip(indices, rows, strict=True)]
    return {name: [document[name] for document in found if document is not None] for name in DOCUMENT_FEATURES}


def _as_document(row: dict, text_column: str | None, place: str, name: str = "") -> dict[str, str] | None:
    """The document of a row, `None` for a blank one."""
    text, is_chat = read_document(row, text_column, place)
    return {"text": text, "name": name, "chat": place if is_chat else ""} if text.strip() else None


def _describe_row(number: int) -> str:
    return f"the data set, row {number}"


def _pick_split(data: DatasetDict | IterableDatasetDict, split: str) -> Dataset | IterableDataset:
    if split not in data:
        raise ValueError(f"The data has no split {split!r}; its splits are {', '.join(data)}. Name one with split.")
    return data[split]


def _looks_like_path(data: str | Path) -> bool:
    """Whether `data` cannot be the name of a data set on the Hub, which is `name` or `owner/name`."""
    return (
        isinstance(data, Path)
        or data.startswith((".", "/", "~"))
        or data.endswith("/")
        or data.count("/") > 1
        or "\\" in data
        or kind_of(Path(data)) is not None
    )


def _is_saved_data_set(folder: Path) -> bool:
    """Whether `save_to_disk` wrote `folder`: a data set, or several splits."""
    is_single = (folder / "dataset_info.json").exists() and (folder / "state.json").exists()
    return is_single or (folder / "dataset_dict.json").exists()


def _is_data_set_repository(folder: Path) -> bool:
    card = folder / "README.md"
    return (
        card.is_file() and _DATA_SET_CARD.match(card.read_text("utf-8", "replace").replace("\ufeff", "")) is not None
    )


def _iterate_documents(parts: Iterable[_Part]) -> Iterator[dict[str, str]]:
    for part, text_column in parts:
        is_table = isinstance(part, (Dataset, IterableDataset))
        rows = _iterate_rows(part, text_column) if is_table else iterate_file(part[0], text_column)
        for row, place, is_whole_file in rows:
            document = _as_document(row, text_column, place, part[1] if is_whole_file else "")
            if document is not None:
                yield document


def _iterate_rows(data: Dataset | IterableDataset, text_column: str | None) -> Iterator[tuple[dict, str, bool]]:
    names = data.column_names
    if names is None:  # a streamed data set may not know its columns before its first row
        names = list(next(data.iter(1), {text_column or "text": []}))
    columns = find_columns(names, text_column, "The data set")
    for number, row in enumerate(iterate_table(data.select_columns(columns))):
        yield row, _describe_row(number), False


def _stdlib_files(root: Path) -> list[Path]:
    return sorted(
        file
        for file in root.rglob("*.py")
        if not _STDLIB_SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)
        and not file.name.startswith("_sysconfigdata")
        and not file.relative_to(root).parts[0].startswith("config-")
    )


def _describe(data) -> str:
    return repr(str(data)) if isinstance(data, (str, Path)) else f"set of type {type(data).__name__}"
