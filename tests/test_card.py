"""The model card of a student: what it says, what it leaves out, and what it leaves alone."""

import json
import re
import shlex

import pytest
from conftest import make_teacher, plan_of, write_workplace
from huggingface_hub import ModelCard

from echoatt_hf import CompressionSettings, DistillationSettings, EchoAttForCausalLM, PlanSettings, convert
from echoatt_hf.benchmark.report import format_benchmark, write_benchmark
from echoatt_hf.benchmark.speed import run_benchmark
from echoatt_hf.cli import app as cli
from echoatt_hf.conversion.convert import ConversionReport
from echoatt_hf.publishing.card import TEMPLATE, find_gaps, has_own_text, make_card
from echoatt_hf.publishing.metadata import LICENSES, find_metadata_faults
from echoatt_hf.settings import BenchmarkSettings, CalibrationSettings, DataSettings


pytestmark = pytest.mark.once

ENTRY = {
    "tokens": 1000,
    "perplexity": 12.5,
    "bits_per_byte": 1.1,
    "agreement": 0.75,
    "kl": 0.1,
    "parameters": 10,
    "kv_bytes_per_token": 4,
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of a student, and nothing else that a card takes its facts from."""
    student = EchoAttForCausalLM.from_teacher(make_teacher(), plan_of("llama"))
    student.config.architectures = ["EchoAttForCausalLM"]
    student.config.save_pretrained(tmp_path)
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def report_of(**changes):
    settings = CompressionSettings(
        teacher="org/teacher",
        distillation=DistillationSettings(steps=12, learning_rate=3e-3),
        data=DataSettings(data=["org/text", "more.txt"]),
        calibration=CalibrationSettings(align=False),
    )
    return {
        "settings": json.loads(settings.to_json()),
        "teacher": {"name": "org/teacher", "repository": "org/teacher", "revision": "a" * 40},
        "data": {"names": ["org/text", "more.txt"], "repositories": ["org/text"]},
        "results": [{"name": "teacher", **ENTRY}, {"name": "stage 1", **ENTRY, "perplexity": 13.25}],
        "tokens_per_step": 100,
        "environment": {"echoatt_hf": "0.1", "commit": "", "hardware": "a machine"},
    } | changes


def test_card_with_nothing_known_has_no_gaps(folder):
    card = make_card(folder)
    assert find_gaps(card) == [] and "None" not in card
    assert "1000" not in card and "base_model" not in card and "model-index" not in card
    assert "was not trained" in card and "Nothing was measured" in card
    assert not re.search(r"\n\n\n", card) and "  \n" not in card
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["echoatt", "attention-sharing", "distillation"],
    }


def test_card_says_what_the_report_knows(folder):
    write(folder, "report.json", report_of())
    card = make_card(folder, repo_id="alice/student", license="mit")
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/teacher", "finetune", "mit")
    assert data.datasets == ["org/text"]
    metrics = {result.metric_type: result.metric_value for result in data.eval_results}
    assert metrics == {"perplexity": 13.25, "agreement": 0.75}
    for fact in (
        "a" * 40,
        "| stage 1 |     13.250 |",
        "10 steps from the teacher, then 2",
        "1,200 tokens",
        "a machine",
    ):
        assert fact in card, fact
    assert "KV bytes are" not in card  # an earlier version did not say in which type they are counted
    assert 'name = "alice/student"' in card and "revision=revision, trust_remote_code=True" in card
    assert "commit" not in card.split("## Training")[1]  # which is not known
    assert find_gaps(card) == [] and not re.search(r"\n\n\n", card)


def test_what_was_inherited_and_dropped_is_said_of_a_converted_student(folder):
    student, report = convert(make_teacher(), plan_of("llama"))
    write(folder, "conversion.json", report.to_dict())
    card = make_card(folder)
    assert str(report) in card and "q_proj" in card and f"{student.num_parameters():,}" in card


def test_other_moves_are_named(folder, tmp_path):
    student, report = convert(make_teacher(), [0, 1, "kv 1", "skip attention", "drop", 5])
    student.save_pretrained(tmp_path / "mixed")
    write(tmp_path / "mixed", "conversion.json", report.to_dict())
    card = make_card(tmp_path / "mixed")
    assert (
        "A language model in which 1 of 5 layers use the keys and values of an earlier layer, 1 of 5 layers have no attention, "
        "1 layers of the teacher are left out ([EchoAtt]"
    ) in card
    assert "2→kv1 3:skip 4:drop" in card and "`skip` is a layer without attention" in card
    assert "use the keys" not in make_card(folder)


CONVERSION = {
    "echo_sources": [0, 1, 1, 1, 4, 5],
    "copied": ["a"],
    "cut": [],
    "dropped": ["b.weight"],
    "teacher_parameters": 20,
    "student_parameters": 10,
    "teacher_kv_bytes_per_token": 8,
    "student_kv_bytes_per_token": 4,
    "kl": {"copied": 0.5, "aligned": 0.25},  # of 0.1.0
    "aligned": {"2": [0, 1]},
    "refitted": {},
    "teacher": {"name": "org/first", "repository": "org/first", "revision": "b" * 40},
}


@pytest.mark.parametrize("place", ["report.json", "conversion.json"])
def test_base_model_is_what_the_student_was_converted_from(folder, place):
    if place == "report.json":
        write(folder, "report.json", report_of(conversion=CONVERSION))
    else:
        write(folder, "report.json", report_of())
        write(folder, "conversion.json", CONVERSION)
    card = make_card(folder)
    assert ModelCard(card).data.base_model == "org/first"
    assert f"made from\n[org/first](https://huggingface.co/org/first), revision `{'b' * 40}`, by" in card
    assert "Its teacher in distillation was another model, [org/teacher](https://huggingface.co/org/teacher)" in card
    assert "0.5000 → 0.2500 aligned (1 aligned)" in card and "The heads of echo layers were aligned" in card
    write(folder, "report.json", report_of(conversion=CONVERSION, teacher=CONVERSION["teacher"]))
    assert "another model" not in make_card(folder)
    given = make_card(folder, base_model="org/given")  # where it is on the Hub: no other model
    assert ModelCard(given).data.base_model == "org/given" and "another model" not in given
    # Without a repository of its own, what the card says already.
    write(
        folder,
        "report.json",
        report_of(teacher={"name": "local"}, conversion=CONVERSION | {"teacher": {"name": "local"}}),
    )
    (folder / "conversion.json").unlink(missing_ok=True)
    assert (
        make_card(folder, given).count("org/given") == make_card(folder, base_model="org/given").count("org/given") > 1
    )


def test_a_revision_that_is_not_known_is_not_named(folder):
    write(folder, "report.json", {"teacher": {"name": "org/teacher", "repository": "org/teacher"}})
    card = make_card(folder)
    assert "(https://huggingface.co/org/teacher) by `echoatt_hf`." in card and "revision ``" not in card


def test_one_name_is_a_list_of_one(folder):
    data = ModelCard(make_card(folder, datasets="org/rows", tags="mine")).data
    assert data.datasets == ["org/rows"] and data.tags[-1] == "mine"


def test_command_convert_writes_a_card(tmp_path):
    from typer.testing import CliRunner

    output = tmp_path / "student"
    plan = ",".join(map(str, [*range(10), 9, 11]))
    command = ["convert", "builtin", "--plan", plan, "--no-align", "--no-refit", "--output", str(output)]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    card, data = (output / "README.md").read_text(), ModelCard.load(output / "README.md").data
    assert data.license == "apache-2.0" and find_gaps(card) == []
    assert "made from the built-in teacher of echoatt_hf" in card and 'name = "student"' in card
    assert "was not trained" in card and json.loads((output / "conversion.json").read_text())["teacher"]["license"]


def test_what_conversion_measured_outlives_a_separate_distill(tmp_path):
    from typer.testing import CliRunner

    tokenizer = write_workplace(tmp_path, [f"Some words, number {number}. " * 20 for number in range(20)])
    for name in ("teacher", "other"):
        make_teacher(num_hidden_layers=4, vocab_size=300).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    teacher, other, student, output = (str(tmp_path / name) for name in ("teacher", "other", "student", "output"))
    data = ["--data", str(tmp_path / "text"), "--row-length", "16"]
    plan = ["--plan", "0,1,1,3", "--no-align", "--calibration-rows", "8"]
    steps = [
        "--steps",
        "1",
        "--stage2-steps",
        "0",
        "--warmup-steps",
        "0",
        "--batch-size",
        "2",
        "--evaluation-rows",
        "2",
    ]
    for command in (
        ["convert", teacher, *plan, *data, "--output", student],
        ["distill", student, "--teacher", other, *data, *steps, "--output", output],
    ):
        ran = CliRunner().invoke(cli.app, command)
        assert ran.exit_code == 0, ran.output
    measured = json.loads((tmp_path / "student" / "conversion.json").read_text())
    assert {*measured["kl"]} == {"copied", "tuned"} and measured["teacher"] == {"name": "teacher"}
    assert json.loads((tmp_path / "output" / "report.json").read_text())["conversion"] == measured
    card = (tmp_path / "output" / "README.md").read_text()
    assert str(ConversionReport(**measured)) in card and "It was made from teacher by" in card
    assert "Its teacher in distillation was another model, other." in card


# Metadata


@pytest.mark.parametrize(
    ("data", "faulty"),
    [
        ({"license": "apache-2.0", "language": ["en", "code"], "datasets": ["squad", "org/rows"], "tags": ["x"]}, []),
        ({"license": ["mit", "llama3.3"], "base_model": ["org/a", "gpt2"]}, []),
        ({"license": "Apache-2.0"}, ["Apache-2.0"]),
        ({"license": ["mit", "gpl-3.0-or-later"]}, ["gpl-3.0-or-later"]),
        ({"license": {"name": "mit"}}, ["{'name': 'mit'}"]),
        ({"language": ["en-US"], "datasets": ["a/b/c", 3], "tags": [None]}, ["en-US", "a/b/c", "3", "None"]),
        ({"base_model": "../teacher"}, ["../teacher"]),
    ],
)
def test_metadata_that_the_hub_refuses(data, faulty):
    assert [value for value, _ in find_metadata_faults(data)] == faulty


def test_names_of_licences_are_whole():
    assert len(LICENSES) == 83 and {"apache-2.0", "openrail++", "llama3.1", "gemma", "other"} <= LICENSES


def test_zero_shot_results_come_with_their_standard_errors(folder):
    result = {"acc": 0.5, "acc_stderr": 0.05, "acc_norm": 0.6, "acc_norm_stderr": None, "count": 100}
    write(folder, "zero_shot.json", {"model": "student", "limit": 100, "results": {"piqa": result}})
    card = make_card(folder)
    assert "0.5000 ± 0.0500" in card and "first 100 questions" in card
    found = {entry.metric_type: entry.metric_value for entry in ModelCard(card).data.eval_results}
    assert found == {"acc": 0.5, "acc_stderr": 0.05, "acc_norm": 0.6}
    assert {entry.dataset_name for entry in ModelCard(card).data.eval_results} == {"piqa"}


def test_speed_comes_with_its_ceiling_and_attention(folder, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    settings = BenchmarkSettings(measure=["prefill"], length=[16], baseline=["eager"], repeats=2)
    results = run_benchmark(settings, str(tmp_path / "teacher"), ",".join(map(str, plan_of("llama"))))
    write_benchmark(results, folder)
    card = make_card(folder)
    assert format_benchmark(results) in card and "float32" in card
    assert {"ceiling", "sdpa", "eager teacher"} <= {cell.strip() for cell in card.split("|")}
    assert not find_gaps(card)


@pytest.mark.parametrize(
    ("architecture", "task", "auto_class"),
    [
        ("EchoAttForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("EchoAttForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("EchoAttModel", "feature-extraction", "AutoModel"),
    ],
)
def test_every_model_is_loaded_by_its_own_class(folder, architecture, task, auto_class):
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", config | {"architectures": [architecture]})
    card = make_card(folder)
    assert ModelCard(card).data.pipeline_tag == task and f"{auto_class}.from_pretrained(" in card


# Updates


def test_an_update_writes_marked_sections_anew_and_keeps_the_rest(folder):
    old = make_card(folder)
    assert not has_own_text(old)
    mine = old.replace("# EchoAtt student\n", "# My student\n\nA word of mine: None of your business.\n")
    mine = mine.replace("## Limits\n", "## Uses\n\nFor tests.\n\n## Limits\n").replace("tags:\n", "tags:\n- mine\n")
    mine = mine.replace("library_name:", "license: mit\ninference: false\nlibrary_name:")
    assert has_own_text(mine)
    write(folder, "report.json", report_of())
    new = make_card(folder, mine, repo_id="alice/student")
    assert "Nothing was measured" not in new and "| stage 1 |" in new
    for kept in ("# My student", "A word of mine", "## Uses\n\nFor tests."):
        assert kept in new
    data = ModelCard(new).data.to_dict()
    assert data["license"] == "mit" and data["inference"] is False
    assert data["tags"] == ["echoatt", "attention-sharing", "distillation", "mine"]
    assert make_card(folder, new, repo_id="alice/student") == new
    assert find_gaps(new) == []


def test_licence_is_the_one_given_or_that_of_the_card_or_of_the_teacher(folder):
    write(
        folder,
        "report.json",
        {"teacher": {"name": "a teacher", "license": "apache-2.0"}, "data": {"language": "code"}},
    )
    first = make_card(folder)
    mine = first.replace("license: apache-2.0", "license: mit").replace("language: code", "language: en")
    for old, given, expected in ((None, None, "apache-2.0"), (mine, None, "mit"), (mine, "gpl-3.0", "gpl-3.0")):
        assert ModelCard(make_card(folder, old, license=given)).data.license == expected
    assert ModelCard(make_card(folder, mine)).data.language == "en"


def test_a_section_whose_marks_were_removed_is_its_owners(folder):
    mine = re.sub(r"<!-- /?echoatt: limits -->\n", "", make_card(folder)).replace("- It was measured on", "- I say:")
    write(folder, "report.json", report_of())
    new = make_card(folder, mine)
    assert "- I say:" in new and "- It was measured on" not in new and "| stage 1 |" in new


def test_a_card_without_marks_keeps_its_text(folder):
    new = make_card(folder, "---\nlicense: mit\n---\n\n# All mine\n")
    assert new.endswith("---\n\n# All mine\n") and ModelCard(new).data.library_name == "transformers"


@pytest.mark.parametrize(
    "text",
    [
        "fine-tuned from None",
        "[More Information Needed]",
        "TODO",
        "{{ repo_id }}",
        "{% if x %}",
        '"path or repository"',
    ],
)
def test_gaps_are_found(folder, text):
    assert find_gaps(make_card(folder).replace("## Limits", f"{text}\n\n## Limits")) != []
    assert find_gaps("```python\nf(x=None)  # {{}}\n```\n\nNone of this is a gap, and none was left.") == []
    assert find_gaps(f"```python\nf(x=None)\n```\n\n{text}")[0][0] == 5


def test_sections_of_the_template_have_two_marks_each():
    text = TEMPLATE.read_text()
    opened, closed = (re.findall(rf"<!-- {mark}echoatt: (\w+) -->", text) for mark in ("", "/"))
    assert opened == closed and len(opened) == len({*opened}) == text.count("\n## ") + 1


@pytest.mark.parametrize(
    "settings",
    [
        CompressionSettings(),
        CompressionSettings(
            teacher="a teacher",
            data=DataSettings(data=["one.txt", "two.txt"], streaming=True, row_length=64),
            plan=PlanSettings(plan="0,1,1,3", ratio=0.5),
            calibration=CalibrationSettings(refit=False),
            distillation=DistillationSettings(steps=50, stage2_steps=0, learning_rate=1e-4, seed=3),
        ),
        CompressionSettings(distillation=DistillationSettings(recipe="paper", hidden_weight=0.0)),
    ],
    ids=["defaults", "others", "recipe"],
)
def test_the_command_in_the_card_makes_the_same_run(folder, settings, monkeypatch):
    from typer.testing import CliRunner

    write(folder, "report.json", report_of(settings=json.loads(settings.to_json())))
    command = re.search(r"^echoatt (compress .*)$", make_card(folder), re.MULTILINE).group(1)
    seen = []
    monkeypatch.setattr("echoatt_hf.pipeline.steps.compress", lambda settings, *_, **__: seen.append(settings))
    CliRunner().invoke(cli.app, shlex.split(command))
    assert seen == [settings]
    assert (command == "compress builtin --output student") == (settings == CompressionSettings())
    if settings.distillation.recipe == "paper":
        assert command == "compress builtin --recipe paper --hidden-weight 0.0 --output student"
