"""Students that earlier versions wrote load in this one. They are never written anew: see fixtures/make_students.py."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FP32_TOLERANCE
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from echoatt_hf import EchoAttForCausalLM


FIXTURES = Path(__file__).parent / "fixtures"
STUDENTS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


def test_fixtures_are_small_and_say_who_wrote_them():
    assert {name.split("_")[0] for name in STUDENTS} >= {"llama", "phi3", "qwen3"}
    for version in {name.split("_", 1)[1] for name in STUDENTS}:
        sizes = [path.stat().st_size for path in FIXTURES.glob(f"*_{version}/*")]
        assert sum(sizes) < 200_000
    for name in STUDENTS:
        config = json.loads((FIXTURES / name / "config.json").read_text())
        assert config["echoatt_version"] == name.split("_", 1)[1]


@pytest.mark.parametrize("name", STUDENTS)
def test_student_of_an_earlier_version_gives_the_logits_it_gave(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    logits, mask = expected.pop("logits"), expected["attention_mask"].bool()
    model, report = AutoModelForCausalLM.from_pretrained(FIXTURES / name, output_loading_info=True)
    assert type(model) is EchoAttForCausalLM and not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(model(**expected).logits[mask], logits[mask], **FP32_TOLERANCE)
        # The headless model loads from it too.
        hidden = AutoModel.from_pretrained(FIXTURES / name)(**expected).last_hidden_state
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(hidden)[mask], logits[mask], **FP32_TOLERANCE)
