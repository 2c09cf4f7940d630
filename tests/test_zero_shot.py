"""Zero-shot tasks against a reference that takes one token at a time, and against lm-eval where it is installed."""

import copy
import functools
import importlib.util
import json
import math
import random
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import process_environment, train_byte_level_bpe
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import echoatt_hf
from echoatt_hf import evaluate_zero_shot
from echoatt_hf.evaluation.zero_shot import format_zero_shot, read_zero_shot_tasks


pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared/data"
TOLERANCE = 1e-4  # of a log-likelihood in float32, whatever the batches
CONTEXT = 40
ANIMALS = ["cat", "dog", "brown bear", "hen", "old grey owl", "pig"]
PLACES = ["on the mat", "in a tree", "by the sea", "under the table in the hall"]
TEXTS = [f"Story {n}. The {animal} sat {PLACES[n % 4]} and sang." for n, animal in enumerate(ANIMALS)]
LONG = "Once there were many animals in a house by the sea, and all of them sang. " * 3


@pytest.fixture(scope="module", params=["bos", "eos"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """One that begins each text with a BOS token, and one that has no such token and adds nothing."""
    backend = train_byte_level_bpe([LONG, *TEXTS], 300, ["<s>", "</s>"])
    if request.param == "eos":
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    """A student that has learnt the texts, so that it ranks some words first and is surprised by others."""
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, initializer_range=0.1, attention_dropout=0.5,
    )  # fmt: skip
    config = echoatt_hf.EchoAttConfig(text_config=base, echo_sources=[0, 1, 1])
    student = echoatt_hf.EchoAttForCausalLM(config).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    rows = [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]
    for step in range(60):
        row = rows[step % len(rows)]
        student(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def make_records() -> dict[str, list[dict]]:
    """Questions of each kind: some easy, some wrong, longer than the context, with spaces where they matter."""
    draw = random.Random(0)
    records = {"choice": [], "partial": [], "last": [], "pair": []}
    for n, text in enumerate(TEXTS * 3):
        words = text.split(" ")
        other = draw.choice(ANIMALS)
        start, end = " ".join(words[:5]), " ".join(words[5:])
        before = ["", LONG, "Hm.\n"][n // len(TEXTS)]
        choices = [end, f"{other} and sang for all of the animals.", "a mat."]
        draw.shuffle(choices)
        records["choice"].append(
            {"query": before + start + " \n"[n % 2], "choices": choices, "gold": choices.index(end)}
        )
        options = [f"{before}The {other} sat", f"{before}{start} "]
        records["partial"].append({"context_options": options, "continuation": end, "gold": n % 2, "source": "here"})
        records["last"].append(
            {"context": before + " ".join(words[:-1]), "continuation": words[-1] if n % 3 else "sang. "}
        )
        learnt, unknown = ("sentence_good", "sentence_bad") if n % 4 else ("sentence_bad", "sentence_good")
        records["pair"].append({learnt: text, unknown: text.replace("sat", other), "UID": "sat"})
    records["choice"].append({"query": "", "choices": ["Story 3.", "<s>", "Ünïcödé 🙂"], "gold": 0})
    records["choice"].append({"query": "<s>Story 1. The", "choices": ["dog", "mat"], "gold": 0})
    records["last"].append({"context": "", "continuation": "Story"})
    records["last"].append({"context": "The", "continuation": "\n\nhen"})
    records["pair"].append({"sentence_good": "</s>", "sentence_bad": "<s>The"})
    return records


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    records = make_records()
    tasks = {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in records.items()}
    (folder / "group").mkdir()
    write_lines(folder / "group" / "one.jsonl", records["pair"])
    write_lines(folder / "group" / "two.jsonl", records["pair"][:4])
    (folder / "group" / "SOURCE.txt").write_text("not a task")
    return tasks | {"group": folder / "group"}


# The reference: the rules of lm-eval written down once more, in the plainest way.


def split_tokens(tokenizer, context, continuation):
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if context == "":
        tokens = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        return tokens if tokens[0] == prefix else [prefix, *tokens], 1
    while context[-1].isspace():
        context, continuation = context[:-1], context[-1] + continuation
    adds = not context.startswith(tokenizer.convert_ids_to_tokens(prefix))
    tokens = tokenizer(context + continuation, add_special_tokens=adds)["input_ids"]
    return tokens, len(tokenizer(context, add_special_tokens=adds)["input_ids"])


def score_slowly(model, tokenizer, context, continuation):
    tokens, start = split_tokens(tokenizer, context, continuation)
    cut = max(0, len(tokens) - model.config.text_config.max_position_embeddings - 1)
    total, is_greedy = 0.0, True
    for position in range(start, len(tokens)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[cut:position]])).logits[0, -1].double().tolist()
        largest = max(logits)
        total += logits[tokens[position]] - largest - math.log(sum(math.exp(logit - largest) for logit in logits))
        is_greedy &= logits.index(largest) == tokens[position]
    return total, is_greedy


def evaluate_slowly(model, tokenizer, records) -> dict[str, float]:
    score = functools.partial(score_slowly, model, tokenizer)
    columns = {}
    for record in records:
        if "query" in record:
            totals = [score(record["query"], " " + choice)[0] for choice in record["choices"]]
            shares = [total / len(choice) for total, choice in zip(totals, record["choices"], strict=True)]
            row = {
                "acc": totals.index(max(totals)) == record["gold"],
                "acc_norm": shares.index(max(shares)) == record["gold"],
            }
        elif "context_options" in record:
            totals = [score(option, " " + record["continuation"])[0] for option in record["context_options"]]
            row = {"acc": totals.index(max(totals)) == record["gold"]}
        elif "context" in record:
            total, is_greedy = score(record["context"], " " + record["continuation"])
            row = {"perplexity": total, "acc": is_greedy}
        else:
            row = {"acc": score("", " " + record["sentence_good"])[0] >= score("", " " + record["sentence_bad"])[0]}
        for name, value in row.items():
            columns.setdefault(name, []).append(float(value))
    result = {"count": len(records)}
    for name, values in columns.items():
        mean, stderr = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
        if name == "perplexity":
            mean = math.exp(-mean)
            stderr *= mean
        result |= {name: mean, f"{name}_stderr": stderr}
    return result


@pytest.fixture(scope="module")
def expected(model, tokenizer) -> dict[str, dict]:
    return {name: evaluate_slowly(model, tokenizer, records) for name, records in make_records().items()}


@pytest.mark.parametrize("kind", ["choice", "partial", "last", "pair"])
def test_agrees_with_a_loop_over_tokens(kind, model, tokenizer, files, expected):
    assert 0 < expected[kind]["acc"] < 1, "this can fail in both directions"
    result = evaluate_zero_shot(model, tokenizer, {"task": files[kind]})
    assert result == {"task": pytest.approx(expected[kind], rel=TOLERANCE)}


PAIRS = [
    ("", "Story"),
    ("", "</s>The"),
    ("", "<s> The"),
    ("The hen", "sat"),
    ("The hen ", "sat"),
    ("The hen\n", "sat on the mat"),
    ("The\t \n", "\n\nhen"),
    ("<s>Story 1. The", "dog"),
    ("</s>Story 1. The", "dog"),
    ("Story", "<s>1"),
    (LONG, "and sang."),
    ("The hen", LONG[:50]),
    ("The hen sat in a", "tr ee"),
]


@pytest.fixture(scope="module")
def stripping(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose first token takes the space before it along, so that a continuation can begin with it."""
    stripping = copy.deepcopy(tokenizer)
    name = "bos_token" if tokenizer.bos_token else "eos_token"
    stripping.add_special_tokens({name: AddedToken(getattr(tokenizer, name), lstrip=True, special=True)})
    assert stripping.encode(f" {getattr(stripping, name)}", add_special_tokens=False)[0] in stripping.all_special_ids
    return stripping


@pytest.mark.parametrize("use_stripping", [False, True], ids=["plain", "stripping"])
def test_each_log_likelihood_agrees_with_a_loop_over_tokens(use_stripping, model, tokenizer, stripping, tmp_path):
    used, tasks = stripping if use_stripping else tokenizer, {}
    for number, (context, continuation) in enumerate(PAIRS):  # the perplexity of one is its log-likelihood
        records = [{"context": context, "continuation": continuation}]
        tasks[number] = write_lines(tmp_path / f"{number}.jsonl", records)
    results = evaluate_zero_shot(model, used, tasks)
    for number, (context, continuation) in enumerate(PAIRS):
        expected, is_greedy = score_slowly(model, used, context, " " + continuation)
        assert -math.log(results[number]["perplexity"]) == pytest.approx(expected, abs=TOLERANCE), PAIRS[number]
        assert results[number]["acc"] == is_greedy


def test_what_is_scored_after_what(tmp_path):
    records = [
        {"query": "q ", "choices": ["Ünïcödé 🙂", "b"], "gold": 1},
        {"context_options": ["one ", "two"], "continuation": "c", "gold": 1},
        {"context": "q", "continuation": " c"},
        {"sentence_good": "a", "sentence_bad": "b"},
    ]
    tasks = {f"{n}": write_lines(tmp_path / f"{n}.jsonl", [record]) for n, record in enumerate(records)}
    choice, partial, last, pair = (task.items[0] for task in read_zero_shot_tasks(tasks).values())
    assert (choice.pairs, choice.gold) == ((("q ", " Ünïcödé 🙂"), ("q ", " b")), 1)
    assert choice.lengths == (9, 1), "characters, not bytes, and without the delimiter"
    assert (partial.pairs, partial.gold) == ((("one ", " c"), ("two", " c")), 1)
    assert last.pairs == (("q", "  c"),)
    assert (pair.pairs, pair.gold) == ((("", " a"), ("", " b")), 0)


def test_the_questions_try_the_rules(model, tokenizer, expected):
    """Without these the test above could not tell whether the rules are kept."""
    assert expected["choice"]["acc"] != expected["choice"]["acc_norm"]
    records = make_records()
    lengths = [len(split_tokens(tokenizer, record["query"], " a")[0]) for record in records["choice"]]
    assert min(lengths) < CONTEXT < max(lengths)
    moved = [split_tokens(tokenizer, text, " sang")[1] for text in ("The hen ", "The hen")]
    assert moved[0] == moved[1]
    assert split_tokens(tokenizer, "", "</s>The")[0][:2].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batch_size_does_not_matter(batch_size, model, tokenizer, files, tmp_path):
    singles = {}
    for number, record in enumerate(make_records()["last"]):  # the perplexity of one is its log-likelihood
        singles[f"{number}"] = write_lines(tmp_path / f"{number}.jsonl", [record])
    results = [evaluate_zero_shot(model, tokenizer, singles | files, batch_size=size) for size in (batch_size, 16)]
    for name in singles:
        totals = [math.log(result[name]["perplexity"]) for result in results]
        assert totals[0] == pytest.approx(totals[1], abs=TOLERANCE)
    for name in files:
        assert results[0][name]["acc"] == results[1][name]["acc"]


def test_only_the_logits_that_are_needed(model, tokenizer, files, expected, monkeypatch):
    seen = []

    def record(module, args, kwargs, output):
        if kwargs["input_ids"].shape[1] > 2:  # the head is tried out on two tokens
            seen.append((kwargs["input_ids"].shape[1], output.logits.shape[1]))

    hook = model.register_forward_hook(record, with_kwargs=True)
    evaluate_zero_shot(model, tokenizer, {"last": files["last"]}, batch_size=4)
    hook.remove()
    assert seen[0][0] == CONTEXT and all(kept < length for length, kept in seen[:-1])
    assert [length for length, _ in seen] == sorted((length for length, _ in seen), reverse=True)

    class Other(type(model)):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "__class__", Other)
    result = evaluate_zero_shot(model, tokenizer, {"last": files["last"]})
    assert result["last"] == pytest.approx(expected["last"], rel=TOLERANCE), "a model that cannot leave logits out"


def test_tokens_that_the_model_puts_before_the_text(model, tokenizer, files, expected, monkeypatch):
    """As prompt tuning does: logits of more positions than there are tokens."""

    class Prompted(type(model)):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
            output.logits = torch.cat([torch.full_like(output.logits[:, :5], 9.0), output.logits], dim=1)
            return output

    monkeypatch.setattr(model, "__class__", Prompted)
    result = evaluate_zero_shot(model, tokenizer, {"last": files["last"]})
    assert result["last"] == pytest.approx(expected["last"], rel=TOLERANCE)


def test_modes_are_restored_and_dropout_is_off(model, tokenizer, files, expected):
    trained = copy.deepcopy(model).train()
    result = evaluate_zero_shot(trained, tokenizer, {"last": files["last"]})
    assert result["last"] == pytest.approx(expected["last"], rel=TOLERANCE)
    assert all(module.training for module in trained.modules()) and torch.is_grad_enabled()


def test_a_group_is_the_mean_of_its_tasks(model, tokenizer, files):
    result = evaluate_zero_shot(model, tokenizer, {"blimp": files["group"]})["blimp"]
    one, two = result["tasks"]["one"], result["tasks"]["two"]
    assert list(result["tasks"]) == ["one", "two"] and (one["count"], two["count"]) == (19, 4)
    assert one["acc"] != two["acc"] or one["acc_stderr"] != two["acc_stderr"]
    assert result["acc"] == pytest.approx((one["acc"] + two["acc"]) / 2)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(one["acc_stderr"] ** 2 + two["acc_stderr"] ** 2) / 2)
    assert result["count"] == 23


def test_a_group_has_the_metrics_that_all_of_its_tasks_have(model, tokenizer, files):
    mixed = evaluate_zero_shot(model, tokenizer, {"all": files["choice"].parent})["all"]
    assert set(mixed) == {"acc", "acc_stderr", "count", "tasks"}
    assert "perplexity" in mixed["tasks"]["last"] and "acc_norm" in mixed["tasks"]["choice"]


def test_error_of_the_perplexity_is_what_bootstrap_samples_give(model, tokenizer, tmp_path):
    texts = [f"{text} {word}" for text in TEXTS for word in ("The", "and the", "Story", "sang", "in", "by the sea")]
    records = [{"context": text, "continuation": "sang"} for text in texts]
    calm = copy.deepcopy(model)
    with torch.no_grad():
        calm.get_output_embeddings().weight.mul_(0.1)
    result = evaluate_zero_shot(calm, tokenizer, {"last": write_lines(tmp_path / "last.jsonl", records)})["last"]
    totals = [score_slowly(calm, tokenizer, record["context"], " sang")[0] for record in records]
    draw = random.Random(0)
    samples = [math.exp(-statistics.fmean(draw.choices(totals, k=len(totals)))) for _ in range(4000)]
    assert result["perplexity_stderr"] / result["perplexity"] < 0.1, "far beyond that the two differ"
    assert result["perplexity_stderr"] == pytest.approx(statistics.stdev(samples), rel=0.05)


def test_limit_takes_the_first_questions(model, tokenizer, files):
    result = evaluate_zero_shot(model, tokenizer, {"choice": files["choice"], "group": files["group"]}, limit=5)
    expected = evaluate_slowly(model, tokenizer, make_records()["choice"][:5])
    assert result["choice"] == pytest.approx(expected, rel=TOLERANCE)
    assert result["group"]["count"] == 5 + 4


def test_a_single_question_has_no_standard_error(model, tokenizer, files):
    tasks = {"last": files["last"], "group": files["group"]}
    result = evaluate_zero_shot(model, tokenizer, tasks, limit=1)
    assert result["last"]["acc_stderr"] is None and result["last"]["perplexity_stderr"] is None
    assert result["group"]["acc_stderr"] is None
    table = format_zero_shot(result).splitlines()
    assert len({len(line) for line in table}) == 1 and not any("±" in line or "None" in line for line in table)


def test_logits_that_are_not_numbers_are_refused(model, tokenizer, files):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"logits are not numbers \(NaN\)"):
        evaluate_zero_shot(broken, tokenizer, {"pair": files["pair"]})


def test_context_length_as_lm_eval_finds_it(tokenizer, tmp_path):
    """In the order of lm-eval: the configuration, the tokenizer, 2048."""
    path = write_lines(tmp_path / "last.jsonl", [{"context": "a " * 3000, "continuation": "b"}])
    seen = []

    def evaluate(model, tokenizer):
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(kwargs["input_ids"][0])), with_kwargs=True
        )
        evaluate_zero_shot(model, tokenizer, {"last": path})

    sizes = {"vocab_size": len(tokenizer), "n_layer": 1, "n_head": 1}
    evaluate(GPT2LMHeadModel(GPT2Config(n_positions=77, n_embd=8, **sizes)), tokenizer)
    evaluate(BloomForCausalLM(BloomConfig(hidden_size=8, **sizes)), tokenizer)
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 55
    evaluate(BloomForCausalLM(BloomConfig(hidden_size=8, **sizes)), short)
    assert [length for length in seen if length > 2] == [77, 2048, 55]  # on two tokens heads are tried out


# Files.


CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 0}
PARTIAL = {"context_options": ["a", "b"], "continuation": "c", "gold": 1}
LAST = {"context": "a", "continuation": "b"}
PAIR = {"sentence_good": "a", "sentence_bad": "b"}
MALFORMED = {
    "not JSON": ("{'query': 1}", "is not JSON: Expecting"),
    "not an object": ("[1, 2]", "is not a JSON object, but of type list"),
    "not UTF-8": (b'{"context": "\xff", "continuation": "a"}', "is not JSON: 'utf-8' codec can't decode"),
    "unknown fields": ({"question": "a", "gold": 1}, "has the fields question, gold; known are query, choices, gold"),
    "no fields": ({}, "has the fields none; known are"),
    "a field is missing": ({"query": "a", "choices": ["b", "c"]}, "it has the fields query, choices; known are"),
    "two kinds": (LAST | PAIR, "fits the kinds last word and minimal pair"),
    "another kind": (LAST, "is of the kind last word, but the lines before it are of the kind multiple choice"),
    "gold too large": (CHOICE | {"gold": 2}, "gold is 2; it must be an integer from 0 to 1."),
    "gold below zero": (CHOICE | {"gold": -1}, "gold is -1; it must be an integer from 0 to 1."),
    "gold is a text": (CHOICE | {"gold": "0"}, "gold is '0'; it must be"),
    "gold is a boolean": (CHOICE | {"gold": True}, "gold is True; it must be"),
    "gold of partial scoring": (PARTIAL | {"gold": 2}, "gold is 2; it must be an integer from 0 to 1."),
    "empty choice": (CHOICE | {"choices": ["b", ""]}, "choices is ['b', '']; it must be a list of at least 2 texts"),
    "blank choice": (CHOICE | {"choices": ["b", " "]}, "choices is ['b', ' ']"),
    "one choice": (CHOICE | {"choices": ["b"]}, "choices is ['b']; it must be a list of at least 2 texts"),
    "choices are no list": (CHOICE | {"choices": "bc"}, "choices is 'bc'; it must be a list"),
    "choice is a number": (CHOICE | {"choices": ["b", 3]}, "choices is ['b', 3]"),
    "query is a number": (CHOICE | {"query": 3}, "query is 3; it must be a text."),
    "blank context option": (PARTIAL | {"context_options": ["", "b"]}, "context_options is ['', 'b']"),
    "blank continuation": (LAST | {"continuation": "\n"}, r"continuation is '\n'; it must be a text that is"),
    "continuation of partial scoring": (PARTIAL | {"continuation": ""}, "continuation is ''"),
    "context is null": (LAST | {"context": None}, "context is None; it must be a text."),
    "blank sentence": (PAIR | {"sentence_bad": ""}, "sentence_bad is ''; it must be a text that is not blank."),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_lines_are_refused_with_file_and_line(case, tmp_path):
    line, message = MALFORMED[case]
    path = tmp_path / "task.jsonl"
    line = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    # Below a line of the same kind, and a blank one, which is passed over.
    first = next(
        (known for known in (PARTIAL, LAST, PAIR) if all(b'"%s"' % key.encode() in line for key in known)), CHOICE
    )
    first = CHOICE if case == "another kind" else first
    path.write_bytes(json.dumps(first).encode() + b"\r\n\r\n" + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{str(path)!r}, line 3")) as error:
        evaluate_zero_shot(None, None, {"task": path}, limit=1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_line_breaks_of_other_alphabets_and_byte_order_marks_are_text(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"context": "a\u2028b", "continuation": "c"}, ensure_ascii=False).encode()
    )
    (item,) = read_zero_shot_tasks({"task": path})["task"].items
    assert item.pairs == (("a\u2028b", " c"),)


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "task.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tasks: give at least one name"):
        evaluate_zero_shot(None, None, {})
    with pytest.raises(FileNotFoundError, match=r"task 'a' is to be read from '.*nothing', which does not exist"):
        evaluate_zero_shot(None, None, {"a": tmp_path / "nothing"})
    with pytest.raises(ValueError, match=r"empty.jsonl' is empty: give a file of JSON lines"):
        evaluate_zero_shot(None, None, {"a": tmp_path / "empty.jsonl"})
    with pytest.raises(ValueError, match=r"folder '.*folder' of the task 'a' holds no .jsonl files"):
        evaluate_zero_shot(None, None, {"a": tmp_path / "folder"})
    for name, value in (("limit", 0), ("batch_size", 0), ("limit", -3)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
            evaluate_zero_shot(None, None, {"a": tmp_path}, **{name: value})


def test_what_cannot_be_scored_is_refused_before_the_model_runs(model, tokenizer, tmp_path):
    def refuse(record, message, with_tokenizer=tokenizer):
        path = write_lines(tmp_path / "task.jsonl", [LAST, record])
        with pytest.raises(ValueError, match=message):
            evaluate_zero_shot(model, with_tokenizer, {"task": path})

    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
    try:
        words = " a" * CONTEXT
        assert len(tokenizer.encode(words, add_special_tokens=False)) == CONTEXT, "as many as can be scored"
        message = rf"line 2: the continuation has {CONTEXT + 1} tokens, more than the model's context of {CONTEXT}"
        refuse({"context": "b", "continuation": words}, message)
        if tokenizer.bos_token is None:
            refuse({"context": "  ", "continuation": "a"}, r"line 2: the tokenizer makes no token of the context '  '")
        nameless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        refuse(LAST, "neither a BOS nor an EOS token", nameless)
    finally:
        hook.remove()


# The command line.


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "student"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capfd):
    """The command line in this process, which spares the seconds an import takes."""
    from typer.testing import CliRunner

    from echoatt_hf.cli.app import app

    def invoke(*arguments):
        return CliRunner().invoke(app, ["zero-shot", *map(str, arguments)])

    return invoke


def test_command_prints_a_table_and_writes_json(run, saved, model, tokenizer, files, tmp_path):
    tasks = {"choice": files["choice"], "last": files["last"], "group": files["group"]}
    output = tmp_path / "results.json"
    arguments = [part for name, path in tasks.items() for part in ("--task", f"{name}={path}")]
    result = run(saved, *arguments, "--limit", 7, "--batch-size", 4, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert "zero-shot: " in result.stderr and "/50 [" in result.stderr, "a progress bar over the texts"
    expected = evaluate_zero_shot(model, tokenizer, tasks, limit=7, batch_size=4)
    written = json.loads(output.read_text())
    # The command loads the model: its weights lie elsewhere in memory, so sums of them may round otherwise.
    assert [written["model"], written["limit"], list(written["results"])] == [saved.name, 7, list(tasks)]
    members = written["results"]["group"].pop("tasks"), expected["group"].pop("tasks")
    found = [{**results, **each} for results, each in ((written["results"], members[0]), (expected, members[1]))]
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name] == pytest.approx(found[1][name], rel=1e-6) for name in found[0])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "|" in line]
    assert rows[0] == ["task", "count", "acc", "acc_norm", "perplexity"]
    assert [row[0] for row in rows[2:]] == ["choice", "last", "group", "- one", "- two"]
    choice, last = expected["choice"], expected["last"]
    assert rows[2][1:3] == ["7", f"{choice['acc']:.4f} ± {choice['acc_stderr']:.4f}"]
    assert rows[2][3:] == [f"{choice['acc_norm']:.4f} ± {choice['acc_norm_stderr']:.4f}", ""]
    assert rows[3][3:] == ["", f"{last['perplexity']:.2f} ± {last['perplexity_stderr']:.2f}"]


def test_misuse_is_one_line_and_exit_code_2(run, saved, files, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    existing = tmp_path / "existing.json"
    existing.write_text("mine")
    good = f"pair={files['pair']}"
    cases = [
        # Files come first: no model is loaded for a run that cannot succeed.
        (["nowhere/at/all", "--task", f"a={broken}"], "broken.jsonl', line 1 is not JSON"),
        (["nowhere/at/all", "--task", good], "There is no model folder 'nowhere/at/all'"),
        ([saved, "--task", "piqa"], "--task is 'piqa'; give NAME=FILE or NAME=FOLDER"),
        ([saved, "--task", "=file"], "--task is '=file'"),
        ([saved, "--task", "a="], "--task is 'a='"),
        ([saved, "--task", good, "--task", good], "--task names 'pair' twice"),
        ([saved, "--task", "a=missing.jsonl"], "'missing.jsonl', which does not exist"),
        ([saved, "--task", good, "--limit", 0], "limit is 0; it must be at least 1"),
        ([saved, "--task", good, "--batch-size", 0], "batch_size is 0; it must be at least 1"),
        ([saved, "--task", good, "--output", existing], "--overwrite"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        assert result.exit_code == 2 and len(errors) == 1, (arguments, result.stderr)
        assert errors[0].startswith("echoatt: error: ") and message in errors[0], errors[0]
    assert existing.read_text() == "mine"
    assert run(saved).exit_code == 2, "no task"
    assert run(saved, "--task", good, "--output", existing, "--overwrite").exit_code == 0
    assert json.loads(existing.read_text())["results"]["pair"]["count"] == 19
    assert run("--help").exit_code == 0


# Real weights, real questions.


@pytest.fixture(scope="module")
def zero_shot_data(tmp_path_factory) -> Path:
    """A folder laid out as the task files of `examples/lm_eval_tasks` expect it."""
    if not (SHARED_DATA / "zeroshot/piqa.jsonl").exists() or not (SHARED_DATA / "blimp").exists():
        pytest.skip("shared/data/zeroshot or shared/data/blimp is not here")
    folder = tmp_path_factory.mktemp("real") / "zero_shot_data"
    (folder / "blimp").mkdir(parents=True)
    for name in ("piqa", "winogrande", "copa", "lambada_openai"):
        (folder / f"{name}.jsonl").symlink_to(SHARED_DATA / f"zeroshot/{name}.jsonl")
    for name in ("adjunct_island", "irregular_past_participle_verbs", "principle_A_case_2"):
        (folder / f"blimp/{name}.jsonl").symlink_to(SHARED_DATA / f"blimp/{name}.jsonl")
    return folder


@pytest.fixture(scope="module")
def real_student(stories260k, tmp_path_factory) -> Path:
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(stories260k), AutoTokenizer.from_pretrained(stories260k)
    student, _ = echoatt_hf.convert(teacher, echoatt_hf.SharingPlan([0, 1, 2, 2, 2]))
    folder = tmp_path_factory.mktemp("real") / "student"
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def real_tasks(folder: Path) -> dict[str, Path]:
    tasks = {name: folder / f"{name}.jsonl" for name in ("piqa", "winogrande", "copa")}
    return tasks | {"lambada": folder / "lambada_openai.jsonl", "blimp": folder / "blimp"}


@pytest.mark.real_weights
def test_real_student_agrees_with_a_loop_over_tokens(real_student, zero_shot_data):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(real_student), AutoTokenizer.from_pretrained(real_student)
    results = evaluate_zero_shot(model, tokenizer, real_tasks(zero_shot_data), limit=6)
    results |= results.pop("blimp")["tasks"]
    for path in zero_shot_data.rglob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()[:6]]
        name = path.stem.removesuffix("_openai")
        assert results.pop(name) == pytest.approx(evaluate_slowly(model, tokenizer, records), rel=1e-3), name
    assert not results


@pytest.mark.real_weights
def test_the_real_teacher_knows_some_grammar(stories260k, zero_shot_data):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories260k), AutoTokenizer.from_pretrained(stories260k)
    result = evaluate_zero_shot(model, tokenizer, {"blimp": zero_shot_data / "blimp"}, limit=200)["blimp"]
    assert result["tasks"]["irregular_past_participle_verbs"]["acc"] > 0.8


@pytest.mark.real_weights
def test_lm_eval_gives_the_same_numbers(real_student, zero_shot_data):
    """The command of the guide with the task files of the repository, on the first questions of each file."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    folder = zero_shot_data.parent
    guide = (ROOT / "examples/lm_eval_tasks/README.md").read_text()
    command = re.search(r"<!-- lm-eval command -->\n```bash\n(.*)\n```", guide).group(1)
    command = command.replace("pretrained=student", f"pretrained={real_student}").removeprefix("lm_eval")
    present = [path.stem for path in (zero_shot_data / "blimp").iterdir()]
    (folder / "tasks").mkdir()
    for path in (ROOT / "examples/lm_eval_tasks").glob("*.yaml"):
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if "{task: " not in line or any(f"{{task: {name}," in line for name in present)]
        (folder / "tasks" / path.name).write_text("".join(kept))
    limited = f"{command} --limit 300 --device cpu --output_path {folder / 'lm_eval.json'}"
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", *shlex.split(limited.replace("examples/lm_eval_tasks", "tasks"))],
        cwd=folder, env=process_environment(HF_DATASETS_CACHE=str(folder / "cache")), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (written,) = folder.glob("lm_eval*.json")
    theirs = json.loads(written.read_text())["results"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(real_student), AutoTokenizer.from_pretrained(real_student)
    ours = evaluate_zero_shot(model, tokenizer, real_tasks(zero_shot_data), limit=300)
    ours |= {f"blimp::{name}": part for name, part in ours["blimp"].pop("tasks").items()}
    assert {f"local_{name}" for name in ours} == set(theirs)
    for name, metrics in ours.items():
        metrics.pop("count")
        metrics.pop("perplexity_stderr", None)  # bootstrap samples there, the delta method here
        for metric, value in metrics.items():
            assert theirs[f"local_{name}"][f"{metric},none"] == pytest.approx(value, rel=TOLERANCE), (name, metric)
