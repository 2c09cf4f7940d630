"""transformers' and PEFT's own tests, run on students. They come from the source distributions; see CONTRIBUTING.md."""

import contextlib
import functools
import tempfile
import unittest
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import make_batch, make_config, plan_of, train_byte_level_bpe
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast
from upstream import FOLDER, find_tests, import_tests

import echoatt_hf
from echoatt_hf import EchoAttConfig, EchoAttForCausalLM


pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("default")]

# With what the tests need of a configuration.
FULL_ROTATION = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": {}, "phi3": {}, "gpt2": {}}
FAMILIES |= {"gpt_neox": FULL_ROTATION, "mixtral": {"head_dim": 8}}
WITHOUT_EXPERTS = [family for family in FAMILIES if family != "mixtral"]
CLASSES = ["EchoAttModel", "EchoAttForCausalLM", "EchoAttForSequenceClassification", "EchoAttForTokenClassification"]

# What fails: the families, what it says, and why that is right.
EXPECTED = {
    "test_num_layers_is_small": (FAMILIES, "", "two layers are too few for a plan"),
    "test_training_gradient_checkpointing_use_reentrant_true": (
        FAMILIES,
        "do not support reentrant gradient checkpointing",
        "it computes a source again without its echoes, whose gradients get lost",
    ),
    "test_sdpa_can_dispatch_non_composite_models": (
        ["gemma2"],
        "False is not true",
        "the test asks the class whether it has sdpa, and one class is for all families; this one has not",
    ),
    **{
        f"test_eager_matches_batched_and_grouped_inference_{variant}": (
            WITHOUT_EXPERTS,
            "Expected 'mock' to have been called",
            "the test asks the class whether it has experts, and one class is for all families; these have none",
        )
        for variant in ("0_fp16", "1_fp32", "2_bf16")
    },
}


# The same of PEFT's tests: what is raised, and why that is right.
EMBEDDINGS = "test_save_pretrained_targeting_lora_to_embedding_layer"
REACHES = "the test reaches for `model.model`; a student has the headless model in its `language_model`"
NO_GEMMA4 = "Gemma 4 gets no students: its layers have configurations of their own"
EXPECTED_OF_PEFT = {
    "test_prompt_tuning_trust_remote_code": (AttributeError, REACHES),
    "test_lora_layer_replication": (AttributeError, REACHES),
    "test_merge_and_unload_fixes_tie_word_embeddings_config": (AttributeError, REACHES),
    **{
        f"{EMBEDDINGS}[peft_config{number}-{value}]": (
            AssertionError,
            "the test looks for a key that begins with `base_model.model.model`; a student's has `language_model` in it",
        )
        for number in (0, 1)
        for value in ("auto", "True")
    },
    **{
        f"test_prefix_tuning_gemma4_{what}": (OSError, NO_GEMMA4)
        for what in ("works", "warns_if_some_layers_skipped", "raises_if_all_layers_skipped")
    },
}

# Models of the Hub that PEFT's tests name, and the students in their place: the family, and what its configuration has. Most are as
# wide as the ranks in those tests ask for.
WIDE = {"hidden_size": 64, "num_key_value_heads": 4}
NARROW = {"hidden_size": 16}  # Gemma's embeddings grow with it, and the tests bound them
LLAMA, QWEN2 = "trl-internal-testing/tiny-random-LlamaForCausalLM", "peft-internal-testing/tiny-dummy-qwen2"
STAND_INS = {
    LLAMA: ("llama", {**WIDE, "tie_word_embeddings": False}),
    QWEN2: ("qwen2", {**WIDE, "tie_word_embeddings": True}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("qwen3", WIDE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", WIDE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", NARROW),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", WIDE),
}

# In place of a data set of the Hub.
QUOTES = Dataset.from_dict({"quote": ["Once upon a time"] * 8})


class StudentTester:
    """What transformers' tests ask a family for."""

    batch_size, seq_length, is_training = 2, 12, True

    def __init__(self, family: str):
        self.family = family
        sizes = self.get_config().text_config
        self.hidden_size, self.num_attention_heads = sizes.hidden_size, sizes.num_attention_heads
        self.num_hidden_layers = sizes.num_hidden_layers

    def get_config(self) -> EchoAttConfig:
        return EchoAttConfig(
            text_config=make_config(self.family, **FAMILIES[self.family]), echo_sources=plan_of(self.family)
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), make_batch(self.batch_size, self.seq_length, padding=(3,))


def fails_as_expected(test, message: str):
    """A test that passes where `test` fails with `message`, and fails where it passes."""

    @functools.wraps(test)
    def run(self):
        with pytest.raises(Exception, match=message), mock.patch.object(self, "subTest", contextlib.nullcontext):
            test(self)

    return run


def define_suite(common, family: str) -> type:
    parents = (common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase)
    members = {
        "all_model_classes": tuple(getattr(echoatt_hf, name) for name in CLASSES),
        "setUp": lambda self: setattr(self, "model_tester", StudentTester(family)),
        "__module__": __name__,
    }
    for name, (families, message, _) in EXPECTED.items():
        if family in families:
            members[name] = fails_as_expected(getattr(common.ModelTesterMixin, name), message)
    return type(f"Test_{family}", parents, members)


def save_students(folder: Path):
    """Save tiny students with a tokenizer, each where PEFT's tests look for the model of the Hub that it stands in for."""
    tokenizer = train_byte_level_bpe(["Once upon a time"] * 3, 290, ["<|endoftext|>"])
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for name, (family, overrides) in STAND_INS.items():
        config = make_config(family, vocab_size=300, **overrides)
        torch.manual_seed(0)
        student = EchoAttForCausalLM(EchoAttConfig(text_config=config, echo_sources=plan_of(family)))
        student.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / name)


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_the_tests_of_the_installed_version_are_here(package):
    if find_tests(package) is None:
        pytest.skip(f"{FOLDER} has no source distribution of {package} {version(package)}: see CONTRIBUTING.md")


folder = find_tests("transformers")
if folder is not None:
    common = import_tests(
        folder,
        "test_modeling_common",
        {".exporters.test_export": ("ExportTesterMixin",), ".generation.test_utils": ("GenerationTesterMixin",)},
        {},
    )
    for family in FAMILIES:
        globals()[f"Test_{family}"] = define_suite(common, family)

folder = find_tests("peft")
if folder is not None:
    _students = tempfile.TemporaryDirectory(prefix="echoatt-upstream-")
    save_students(Path(_students.name))
    decoders = import_tests(
        folder,
        "test_decoder_models",
        {"diffusers": ("StableDiffusionPipeline",)},
        dict.fromkeys(("PEFT_DECODER_MODELS_TO_TEST", "SMALL_GRID_MODELS"), (LLAMA, QWEN2)),
    )

    class TestDecoderModels(decoders.TestDecoderModels):
        @pytest.fixture(autouse=True)
        def on_students(self, request, monkeypatch):
            monkeypatch.chdir(_students.name)
            monkeypatch.setattr(decoders, "hub_online_once", lambda model_id: contextlib.nullcontext())
            monkeypatch.setattr(decoders, "load_dataset_english_quotes", lambda: DatasetDict(train=QUOTES))
            if request.node.name in EXPECTED_OF_PEFT:
                raised, reason = EXPECTED_OF_PEFT[request.node.name]
                request.node.add_marker(pytest.mark.xfail(raises=raised, reason=reason, strict=True))
            if "use_reentrant" in request.fixturenames and request.getfixturevalue("use_reentrant"):
                reason = EXPECTED["test_training_gradient_checkpointing_use_reentrant_true"][2]
                request.node.add_marker(pytest.mark.xfail(raises=ValueError, reason=reason, strict=True))
