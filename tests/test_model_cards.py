"""The cards in `model_cards/` say what their results say. That of the teacher: see test_builtin_teacher.py."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from echoatt_hf import EchoAttForCausalLM, SharingPlan, count_kv_bytes_per_token, load_model
from echoatt_hf.models.loading import load_config
from echoatt_hf.publishing.card import find_gaps
from echoatt_hf.settings import CompressionSettings, DistillationSettings


pytestmark = pytest.mark.once

CARD = Path(__file__).parents[1] / "model_cards" / "builtin_student_041"
STUDENTS = sorted(CARD.parent.glob("*_student_*"))


@pytest.fixture(scope="module")
def results():
    return json.loads((CARD / "results.json").read_text())


@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("make_model_card")


@pytest.mark.parametrize("card", STUDENTS, ids=lambda card: card.name)
def test_card_is_what_its_results_make(make, tmp_path, card):
    folder = Path(shutil.copytree(card, tmp_path / card.name))
    before = (folder / "README.md").read_text()
    make.write_card(folder)
    assert (folder / "README.md").read_text() == before
    results = json.loads((folder / "results.json").read_text())
    results["results"][-1]["perplexity"] += 1
    (folder / "results.json").write_text(json.dumps(results))
    make.write_card(folder)
    assert (folder / "README.md").read_text() != before


@pytest.mark.parametrize("folder", STUDENTS, ids=lambda folder: folder.name)
def test_numbers_of_the_card_are_those_of_the_results(folder):
    card, results = (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())
    for entry in results["results"]:
        row = next(line for line in card.splitlines() if line.startswith(f"| {entry['name']} "))
        figures = [f"{entry['perplexity']:.3f}", f"{entry['kl']:.4f}", f"{entry['parameters']:,}"]
        assert all(figure in row for figure in figures), row
    last = results["results"][-1]
    found = {
        result.metric_type: result.metric_value
        for result in ModelCard(card).data.eval_results
        if result.dataset_type == "text"
    }
    assert found == {"perplexity": round(last["perplexity"], 6), "agreement": round(last["agreement"], 6)}
    assert find_gaps(card) == [] and ModelCard(card).data.license == "apache-2.0"
    assert not re.search(r"/(home|root|tmp|work|opt)/", card + json.dumps(results))


def test_a_card_is_made_of_a_student_that_is_there(make, tmp_path):
    student = CARD.parent / "smollm2_student_041"
    for file in student.iterdir():
        shutil.copy(file, tmp_path / {"results.json": "report.json"}.get(file.name, file.name))
    (tmp_path / "README.md").unlink()
    words = ["--student", str(tmp_path), "--base-model", "org/teacher", "--license", "mit", "--language", "de"]
    make.main([*words, "--output", str(tmp_path / "card")])
    data = ModelCard((tmp_path / "card" / "README.md").read_text()).data
    assert (data.base_model, data.license, data.language) == ("org/teacher", "mit", "de")
    assert {file.name for file in (tmp_path / "card").iterdir()} == {file.name for file in student.iterdir()}


def test_a_card_has_nothing_of_an_earlier_student(make, tmp_path):
    card = Path(shutil.copytree(CARD.parent / "smollm2_student_041", tmp_path / "card"))
    (card / "similarity.png").write_bytes(b"of another teacher")
    assert "Zero-shot" in (card / "README.md").read_text()
    student = tmp_path / "student"
    student.mkdir()
    shutil.copy(CARD / "config.json", student)
    before = {file.name: file.read_bytes() for file in card.iterdir()}
    with pytest.raises(SystemExit, match=r"student has no report\.json: give the folder of a student"):
        make.collect(student, card)
    assert {file.name: file.read_bytes() for file in card.iterdir()} == before
    shutil.copy(CARD / "results.json", student / "report.json")
    make.collect(student, card)
    assert {file.name for file in card.iterdir()} == {"README.md", "config.json", "results.json"}
    text = (card / "README.md").read_text()
    assert "Zero-shot" not in text and "similarity.png" not in text


def test_results_are_those_of_the_default_student(results):
    distillation = DistillationSettings().for_width(load_config("builtin").hidden_size)
    defaults = json.loads(CompressionSettings(distillation=distillation).to_json())
    for group, values in results["settings"].items():  # settings that were added since are not in it
        assert (
            values == defaults[group]
            if isinstance(values, str)
            else all(defaults[group][name] == value for name, value in values.items())
        ), group
    assert "dirty" not in results["environment"]["commit"]
    student = EchoAttForCausalLM.from_teacher(load_model("builtin"), results["plan"]["echo_sources"])
    last = results["results"][-1]
    assert last["parameters"] == student.num_parameters()
    assert last["kv_bytes_per_token"] == count_kv_bytes_per_token(student)
    assert SharingPlan(json.loads((CARD / "config.json").read_text())["echo_sources"]) == SharingPlan(
        results["plan"]["echo_sources"]
    )
    teacher, converted, *_ = results["results"]
    assert teacher["perplexity"] < last["perplexity"] < converted["perplexity"]
