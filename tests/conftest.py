"""Tiny random teachers and where the real one lies. Everything runs on CPU, offline, on fixed seeds."""

import os
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The rows of a test are of no use to any other run.
_CACHE = tempfile.TemporaryDirectory(prefix="echoatt-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

import copy  # noqa: E402
import gc  # noqa: E402
import logging  # noqa: E402
import re  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from _pytest.mark.expression import Expression  # noqa: E402
from families import FAMILIES, SIZES, VOCAB_SIZE  # noqa: E402
from family_table import FamilyTable, is_always_run  # noqa: E402
from hub_server import TOKEN, HubServer  # noqa: E402
from huggingface_hub import close_session, constants  # noqa: E402
from processes import process_environment  # noqa: E402, F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from echoatt_hf.distillation.two_stages import CHECKPOINTING  # noqa: E402, F401


torch.set_num_threads(1)

# The one table of tolerances, for outputs of order one.
FP32_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def train_byte_level_bpe(
    texts: list[str], vocab_size: int, special_tokens: list[str], use_regex: bool = True
) -> Tokenizer:
    """A byte-level BPE tokenizer, trained here as nothing can be downloaded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_workplace(folder: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """Write texts into `folder / "text"`. Returns a tokenizer of 300 tokens for them."""
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    tokenizer = train_byte_level_bpe(texts, 300, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def positions_with_target(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and positions that predict a token, by a loop."""
    return [
        (row, position)
        for row in range(labels.shape[0])
        for position in range(labels.shape[1] - 1)
        if labels[row, position + 1] != -100
    ]


def positions_of(batch: dict) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def decode(model: torch.nn.Module, batch: dict, cache, prompt: int) -> torch.Tensor:
    """Logits of a prompt at once and of the rest token by token."""
    length = batch["input_ids"].shape[1]
    positions = positions_of(batch)
    logits = []
    for start, end in [(0, prompt), *((position, position + 1) for position in range(prompt, length))]:
        output = model(
            input_ids=batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def pytest_addoption(parser):
    parser.addoption("--update-readme", action="store_true", help="write the table of families into the README")


def pytest_configure(config):
    config.pluginmanager.register(FamilyTable(), "family_table")
    # Several processes take the files as they come, not those of many tests first: long ones would be left for the end.
    config.option.loadscopereorder = False
    if asks_for_upstream(config):
        for name in MARKS_OF_UPSTREAM:
            config.addinivalue_line("markers", f"{name}: a mark of transformers' or PEFT's tests")


MARKS_OF_UPSTREAM = ("accelerate_tests", "bitsandbytes", "order", "slow", "torch_compile_test")
MARKS_OF_UPSTREAM += ("flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "all_flash_attn_test")


def names_mark(expression: str, name: str) -> bool:
    """Whether an expression of `-m` names a mark."""
    return name in re.findall(r"\w+", expression)


def asks_for_upstream(config) -> bool:
    return names_mark(config.option.markexpr, "upstream")


def pytest_ignore_collect(collection_path, config):
    """transformers' and PEFT's own tests take long to collect, and have other rules."""
    if collection_path.name == "test_upstream.py" and not asks_for_upstream(config):
        return True


def pytest_collection_finish():
    # What is imported by now stays: a full collection takes a hundredth of the time, and some tests make dozens.
    gc.collect()
    gc.freeze()


def is_left_out(name: str, expression: str) -> bool:
    """
    Whether tests marked `name`, such as `slow`, are to be skipped under an expression of `-m`: unless it names the mark,
    so that pytest selects by it, or asks for other marked tests, and does not only leave some out, as `not readme` does.
    """
    only_leaves_out = Expression.compile(expression or "not any").evaluate(lambda *_, **__: False)
    return only_leaves_out and not names_mark(expression, name)


def pytest_collection_modifyitems(config, items):
    """Leave slow tests out unless `-m` asks for them, and most of the families unless it names those."""
    expression = config.option.markexpr
    for name in ("slow", "faults"):
        if is_left_out(name, expression):
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"{name}: ask for it with -m {name}"))
    if not names_mark(expression, "families"):
        left_out = {item for item in items if item.get_closest_marker("families") and not is_always_run(item)}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def make_config(family: str = "llama", **overrides):
    """Configuration of a tiny model of `family`, six layers unless `num_hidden_layers` is given."""
    known = FAMILIES[family]
    return AutoConfig.for_model(known.config_type, **{**SIZES, **known.overrides, **overrides})


def make_teacher(family: str = "llama", attention: str | None = "sdpa", **overrides):
    """A tiny random teacher in float32, all of its parameters random, biases and norms too; `None` for its default."""
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def plan_of(family: str) -> list[int]:
    """The sharing plan with two blocks that the tests use for `family`."""
    return list(FAMILIES[family].plan)


def make_batch(rows: int = 2, length: int = 12, padding: tuple[int, ...] = (), seed: int = 0, side: str = "left"):
    """Token rows as `input_ids` and `attention_mask`; `padding` counts the padded positions of the first rows."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    for row, count in enumerate(padding):
        if count:
            mask[row, slice(0, count) if side == "left" else slice(length - count, length)] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def similarity_of(teacher, rows):
    """The attention similarity of a teacher, measured on rows of one length."""
    from echoatt_hf import measure_attention_similarity

    return measure_attention_similarity(teacher, [{"input_ids": torch.tensor([row["input_ids"] for row in rows])}])


def kl_of(teacher, plan, rows):
    """KL to the teacher of the student of a plan with copied weights."""
    from echoatt_hf import EchoAttForCausalLM, evaluate_model

    return evaluate_model(EchoAttForCausalLM.from_teacher(teacher, plan), rows, teacher=teacher)["kl"]


def effect_by_hand(teacher, module, ids, change):
    """
    What a change `(N, O)` of the outputs of a module does to predictions to second order, with the tokens of the text in place of
    drawn ones: gradients by finite differences, token by token, and the sum written out.
    """

    def likelihood():
        logits = teacher(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return -torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()

    slopes = []
    for token in range(len(change)):
        values = []
        for step in (1e-4, -1e-4):
            moved = torch.zeros_like(change)
            moved[token] = step * change[token]

            def add(module, args, output, by=moved):
                if isinstance(output, tuple):
                    return (output[0] + by.view_as(output[0]), *output[1:])
                return output + by.view_as(output)

            hook = module.register_forward_hook(add)
            with torch.no_grad():
                values.append(likelihood())
            hook.remove()
        slopes.append((values[0] - values[1]) / 2e-4)
    return sum(slope**2 for slope in slopes) / 2 / ids[:, 1:].numel()


@pytest.fixture(scope="session")
def _tiny_teacher():
    return make_teacher("llama", num_hidden_layers=5)


@pytest.fixture
def tiny_teacher(_tiny_teacher):
    """A five-layer Llama with tied embeddings, new for each test."""
    return copy.deepcopy(_tiny_teacher)


@pytest.fixture
def teacher_of():
    """The factory of tiny teachers: `teacher_of(family, attention="sdpa", **config_overrides)`."""
    return make_teacher


@pytest.fixture
def family_table(request) -> FamilyTable:
    """What the tests of families found so far."""
    return request.config.pluginmanager.get_plugin("family_table")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Folder of the small real teacher; tests that use it are marked `real_weights`."""
    folder = Path(__file__).parents[2] / "shared/data/stories260k/hf"
    if not (folder / "model.safetensors").exists():
        pytest.skip("the weights of stories260k are not here")
    return folder


@pytest.fixture
def own_datasets_cache(tmp_path_factory, monkeypatch):
    """Rows that no other test has packed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


@pytest.fixture
def hub():
    """A Hub of its own for each test."""
    with HubServer() as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process takes the server for the Hub, and its client does not wait before it tries again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    close_session()  # no connection to the server of another test
    return hub


class _DeprecationsFail(logging.Handler):
    """transformers says much of what it is about to remove in its log. Some of it it does itself."""

    OWN = "Passing `generation_config` together with generation-related arguments"  # when a draft is generated

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message.lower() and not message.startswith(self.OWN):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def deprecations_in_the_log_fail(request):
    if request.node.get_closest_marker("upstream"):
        yield
        return
    handler = _DeprecationsFail()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, "\n".join(handler.messages)
