import csv
import gzip
import json
import logging
import pickle
import shutil
import sysconfig
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import train_byte_level_bpe
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from echoatt_hf.text.documents import STDLIB, load_documents, split_documents
from echoatt_hf.text.rows import collate_rows, pack_rows


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


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


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
        ("a.csv", b"id,body\n1,b\n", r"a\.csv' has no column 'text'; its columns are id, body"),
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
        ("a.jsonl", b'{"body": "b", "id": 1}', r"line 1, has no column 'text'; its columns are body, id\."),
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
        with pytest.raises(ValueError, match=r"has no column 'text'; its columns are body.*text_column"):
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
