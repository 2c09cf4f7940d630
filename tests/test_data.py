import csv
import gzip
import json
import logging
import pickle
import shutil
import sysconfig
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_teacher, plan_of, train_byte_level_bpe
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainerCallback

from echoatt_hf import EchoAttTrainer, EchoAttTrainingArguments, compute_perplexity, convert
from echoatt_hf.distillation.stored_teacher import write_stored_teacher
from echoatt_hf.evaluation.zero_shot import read_zero_shot_tasks
from echoatt_hf.pipeline import steps, training
from echoatt_hf.pipeline.preparation import load_calibration_rows, load_held_out_rows, load_rows
from echoatt_hf.settings import (
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DataSource,
    ScoringSettings,
    StudentSettings,
)
from echoatt_hf.text import rows as rows_module
from echoatt_hf.text.documents import STDLIB, load_documents, split_documents
from echoatt_hf.text.rows import collate_rows, draw_rows, mix_rows, pack_rows, sample_rows, shuffle_rows, stack_rows


pytestmark = [pytest.mark.once, pytest.mark.usefixtures("own_datasets_cache")]

TEXTS = [
    "A first story.\nIt has two lines.",
    "Second one: ünïcödé 🙂.",
    "The third is the last of them, and the longest.",
]
EOS, BOS = "<|endoftext|>", "<s>"


def make_tokenizer(bos: bool = False, eos: bool = True, **options) -> PreTrainedTokenizerFast:
    tokenizer = train_byte_level_bpe(TEXTS, 300, [EOS, BOS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    special = {"bos_token": BOS} | ({"eos_token": EOS} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special, **options)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def library_log(caplog):
    """What transformers and datasets log, whose loggers do not propagate."""
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def text_file(folder: Path):
    path = folder / "story.txt"
    path.write_text(TEXTS[0], encoding="utf-8")
    return path, TEXTS[:1]


def text_file_with_separators(folder: Path):
    path = folder / "stories.txt"
    path.write_text(f"\n{EOS}\n".join(["", *TEXTS[:2], f"   \n{EOS}", TEXTS[2]]), encoding="utf-8")
    return str(path), TEXTS


def text_file_from_windows(folder: Path):
    path = folder / "STORIES.TXT"
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{EOS}\r\n".join(TEXTS).replace("\nIt", "\r\nIt").encode())
    return path, TEXTS


def json_lines_file(folder: Path):
    path = folder / "stories.jsonl"
    rows = [{"id": index, "text": text} for index, text in enumerate([TEXTS[0], "", None, *TEXTS[1:]])]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path, TEXTS


def json_array_file(folder: Path):
    path = folder / "stories.JSON"
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=2), encoding="utf-8")
    return path, TEXTS


def parquet_file(folder: Path):
    path = folder / "stories.Parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None, " \n"], "id": [1, 2, 3, 4, 5]}), path)
    return path, TEXTS


def folder_of_files(folder: Path):
    (folder / "nested/.hidden").mkdir(parents=True)
    (folder / "a.md").write_text(TEXTS[0], encoding="utf-8")
    (folder / "b.txt").write_text(TEXTS[1], encoding="utf-8")
    (folder / "nested/c.py").write_text(TEXTS[2], encoding="utf-8")
    (folder / "nested/.hidden/d.txt").write_text("hidden", encoding="utf-8")
    (folder / "blank.txt").write_text(" \n", encoding="utf-8")
    return folder, TEXTS


def folder_of_rows(folder: Path):
    (folder / "part").mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": TEXTS[0]}), encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": TEXTS[1]}).encode()))
    (folder / "part/c.csv").write_text(f'id,text\n1,"{TEXTS[2]}"\n', encoding="utf-8")
    for name in ("README.md", "LICENSE.txt", "convert.py", "image.png", "dataset_infos.json"):
        (folder / name).write_text("{}")
    return folder, TEXTS


def compressed_text_file(folder: Path):
    path = folder / "stories.txt.gz"
    path.write_bytes(gzip.compress(f"\n{EOS}\n".join(TEXTS).encode()))
    return path, TEXTS


def zstandard_json_lines_file(folder: Path):
    path = folder / "stories.jsonl.zst"
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    with pa.output_stream(path, compression="zstd") as stream:
        stream.write(lines.encode())
    return path, TEXTS


def csv_file(folder: Path):
    path = folder / "stories.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["text", "id"], [TEXTS[0], 1], ["", 2], ["NA", 3], ["12", 4], [TEXTS[1], 5]])
    return path, [TEXTS[0], "NA", "12", TEXTS[1]]


def tsv_file(folder: Path):
    path = folder / "stories.tsv"
    path.write_text("id\ttext\n" + "".join(f"1\t{text}\n" for text in TEXTS[1:]), encoding="utf-8")
    return path, TEXTS[1:]


def saved_data_set(folder: Path):
    Dataset.from_dict({"id": [1, 2, 3], "text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved", TEXTS


def saved_data_set_with_splits(folder: Path):
    splits = {"train": Dataset.from_dict({"text": TEXTS}), "test": Dataset.from_dict({"text": ["other"]})}
    DatasetDict(splits).save_to_disk(folder / "saved")
    return str(folder / "saved"), TEXTS


def data_set_repository(folder: Path):
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: data/train.jsonl}\n  - {split: test, path: data/test.jsonl}\n"
        "---\n# A card, which is no text to train on\n"
    )
    (folder / "data").mkdir()
    for split, texts in {"train": TEXTS, "test": ["other"]}.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"data/{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder, TEXTS


def data_set(folder: Path):
    return Dataset.from_dict({"text": ["dropped", *TEXTS, ""], "id": [0, 1, 2, 3, 4]}).select([1, 2, 3, 4]), TEXTS


def data_set_with_splits(folder: Path):
    return DatasetDict(test=Dataset.from_dict({"text": ["other"]}), train=Dataset.from_dict({"text": TEXTS})), TEXTS


def streamed_data_set(folder: Path):
    return Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).to_iterable_dataset(num_shards=2), TEXTS


def streamed_data_set_of_unknown_columns(folder: Path):
    return IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)), TEXTS


def several_sources(folder: Path):
    path = folder / "story.txt"
    path.write_text(TEXTS[0], encoding="utf-8")
    return (part for part in [str(path), Dataset.from_dict({"text": [TEXTS[1]]}), parquet_file(folder)[0]]), [
        *TEXTS[:2],
        *TEXTS,
    ]


SOURCES = [
    text_file,
    text_file_with_separators,
    text_file_from_windows,
    json_lines_file,
    json_array_file,
    parquet_file,
    folder_of_files,
    folder_of_rows,
    compressed_text_file,
    zstandard_json_lines_file,
    csv_file,
    tsv_file,
    saved_data_set,
    saved_data_set_with_splits,
    data_set_repository,
    data_set,
    data_set_with_splits,
    streamed_data_set,
    streamed_data_set_of_unknown_columns,
    several_sources,
]


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_kind_of_source_loads_and_streams_alike(source, tmp_path, tokenizer, library_log):
    data, expected = source(tmp_path)
    before = files_in(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        documents = load_documents(data)
        data = source(_emptied(tmp_path))[0]
        streamed = load_documents(data, streaming=True)
        assert isinstance(streamed, IterableDataset)
        assert [document["text"] for document in documents] == expected
        assert list(streamed) == list(documents)
        rows = list(pack_rows(documents, tokenizer, 7))
        assert list(pack_rows(streamed, tokenizer, 7)) == rows
        assert rows
    assert files_in(tmp_path) == before, "nothing is written next to the data"
    assert bool(library_log.records) == (source is folder_of_rows), "which leaves files out"


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("source", [data_set, streamed_data_set], ids=lambda source: source.__name__)
def test_a_streamed_data_set_stays_streamed(source, tmp_path):
    data, _ = source(tmp_path)
    assert type(load_documents(data)) is type(data)
    assert isinstance(load_documents([data, text_file(tmp_path)[0]]), type(data))


def test_text_column(tmp_path):
    table = Dataset.from_dict({"text": ["no"] * 3, "content": TEXTS})
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "b.parquet")
    table.save_to_disk(tmp_path / "saved")
    for data in (table, table.to_iterable_dataset(), *(tmp_path / name for name in ("a.jsonl", "b.parquet", "saved"))):
        assert [document["text"] for document in load_documents(data, text_column="content")] == TEXTS


def test_split_of_a_data_set_that_has_several(tmp_path):
    for source in (saved_data_set_with_splits, data_set_repository, data_set_with_splits):
        data, _ = source(_emptied(tmp_path))
        assert load_documents(data, split="test")["text"][:] == ["other"]


def test_documents_are_named_after_whole_files(tmp_path):
    folder_of_files(tmp_path)
    (tmp_path / "many.txt").write_text(f"one\n{EOS}\ntwo\n", encoding="utf-8")
    names = {document["text"].strip(): document["name"] for document in load_documents(tmp_path)}
    assert names == {TEXTS[0]: "a.md", TEXTS[1]: "b.txt", TEXTS[2]: "nested/c.py", "one": "", "two": ""}
    assert load_documents(tmp_path / "a.md")["name"][:] == ["a.md"]


def test_only_a_line_of_its_own_separates(tmp_path):
    text = f"the token {EOS} in a line\n{EOS}.\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert load_documents(tmp_path / "a.txt")["text"][:] == [text]


def test_stdlib():
    documents = load_documents(STDLIB)
    names = documents["name"][:]
    root = Path(sysconfig.get_path("stdlib"))
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert documents[names.index("abc.py")]["text"] == (root / "abc.py").read_text(encoding="utf-8")
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages"}.intersection(name.split("/"))
        assert "_sysconfigdata" not in name
    train, held_out = split_documents(documents)
    assert sorted([*train["name"], *held_out["name"]]) == sorted(names)
    assert held_out["name"][:] == split_documents(load_documents(STDLIB))[1]["name"][:]


def make_documents(texts: list[str], names: list[str] | None = None) -> Dataset:
    return Dataset.from_dict({"text": texts, "name": names or [""] * len(texts)})


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("count", range(2, 11))
def test_both_sides_of_a_split_hold_documents(count, fraction):
    texts = [f"document {index}" for index in range(count)]
    train, held_out = split_documents(make_documents(texts), fraction)
    assert len(train) and len(held_out)
    assert sorted([*train["text"], *held_out["text"]]) == sorted(texts), "whole documents, each on one side"


def test_split_holds_out_about_the_fraction():
    documents = make_documents([f"document {index}" for index in range(2000)])
    assert 150 < len(split_documents(documents, 0.1)[1]) < 250


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by text"])
def test_split_is_stable_when_documents_are_reordered_added_or_streamed(named):
    def make(indices):
        texts = [f"document {index}" for index in indices]
        return make_documents(texts, [f"{index}.txt" for index in indices] if named else None)

    few, held_out = (part["text"][:] for part in split_documents(make(range(100)), 0.2))
    train_of_more, held_out_of_more = (part["text"][:] for part in split_documents(make(range(199, -1, -1)), 0.2))
    assert set(held_out) <= set(held_out_of_more)
    assert set(few) <= set(train_of_more)
    streamed = split_documents(make(range(100)).to_iterable_dataset(), 0.2)
    assert [[document["text"] for document in part] for part in streamed] == [few, held_out]


def test_split_does_not_depend_on_the_place_in_a_file(tmp_path):
    texts = [f"story {index}" for index in range(40)]
    sides = []
    for order in (texts, ["one more", *texts[::-1]]):
        (tmp_path / "a.txt").write_text(f"\n{EOS}\n".join(order), encoding="utf-8")
        sides.append({document["text"] for document in split_documents(load_documents(tmp_path), 0.3)[1]})
    assert sides[0] == sides[1] - {"one more"}


def test_split_keeps_copies_of_a_document_on_one_side():
    train, held_out = split_documents(make_documents(["a", "b", "b ", "a\n", "a"]), 0.5)
    assert not {text.strip() for text in train["text"]} & {text.strip() for text in held_out["text"]}


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bos": True}, {"eos": False}, {"bos": True, "eos": False}],
    ids=["eos", "bos and eos", "neither", "bos"],
)
def test_rows_join_to_the_tokenization_of_the_documents(options, streaming):
    tokenizer = make_tokenizer(**options)
    expected = []
    for text in TEXTS * 4:
        expected += ([tokenizer.bos_token_id] if options.get("bos") else []) + tokenizer.encode(
            text, add_special_tokens=False
        )
        expected += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = load_documents(Dataset.from_dict({"text": TEXTS * 4}), streaming=streaming)
    rows = pack_rows(documents, tokenizer, 10, row_start="text")
    for _ in range(2):  # rows can be read again
        read = [row["input_ids"] for row in rows]
        assert {len(row) for row in read} == {10}
        assert sum(read, []) == expected[: len(expected) // 10 * 10]


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    (row,) = pack_rows(make_documents(["a", "b"]), tokenizer, 4)
    assert row["input_ids"] == [*tokenizer.encode("a"), *tokenizer.encode("b")]


def test_documents_longer_than_the_context_are_packed_without_a_warning(library_log):
    text = "word " * 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = pack_rows(make_documents([text]), make_tokenizer(), 64)
    assert len(rows) > 50
    assert not library_log.records
    make_tokenizer()(text)  # without verbose=False
    assert "longer than the specified maximum sequence length" in library_log.text


def test_streamed_rows_can_be_sent_to_a_worker_process(tokenizer, tmp_path):
    documents = load_documents([text_file_with_separators(tmp_path)[0], *[text_file(tmp_path)[0]] * 5], streaming=True)
    rows = pack_rows(split_documents(documents, 0.5)[0], tokenizer, 4)
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python's own, of a fork
def test_workers_of_a_data_loader_lose_no_document(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = [f"document {index}" for index in range(40)]
    for index, text in enumerate(texts[:10]):
        (tmp_path / f"{index}.txt").write_text(text)
    sharded = Dataset.from_dict({"text": texts[10:]}).to_iterable_dataset(num_shards=6)
    documents = load_documents([tmp_path, sharded], streaming=True)
    assert sorted(document["text"] for document in DataLoader(documents, batch_size=None, num_workers=2)) == sorted(
        texts
    )
    rows = pack_rows(documents, tokenizer, 8)
    assert list(DataLoader(rows, batch_size=None, num_workers=2)) == list(rows)


def test_streaming_reads_as_it_goes(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": TEXTS[0]}

    rows = pack_rows(load_documents(IterableDataset.from_generator(endless)), tokenizer, 8)
    assert len(list(rows.take(10))) == 10
    assert len(read) < 50


def test_collated_rows():
    batch = collate_rows([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"text", r"suffix '\.bin'; known are \.txt, .*\.parquet.*compressed, \.gz, \.zst"),
        ("a.jsonl.gz", b"text", r"a\.jsonl\.gz' cannot be decompressed"),
        ("a.parquet.gz", b"text", r"suffix '\.gz'; known are"),
        ("a.csv", b"id,body\n1,b\n", r"a\.csv' has no column 'text' or .*; its columns are id, body"),
        ("a.csv", b"text\n\xff\n", r"a\.csv', line \d: not ','-separated text \(.*utf-8"),
        ("a.jsonl", b'{"text": "\\udcb2"}', r"a\.jsonl', line 1: '\\udcb2', at character 0 .* surrogate pair.*mend"),
        ("a.json", b'[{"text": ""}, {"text": "a \\ud83d b"}]', r"a\.json', item 1: '\\ud83d', at character 2"),
        ("a.txt", b"text\xff", r"a\.txt' is not UTF-8 text \(byte 4\)"),
        ("a.txt", b" \n", r"a\.txt' holds no text"),
        ("a.jsonl", b"", r"a\.jsonl' holds no text"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}', r"a\.jsonl' holds no text"),
        ("a.jsonl", b'\n{"text": oops}\n', r"a\.jsonl', line 2: not JSON \(Expecting value\)"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl', line 1: not UTF-8"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl', line 1: str where an object should be"),
        ("a.json", b'[{"text": "a"},\n{]', r"a\.json', line 2: not JSON"),
        ("a.jsonl", b'{"body": "b", "id": 1}', r"line 1, has no column 'text' or .*; its columns are body, id\."),
        ("a.jsonl", b'{"text": ["a"]}', r"Column 'text' of .*a\.jsonl', line 1 holds list, not text"),
        ("a.parquet", b"text", r"a\.parquet' is not a parquet file"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, streaming, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_documents(tmp_path / name, streaming=streaming)
    assert "\n" not in str(error.value)


def test_a_broken_line_further_down_is_named_when_it_is_reached(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl', line 2: not JSON"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match=r"a\.jsonl', line 2: not JSON"):
        list(load_documents(tmp_path, streaming=True))


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_missing_columns_and_splits(streaming, tmp_path):
    table = Dataset.from_dict({"body": TEXTS, "id": [1, 2, 3]})
    table.to_parquet(tmp_path / "a.parquet")
    unknown = IterableDataset.from_generator(lambda: ({"body": text} for text in TEXTS))
    for data in (table, table.to_iterable_dataset(), tmp_path / "a.parquet", unknown):
        with pytest.raises(ValueError, match=r"has no column 'text' or .*; its columns are body.*text_column"):
            load_documents(data, streaming=streaming)
    with pytest.raises(ValueError, match=r"Column 'id' of the data set, row 0 holds int, not text"):
        load_documents(table, text_column="id", streaming=streaming)
    splits = DatasetDict(validation=table, test=table)
    splits.save_to_disk(tmp_path / "saved")
    for data in (splits, tmp_path / "saved"):
        with pytest.raises(ValueError, match=r"no split 'train'; its splits are validation, test"):
            load_documents(data, streaming=streaming)
    with pytest.raises(FileNotFoundError, match="(Unknown|Bad) split.*valid.*train.*test"):
        load_documents(data_set_repository(_emptied(tmp_path))[0], split="valid", streaming=streaming)


@pytest.mark.parametrize("data", ["no/such/file", "missing.txt", "./missing", "missing/", Path("owner/name"), "~/a"])
def test_a_missing_path_is_not_looked_for_on_the_hub(data, monkeypatch):
    monkeypatch.setattr("echoatt_hf.text.documents.load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_documents(data)


@pytest.mark.parametrize("data", ["no-such-data-set", "owner/no-such-data-set"])
def test_a_name_that_cannot_be_loaded(data, monkeypatch):
    def fail(path, name, split, revision, streaming):
        raise ConnectionError(f"Couldn't reach {path!r}\nand more")

    monkeypatch.setattr("echoatt_hf.text.documents.load_dataset", fail)
    message = r"neither a file or folder of text .* \(ConnectionError: Couldn't reach '[^\n]*'\)\..*'stdlib'"
    with pytest.raises(FileNotFoundError, match=message):
        load_documents(data)


def test_a_data_set_is_loaded_by_name_with_configuration_and_split(monkeypatch):
    def load(*arguments, **options):
        assert arguments == ("owner/name", "english")
        assert options == {"split": "train[:3]", "revision": "v1", "streaming": False}
        return Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr("echoatt_hf.text.documents.load_dataset", load)
    assert load_documents("owner/name", name="english", split="train[:3]", revision="v1")["text"][:] == TEXTS


def test_empty_data(tmp_path):
    with pytest.raises(ValueError, match="data is empty: give at least one file"):
        load_documents([])
    with pytest.raises(FileNotFoundError, match=r"neither a file or folder of text .*doesn't contain any data files"):
        load_documents(tmp_path)
    (tmp_path / "a.txt").touch()
    for data, name in ((tmp_path, tmp_path.name), (Dataset.from_dict({"text": []}), "set of type Dataset")):
        with pytest.raises(ValueError, match=f"{name}.* holds no text: give files with text in them"):
            load_documents(["stdlib", data])


@pytest.mark.parametrize("texts", [["only"], ["copy", "copy\n"]], ids=["one", "copies"])
def test_a_single_document_cannot_be_split(texts):
    with pytest.raises(ValueError, match="single document, of which nothing can be held out"):
        split_documents(make_documents(texts))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=f"held_out_fraction is {fraction}; it must be between 0 and 1"):
        split_documents(make_documents(TEXTS), fraction)


def test_rows_that_cannot_be_made(tokenizer):
    documents = make_documents(TEXTS)
    with pytest.raises(ValueError, match="row_length is 1; it must be at least 2"):
        pack_rows(documents, tokenizer, 1)
    with pytest.raises(ValueError, match="does not fill a row of 1000 tokens"):
        pack_rows(documents, tokenizer, 1000)
    with pytest.raises(ValueError, match="does not fill a row of 1000 tokens"):
        list(pack_rows(documents.to_iterable_dataset(), tokenizer, 1000))


@pytest.mark.parametrize("length", [2, 3])
def test_rows_have_place_for_more_than_their_beginning(length):
    """Rows of their beginning alone never come to the end of the text."""
    tokenizer, documents = make_tokenizer(), make_documents(TEXTS)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} {BOS} $A", special_tokens=[(BOS, bos)]
    )
    if length == 3:
        assert all(row["input_ids"][:2] == [bos, bos] for row in pack_rows(documents, tokenizer, length))
        return
    for made in (
        lambda: pack_rows(documents, tokenizer, length),
        lambda: pack_rows(documents.to_iterable_dataset(), tokenizer, length),
        lambda: draw_rows(documents, tokenizer, length, 4),
    ):
        with pytest.raises(ValueError, match="row_length is 2; it must be more than 2, the tokens with which"):
            made()
    assert len(pack_rows(documents, tokenizer, length, row_start="text"))


# What a folder holds


def test_what_of_a_folder_is_read_is_said(tmp_path, caplog):
    folder_of_rows(tmp_path)
    load_documents(tmp_path)
    (line,) = caplog.messages
    assert "3 files are read (1 .jsonl, 1 .jsonl.gz, 1 .csv)" in line
    assert "left out: LICENSE.txt, README.md, convert.py, dataset_infos.json, image.png" in line
    caplog.clear()
    folder_of_files(_emptied(tmp_path))
    for number in range(7):
        (tmp_path / f"chunk_{number}.bin").touch()
    load_documents(tmp_path)
    (line,) = caplog.messages
    assert "4 files are read (2 .txt, 1 .md, 1 .py); left out: chunk_0.bin, " in line and line.endswith(" and 2 more")


# Where text comes from


@pytest.fixture
def model(tokenizer):
    return make_teacher(vocab_size=len(tokenizer), max_position_embeddings=64)


def words_of(rows, tokenizer) -> set[str]:
    """The words of rows, but those at their ends, which may be cut."""
    return {
        word for row in rows for word in tokenizer.decode(row["input_ids"]).replace(EOS, " ").split(" ")[1:-1] if word
    }


def find_words(settings: DataSettings, tokenizer, model) -> tuple[set[str], set[str]]:
    rows, held_out = load_rows(settings, tokenizer, model)
    assert load_held_out_rows(settings, tokenizer, model) == held_out
    return words_of(rows, tokenizer), words_of(held_out, tokenizer)


def two_splits(folder: Path) -> str:
    data_set_repository(folder)
    for split, word in (("train", "train"), ("test", "exam")):
        lines = [json.dumps({"text": f"{word} " * 20, "body": f"{word}! " * 20}) for _ in range(4)]
        (folder / f"data/{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_a_split_of_the_data_is_held_out(streaming, tmp_path, tokenizer, model):
    repository, options = two_splits(tmp_path), {"row_length": 16, "streaming": streaming}
    test_file = str(tmp_path / "data/test.jsonl")
    for data in (
        DataSettings(data=[repository], held_out_split="test", **options),
        DataSettings(data=[repository], held_out_data=[repository], held_out_split="test", **options),
        DataSettings(data=[repository], held_out_data=[test_file], **options),
    ):
        assert find_words(data, tokenizer, model) == ({"train"}, {"exam"})
    swapped = DataSettings(
        data=[repository], data_split="test", held_out_split="train", held_out_text_column="body", **options
    )
    assert find_words(swapped, tokenizer, model) == ({"exam"}, {"train!"})


def test_held_out_text_is_described_as_the_data_is():
    data = DataSettings(
        data=["a/b"], data_name="english", data_revision="v1", text_column="body", held_out_split="test"
    )
    assert data.sources == [DataSource("a/b", "english", "train", "v1", "body")]
    assert data.held_out_sources == [DataSource("a/b", "english", "test", "v1", "body")]
    assert DataSettings().held_out_sources is None
    data = DataSettings(held_out_data=["c:2"], held_out_name="german", held_out_revision="v2")
    assert data.held_out_sources == [DataSource("c", "german", "train", "v2", None, 2.0)]


def test_text_to_train_on_is_not_held_out(tmp_path, tokenizer, model):
    repository = two_splits(tmp_path)
    file = str(tmp_path / "data/train.jsonl")
    saved = str(saved_data_set(tmp_path)[0])
    for data, held_out in (
        ([repository], [repository]),
        ([file], [str(tmp_path / "data/../data/train.jsonl")]),
        ([str(tmp_path / "data")], [file]),
        ([saved, file], [saved]),
        ([STDLIB], [STDLIB]),
    ):
        settings = DataSettings(data=data, held_out_data=held_out, row_length=16)
        for load in (load_rows, load_held_out_rows):
            with pytest.raises(ValueError, match=r"held_out_data .* is text to train on too.*another file or split"):
                load(settings, tokenizer, model)


# Weights of sources


def test_weights_of_sources(tmp_path):
    odd = tmp_path / "a:3"
    odd.write_text("x")
    settings = DataSettings(data=["a.txt:3", "b:0.5", "owner/name", str(odd)])
    assert [(source.path, source.weight) for source in settings.sources] == [
        ("a.txt", 3.0), ("b", 0.5), ("owner/name", None), (str(odd), None),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="weight of 'a' is 0; it must be above 0"):
        DataSettings(data=["a:0"])


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_rows_are_drawn_by_weight(streaming, tmp_path, tokenizer, model):
    for name in ("aaa", "bbb"):
        (tmp_path / f"{name}.txt").write_text(f"\n{EOS}\n".join(f"{name} {number} " * 20 for number in range(60)))
    data = DataSettings(
        data=[f"{tmp_path / 'aaa.txt'}:3", str(tmp_path / "bbb.txt")], row_length=16, streaming=streaming,
        held_out_fraction=0.3, evaluation_rows=40,
    )  # fmt: skip
    train, held_out = load_rows(data, tokenizer, model)
    settings = CompressionSettings(data=data, calibration=CalibrationSettings(calibration_rows=80))
    calibration = load_calibration_rows(settings, tokenizer, model)
    assert len(calibration) == 80
    for rows in (list(train.take(200)), held_out, calibration):
        texts = [tokenizer.decode(row["input_ids"]) for row in rows]
        share = sum("aaa" in text for text in texts) / len(texts)
        assert 0.6 < share < 0.9


def test_mixed_rows_repeat():
    parts = [Dataset.from_dict({"input_ids": [[number]] * count}) for number, count in ((0, 2), (1, 20))]
    assert mix_rows(parts[:1], [2.0]) is parts[0]
    repeated = mix_rows(parts, [1, 1])["input_ids"][:]
    assert repeated.count([1]) >= 20 and repeated.count([0]) > 2


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("stride", [None, 4])
def test_rows_to_evaluate_on_are_of_many_documents(stride, streaming, tmp_path, tokenizer, model):
    """The first ones are of one document, where documents are long."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"tale{number} " * 200)
    data = DataSettings([str(tmp_path)], held_out_fraction=0.5, row_length=16, streaming=streaming, evaluation_rows=24)
    scoring = ScoringSettings(stride=stride)
    rows = load_held_out_rows(data, tokenizer, model, scoring)
    held_out = {f"tale{number}" for number in range(12)} & words_of(
        load_held_out_rows(replace(data, evaluation_rows=5000), tokenizer, model), tokenizer
    )
    assert len(rows) == 24 and 3 < len(held_out) < 12
    assert len(held_out & words_of(rows, tokenizer)) > 3
    again = load_held_out_rows(data, tokenizer, model, scoring)
    assert [[*row["input_ids"]] for row in again] == [[*row["input_ids"]] for row in rows]
    for row in rows if stride else []:
        assert 0 < sum(row["scored"]) <= 16


def test_rows_drawn_have_their_masks(tokenizer):
    """With few of many rows, of which only parts of the text are tokenized, as with all."""
    texts = [f"text {number} " * 40 for number in range(400)]
    documents = make_documents(texts)
    few = draw_rows(documents, tokenizer, 16, 8, document_masks=True, assistant_only=True)
    assert {tuple(row) for row in few} == {("input_ids", "position_ids", "assistant_masks")}
    assert all(sum(row["assistant_masks"]) == 16 for row in few)


def test_a_sample_is_of_all_rows():
    rows = [{"number": number} for number in range(40)]
    seen = [row["number"] for seed in range(400) for row in sample_rows(iter(rows), 10, seed)]
    counts = np.bincount(seen, minlength=40)
    assert len(seen) == 4000 and counts.min() > 60 and counts.max() < 140
    assert sample_rows(rows, 50) == rows and sample_rows([], 3) == []


# Tokens


def test_long_documents_are_tokenized_in_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(rows_module, "_PIECE", 50)
    monkeypatch.setattr(rows_module, "_PIECES", 2)
    texts = ["a line of words and\n\n\nmore ünïcödé words\n  in\n\nlines " * 40, "word " * 100, "x" * 400, "short"]
    expected = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    sizes = []

    class Counting(_Wrapped):
        def __call__(self, given, **options):
            sizes.append(sum(map(len, given)))
            return self.tokenizer(given, **options)

    tokenize = rows_module._Tokenize(tokenizer)
    tokenize.tokenizer = Counting(tokenizer)
    assert sum((tokens.tolist() for tokens in tokenize.whole(texts)), []) == expected
    assert max(sizes) <= 100 and len(sizes) > 20


@pytest.mark.parametrize("length, documents", [(4, 30), (400, 2), (5000, 1)], ids=["short", "long", "longest"])
def test_few_long_documents_or_many_short_ones_are_mapped_together(length, documents, monkeypatch):
    monkeypatch.setattr(rows_module, "_BATCH", 1000)
    monkeypatch.setattr(rows_module, "_BATCH_DOCUMENTS", 30)
    sizes, call = [], rows_module._Tokenize.__call__
    monkeypatch.setattr(
        rows_module._Tokenize, "__call__", lambda self, text, *more: sizes.append(len(text)) or call(self, text, *more)
    )
    pack_rows(make_documents(["a" * length] * 60), make_tokenizer(), 8)
    assert max(sizes) == documents and sum(sizes) == 60


class _Wrapped:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_rows_are_found_in_the_cache_again(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(f"\n{EOS}\n".join(TEXTS))
    first = pack_rows(load_documents(tmp_path), make_tokenizer(), 8)
    assert first.cache_files, "rows are mapped into memory"
    monkeypatch.setattr(rows_module._Tokenize, "whole", lambda *_: pytest.fail("tokenized again"))
    again = pack_rows(load_documents(tmp_path), make_tokenizer(), 8)
    assert again["input_ids"][:] == first["input_ids"][:]
    pack_rows(load_documents(tmp_path), make_tokenizer(), 9)  # packed anew, of the same tokens
    with pytest.raises(BaseException, match="tokenized again"):
        pack_rows(load_documents(tmp_path), make_tokenizer(bos=True), 8)


def test_a_changed_file_is_read_anew(tmp_path):
    for text in ("one", "other"):
        (tmp_path / "a.txt").write_text(text)
        assert load_documents(tmp_path)["text"][:] == [text]


def test_mapped_data_stays_mapped(tmp_path):
    Dataset.from_dict({"body": [*TEXTS, " ", ""]}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    documents = load_documents(tmp_path / "saved", text_column="body")
    assert [entry["filename"] for entry in documents.cache_files] == [str(file)]
    assert documents["text"][:] == TEXTS and documents["name"][:] == [""] * 3


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_make_the_same_rows(tokenizer):
    documents = make_documents([f"document {number} of many" for number in range(40)])
    expected = pack_rows(documents, tokenizer, 8)["input_ids"][:]
    assert pack_rows(documents, tokenizer, 8, num_proc=2)["input_ids"][:] == expected
    assert draw_rows(documents, tokenizer, 8, 10, num_proc=2) == draw_rows(documents, tokenizer, 8, 10)


def test_rows_that_are_drawn_are_made_by_as_many_processes(tmp_path, tokenizer, model, monkeypatch):
    (tmp_path / "a.txt").write_text(f"\n{EOS}\n".join(f"document {number} of many" for number in range(40)))
    pack, asked = rows_module.pack_rows, []

    def count(*arguments, num_proc=None, **options):
        asked.append(num_proc)
        return pack(*arguments, **options)

    monkeypatch.setattr(rows_module, "pack_rows", count)
    data = DataSettings([str(tmp_path / "a.txt")], row_length=8, held_out_fraction=0.5, num_proc=3)
    load_held_out_rows(data, tokenizer, model)
    load_calibration_rows(CompressionSettings(data=data), tokenizer, model)
    assert asked == [3, 3]


def test_a_stride_does_not_look_at_what_rows_start_with(tmp_path, model):
    (tmp_path / "a.txt").write_text(f"\n{EOS}\n".join(f"document {number} " * 20 for number in range(10)))
    data, tokenizer = (
        DataSettings([str(tmp_path / "a.txt")], row_length=16, held_out_fraction=0.5),
        make_tokenizer(bos=True),
    )
    rows, *others = [
        load_held_out_rows(replace(data, row_start=start), tokenizer, model, ScoringSettings(stride=4))
        for start in ("bos", "document", "text")
    ]
    firsts = [[row["input_ids"][0] for row in each] for each in (rows, *others)]
    assert firsts[0] == firsts[1] == firsts[2] and len(set(firsts[0])) > 1
    (stride,) = (field for field in fields(ScoringSettings) if field.name == "stride")
    assert "--row-start" in stride.metadata["help"]


# What rows begin with


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_rows_begin_with_bos_where_the_tokenizer_puts_one(streaming):
    documents = load_documents(Dataset.from_dict({"text": TEXTS * 4}), streaming=streaming)
    tokenizer = make_tokenizer(bos=True)
    rows = [row["input_ids"] for row in pack_rows(documents, tokenizer, 10)]
    expected = [row["input_ids"] for row in pack_rows(documents, tokenizer, 10, row_start="text")]
    bos = tokenizer.bos_token_id
    assert all(row[0] == bos and bos != row[1] and len(row) == 10 for row in rows)
    # The same text, but for what was added.
    text, plain = (sum(part, []) for part in (rows, expected))
    without, of_text = ([token for token in part if token != bos] for part in (text, plain))
    assert without[: len(of_text)] == of_text[: len(without)] and text.count(bos) > plain.count(bos)
    none = make_tokenizer()
    for start in ("bos", "text"):
        assert list(pack_rows(documents, none, 10, row_start=start)) == list(pack_rows(documents, none, 10))


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_rows_begin_with_a_document(streaming, tokenizer, caplog):
    documents = load_documents(Dataset.from_dict({"text": TEXTS * 4}), streaming=streaming)
    begins = {tuple(tokenizer(text)["input_ids"][:4]) for text in TEXTS}
    rows = list(pack_rows(documents, tokenizer, 10, row_start="document", document_masks=True))
    assert len(rows) > 4 and all(tuple(row["input_ids"][:4]) in begins for row in rows)
    assert all(row["position_ids"][:4] == [0, 1, 2, 3] for row in rows)
    (line,) = {message for message in caplog.messages if "leave out" in message}
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS * 4)
    assert f"leave out {tokens - 10 * len(rows):,} of {tokens:,} tokens" in line


def test_an_unknown_beginning():
    with pytest.raises(ValueError, match="row_start is 'eos'; it must be one of bos, document, text"):
        DataSettings(row_start="eos")
    with pytest.raises(ValueError, match="row_start is 'eos'"):
        pack_rows(make_documents(TEXTS), make_tokenizer(), 8, row_start="eos")


@pytest.mark.parametrize("field", ["num_proc", "shuffle_buffer"])
def test_numbers_out_of_range(field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        DataSettings(**{field: 0})


# Rows to calibrate on


def test_drawn_rows_are_of_all_documents_and_few_are_tokenized(tokenizer, monkeypatch):
    texts = [f"document {number}: " + f"word{number} and\n" * 100 for number in range(400)]
    documents, read = make_documents(texts), []
    whole = rows_module._Tokenize.whole

    def count(self, given, *ends):
        read.append(sum(map(len, given)))
        return whole(self, given, *ends)

    monkeypatch.setattr(rows_module._Tokenize, "whole", count)
    rows = draw_rows(documents, tokenizer, 16, 24, seed=1)
    assert sum(read) < 0.05 * sum(map(len, texts))
    found = [tokenizer.decode(row["input_ids"]) for row in rows]
    everything = EOS.join(texts)
    assert all(len(row["input_ids"]) == 16 and text in everything for row, text in zip(rows, found, strict=True))
    assert len(set(found)) == 24
    numbers = [everything.index(text) / len(everything) for text in found]
    assert min(numbers) < 0.25 and max(numbers) > 0.75
    assert draw_rows(documents, tokenizer, 16, 24, seed=1) == rows != draw_rows(documents, tokenizer, 16, 24, seed=2)


def test_rows_drawn_from_a_short_text(tokenizer):
    documents = make_documents(TEXTS * 4)
    packed = list(pack_rows(documents, tokenizer, 8))
    for count in (3, 10_000):
        rows = draw_rows(documents, tokenizer, 8, count)
        assert len(rows) == min(count, len(packed)) and all(row in packed for row in rows)
    assert rows != packed and sorted(map(str, rows)) == sorted(map(str, packed))


def test_too_few_calibration_rows_are_warned_of(tmp_path, tokenizer, model, caplog):
    (tmp_path / "a.txt").write_text(f"\n{EOS}\n".join(f"document {number} " * 20 for number in range(40)))
    data = DataSettings(data=[str(tmp_path / "a.txt")], row_length=16)
    config = model.config
    features = config.num_attention_heads * config.head_dim
    for number, is_warned in ((2, True), (-(-10 * features // 16), False)):
        caplog.clear()
        settings = CompressionSettings(data=data, calibration=CalibrationSettings(calibration_rows=number))
        load_calibration_rows(settings, tokenizer, model)
        assert is_warned == any(
            f"fewer than 10 for each of the {features} head features" in line for line in caplog.messages
        )


# Batches


def test_labels_and_masks_of_rows_are_kept():
    batch = collate_rows([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 0]}] * 2)
    assert batch["labels"].tolist() == [[-100, 2, -100]] * 2
    assert batch["attention_mask"].tolist() == [[1, 1, 0]] * 2
    for name in ("completion_mask", "assistant_masks"):
        batch = collate_rows([{"input_ids": [1, 2, 3], name: [0, 1, 1]}])
        assert list(batch) == ["input_ids", "labels"] and batch["labels"].tolist() == [[-100, 2, 3]]


def test_rows_of_different_lengths_are_padded():
    rows = [
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 2], "labels": [-100, 2, 3]},
        {"input_ids": [4], "position_ids": [0], "labels": [4]},
    ]
    batch = collate_rows(rows)
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    plain = collate_rows([{"input_ids": row["input_ids"]} for row in rows])
    assert plain["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_rows_that_make_no_batch():
    with pytest.raises(ValueError, match="Row 1 of a batch has no labels, which the first one has"):
        collate_rows([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match="Row 0 of a batch has 2 tokens and 1 numbers in labels"):
        collate_rows([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="Rows have 1 and 2 tokens; here all must be as long"):
        stack_rows([{"input_ids": [1, 2]}, {"input_ids": [1]}])
    stored = {"teacher_ids": [[1]], "teacher_logprobs": [[0.0, 0.0]]}
    with pytest.raises(ValueError, match="Rows of a stored teacher have 1 and 2 tokens"):
        collate_rows([{"input_ids": [1], **stored}, {"input_ids": [1, 2], **stored}])


def test_a_store_takes_no_rows_with_labels(tmp_path, tokenizer, model):
    with pytest.raises(ValueError, match="The rows bring labels, which a store does not keep"):
        write_stored_teacher(tmp_path, model, tokenizer, [{"input_ids": [1, 2], "labels": [1, 2]}])


# Training


def make_trainer(folder: Path, model, rows, steps: int, collate=collate_rows, callbacks=()) -> EchoAttTrainer:
    arguments = EchoAttTrainingArguments(
        str(folder), stage1_steps=steps, per_device_train_batch_size=4, save_steps=3, logging_steps=100,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    student = convert(model, plan_of("llama"))[0]
    return EchoAttTrainer(
        model=student, teacher=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[*callbacks]
    )


def test_the_trainer_learns_what_the_masks_leave(tmp_path, model):
    rows = Dataset.from_list([{"input_ids": [*range(5, 13)], "completion_mask": [0] * 5 + [1] * 3}] * 4)
    seen = []

    def collate(batch):
        seen.append(collate_rows(batch))
        return seen[-1]

    make_trainer(tmp_path, model, rows, 1, collate).train()
    assert (seen[0]["labels"] != -100).sum() == 12


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 6


def test_a_stream_shorter_than_the_run_is_resumed_at_its_row(tmp_path, model):
    """Five batches in a pass, eleven steps, stopped in the second pass."""
    torch.manual_seed(0)
    rows = IterableDataset.from_generator(lambda: ({"input_ids": [number + 5] + [7] * 7} for number in range(20)))

    def run(folder, callbacks=(), resume=None):
        seen = []

        def collate(batch):
            seen.append([row["input_ids"][0] for row in batch])
            return collate_rows(batch)

        trainer = make_trainer(tmp_path / folder, model, rows, 11, collate, callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return seen, trainer.model.state_dict()

    whole, expected = run("whole")
    first, _ = run("stopped", [_Stop()])
    resumed, weights = run("stopped", resume=True)
    # One batch is read ahead; those that a resumed run skips are collated too.
    assert len(resumed) >= 5 and resumed == whole[-len(resumed) :] and first[:6] == whole[:6]
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name])


def test_streamed_rows_are_shuffled_in_each_pass(tmp_path, tokenizer, model, monkeypatch):
    (tmp_path / "a.txt").write_text(f"\n{EOS}\n".join(f"document {number} " * 5 for number in range(60)))
    convert(model, plan_of("llama"))[0].save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    model.save_pretrained(tmp_path / "teacher")
    data = DataSettings(data=[str(tmp_path / "a.txt")], row_length=16, streaming=True, shuffle_buffer=20)
    expected = [row["input_ids"] for row in load_rows(data, tokenizer, model)[0]]
    given = []

    def make_trainer(train_dataset, **kwargs):
        given.extend(row["input_ids"] for row in train_dataset.take(2 * len(expected)))
        raise KeyboardInterrupt

    train = partial(training.train_two_stages, trainer_class=make_trainer)
    monkeypatch.setattr(training, "train_two_stages", train)
    with pytest.raises(KeyboardInterrupt):
        settings = StudentSettings(str(tmp_path / "student"), str(tmp_path / "teacher"), data=data)
        steps.distill(settings, tmp_path / "output")
    assert len(given) == 2 * len(expected), "the stream has no end"
    assert given[: len(expected)] != expected and given[: len(expected)] != given[len(expected) :]
    assert {tuple(row) for row in given} == {tuple(row) for row in expected}


def test_the_order_of_streamed_rows_depends_on_the_seed_and_the_buffer():
    rows = Dataset.from_dict({"input_ids": [[number] for number in range(50)]}).to_iterable_dataset()

    def order(*options):
        return [row["input_ids"][0] for row in shuffle_rows(rows, *options)]

    assert order(0, 10) == order(0, 10) != order(1, 10)
    assert order(0, 10)[0] < 10 and sorted(order(0, 10)) == [*range(50)]
    assert order(0, 1) == [*range(50)]


# Text that is none


def test_half_a_surrogate_pair_is_named_wherever_text_comes_in(tmp_path, tokenizer, model):
    broken, message = "a \udcb2", r"'\\udcb2', at character 2 of the text, is half of a surrogate pair"
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in ("fine", broken)))
    with pytest.raises(ValueError, match=f"the data set, row 1: {message}"):
        list(load_documents(stream))
    with pytest.raises(ValueError, match=f"text 1: {message}"):
        compute_perplexity(["fine", broken], model, tokenizer)
    tasks = {
        "context": {"context": broken, "continuation": "b"},
        "choices": {"query": "a", "choices": ["b", broken], "gold": 0},
    }
    for field, item in tasks.items():
        (tmp_path / "a.jsonl").write_text(json.dumps(item))
        with pytest.raises(ValueError, match=rf"a\.jsonl', line 1, {field}: {message}"):
            read_zero_shot_tasks({"task": tmp_path / "a.jsonl"})
