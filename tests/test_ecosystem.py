"""Students under the tools that users of transformers models expect to work."""

import copy
import io
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import FP32_TOLERANCE, make_batch, make_config, make_teacher, plan_of, process_environment
from families import DIVERSE
from peft import LoraConfig, get_peft_model
from peft.utils.other import _get_module_names_tied_with_embedding
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    QuantoConfig,
    StaticCache,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    convert_and_export_with_cache,
)
from transformers.cache_utils import Cache, QuantizedLayer

from echoatt_hf import (
    EchoAttConfig,
    EchoAttForCausalLM,
    EchoAttForSequenceClassification,
    EchoAttForTokenClassification,
    EchoAttModel,
)
from echoatt_hf.modeling_echoatt import AttentionRecord, EchoRecords


# torch's own, under torch.compile
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks for it
]

HEADS = {
    EchoAttModel: AutoModel,
    EchoAttForCausalLM: AutoModelForCausalLM,
    EchoAttForSequenceClassification: AutoModelForSequenceClassification,
    EchoAttForTokenClassification: AutoModelForTokenClassification,
}
EVERY_HEAD = pytest.mark.parametrize("model_class", HEADS, ids=lambda model_class: model_class.__name__)
SMALL = {"num_hidden_layers": 3}  # for what takes its time per layer
SMALL_PLAN = [0, 1, 1]


def make_student(family: str = "llama", attention: str = "sdpa", plan: list[int] | None = None, **overrides):
    return EchoAttForCausalLM.from_teacher(make_teacher(family, attention, **overrides), plan or plan_of(family))


def saved_student(folder: Path, family: str = "llama", **overrides) -> EchoAttForCausalLM:
    student = make_student(family, **overrides)
    student.save_pretrained(folder)
    return student


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def echoes_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "echo_source")]


@torch.no_grad()
def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def assert_same_model(found: nn.Module, expected: nn.Module, **tolerance) -> None:
    batch = make_batch(2, 12, padding=(3,))
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found(**batch).logits, expected(**batch).logits, **tolerance)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(found.generate(**batch, **options), expected.generate(**batch, **options))


# Heads


def make_token_classifier(family: str = "llama", **options) -> EchoAttForTokenClassification:
    torch.manual_seed(0)
    config = EchoAttConfig(text_config=make_config(family), echo_sources=plan_of(family), **options)
    return AutoModelForTokenClassification.from_config(config)


@pytest.mark.parametrize("family", DIVERSE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_head_loads_from_a_causal_student(family, tied, tmp_path):
    student = saved_student(tmp_path, family, tie_word_embeddings=tied)
    batch = make_batch()
    with torch.no_grad():
        hidden = student(**batch, output_hidden_states=True).hidden_states
    for model_class, auto_class in HEADS.items():
        model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is model_class
        assert not info["mismatched_keys"] and not info["error_msgs"]
        new = {name for name, _ in model.named_parameters() if name.startswith("score.")}
        assert bool(new) is (model_class in (EchoAttForSequenceClassification, EchoAttForTokenClassification))
        assert set(info["missing_keys"]) == new
        head = {f"language_model.lm_head.{name}" for name, _ in student.get_output_embeddings().named_parameters()}
        if tied:
            head.discard("language_model.lm_head.weight")
        assert set(info["unexpected_keys"]) == (set() if model_class is EchoAttForCausalLM else head)
        with torch.no_grad():
            found = model(**batch, output_hidden_states=True)
            assert all(torch.equal(*pair) for pair in zip(found.hidden_states, hidden, strict=True))
            if model_class is EchoAttForCausalLM:
                assert torch.equal(found.logits, student(**batch).logits)
            elif model_class is EchoAttModel:
                assert torch.equal(student.get_output_embeddings()(found.last_hidden_state), student(**batch).logits)
            else:
                scores = model.score(hidden[-1])
                expected = scores if model_class is EchoAttForTokenClassification else scores[:, -1]
                torch.testing.assert_close(found.logits, expected, **FP32_TOLERANCE)


def test_labels_of_a_token_classifier(tmp_path):
    saved_student(tmp_path / "causal")
    id2label = {0: "O", 1: "NAME", 2: "PLACE"}
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "causal", id2label=id2label)
    assert model.num_labels == model.config.num_labels == 3
    model.save_pretrained(tmp_path / "own")
    again, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.id2label == id2label
    assert again(**make_batch(2, 12)).logits.shape == (2, 12, 3)
    torch.testing.assert_close(again(**make_batch()).logits, model(**make_batch()).logits, **FP32_TOLERANCE)
    more = AutoModelForTokenClassification.from_pretrained(tmp_path / "causal", num_labels=5)
    assert more(**make_batch(2, 12)).logits.shape == (2, 12, 5)


@pytest.mark.parametrize("rate", [None, 0.0, 0.5], ids=["default", "none", "half"])
@pytest.mark.parametrize("name", ["classifier_dropout", "hidden_dropout"])
def test_dropout_of_a_token_classifier(name, rate, tmp_path):
    model = make_token_classifier(**{name: rate})
    assert model.dropout.p == (0.1 if rate is None else rate)
    model.save_pretrained(tmp_path)
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).dropout.p == model.dropout.p
    model.train()
    torch.manual_seed(0)
    outputs = [model(**make_batch()).logits for _ in range(2)]
    assert torch.equal(*outputs) is (rate == 0.0)


def test_token_classifier_learns():
    """To tell even tokens from odd ones, from what is left of them after the echo layers."""
    model = make_token_classifier("qwen3", num_labels=2)
    batch = make_batch(4, 12, padding=(4,))
    labels = (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
    output = model.eval()(**batch, labels=labels)
    kept = labels != -100
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits[kept], labels[kept]))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * output.loss


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_token_classifier(how):
    model = make_token_classifier().eval()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    logits = model(**make_batch()).logits
    assert torch.equal(twin(**make_batch()).logits, logits)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(**make_batch()).logits, logits)


@EVERY_HEAD
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_outputs_of_every_head(model_class, family):
    torch.manual_seed(0)
    config = EchoAttConfig(text_config=make_config(family), echo_sources=plan_of(family), attn_implementation="eager")
    model = model_class(config).eval()
    output = model(**make_batch(2, 12), output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 7
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 12, 12)] * 6
    for layer, source in enumerate(plan_of(family)):
        assert torch.equal(output.attentions[layer], output.attentions[source])
    sources = sorted(set(plan_of(family)))
    assert not torch.equal(output.attentions[sources[0]], output.attentions[sources[1]])
    output = model(**make_batch(2, 12))
    assert output.attentions is None and output.hidden_states is None
    model.config.output_attentions = model.config.output_hidden_states = True
    output = model(**make_batch(2, 12))
    assert len(output.attentions) == 6 and len(output.hidden_states) == 7


# Device maps


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_device_map_by_hand(tmp_path):
    """Sources and echoes on different sides: 1 lies on disk and its echo 2 does not, 4 and its echo 5 the other way."""
    student = saved_student(tmp_path)
    parts = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    device_map = {f"language_model.{name}": "cpu" for name in parts}
    for layer, device in {1: "disk", 2: "cpu", 3: "disk", 4: "cpu", 5: "disk"}.items():
        device_map[f"language_model.model.layers.{layer}"] = device
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    on_disk = [all(parameter.is_meta for parameter in layer.parameters()) for layer in layers_of(model)]
    assert on_disk == [False, True, False, True, False, True]
    assert_same_model(model, student)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_device_map_auto_does_not_split_layers(family, share, tmp_path):
    student = saved_student(tmp_path, family)
    memory = {"cpu": int(share * bytes_of(student))}
    # What there is to be avoided: without knowing of layers they are split.
    split = re.compile(r"layers\.\d+\.")
    assert any(split.search(name) for name in infer_auto_device_map(student, {**memory, "disk": 10**9}))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(split.search(name) for name in model.hf_device_map)
    assert_same_model(model, student)


def test_dispatched_model(tmp_path):
    student = make_student("gemma3_text")
    expected = copy.deepcopy(student)
    device_map = infer_auto_device_map(
        student,
        {"cpu": int(0.6 * bytes_of(student)), "disk": 10**9},
        no_split_module_classes=student._no_split_modules,
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    assert_same_model(dispatch_model(student, device_map, offload_dir=tmp_path), expected)


@EVERY_HEAD
@pytest.mark.parametrize("family", DIVERSE)
def test_layers_of_the_family_are_what_is_not_split(model_class, family):
    with torch.device("meta"):
        model = model_class(EchoAttConfig(text_config=make_config(family), echo_sources=plan_of(family)))
    assert {type(layer).__name__ for layer in layers_of(model)} <= set(model._no_split_modules)


def test_record_moves_with_all_it_holds():
    records = EchoRecords()
    kwargs = {"s_aux": torch.ones(4), "scaling": 0.5, "sliding_window": None, "name": "a"}
    record = AttentionRecord("eager", torch.ones(1, 4, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 1, 2, 2), kwargs)
    records.by_layer[3] = record
    assert records.get(3, torch.device("cpu")) is record
    assert records.to(torch.device("meta")) is records
    moved = records.get(3, torch.device("meta"))
    tensors = [moved.query, moved.key, moved.attention_mask, moved.kwargs["s_aux"]]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 4
    assert {name: value for name, value in moved.kwargs.items() if name != "s_aux"} == {
        "scaling": 0.5,
        "sliding_window": None,
        "name": "a",
    }
    assert kwargs["s_aux"].device.type == "cpu"
    assert records.get(3, torch.device("meta")) is moved  # once for all echoes on a device


def _attention_on_one_device(module, query, key, value, attention_mask, **kwargs):
    """As sdpa, with a tensor among its arguments, and refusing to mix devices."""
    beside = kwargs.pop("beside", None)
    tensors = [tensor for tensor in (query, key, attention_mask, beside) if tensor is not None]
    assert {tensor.device for tensor in tensors} == {value.device}
    _DEVICES.append((module.layer_idx, value.device.type, beside is not None))
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)


_DEVICES = []
AttentionInterface.register("one_device", _attention_on_one_device)
AttentionMaskInterface.register("one_device", AttentionMaskInterface()["sdpa"])


@pytest.mark.parametrize("family", DIVERSE)
def test_records_travel_between_devices(family):
    """The meta device stands for the second one: layers 3 to 5 lie there, with echoes of sources on the first."""
    student = make_student(family, plan=[0, 1, 0, 1, 4, 1] if family == "gemma3_text" else [0, 1, 1, 1, 4, 1])
    student.set_attn_implementation("one_device")
    family_model = student.base_model.base_model
    for layer in layers_of(student)[3:]:
        add_hook_to_module(layer.to("meta"), AlignDevicesHook("meta", skip_keys="past_key_values"))
    for module in (student.get_output_embeddings(), *family_model.children()):
        if not isinstance(module, (nn.ModuleList, nn.Embedding)) and "Rotary" not in type(module).__name__:
            module.to("meta")
    _DEVICES.clear()
    batch = make_batch(2, 12, padding=(3,))
    logits = student(**batch, beside=torch.ones(4)).logits
    assert logits.is_meta and logits.shape[:2] == (2, 12)
    expected = [(layer, "cpu" if layer < 3 else "meta", True) for layer in range(6)]
    assert expected == _DEVICES


# torch.compile


def backends() -> list:
    missing = shutil.which("g++") is None
    return [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(missing, reason="inductor needs a C++ compiler")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends())
def test_compiled_forward(backend):
    student = make_student()
    batch = make_batch(2, 12, padding=(3,))
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = student(**batch, use_cache=False).logits
        found = compiled(**batch, use_cache=False).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], **FP32_TOLERANCE)


@pytest.mark.slow
def test_compiled_training_step():
    student = make_student().train()
    batch = make_batch(2, 12, padding=(3,))
    torch._dynamo.reset()
    gradients = []
    for model in (student, torch.compile(student, fullgraph=True, backend="aot_eager")):
        student.zero_grad()
        (100 * model(**batch, labels=batch["input_ids"], use_cache=False).loss).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in student.named_parameters()})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < 1e-5, name


@torch.no_grad()
def count_graphs(model: nn.Module, backend: str, compiled_prefill: bool = False) -> list[int]:
    """Graphs there are after each step of two decodings with static caches, the results of which are checked."""
    tokens = make_batch(2, 12)["input_ids"]
    expected = model(tokens, use_cache=False).logits
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    graphs = []
    for _ in range(2):
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = []
        for start, end in [(0, 5), *((position, position + 1) for position in range(5, 12))]:
            step = compiled if start or compiled_prefill else model
            logits.append(step(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True).logits)
            graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **FP32_TOLERANCE)
    assert not counters["graph_break"]
    return graphs


@pytest.mark.parametrize("compiled_prefill", [False, True], ids=["decoding", "prefill-and-decoding"])
def test_compiled_decoding_does_not_recompile(compiled_prefill):
    graphs = count_graphs(make_student(plan=SMALL_PLAN, **SMALL), "eager", compiled_prefill)
    assert graphs == ([1, *[2] * 15] if compiled_prefill else [0, *[1] * 15])


@pytest.mark.slow
@pytest.mark.parametrize("family", DIVERSE)
def test_compiled_decoding_compiles_as_often_as_that_of_the_teacher(family):
    """Once, and where there are sliding windows once more when they are full."""
    teacher = make_teacher(family)
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family))
    graphs = count_graphs(student, "aot_eager")
    assert graphs == count_graphs(teacher, "aot_eager")
    assert graphs[8:] == [graphs[7]] * 8


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends())
def test_generation_that_compiles_itself(backend):
    """What `generate` does on a GPU: prefill as it is, decoding compiled."""
    student = make_student()
    batch = make_batch(2, 8, padding=(3,))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = student.generate(**batch, **options)
    compilation = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compilation._compile_all_devices = True  # transformers' own switch for tests without a GPU
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        found = student.generate(**batch, **options, cache_implementation="static", compile_config=compilation)
        assert torch.equal(found, expected)
        assert counters["stats"]["unique_graphs"] == 1


# torch.export


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict):
    student = make_student(plan=SMALL_PLAN, **SMALL)
    batch = make_batch(2, 12, padding=(3,))
    other = make_batch(2, 12, padding=(0, 5), seed=1)
    with torch.no_grad():
        program = torch.export.export(student, (), {**batch, "use_cache": False}, strict=strict)
        expected = student(**other, use_cache=False).logits
        torch.testing.assert_close(program.module()(**other, use_cache=False).logits, expected, **FP32_TOLERANCE)


def test_export_for_any_batch_and_length():
    student = make_student(plan=SMALL_PLAN, **SMALL)
    shape = {0: torch.export.Dim("rows", min=2, max=8), 1: torch.export.Dim("length", min=2, max=64)}
    shapes = {"input_ids": shape, "attention_mask": shape, "use_cache": None}
    batch = make_batch(3, 12, padding=(3,))
    program = torch.export.export(student, (), {**batch, "use_cache": False}, dynamic_shapes=shapes)
    other = make_batch(5, 17, padding=(0, 5), seed=1)
    with torch.no_grad():
        expected = student(**other, use_cache=False).logits
        torch.testing.assert_close(program.module()(**other, use_cache=False).logits, expected, **FP32_TOLERANCE)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_static_cache(strict):
    """As transformers exports for ExecuTorch: one token at a time, a cache that is laid out ahead."""
    student = make_student(plan=SMALL_PLAN, **SMALL)
    student.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 16}
    )
    tokens = make_batch(1, 12)["input_ids"]
    with torch.no_grad():
        step = convert_and_export_with_cache(student, strict=strict).module()
        logits = [step(input_ids=tokens[:, at : at + 1], cache_position=torch.tensor([at])) for at in range(12)]
        expected = student(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **FP32_TOLERANCE)


# Caches


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_static_cache_that_is_laid_out_ahead(family):
    """Its value slots are as wide as its key slots, in echo layers too."""
    student = make_student(family)
    batch = make_batch(2, 12, padding=(3,))
    cache = StaticCache(config=student.config, max_cache_len=20)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = student.generate(**batch, **options)
    assert torch.equal(student.generate(**batch, **options, past_key_values=cache), expected)


def test_chunked_prefill():
    student = make_student()
    tokens = make_batch(2, 12)["input_ids"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = student.generate(tokens, **options)
    for implementation in ("dynamic", "static"):
        found = student.generate(tokens, **options, prefill_chunk_size=5, cache_implementation=implementation)
        assert torch.equal(found, expected)


class LosslessLayer(QuantizedLayer):
    """Quantizes nothing, and no more than the others can it quantize nothing."""

    def _quantize(self, tensor, axis):
        if not tensor.numel():
            raise ValueError("cannot quantize an empty tensor")
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


class LosslessCache(QuantizedCache):
    def __init__(self, num_layers: int):
        Cache.__init__(self, layers=[LosslessLayer(residual_length=3) for _ in range(num_layers)])


@pytest.mark.parametrize("beams", [1, 3])
def test_quantized_cache_keeps_the_values_of_echo_layers(beams):
    if beams > 1 and "reorder_cache" not in vars(QuantizedLayer):
        pytest.skip("the quantized caches of this transformers do not reorder beams")
    student = make_student()
    batch = make_batch(2, 12, padding=(3,))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    cache = LosslessCache(6)
    assert torch.equal(
        student.generate(**batch, **options, past_key_values=cache),
        student.generate(**batch, **options, past_key_values=DynamicCache()),
    )
    assert cache.get_seq_length() == 19
    for layer, source in enumerate(plan_of("llama")):
        slot = cache.layers[layer]
        sizes = [quantized.shape[-1] for quantized in (slot._quantized_keys, slot._quantized_values)]
        assert sizes == ([8, 8] if layer == source else [4, 4])  # half of what the teacher's layer takes


def quantized_cache(backend: str) -> dict:
    if backend == "fp8":
        if not hasattr(transformers, "Fp8QuantizedLayer"):
            pytest.skip("this transformers has no fp8 cache")
        return {"backend": "fp8"}
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend], reason=f"{backend} is not installed")
    axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    return {"backend": backend, "nbits": 4, "q_group_size": 32, "residual_length": 4, **axis}


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantized_cache_of_transformers(backend):
    options = quantized_cache(backend)
    student = make_student(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    tokens = make_batch(2, 24)["input_ids"]
    cache = QuantizedCache(config=student.config, **options)
    with torch.no_grad():
        expected = student(tokens, use_cache=False).logits
        student(tokens[:, :12], past_key_values=cache)
        steps = [student(tokens[:, step : step + 1], past_key_values=cache).logits for step in range(12, 24)]
    assert cache.get_seq_length() == 24
    error = relative_error(torch.cat(steps, dim=1), expected[:, 12:])
    assert 1e-4 < error < (0.2 if backend == "fp8" else 0.5)
    found = student.generate(
        tokens, max_new_tokens=4, do_sample=False, num_beams=2, cache_implementation="quantized", cache_config=options
    )
    assert found.shape[1] > 24


# Files and dtypes


@pytest.mark.parametrize("auto_class", HEADS.values(), ids=lambda auto_class: auto_class.__name__)
def test_sharded_checkpoint(auto_class, tmp_path):
    student = make_student()
    model = student
    if auto_class is not AutoModelForCausalLM:
        student.save_pretrained(tmp_path / "whole")
        model = auto_class.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(**make_batch())[0], model(**make_batch())[0])


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_dtype_of_a_loaded_student(saved, tmp_path):
    make_student().to(saved).save_pretrained(tmp_path)
    for asked, expected in [("auto", saved), *((dtype, dtype) for dtype in DTYPES), ("bfloat16", torch.bfloat16)]:
        student = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in student.parameters()} == {expected}
        assert student.dtype == student.config.dtype == student.config.text_config.dtype == expected
        assert student(**make_batch()).logits.dtype == expected


@pytest.mark.parametrize("family", DIVERSE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)], ids=str)
def test_half_precision_is_close(family, dtype, tolerance, tmp_path):
    student = saved_student(tmp_path, family)
    batch = make_batch(2, 12)
    options = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        expected = student(**batch).logits
        for model in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), copy.deepcopy(student).to(dtype)):
            assert 1e-5 < relative_error(model(**batch).logits, expected) < tolerance
            assert model.generate(**batch, **options).shape == (2, 15)
    halved = copy.deepcopy(student).half() if dtype is torch.float16 else copy.deepcopy(student).bfloat16()
    assert relative_error(halved(**batch).logits, expected) < tolerance


# Quantized weights


def quantization(method: str, bits: int):
    if method == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    if method == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        return QuantoConfig(weights=f"int{bits}")
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if bits == 8:
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["bitsandbytes", "quanto", "torchao"])
def test_quantized_student(method, bits, tmp_path):
    """As far from the unquantized student as the quantized teacher is from the teacher."""
    quantization(method, bits)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.05}
    teacher = make_teacher("llama", **sizes)
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    batch = make_batch(2, 24)
    errors = {}
    for name, model in {"teacher": teacher, "student": student}.items():
        model.save_pretrained(tmp_path / name)
        quantized = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=quantization(method, bits), device_map="cpu"
        )
        with torch.no_grad():
            errors[name] = relative_error(quantized(**batch).logits, model(**batch).logits)
            generated = quantized.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert generated.shape == (2, 28)
    for attention in echoes_of(quantized):
        assert not hasattr(attention, "q_proj")
        for projection in (attention.v_proj, attention.o_proj):
            assert (type(projection), type(projection.weight)) != (nn.Linear, nn.Parameter)
    assert 1e-4 < errors["student"] < 1.5 * errors["teacher"] < (0.15 if bits == 8 else 1.0)


# Tensor parallelism


@EVERY_HEAD
@pytest.mark.parametrize("family", [*(family for family in DIVERSE if family != "gpt2"), "phi3", "gpt_neox"])
def test_tensor_parallel_plan_is_that_of_the_family(model_class, family):
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(make_config(family))
        model = model_class(EchoAttConfig(text_config=teacher.config, echo_sources=plan_of(family)))
    prefix = {EchoAttModel: "", EchoAttForCausalLM: "language_model."}.get(model_class, "language_model.")
    if model_class is EchoAttForCausalLM:
        expected = {prefix + name: style for name, style in teacher.tp_plan.items()}
    else:
        expected = {prefix + name: style for name, style in teacher.tp_plan.items() if not name.startswith("lm_head")}
    whole = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}.get(family)
    if whole:  # echo layers keep a part of it
        expected |= {
            name.replace(whole, "v_proj"): style for name, style in expected.items() if name.endswith(f".{whole}")
        }
    assert model.tp_plan == expected
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names  # no rule is for nothing
    # An echo layer is sharded wherever the layers of the teacher are.
    projections = {name for name in names if ".layers.*." in name and name.endswith(("_proj", "dense", "fc1", "fc2"))}
    assert {name.rpartition(".")[2] for name in projections} >= {"v_proj"}
    assert projections <= set(model.tp_plan)


PARALLEL = """
    import sys

    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, DistributedConfig

    import echoatt_hf

    folder = sys.argv[1]
    dist.init_process_group("gloo")
    batch = torch.load(f"{folder}/batch.pt")
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    student = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    echoes = [module for module in student.modules() if hasattr(module, "echo_source")]
    with torch.no_grad():
        logits = student(**batch, use_cache=False).logits
        generated = student.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    shapes = [tuple(attention.v_proj.weight.to_local().shape) for attention in echoes]
    result = {"logits": logits, "generated": generated, "shapes": shapes}
    torch.save(result, f"{folder}/result{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_tensor_parallel_student(family, tmp_path):
    student = saved_student(tmp_path, family, vocab_size=96)  # to be divided by two
    batch = make_batch(2, 12, padding=(3,))
    batch["input_ids"].clamp_(max=95)
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "parallel.py").write_text(textwrap.dedent(PARALLEL))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "parallel.py"), str(tmp_path)],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    whole = echoes_of(student)[0].v_proj.weight.shape
    with torch.no_grad():
        logits = student(**batch, use_cache=False).logits
    kept = batch["attention_mask"].bool()
    generated = student.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"result{rank}.pt")
        assert found["shapes"] == [(whole[0] // 2, whole[1])] * len(echoes_of(student))
        torch.testing.assert_close(found["logits"][kept], logits[kept], **FP32_TOLERANCE)
        assert torch.equal(found["generated"], generated)


# Speculative decoding


def assist(model: nn.Module, assistant: nn.Module, tokens: torch.Tensor, new: int) -> tuple[torch.Tensor, int, int]:
    """Greedy tokens of `model` with an assistant that drafts four at a time; tokens drafted and accepted."""
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    output = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, assistant_model=assistant)
    hook.remove()
    # Each call checks the drafted tokens and gives one more, and takes one given before; the first takes the prompt.
    drafted = sum(lengths) - tokens.shape[1] - (len(lengths) - 1)
    return output, drafted, output.shape[1] - tokens.shape[1] - len(lengths)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_student_drafts_for_its_teacher_and_the_other_way_round(family):
    teacher = make_teacher(family)
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 2, 3, 4, 4])
    tokens = make_batch(1, 10)["input_ids"]
    for model, assistant in ((teacher, student), (student, teacher)):
        expected = model.generate(tokens, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        found, drafted, accepted = assist(model, assistant, tokens, 16)
        assert torch.equal(found, expected)
        assert drafted > 0 and 0 <= accepted <= drafted


def test_teacher_without_echo_layers_accepts_every_draft():
    teacher = make_teacher()
    tokens = make_batch(1, 10)["input_ids"]
    _, drafted, accepted = assist(teacher, EchoAttForCausalLM.from_teacher(teacher, range(6)), tokens, 15)
    assert drafted == accepted == 12


@pytest.mark.real_weights
def test_drafts_of_a_real_student_are_accepted(stories260k):
    """Without any training; on 20 stories it was 34 % with two echo layers of five, 59 % with one."""
    stories = stories260k.parents[1] / "tinystories/stories.txt"
    if not stories.exists():
        pytest.skip("shared/data/tinystories is not here")
    teacher = AutoModelForCausalLM.from_pretrained(stories260k)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    texts = [text.strip()[:160] for text in stories.read_text().split("<|endoftext|>") if len(text) > 400][:4]
    rates = []
    for plan in ([0, 1, 2, 2, 2], [0, 1, 2, 2, 4]):
        student = EchoAttForCausalLM.from_teacher(teacher, plan)
        counts = torch.zeros(2)
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            found, *count = assist(teacher, student, tokens, 32)
            expected = teacher.generate(tokens, max_new_tokens=32, min_new_tokens=32, do_sample=False)
            assert torch.equal(found, expected)
            counts += torch.tensor(count)
        rates.append(float(counts[1] / counts[0]))
    assert 0.2 < rates[0] < rates[1] < 0.9


# What goes by the name of a class or a type of model


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "adapters"])
def test_smoothed_labels_are_shifted(wrapped, tmp_path):
    """The plain Trainer shifts them for the classes it knows: a student trained without learned to copy its input."""
    student, batch = make_student("llama", **SMALL, plan=SMALL_PLAN), make_batch(2, 8)
    model = get_peft_model(student, LoraConfig()) if wrapped else student
    options = {"label_smoothing_factor": 0.1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **options))
    model.eval()
    inputs = {**batch, "labels": batch["input_ids"]}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(inputs)).item()
        logits = student(**batch).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), label_smoothing=0.1)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_code_of_a_checkpoint_makes_its_classes_known_too():
    """Where the plugin is not installed it is the exported file that enters them."""
    code = Path(sys.modules[EchoAttForCausalLM.__module__].__file__).read_text()
    assert "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in code and "registration" not in code
    for model_class, auto_class in HEADS.items():
        assert model_class.__name__ in auto_class._model_mapping._model_mapping.values()


def test_every_method_of_peft_knows_what_to_adapt():
    EchoAttConfig()  # the first one enters what there is to adapt
    tables = [
        table
        for name, table in vars(peft.utils.constants).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING")
    ]
    assert len(tables) > 20
    assert all(table["echoatt"] for table in tables)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "LNTuningConfig", "VeraConfig", "HiraConfig"])
def test_methods_of_peft_adapt_every_layer(family, method):
    student = make_student(family)
    model = get_peft_model(student, getattr(peft, method)(task_type="CAUSAL_LM"))
    layers = {int(found[1]) for name, value in model.named_parameters() if value.requires_grad
              and (found := re.search(r"\.(?:h|layers)\.(\d+)\.", name))}  # fmt: skip
    # VeRA has its large matrices once, of the shapes of one family's projections.
    assert layers == set(range(student.config.num_hidden_layers))


@pytest.mark.parametrize("tied", [True, False])
def test_peft_sees_whether_embeddings_are_tied(tied):
    """Trainable tokens of tied embeddings are merged into both."""
    student, batch = make_student("llama", tie_word_embeddings=tied), make_batch(2, 8)
    assert _get_module_names_tied_with_embedding(student) == (["language_model.lm_head"] if tied else [])
    model = get_peft_model(student, LoraConfig(target_modules=["v_proj"], trainable_token_indices=[5, 6, 7]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "trainable_tokens" in name:
                value.add_(torch.randn_like(value))
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
        torch.testing.assert_close(merged(**batch).logits, expected, **FP32_TOLERANCE)


def test_tied_adapters_of_embeddings_are_kept_tied():
    model = get_peft_model(
        make_student("llama", tie_word_embeddings=True),
        LoraConfig(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    )
    assert model.base_model.model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", DIVERSE)
def test_generation_from_embeddings(family):
    student, batch = make_student(family), make_batch(2, 7)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    embeddings = student.get_input_embeddings()(batch["input_ids"])
    found = student.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(found, student.generate(**batch, **options)[:, 7:])


def test_types_of_tokens():
    """Families that have them get them, others, whose tokenizers may still make them, do not."""
    batch = make_batch(2, 7)
    batch["token_type_ids"] = torch.full_like(batch["input_ids"], 9)
    teacher = make_teacher("gpt2")
    student = EchoAttForCausalLM.from_teacher(teacher, range(6))
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, **FP32_TOLERANCE)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(student.generate(**batch, **options), teacher.generate(**batch, **options))
    llama = make_student("llama")
    assert torch.equal(llama(**batch).logits, llama(batch["input_ids"], batch["attention_mask"]).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_head_under_the_name_that_trainers_look_for(family):
    student = make_student(family, tie_word_embeddings=False)
    names = [name for name, _ in student.named_parameters()]
    assert student.lm_head is student.get_output_embeddings()
    head = copy.deepcopy(student.lm_head).double()
    student.lm_head = head
    assert student.language_model.get_output_embeddings() is student.lm_head is head
    assert [name for name, _ in student.named_parameters()] == names


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementation_of_experts(implementation, tmp_path):
    student = saved_student(tmp_path, "mixtral")
    batch = make_batch(2, 7)
    expected = student(**batch).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    student.set_experts_implementation(implementation)
    for model in (loaded, student):
        assert model.config.text_config._experts_implementation == implementation
        torch.testing.assert_close(model(**batch).logits, expected, **FP32_TOLERANCE)
