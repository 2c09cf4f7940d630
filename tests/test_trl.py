"""TRL's SFTTrainer fine-tunes a student as any other model, and prepares conversations as this package does."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTING, FP32_TOLERANCE, make_teacher, plan_of, train_byte_level_bpe
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from echoatt_hf import EchoAttForCausalLM, collate_rows, load_documents
from echoatt_hf.text.rows import _Tokenize


trl = pytest.importorskip("trl", reason="trl is not installed")

# Of TRL and PEFT about what they use themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:trl"),
]

TEXTS = [f"def f{number}(x):\n    return x + {number}\n" for number in range(48)]


@pytest.fixture(scope="module")
def tokenizer():
    backend = train_byte_level_bpe(TEXTS, 290, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture
def student(tokenizer, tmp_path):
    teacher = make_teacher(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0, bos_token_id=0)
    EchoAttForCausalLM.from_teacher(teacher, plan_of("llama")).save_pretrained(tmp_path / "student")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "student")


def make_trainer(student, tokenizer, folder, adapters=None, **options):
    config = trl.SFTConfig(
        str(folder), **{CHECKPOINTING: False, "bf16": False, "max_length": 64, "max_steps": 8, **options}, logging_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    return trl.SFTTrainer(
        model=student, args=config, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer,
        peft_config=adapters,
    )  # fmt: skip


@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True}, {"packing": True, CHECKPOINTING: True}],
    ids=["padded", "packed", "packed, checkpointed"],
)
def test_fine_tuning(student, tokenizer, tmp_path, options, adapters):
    trainer = make_trainer(student, tokenizer, tmp_path, LoraConfig() if adapters else None, **options)
    (batch,) = [next(iter(trainer.get_train_dataloader()))]
    labels, packed = batch["labels"], options.get("packing", False)
    assert ("position_ids" in batch) is packed
    # The first loss is that of the model's own forward pass; of packed texts that of each text alone.
    positions = batch["position_ids"][0] if packed else torch.arange(labels.shape[1])
    ends = [*(positions == 0).nonzero().flatten().tolist()[1:], labels.shape[1]]
    total = count = start = 0
    with torch.no_grad():
        for end in ends:
            part = {
                name: batch[name][:, start:end] for name in ("input_ids", "labels", "attention_mask") if name in batch
            }
            tokens = int((part["labels"][:, 1:] != -100).sum())
            total += tokens * student.eval()(**part).loss.item()
            count, start = count + tokens, end
    student.train()
    found = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert found == pytest.approx(total / count, rel=1e-4)

    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) is not value.requires_grad, name
        assert value.requires_grad is (not adapters or "lora_" in name)
    if not adapters:
        trainer.save_model(str(tmp_path / "tuned"))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        tokens = batch["input_ids"][:, :8]
        with torch.no_grad():
            torch.testing.assert_close(reloaded(tokens).logits, student.eval()(tokens).logits, **FP32_TOLERANCE)


# Conversations are prepared as TRL prepares them.


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]
TALKS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {number} + {number}?"},
        {"role": "assistant", "content": f"It is {2 * number} 🙂.\n"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So it is. " * (1 + number % 3)},
    ]
    for number in range(6)
]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FORMS = {
    "messages": [{"messages": talk} for talk in TALKS],
    "ShareGPT": [
        {"conversations": [{"from": each["role"], "value": each["content"]} for each in talk]} for talk in TALKS
    ],
    "tools": [{"messages": talk, "tools": TOOLS} for talk in TALKS],
    "prompt and completion": [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS],
    "texts": [{"prompt": f"What is {number}? ", "completion": f"It is {number}."} for number in range(6)],
}


def _without_role(tokens, labels: list[int], tokenizer) -> list[int]:
    """TRL's marks for Qwen2.5 hold the line break after the role, which the prompt for an answer brings."""
    is_break = [tokenizer.decode(tokens[:place]).endswith("<|im_start|>assistant") for place in range(len(tokens))]
    has_break = tokenizer.name_or_path == "qwen2_5.jinja"
    return [-100 if has_break and each else label for each, label in zip(is_break, labels, strict=True)]


@pytest.mark.skipif(not TEMPLATES.exists(), reason="this TRL ships no chat templates")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "template", ["qwen2_5.jinja", "llama3.jinja", "qwen2_5_training.jinja", "llama3_training.jinja"]
)
def test_conversations_become_the_tokens_and_masks_of_trl(template, form, student, tmp_path):
    backend = train_byte_level_bpe(TEXTS, 280, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=(TEMPLATES / template).read_text(), name_or_path=template,
    )  # fmt: skip
    rows = FORMS[form]
    for answers in (True, False) if form != "ShareGPT" else (False,):  # of which TRL finds no answers
        # TRL finds answers by marks: to a template that has none it adds those it knows. Completions count alone.
        options = {
            "assistant_only_loss": answers and form != "texts",
            "completion_only_loss": answers and "prompt" in rows[0],
        }
        config = trl.SFTConfig(
            str(tmp_path),
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to="none",
            **{CHECKPOINTING: False},
            **options,
        )
        trainer = trl.SFTTrainer(
            model=student,
            args=config,
            train_dataset=Dataset.from_list(copy.deepcopy(rows)),
            processing_class=tokenizer,
        )
        expected = trainer.train_dataset
        documents = load_documents(Dataset.from_list(rows))
        found = _Tokenize(tokenizer, answers)(documents["text"][:], documents["chat"][:])
        assert [list(ids) for ids in found["input_ids"]] == expected["input_ids"][:]
        if answers:
            batches = [
                collate_rows([{"input_ids": ids, "assistant_masks": mask}])
                for ids, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)
            ]
            labels = [batch["labels"][0].tolist() for batch in batches]
            assert labels == [
                _without_role(*row, tokenizer) for row in zip(found["input_ids"], expected["labels"], strict=True)
            ]
            assert all(0 < sum(label != -100 for label in row) < len(row) for row in labels)
