"""What a conversion reports, and what it saves at the paper's size."""

import functools
import json

import pytest
import torch
from accelerate import cpu_offload
from conftest import FP32_TOLERANCE, make_batch, make_teacher, plan_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import QuantoQuantizedLayer
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel

from echoatt_hf import (
    EchoAttConfig,
    EchoAttForCausalLM,
    SharingPlan,
    convert,
    count_cache_bytes,
    count_kv_bytes_per_token,
)
from echoatt_hf.models.loading import builtin_teacher_path


TINYLLAMA = {
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("ratio", "echo_layers", "kv_saved", "parameters_saved"),
    [(0.23, 5, 0.114, 0.021), (0.41, 9, 0.205, 0.039), (0.77, 17, 0.386, 0.073)],
)
def test_savings_at_the_size_of_tinyllama(ratio, echo_layers, kv_saved, parameters_saved):
    plan = SharingPlan.from_ratio(22, ratio)
    config = LlamaConfig(**TINYLLAMA, dtype="bfloat16")
    with torch.device("meta"):
        teacher = LlamaForCausalLM._from_config(config)
        student = EchoAttForCausalLM._from_config(
            EchoAttConfig(text_config=LlamaConfig(**TINYLLAMA), echo_sources=list(plan), dtype="bfloat16")
        )
    assert len(plan.echo_layers) == echo_layers
    # 4 heads of 64 for keys and as many for values, in 22 layers, two bytes each.
    assert count_kv_bytes_per_token(teacher) == 2 * 4 * 64 * 22 * 2
    assert 1 - count_kv_bytes_per_token(student) / count_kv_bytes_per_token(teacher) == pytest.approx(
        kv_saved, abs=5e-4
    )
    for make_cache in (DynamicCache, functools.partial(StaticCache, max_cache_len=64)):
        caches = [make_cache(config=model.config) for model in (teacher, student)]
        for model, cache in zip((teacher, student), caches, strict=True):
            model(torch.zeros(2, 64, dtype=torch.long, device="meta"), past_key_values=cache)
            assert count_cache_bytes(cache) == 2 * 64 * count_kv_bytes_per_token(model)
    assert teacher.num_parameters() - student.num_parameters() == echo_layers * 2048 * (2048 + 256)
    assert 1 - student.num_parameters() / teacher.num_parameters() == pytest.approx(parameters_saved, abs=5e-4)


def test_cache_bytes_of_sliding_windows():
    """Layers with a window hold one token less than the window, as the token to come fills it."""
    teacher, plan = make_teacher("gemma3_text"), plan_of("gemma3_text")
    caches = []
    for model in (teacher, EchoAttForCausalLM.from_teacher(teacher, plan)):
        caches.append(DynamicCache(config=model.config))
        assert count_cache_bytes(caches[-1]) == 0
        model(make_batch(2, 20)["input_ids"], past_key_values=caches[-1])
    # Layers of each type, in rows x heads x head size x bytes, once for keys and once for values.
    tokens = 3 * 7 + 3 * 20
    assert count_cache_bytes(caches[0]) == 2 * tokens * 2 * 2 * 8 * 4
    # Layer 2 has a window, 3 and 5 have none.
    assert count_cache_bytes(caches[1]) == (2 * tokens - 7 - 20 - 20) * 2 * 2 * 8 * 4


def test_quantized_cache_is_not_counted():
    cache = DynamicCache()
    cache.layers.append(QuantoQuantizedLayer.__new__(QuantoQuantizedLayer))
    with pytest.raises(ValueError, match="cannot count a quantized cache"):
        count_cache_bytes(cache)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_report_lists_every_parameter_once(family):
    teacher, plan = make_teacher(family), plan_of(family)
    student, report = convert(teacher, plan)
    names = [name for name, _ in teacher.named_parameters()]
    assert sorted(report.copied + report.dropped) == sorted(names)
    assert report.copied == [name for name, _ in student.language_model.named_parameters()]
    dropped_layers = {int(name.split(".")[2]) for name in report.dropped}
    assert dropped_layers == {layer for layer, source in enumerate(plan) if layer != source}
    assert all(".q_" in name or ".k_" in name for name in report.dropped)
    sizes = {name: value.numel() for name, value in teacher.named_parameters()}
    assert report.teacher_parameters - report.student_parameters == sum(sizes[name] for name in report.dropped)
    assert report.student_kv_bytes_per_token == count_kv_bytes_per_token(student)


def test_report_as_text_and_json(tiny_teacher):
    _, report = convert(tiny_teacher, [0, 1, 1, 1, 4])
    text = str(report)
    for line in ("0 1 2→1 3→1 4", "dropped      4 tensors", "model.layers.2.self_attn.q_proj"):
        assert line in text
    assert f"{report.teacher_parameters:,} → {report.student_parameters:,} (-" in text
    # Two of five layers keep values only: 8 of 10 parts are left.
    assert "(-20.0%) per token" in text
    assert json.loads(json.dumps(report.to_dict()))["layer_plan"] == [0, 1, 1, 1, 4]


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("gpt2", "transformer.h.{}.attn.c_attn"),
        ("gpt_bigcode", "transformer.h.{}.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.{}.attention.query_key_value"),
        ("persimmon", "model.layers.{}.self_attn.query_key_value"),
        ("phi3", "model.layers.{}.self_attn.qkv_proj"),
    ],
)
def test_values_are_cut_out_of_fused_projections(family, fused):
    teacher, plan = make_teacher(family), [0, 1, 1, 1, 4, 4]
    student, report = convert(teacher, plan)
    names = dict(teacher.named_parameters())
    assert sorted(report.copied + report.cut + report.dropped) == sorted(names)
    assert {name.rsplit(".", 1)[0] for name in report.cut} == {fused.format(layer) for layer in (2, 3, 5)}
    assert f"cut          {len(report.cut)} tensors: {fused.format(2)}" in str(report)
    # Of a projection to H + 2 H_kv heads an echo keeps H_kv.
    kept = student.get_submodule(f"language_model.{fused.format(2)}".rsplit(".", 1)[0]).v_proj
    assert kept.weight.shape == (count_kv_bytes_per_token(teacher) // 6 // 2 // 4, 32)
    cut, dropped = (sum(names[name].numel() for name in part) for part in (report.cut, report.dropped))
    values = sum(value.numel() for name, value in student.named_parameters() if ".v_proj." in name)
    assert report.teacher_parameters - report.student_parameters == cut + dropped - values
    expected = (2 + 2 + 1 + 1 + 2 + 1) / (6 * 2)
    assert report.student_kv_bytes_per_token / report.teacher_kv_bytes_per_token == pytest.approx(expected)


def as_phi3(llama):
    """The same language model with Phi-3's fused projections."""
    config = llama.config.to_dict() | {"sliding_window": None}
    for name in ("model_type", "architectures", "head_dim", "attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(name, None)
    phi3 = Phi3ForCausalLM(Phi3Config(**config)).eval()
    state = llama.state_dict()
    for layer in range(config["num_hidden_layers"]):
        for fused, parts in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            tensors = [state.pop(f"model.layers.{layer}.{part}.weight") for part in parts]
            state[f"model.layers.{layer}.{fused}.weight"] = torch.cat(tensors)
    phi3.load_state_dict(state)
    return phi3


def test_fused_and_separate_projections_give_the_same_student():
    """The built-in teacher as a Llama and as a Phi-3: real weights in both layouts."""
    llama = AutoModelForCausalLM.from_pretrained(builtin_teacher_path(), dtype=torch.float32)
    phi3 = as_phi3(llama)
    plan = SharingPlan.from_ratio(12, 0.41)
    (expected, llama_report), (student, phi3_report) = convert(llama, plan), convert(phi3, plan)
    ids = torch.randint(llama.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(phi3(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(student(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert phi3_report.student_parameters == llama_report.student_parameters
    assert phi3_report.student_kv_bytes_per_token == llama_report.student_kv_bytes_per_token


def test_attention_that_an_echo_cannot_take_over_is_refused(monkeypatch):
    """What a family's modules do not show: an echo of a layer's own attention is not the layer."""
    family_forward = LlamaAttention.forward

    def forward(self, *args, **kwargs):
        output, weights = family_forward(self, *args, **kwargs)
        return output * 1.01, weights

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(ValueError, match=r"'llama' yet: .* differs from layer \d by 1\.0%"):
        convert(make_teacher("llama"), plan_of("llama"))


def test_family_that_initializes_queries_by_name_is_refused(monkeypatch):
    """Its students could be made but not loaded."""
    family_init = LlamaPreTrainedModel._init_weights

    def init_weights(self, module):
        family_init(self, module)
        if isinstance(module, LlamaAttention):
            module.q_proj.weight.zero_()

    teacher = make_teacher("llama")
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", init_weights)
    with pytest.raises(ValueError, match="'llama' yet: it initializes what an echo layer does without .*'q_proj'"):
        convert(teacher, plan_of("llama"))


def test_fused_projection_in_another_order_is_refused():
    """Without multi-query attention GPTBigCode puts query, key and value of a head together; c_attn stands for GPT-2."""
    with pytest.raises(ValueError, match="'gpt_bigcode' yet: its attention does more than an echo layer takes over"):
        convert(make_teacher("gpt_bigcode", multi_query=False), [0, 1, 1, 1, 4, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_check(dtype):
    student, _ = convert(make_teacher("gpt_neox").to(dtype), [0, 1, 1, 1, 4, 4])
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}


def test_teacher_on_the_meta_device():
    with torch.device("meta"):
        teacher = LlamaForCausalLM._from_config(LlamaConfig(**TINYLLAMA))
    student, report = convert(teacher, SharingPlan.from_ratio(22, 0.41))
    assert student.device.type == "meta"
    assert len(report.dropped) == 18


def test_teacher_spread_over_devices(tiny_teacher, monkeypatch):
    """Each weight stays on its device. The meta device stands for a second one, on which accelerate cannot run a model."""
    maps = []
    monkeypatch.setattr(
        "echoatt_hf.conversion.student.dispatch_model", lambda model, devices, **options: maps.append(devices)
    )
    devices = {f"model.layers.{layer}": "cpu" if layer < 3 else "meta" for layer in range(5)}
    devices |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "meta", "lm_head": "meta"}
    tiny_teacher.model.layers[3:].to("meta")
    tiny_teacher.model.norm.to("meta")
    tiny_teacher.lm_head = torch.nn.Linear(32, 97, bias=False, device="meta")
    tiny_teacher.hf_device_map = devices
    student, _ = convert(tiny_teacher, [0, 1, 1, 1, 4])
    assert maps == [{f"language_model.{name}": device for name, device in devices.items()}]
    expected = {name: value.device for name, value in tiny_teacher.named_parameters()}
    for name, value in student.language_model.named_parameters():
        assert value.device == expected[name], name


# What is assumed of the teacher


def untie(model):
    """As adapters of the head leave it that were merged."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() + torch.randn_like(head.weight))


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "gpt_neox"])
def test_embeddings_that_are_not_tied_as_the_configuration_says(family, tmp_path):
    teacher = make_teacher(family, tie_word_embeddings=True)
    untie(teacher)
    batch = make_batch()
    student, _ = convert(teacher, range(6))
    student.save_pretrained(tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(model(**batch).logits, teacher(**batch).logits, **FP32_TOLERANCE)
        assert model.config.tie_word_embeddings is False
    assert teacher.config.tie_word_embeddings is True


def test_embeddings_that_were_tied_by_hand(tmp_path):
    teacher = make_teacher("llama", tie_word_embeddings=False)
    teacher.lm_head.weight = teacher.model.embed_tokens.weight
    student, report = convert(teacher, range(6))
    assert report.student_parameters == report.teacher_parameters == student.num_parameters()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    batch = make_batch()
    torch.testing.assert_close(loaded(**batch).logits, teacher(**batch).logits, **FP32_TOLERANCE)


def test_teacher_with_code_of_its_own_is_refused():
    """What neither its family nor its weights say is seen in its logits."""
    teacher = make_teacher("llama")
    teacher.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match=r"a student without echo layers has other logits, by \d+\.\d%"):
        convert(teacher, plan_of("llama"))


def capped_eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention with a cap of scores that the call does not show."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    scores = 0.1 * torch.tanh(query @ key.transpose(2, 3) * scaling / 0.1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def test_family_whose_decoding_is_more_than_weights_is_refused(monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped_eager_attention)
    with pytest.raises(ValueError, match=r"'llama' yet: .* a token by weights, differs from layer \d by"):
        convert(make_teacher("llama", "eager"), plan_of("llama"))


def test_family_whose_eager_weights_are_not_all_is_refused(monkeypatch):
    def attend(*args, **kwargs):
        output, weights = capped_eager_attention(*args, **kwargs)
        return output, weights.square()

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
    with pytest.raises(ValueError, match=r"'llama' yet: .* a prompt by weights, differs from layer \d by"):
        convert(make_teacher("llama", "eager"), plan_of("llama"))


def test_code_of_the_repository_of_a_teacher(tmp_path):
    """As of Phi-3 on the Hub: the student has its own code, not that of its teacher."""
    teacher = make_teacher("llama")
    teacher.config.auto_map = {"AutoModelForCausalLM": "modeling_teacher.TeacherForCausalLM"}
    student, _ = convert(teacher, plan_of("llama"))
    student.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["auto_map"]["AutoModelForCausalLM"] == "modeling_echoatt.EchoAttForCausalLM"
    assert "auto_map" not in content["text_config"]
    assert teacher.config.auto_map == {"AutoModelForCausalLM": "modeling_teacher.TeacherForCausalLM"}


def test_logits_of_minus_infinity():
    """A head that suppresses the padding of the vocabulary."""
    teacher = make_teacher("phi")
    with torch.no_grad():
        teacher.lm_head.bias[-8:] = -torch.inf
    student, _ = convert(teacher, range(6))
    batch = make_batch()
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, **FP32_TOLERANCE)


def with_nan(teacher):
    with torch.no_grad():
        teacher.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    return teacher


def with_adapters(teacher):
    teacher.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return teacher


def in_integers(teacher):
    weight = teacher.model.layers[0].mlp.up_proj.weight
    teacher.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return teacher


class QuantizedTensor(torch.Tensor):
    """As torchao's and quanto's, a tensor of another class."""


def in_another_class(teacher):
    for layer in teacher.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.data.as_subclass(QuantizedTensor))
    return teacher


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, r"weights that are NaN, in 'model\.layers\.2\.mlp\.up_proj\.weight'"),
        (with_adapters, "has adapters in it: merge them"),
        (
            lambda teacher: get_peft_model(teacher, LoraConfig()),
            r"is a PeftModel: give `teacher\.merge_and_unload\(\)`",
        ),
        (torch.compile, r"is a OptimizedModule: .*here `teacher\._orig_mod`"),
        (torch.nn.DataParallel, r"is a DataParallel: .*here `teacher\.module`"),
        (lambda teacher: (teacher, None), "is a tuple: give a causal language model"),
        (lambda teacher: cpu_offload(teacher, "cpu"), "weights of the teacher are offloaded"),
        (in_integers, r"is quantized \(model\.layers\.0\.mlp\.up_proj\.weight is a Tensor of torch\.int8\)"),
        (in_another_class, r"is quantized \(model\.layers\.0\.mlp\.up_proj\.weight is a QuantizedTensor"),
    ],
    ids=["nan", "adapters", "peft", "compiled", "wrapped", "tuple", "offloaded", "int8", "torchao"],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_teacher_that_is_no_plain_model_is_refused(tiny_teacher, change, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        convert(change(tiny_teacher), [0, 1, 1, 1, 4])
    assert "\n" not in str(error.value)


def test_plan_without_echoes_drops_nothing(tiny_teacher):
    _, report = convert(tiny_teacher, range(5))
    assert report.dropped == []
    assert report.teacher_parameters == report.student_parameters
    assert "dropped      0 tensors: none" in str(report)


def test_teacher_by_path(tiny_teacher, tmp_path):
    tiny_teacher.save_pretrained(tmp_path)
    student, _ = convert(str(tmp_path), [0, 1, 1, 1, 4])
    ids = torch.arange(1, 9)[None]
    expected, _ = convert(tiny_teacher, [0, 1, 1, 1, 4])
    torch.testing.assert_close(student(ids).logits, expected(ids).logits, **FP32_TOLERANCE)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        convert(str(tmp_path / "missing"), [0])


def storages_of(model):
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


# The fused projections of phi3 lie in such a way that the values are a view, those of gpt2 and gpt_neox do not.
@pytest.mark.parametrize(
    ("family", "copied"),
    [("llama", []), ("qwen3", []), ("phi3", []), ("gpt2", ["v_proj.weight"]), ("gpt_neox", ["v_proj.bias", "v_proj.weight"])],
)  # fmt: skip
@pytest.mark.parametrize("share_weights", [True, False], ids=["shared", "copied"])
def test_shared_weights(family, copied, share_weights):
    teacher = make_teacher(family)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, report = convert(teacher, plan_of(family), share_weights=share_weights)
    usual, usual_report = convert(teacher, plan_of(family))
    assert report == usual_report
    assert {parameter.requires_grad for parameter in student.parameters()} == {not share_weights}
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    batch = make_batch()
    assert torch.equal(student(**batch).logits, usual(**batch).logits)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    storages = storages_of(teacher)
    if not share_weights:
        assert not storages & storages_of(student)
        return
    own = [name for name, value in student.named_parameters() if value.untyped_storage().data_ptr() not in storages]
    assert sorted({".".join(name.split(".")[-2:]) for name in own}) == copied
    inherited = dict(teacher.named_parameters())
    for name, value in student.language_model.named_parameters():
        if name in inherited:
            assert value.data_ptr() == inherited[name].data_ptr() and value is not inherited[name]
    parameters = {value.data_ptr(): value for model in (teacher, student) for value in model.parameters()}
    nbytes = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in parameters.values()}
    memory_of_teacher = sum(value.nbytes for value in teacher.parameters())
    assert sum(nbytes.values()) <= memory_of_teacher * (1.05 if copied else 1)


def test_student_with_shared_weights_saves_its_own(tmp_path):
    teacher = make_teacher("phi3")
    student, _ = convert(teacher, plan_of("phi3"), share_weights=True)
    student.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < sum(value.nbytes for value in teacher.parameters())
    batch = make_batch()
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(**batch).logits, student(**batch).logits, **FP32_TOLERANCE
    )
