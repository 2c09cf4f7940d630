import json
from pathlib import Path

import pytest
import torch
from conftest import make_teacher, plan_of, write_workplace
from transformers import GenerationConfig
from typer.testing import CliRunner

from echoatt_hf import EchoAttForCausalLM, evaluate_continuations, pack_rows, repeated_share
from echoatt_hf.cli.app import app
from echoatt_hf.evaluation.continuations import format_continuations, format_side_by_side
from echoatt_hf.pipeline.preparation import load_prompts
from echoatt_hf.settings import DataSettings, EvaluationSettings, ScoringSettings
from echoatt_hf.text.documents import load_documents


PROMPT, NEW = 6, 9
TEXT = [f"Tale {number}: the fox | saw *{number}* bears\nand `slept`.\n" * 12 for number in range(8)]
DATA = ["--data", "text", "--held-out-fraction", "0.5", "--row-length", "16", "--evaluation-rows", "4"]
ASKED = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with text, a teacher and a student."""
    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = write_workplace(folder, TEXT)
    teacher = make_teacher("llama", vocab_size=len(tokenizer))
    for model, name in ((teacher, "teacher"), (make_student(teacher), "student")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def make_student(teacher):
    return EchoAttForCausalLM.from_teacher(teacher, plan_of("llama")).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_workplace(tmp_path_factory.mktemp("text"), TEXT)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return make_teacher("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def rows(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "text.txt"
    file.write_text("\n".join(TEXT))
    return [pack_rows(load_documents(file), tokenizer, PROMPT + NEW)[number] for number in range(5)]


def continue_slowly(model, prompt, new_tokens):
    """Without a cache, one prompt and one token at a time."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def share_slowly(tokens, n):
    """Each n-gram is looked for among those before it."""
    ngrams = [list(tokens[place : place + n]) for place in range(len(tokens)) if place + n <= len(tokens)]
    return sum(ngram in ngrams[:number] for number, ngram in enumerate(ngrams)) / max(len(ngrams), 1)


def make_repeating(model, words=1):
    """A model that says the first few tokens again and again, whatever came before."""

    def answer(module, args, kwargs, output):
        length = output.logits.shape[1]
        places = (kwargs["position_ids"][:, -length:] + 1) % words
        output.logits = torch.nn.functional.one_hot(places, output.logits.shape[-1]).float()
        return output

    model.register_forward_hook(answer, with_kwargs=True)
    return model


# The share.


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ("abcabc", 2, 1 / 5 * 2),
        ("abcdefgh", 4, 0.0),
        ("aaaaaaaa", 4, 4 / 5),
        ("abababab", 4, 3 / 5),
        ("abc", 4, 0.0),
        ("", 1, 0.0),
        ("abca", 1, 1 / 4),
    ],
)
def test_the_share_of_a_text(tokens, n, share):
    assert repeated_share(tokens, n) == pytest.approx(share) == pytest.approx(share_slowly(tokens, n))


def test_the_share_is_that_of_a_search_for_each(rows):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(3, (40,), generator=generator).tolist()
        assert 0 < repeated_share(tokens) == pytest.approx(share_slowly(tokens, 4))


def test_an_n_gram_has_a_token():
    with pytest.raises(ValueError, match="n is 0; it must be at least 1"):
        repeated_share([1, 2], 0)


# Continuations.


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_continuations_are_greedy_and_counted(teacher, tokenizer, rows, batch_size):
    student = make_student(teacher)
    found = evaluate_continuations(
        student, rows, tokenizer, teacher=teacher, prompt_tokens=PROMPT, new_tokens=NEW, batch_size=batch_size
    )
    ids = [row["input_ids"] for row in rows]
    written = {
        "text": [row[PROMPT : PROMPT + NEW] for row in ids],
        "teacher": [continue_slowly(teacher, row[:PROMPT], NEW) for row in ids],
        "model": [continue_slowly(student, row[:PROMPT], NEW) for row in ids],
    }
    assert written["teacher"] != written["model"]
    for name, key in (("text", "text_"), ("teacher", "teacher_"), ("model", "")):
        shares = torch.tensor([share_slowly(tokens, 4) for tokens in written[name]], dtype=torch.float64)
        assert found[f"{key}repeated_4grams"] == pytest.approx(shares.mean().item())
        assert found[f"{key}repeated_4grams_stderr"] == pytest.approx(shares.std().item() / 5**0.5)
        assert [line[name] for line in found["texts"]] == [tokenizer.decode(tokens) for tokens in written[name]]
    assert [line["prompt"] for line in found["texts"]] == [tokenizer.decode(row[:PROMPT]) for row in ids]
    assert (found["prompts"], found["prompt_tokens"], found["new_tokens"]) == (5, PROMPT, NEW)


@pytest.mark.parametrize(("words", "share"), [(1, 5 / 6), (2, 4 / 6), (9, 0.0)])
def test_a_model_that_repeats(tokenizer, rows, words, share):
    model = make_repeating(make_teacher("llama", vocab_size=len(tokenizer)), words)
    found = evaluate_continuations(model, rows, tokenizer, prompt_tokens=PROMPT, new_tokens=NEW)
    assert found["repeated_4grams"] == pytest.approx(share) and found["repeated_4grams_stderr"] == 0
    assert found["text_repeated_4grams"] < 0.5
    assert "teacher_repeated_4grams" not in found and "teacher" not in found["texts"][0]


def test_what_a_model_says_of_generation_is_set_aside(tokenizer, rows):
    """Ends of a text at any token, a penalty for each repetition, and draws at random; and it is there again after."""
    model = make_teacher("llama", vocab_size=len(tokenizer))
    plain = evaluate_continuations(model, rows, tokenizer, prompt_tokens=PROMPT, new_tokens=NEW)
    config = GenerationConfig(
        eos_token_id=list(range(len(tokenizer))),
        pad_token_id=0,
        repetition_penalty=9.0,
        do_sample=True,
        temperature=5.0,
    )
    model.generation_config = config
    assert evaluate_continuations(model, rows, tokenizer, prompt_tokens=PROMPT, new_tokens=NEW) == plain
    assert model.generation_config is config
    model.train()
    evaluate_continuations(model, rows[:1], tokenizer, prompt_tokens=PROMPT, new_tokens=NEW)
    assert model.training


def test_a_single_prompt_has_no_standard_error(teacher, tokenizer, rows):
    found = evaluate_continuations(teacher, rows[:1], tokenizer, prompt_tokens=PROMPT, new_tokens=NEW)
    assert found["repeated_4grams_stderr"] is None
    assert "±" not in format_continuations(found) and "| 1 continuations of 9 tokens |" in format_continuations(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_tokens": 7},
            r"Row 0 has 15 tokens, but a prompt of 7 tokens and 9 new ones need 16: give longer rows",
        ),
        ({"prompt_tokens": 0}, "prompt_tokens is 0; it must be at least 1"),
        ({"new_tokens": 3}, "new_tokens is 3; it must be at least 4"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"rows": []}, "There are no rows to take prompts from"),
    ],
)
def test_bad_input_is_refused(teacher, tokenizer, rows, options, message):
    options = {"rows": rows, "prompt_tokens": PROMPT, "new_tokens": NEW} | options
    with pytest.raises(ValueError, match=message):
        evaluate_continuations(teacher, options.pop("rows"), tokenizer, **options)


def test_another_tokenizer_is_refused(teacher, tokenizer, rows):
    other = make_teacher("llama", vocab_size=len(tokenizer) - 50)
    with pytest.raises(ValueError, match="tokens"):
        evaluate_continuations(teacher, rows, tokenizer, teacher=other, prompt_tokens=PROMPT, new_tokens=NEW)


def test_texts_stand_in_a_table_as_they_are():
    text = format_side_by_side([{"prompt": "A | b\n\n c", "text": "<|end|> *d*", "0.4 ours": "`e`"}])
    table = text.splitlines()[-4:]
    assert table == [
        "|  | prompt 1: A &#124; b ⏎ c |",
        "|---|---|",
        r"| the text itself | &lt;&#124;end&#124;&gt; \*d\* |",
        r"| 0.4 ours | \`e\` |",
    ]


# The command line.


@pytest.fixture
def echoatt(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_evaluate_counts_repetition_and_keeps_the_texts(echoatt, tmp_path, workplace):
    arguments = ["evaluate", "student", "--teacher", "teacher", *DATA, *ASKED, "--output", tmp_path / "found.json"]
    result = echoatt(*arguments, "--continuations", 23)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "found.json").read_text())
    found = written["continuations"]
    assert found["prompts"] == len(found["texts"]) == 23 and written["scoring"]["continuations"] == 23
    assert written["kl"] > 0 and "kl  " in result.output
    assert "| 23 continuations of 9 tokens | repeated 4-grams |" in result.output
    for title, key in (("the text itself", "text_"), ("teacher", "teacher_"), ("model", "")):
        share, error = found[f"{key}repeated_4grams"], found[f"{key}repeated_4grams_stderr"]
        assert f"| {title:28} | {f'{share:.1%} ± {error:.1%}':>16} |" in result.output
    shown = (tmp_path / "found.continuations.md").read_text()
    assert shown == format_side_by_side(found["texts"][:20])
    assert shown.count("|---|---|") == 20 and str(workplace) not in shown
    again = echoatt(*arguments, "--continuations", 4)
    assert again.exit_code == 2 and "found.json" in again.stderr
    (tmp_path / "found.json").unlink()
    again = echoatt(*arguments, "--continuations", 4)
    assert again.exit_code == 2 and "found.continuations.md" in again.stderr
    assert echoatt(*arguments, "--continuations", 4, "--overwrite").exit_code == 0


def test_prompts_are_of_many_documents(workplace, tokenizer, teacher, monkeypatch):
    """Not the beginnings of the first rows, which are of one document where documents are long; and the same each time."""
    monkeypatch.chdir(workplace)
    data = DataSettings(["text"], held_out_fraction=0.5)
    settings = EvaluationSettings("model", data=data, scoring=ScoringSettings(None, 0, 9, PROMPT, NEW))
    rows = load_prompts(settings, tokenizer, teacher)
    tales = [{tale for tale in range(8) if str(tale) in tokenizer.decode(row["input_ids"])} for row in rows]
    assert len(rows) == 9 and all(len(row["input_ids"]) == PROMPT + NEW for row in rows)
    assert len(set().union(*tales)) > 2
    assert load_prompts(settings, tokenizer, teacher) == rows


def test_evaluate_without_continuations_writes_none(echoatt, tmp_path):
    result = echoatt("evaluate", "student", *DATA, "--output", tmp_path / "found.json")
    assert result.exit_code == 0 and "continuations" not in result.output
    assert "continuations" not in json.loads((tmp_path / "found.json").read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--continuations", "-1"], "continuations is -1; it must be 0 or more"),
        (["--continuations", "2", "--prompt-tokens", "0"], "prompt_tokens is 0; it must be at least 1"),
        (["--continuations", "2", "--new-tokens", "3"], "new_tokens is 3; it must be at least 4"),
        (
            ["--continuations", "2", "--new-tokens", "9999"],
            "prompt_tokens + new_tokens is 10063, but the model's context",
        ),
    ],
)
def test_evaluate_refuses_in_one_line(echoatt, options, message):
    result = echoatt("evaluate", "student", *DATA, *options)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_kl_by_position_of_long_rows_from_the_command_line(echoatt, tmp_path, workplace, tokenizer):
    long = tmp_path / "long.txt"
    long.write_text("\n".join(TEXT) * 4)
    teacher = make_teacher("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    for model, name in ((teacher, "teacher"), (make_student(teacher), "student")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    result = echoatt(
        "evaluate", tmp_path / "student", "--teacher", tmp_path / "teacher", "--data", "text", "--held-out-data", long,
        "--row-length", 2048, "--evaluation-rows", 1, "--position-buckets", 8, "--output", tmp_path / "found.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "| KL (nats) |" in result.output and "| 1,792 to 2,047 |    256 |" in result.output
    parts = json.loads((tmp_path / "found.json").read_text())
    assert [part["first"] for part in parts["by_position"]] == list(range(0, 2048, 256))
    mean = sum(part["kl"] * part["tokens"] for part in parts["by_position"]) / 2047
    assert parts["kl"] == pytest.approx(mean) and all(part["kl"] > 0 for part in parts["by_position"])


def test_settings_are_checked_at_construction():
    with pytest.raises(ValueError, match="continuations is -1"):
        ScoringSettings(continuations=-1)
    with pytest.raises(ValueError, match="new_tokens is 3"):
        ScoringSettings(continuations=1, new_tokens=3)
