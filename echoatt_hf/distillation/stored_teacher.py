"""What a teacher says of each token of a text, kept in files: its top-k log-probabilities, for distillation without it."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.checks import check_no_nan, find_tokenizer, hash_tokenizer, hash_weights
from ..models.devices import explained_memory_errors, processes
from ..models.heads import OutputHead, predict
from ..models.inference import inference
from ..outputs.files import hash_file, write_whole
from ..outputs.provenance import describe_environment
from ..text.rows import ANSWERS, ROW_COLUMNS, TARGET_MASKS, stack_rows
from .losses import keep_top
from .served_teacher import ServedTeacher


__all__ = ["StoredTeacher", "write_stored_teacher"]

KEPT_COLUMNS = (*ROW_COLUMNS, ANSWERS)
"""What a store keeps of a row."""

MANIFEST = "manifest.json"
FORMAT = 1
MISSING_MASS = "one outcome: the last of the k + 1 log-probabilities is that of all other tokens together"


class StoredTeacher(torch.utils.data.Dataset):
    """
    Rows of a text with what a teacher says of them, read from files row by row as they are asked for.

    A data set for [`EchoAttTrainer`], which then needs no teacher. A row has `input_ids` `(T,)`, `position_ids` `(T,)` and
    `assistant_masks` `(T,)` if the rows that were stored had them, `teacher_ids` `(T, k)`, the k tokens the teacher finds most likely to come next, and `teacher_logprobs` `(T, k + 1)`, float16, their
    log-probabilities at temperature 1 in nats and, last, that of all other tokens together.

    Of several processes the main one of each machine checks the files.

    Args:
        folder (`str` or `Path`):
            Folder that [`write_stored_teacher`] or `echoatt store-teacher` wrote.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar while the files are checked.

    Attributes:
        manifest (`dict`): what the store was made of and how.
        held_out_rows (`list[dict]`): rows to evaluate on, of text that is not in the store.

    Raises:
        `FileNotFoundError`: the folder is no store, or one of its files is missing.
        `ValueError`: the store is not finished, or a file is not as it was written; the message names it.
    """

    def __init__(self, folder: str | Path, progress: bool = False):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if "data_sha256" not in self.manifest:
            raise ValueError(
                f"The stored teacher {str(folder)!r} is not finished: run the command again with --resume."
            )
        shards, held_out = self.manifest["shards"], self.manifest["held_out"]
        entries = [*shards, held_out] if processes().is_local_main_process else []
        for entry in tqdm(entries, desc="check the stored teacher", disable=not progress, leave=False):
            _check_file(self.folder, entry, "restore it from a copy, or make the store anew")
        self._ends = np.cumsum([shard["rows"] for shard in shards]).tolist()
        columns = _read_columns(self.folder / held_out["file"])
        self.held_out_rows = [
            dict(zip(columns, row, strict=True)) for row in zip(*map(np.ndarray.tolist, columns.values()), strict=True)
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        shard = self.manifest["shards"][number]
        place = index - self._ends[number] + shard["rows"]
        with safe_open(self.folder / shard["file"], framework="numpy") as file:
            return {name: file.get_slice(name)[place] for name in file.keys()}  # noqa: SIM118 - no mapping

    def check_student(self, student: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """
        Check that a student can learn from the store.

        Args:
            student (`nn.Module`): the model that is to be trained.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer; the one that was saved with it if not given.

        Raises:
            `ValueError`: it has another vocabulary or tokenizer than the teacher, or a context shorter than a row.
        """
        config, manifest = student.config.get_text_config(), self.manifest
        tokenizer = tokenizer if tokenizer is not None else find_tokenizer(student)
        if tokenizer is not None:
            self._check_hash("tokenizer_sha256", hash_tokenizer(tokenizer), "tokenizer")
        sizes = config.vocab_size, manifest["vocab_size"]
        # With one tokenizer vocabularies differ by padding.
        if sizes[0] != sizes[1] and (tokenizer is None or len(tokenizer) > min(sizes)):
            raise ValueError(
                f"The student has {sizes[0]} tokens and the stored teacher {sizes[1]}: give a store made from the student's "
                "own teacher, or the student's tokenizer, if it is that of the store."
            )
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and manifest["row_length"] > context:
            raise ValueError(
                f"The rows of the stored teacher have {manifest['row_length']} tokens, but the student's context is "
                f"{context}: make a store with shorter rows."
            )

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        """
        Check that a model is the one the store was made from. Raises `ValueError` if its weights differ. Those of a served
        teacher are not known: there it must find the same next token the likeliest for half of the first row at least.
        """
        if "server" in self.manifest:
            row = {name: value[None] for name, value in self[0].items()}
            with inference(teacher):
                _, ids = _ask(teacher, None, {name: row[name] for name in ROW_COLUMNS if name in row}, 1)
            agreement = float((ids[..., 0] == row["teacher_ids"][..., 0]).mean())
            if agreement < 0.5:
                raise ValueError(
                    f"The stored teacher {str(self.folder)!r} was made from another teacher, in a server: of the first row the "
                    f"one given finds the same next token the likeliest in {agreement:.0%} of places. Give the one it was "
                    "made with, or make the store anew."
                )
            return
        self._check_hash("teacher_sha256", hash_weights(teacher), "teacher")

    def _check_hash(self, name: str, found: str, what: str) -> None:
        expected = self.manifest[name]
        if found != expected:
            raise ValueError(
                f"The stored teacher {str(self.folder)!r} was made with another {what}: its {name} is {expected[:12]}, that "
                f"of the {what} given is {found[:12]}. Give the one it was made with, or make the store anew."
            )


def write_stored_teacher(
    folder: str | Path,
    teacher: PreTrainedModel | ServedTeacher,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict],
    held_out_rows: Iterable[dict] = (),
    *,
    top_k: int = 64,
    shard_rows: int = 512,
    batch_size: int = 8,
    about: dict | None = None,
    progress: bool = False,
) -> dict:
    """
    Write what a teacher says of each token of some rows, to be read as a [`StoredTeacher`].

    The folder holds `manifest.json`, `held_out.safetensors` and the shards `shard-00000.safetensors`, ..., each written
    whole or not at all. Shards that are there, of a run that was stopped, are checked and kept, and the store becomes byte
    for byte what it would have become without the stop.

    Args:
        folder (`str` or `Path`):
            Where to write, or to go on.
        teacher (`PreTrainedModel` or [`ServedTeacher`]):
            Causal language model, loaded here or in a server. What a server says may depend in the last digits on how many
            requests it had at once.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, by which a store and a student are found to belong together.
        rows (iterable of `dict`):
            Rows of T tokens each, as returned by [`pack_rows`].
        held_out_rows (iterable of `dict`, *optional*):
            Rows to evaluate on, which go along without what the teacher says of them.
        top_k (`int`, *optional*, defaults to 64):
            Tokens whose log-probabilities are kept, k, at each position.
        shard_rows (`int`, *optional*, defaults to 512):
            Rows in a shard, which is what a stopped run can lose.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass; of a served teacher, requests at once.
        about (`dict`, *optional*):
            What else the manifest should say.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `dict`: content of `manifest.json`.

    Raises:
        `ValueError`: there are no rows, they differ in length or bring labels or masks of padding or completions, `top_k` does not fit the
            vocabulary, the teacher gives NaN or has weights that are NaN, or the store that is there was made of something
            else or has a file that is not as it was written.
    """
    folder, iterator = Path(folder), iter(rows)
    first = next(iterator, None)
    if first is None:
        raise ValueError("There are no rows to store: give text that fills at least one row.")
    _check_storable(teacher, first, top_k)
    dtypes = _find_dtypes(teacher, first)
    described = _describe_store(teacher, tokenizer, first, dtypes, top_k, shard_rows)
    # `about` is of settings, which another version has more or fewer of. Kept rows are compared themselves.
    shards, data_hash = _finished_shards(folder, described), hashlib.sha256()
    header = (about or {}) | described
    total = len(rows) if isinstance(rows, Sized) else None
    bar = tqdm(total=total, unit=" rows", desc="store the teacher", disable=not progress, leave=False)
    with bar, _answering(teacher, top_k, batch_size) as ask:
        for number, columns in enumerate(_stack_shards(chain([first], iterator), dtypes, shard_rows)):
            for values in columns.values():
                data_hash.update(values.astype("<i4").tobytes())
            file = folder / f"shard-{number:05}.safetensors"
            if number < len(shards) and file.exists():
                _check_kept(folder, shards[number], columns)
                bar.update(len(columns["input_ids"]))
                continue
            ids, logprobs = _answer_shard(ask, columns, number * shard_rows, bar)
            entry = _write_arrays(
                file, **columns, teacher_ids=ids.astype(header["id_dtype"]), teacher_logprobs=logprobs
            )
            entry["rest_mass"] = round(float(np.exp(logprobs[..., -1], dtype=np.float64).mean()), 6)
            shards[number : number + 1] = [entry]
            _write_manifest(folder, header | {"shards": shards})
    if len(shards) > number + 1:
        raise ValueError(f"The text has fewer rows than the store {str(folder)!r}: start anew with --overwrite.")
    held_out_rows = list(held_out_rows)
    held_out = {name: np.asarray([row[name] for row in held_out_rows], dtype) for name, dtype in dtypes.items()}
    count = sum(shard["rows"] for shard in shards)
    manifest = header | {
        "rows": count,
        "tokens": count * header["row_length"],
        "rest_mass": round(sum(shard["rest_mass"] * shard["rows"] for shard in shards) / count, 6),
        "data_sha256": data_hash.hexdigest(),
        "held_out": _write_arrays(folder / "held_out.safetensors", **held_out),
        "shards": shards,
        "environment": describe_environment(),
    }
    _write_manifest(folder, manifest)
    return manifest


def _check_storable(teacher: PreTrainedModel | ServedTeacher, row: dict, top_k: int) -> None:
    """Raise `ValueError` if a store cannot keep such rows, or so many tokens of such a teacher."""
    if others := [name for name in ("labels", "attention_mask", *TARGET_MASKS) if name in row and name != ANSWERS]:
        raise ValueError(
            f"The rows bring {' and '.join(others)}, which a store does not keep: its rows are packed, and what to learn from "
            f"is in {ANSWERS}, if not all. Leave the columns out, or distil from the teacher itself."
        )
    vocab_size = teacher.config.get_text_config().vocab_size
    if not 1 <= top_k < vocab_size:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to {vocab_size - 1}, one less than the vocabulary has.")


def _find_dtypes(teacher: PreTrainedModel | ServedTeacher, row: dict) -> dict[str, np.dtype]:
    """The columns of such rows that are kept, with the smallest types that hold them."""
    id_dtype = np.uint16 if teacher.config.get_text_config().vocab_size <= 2**16 else np.int32
    dtypes = {"input_ids": id_dtype, "position_ids": np.int32, ANSWERS: np.uint8}
    return {name: np.dtype(dtype) for name, dtype in dtypes.items() if name in row}


def _describe_store(
    teacher: PreTrainedModel | ServedTeacher,
    tokenizer: PreTrainedTokenizerBase,
    row: dict,
    dtypes: dict[str, np.dtype],
    top_k: int,
    shard_rows: int,
) -> dict:
    """What the manifest says before anything is stored. Raises `ValueError` if the teacher's answers cannot be right."""
    if isinstance(teacher, ServedTeacher):
        teacher.check_answers(tokenizer, row, top_k)
        described = {"server": teacher.about}
    else:
        check_no_nan(teacher, "teacher")
        described = {
            "teacher_sha256": hash_weights(teacher),
            "teacher_dtype": str(teacher.dtype).removeprefix("torch."),
        }
    id_dtype, sizes = dtypes["input_ids"], [dtype.itemsize for dtype in dtypes.values()]
    return {
        "format": FORMAT,
        **described,
        "tokenizer_sha256": hash_tokenizer(tokenizer),
        "vocab_size": teacher.config.get_text_config().vocab_size,
        "row_length": len(row["input_ids"]),
        "columns": list(dtypes),
        "shard_rows": shard_rows,
        "top_k": top_k,
        "temperature": 1.0,
        "missing_mass": MISSING_MASS,
        "logprob_dtype": "float16",
        "id_dtype": id_dtype.name,
        # k + 1 log-probabilities and k ids, and what the row itself has
        "bytes_per_token": (top_k + 1) * 2 + top_k * id_dtype.itemsize + sum(sizes),
    }


_Answers = Callable[[dict[str, np.ndarray]], Iterator[tuple[np.ndarray, np.ndarray]]]
"""From the columns `(R, T)` of rows to what a teacher says of them, part by part, see `_ask`."""


def _answer_shard(
    ask: _Answers, columns: dict[str, np.ndarray], first_row: int, bar: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `(R, T, k)` and log-probabilities `(R, T, k + 1)`. Raises `ValueError` with the row where one is NaN."""
    answers = []
    for answer in ask(columns):
        answers.append(answer)
        bar.update(len(answer[0]))
    logprobs, ids = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    if np.isnan(logprobs).any():
        row = int(np.isnan(logprobs).any((1, 2)).argmax())
        raise ValueError(
            f"The teacher gives NaN for row {first_row + row}, which begins with the tokens {columns['input_ids'][row, :8]}: "
            "load it in float32 or another dtype, or leave the text out."
        )
    return ids, logprobs


@contextmanager
def _answering(teacher: PreTrainedModel | ServedTeacher, top_k: int, batch_size: int) -> Iterator[_Answers]:
    """A function that asks the teacher."""
    if isinstance(teacher, ServedTeacher):
        with teacher.answering(top_k, batch_size) as ask:
            yield ask
        return
    remedy = f"a forward pass has batch_size {batch_size} rows. Give a smaller one, and go on where this run ended"
    with explained_memory_errors(remedy), inference(teacher):
        head = OutputHead.find(teacher, among_processes=False)

        def ask(columns: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start in range(0, len(columns["input_ids"]), batch_size):
                part = {name: values[start : start + batch_size] for name, values in columns.items()}
                yield _ask(teacher, head, part, top_k)

        yield ask


def _ask(
    teacher: PreTrainedModel, head: OutputHead | None, columns: dict[str, np.ndarray], top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `(B, T, k + 1)`, float16, and token ids `(B, T, k)`, the likeliest first, for rows `(B, T)`."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    logits = predict(teacher, head, stack_rows(rows))
    kept = zip(*(keep_top(logits(tokens), top_k) for tokens in logits.chunks()), strict=True)
    logprobs, ids = (torch.cat(parts).unflatten(0, (len(rows), -1)).cpu().numpy() for parts in kept)
    return logprobs, ids


def _stack_shards(
    rows: Iterator[dict], dtypes: dict[str, np.dtype], shard_rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """The columns `(R, T)` of `shard_rows` rows at a time."""
    length = None
    while shard := list(islice(rows, shard_rows)):
        length = length or len(shard[0]["input_ids"])
        if other := {len(row["input_ids"]) for row in shard} - {length}:
            raise ValueError(f"Rows have {length} and {other.pop()} tokens: all must be as long, see pack_rows.")
        yield {name: np.asarray([row[name] for row in shard], dtype) for name, dtype in dtypes.items()}


def _finished_shards(folder: Path, header: dict) -> list[dict]:
    """Entries of the shards that are there, of a store that must have been begun with the same header."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (".*.safetensors.*", f".{MANIFEST}.*"):  # what a killed run was writing
        for file in folder.glob(pattern):
            file.unlink()
    if not (folder / MANIFEST).exists():
        return []
    found = _read_manifest(folder)
    if changed := [name for name, value in header.items() if found.get(name) != value]:
        raise ValueError(
            f"The store {str(folder)!r} was made of something else: {', '.join(changed)} changed. Start anew "
            "with --overwrite."
        )
    return found["shards"]


def _check_kept(folder: Path, entry: dict, columns: dict[str, np.ndarray]) -> None:
    _check_file(folder, entry, "delete it, and the same command with --resume makes it anew")
    kept = _read_columns(folder / entry["file"])
    if not all(np.array_equal(kept[name], values) for name, values in columns.items()):
        raise ValueError(
            f"The rows of {str(folder / entry['file'])!r} are not those of the text any more: start anew with --overwrite."
        )


def _check_file(folder: Path, entry: dict, remedy: str) -> None:
    """Check that a file is as it was written. Raises `FileNotFoundError` or `ValueError`, which name it and the remedy."""
    path = folder / entry["file"]
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} of the stored teacher is missing: {remedy}.")
    if hash_file(path) != entry["sha256"]:
        size = path.stat().st_size
        found = "its content has changed" if size == entry["bytes"] else f"{size:,} of {entry['bytes']:,} bytes"
        raise ValueError(f"{str(path)!r} of the stored teacher is corrupt ({found}): {remedy}.")


def _read_columns(file: Path) -> dict[str, np.ndarray]:
    """What a file holds of the rows themselves."""
    with safe_open(file, framework="numpy") as tensors:
        return {name: tensors.get_tensor(name) for name in KEPT_COLUMNS if name in tensors.keys()}  # noqa: SIM118


def _write_arrays(file: Path, **arrays: np.ndarray) -> dict:
    """Write a file whole; its entry in the manifest."""
    data = save(arrays)
    write_whole(file, data)
    return {
        "file": file.name,
        "rows": len(arrays["input_ids"]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _read_manifest(folder: Path) -> dict:
    file = folder / MANIFEST
    if not file.exists():
        raise FileNotFoundError(
            f"{str(folder)!r} is no stored teacher, it has no {MANIFEST}: run `echoatt store-teacher`."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} is not the manifest of a stored teacher ({error}): make the store anew."
        ) from None
    if version != FORMAT:
        raise ValueError(f"{str(file)!r} has the format {version}, this version reads {FORMAT}: make the store anew.")
    return manifest


def _write_manifest(folder: Path, manifest: dict) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
