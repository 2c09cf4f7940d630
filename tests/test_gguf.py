"""Teachers of GGUF files: the weights and tokenizer of the model they were made from, and students like any other."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher, write_workplace
from hub_server import TOKEN, USER
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from echoatt_hf import EchoAttForCausalLM, load_model, load_tokenizer
from echoatt_hf.cli.app import app
from echoatt_hf.models import loading
from echoatt_hf.models.checks import find_tokenizer
from echoatt_hf.models.loading import load_config, load_typed
from echoatt_hf.outputs.provenance import describe_teacher
from echoatt_hf.settings import name_gguf_file


gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'echoatt-hf[gguf]'")

ROOT = Path(__file__).parents[1]
TEXT = [f"Story {n}. Once upon a time there were {n} small bears who ate {n * 3} honeys.\n" * 6 for n in range(12)]
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
PLAN = [0, 1, 1, 3, 3, 5]
DATA = ["--data", "text", "--row-length", "32", "--evaluation-rows", "4"]
COPY = ["--plan", ",".join(map(str, PLAN)), "--no-align", "--no-refit"]
TRAIN = ["--calibration-rows", "4", "--steps", "3", "--batch-size", "2", "--warmup-steps", "1"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    """Name of a parameter of Llama in llama.cpp."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in outer:
        return f"{outer[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def write_gguf(path, model, tokenizer, kind="F32", architecture="llama", leave_out=(), rope=None):
    """Write a Llama as llama.cpp does: pairs of rotary features beside each other, no head of its own where it is tied."""
    config, kind = model.config, getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, parameter in model.named_parameters():
        if name in leave_out:
            continue
        weight = parameter.detach().float().numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                halves = weight.reshape(heads, 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        type_ = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        data = gguf.quants.quantize(weight, type_)
        writer.add_tensor(gguf_name(name), data, raw_dtype=type_)
    if rope == "factors":
        writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    elif rope == "type":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(vocab_size, **overrides):
    return make_teacher("llama", vocab_size=vocab_size, intermediate_size=64, **overrides)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with text, a Llama in two forms, `hub/` and `files/tiny.gguf`, and files of other types of it."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = write_workplace(folder, TEXT)
    tokenizer.bos_token = tokenizer.eos_token
    teacher = tiny_llama(len(tokenizer))
    teacher.save_pretrained(folder / "hub")
    tokenizer.save_pretrained(folder / "hub")
    (folder / "files").mkdir()
    for name, kind in (("tiny", "F32"), ("half", "F16"), ("brain", "BF16"), ("blocks", "Q8_0")):
        write_gguf(folder / "files" / f"{name}.gguf", teacher, tokenizer, kind)
    return folder


@pytest.fixture
def echoatt(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@torch.no_grad()
def logits_of(model, vocab_size=90):
    batch = {name: value.clamp(max=vocab_size) for name, value in make_batch(3, 24).items()}
    return model(**batch).logits


def assert_one_line(result, message):
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if "echoatt: error: " in line]
    assert len(lines) == 1 and message in lines[0], result.stderr


# Weights, types, tokenizer


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_logits_are_those_of_the_model_of_the_hub(workplace, tmp_path, is_tied, key_value_heads):
    tokenizer = AutoTokenizer.from_pretrained(workplace / "hub")
    sizes = {"tie_word_embeddings": is_tied, "num_key_value_heads": key_value_heads}
    tiny_llama(len(tokenizer), **sizes, rope_theta=1234.0).save_pretrained(tmp_path / "hub")
    original = load_model(tmp_path / "hub")
    model = load_model(write_gguf(tmp_path / "tiny.gguf", original, tokenizer))
    torch.testing.assert_close(logits_of(model), logits_of(original), **FP32_TOLERANCE)
    assert model.config.tie_word_embeddings == is_tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


@pytest.mark.parametrize(
    ("file", "dtype"),
    [("tiny", torch.float32), ("half", torch.float16), ("brain", torch.bfloat16), ("blocks", torch.bfloat16)],
)
def test_auto_is_the_type_of_the_file_or_bfloat16_of_blocks(workplace, file, dtype):
    path = workplace / "files" / f"{file}.gguf"
    model = load_model(path, "auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.config.dtype}
    running, saved = load_typed(path)
    assert (running.dtype, saved) == (torch.float32, dtype)
    assert load_typed(path, "float16")[0].dtype == torch.float16


def test_blocks_are_loaded_as_plain_weights_that_can_be_saved(workplace, tmp_path):
    model = load_model(workplace / "files" / "blocks.gguf")
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    original = load_model(workplace / "hub")
    for name, weight in model.state_dict().items():
        rounding = original.state_dict()[name].abs().max() / 127
        assert (weight - original.state_dict()[name]).abs().max() <= rounding, name
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load_model(tmp_path)), logits_of(model))


def test_tokenizer_and_chat_template_come_with_the_file(workplace):
    path = workplace / "files" / "tiny.gguf"
    original, model = AutoTokenizer.from_pretrained(workplace / "hub"), load_model(path)
    for tokenizer in (load_tokenizer(path, model), find_tokenizer(model)):
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer.eos_token == original.eos_token == "<|endoftext|>"
        assert tokenizer(TEXT[3])["input_ids"] == original(TEXT[3])["input_ids"]
        assert tokenizer.decode(tokenizer(TEXT[3])["input_ids"]) == TEXT[3]


# Students


def test_student_of_a_file_is_one_of_the_model_it_was_made_from(echoatt, workplace):
    for teacher, output in (("files/tiny.gguf", "from-file"), ("hub", "from-hub")):
        result = echoatt("convert", teacher, "--plan", COPY[1], "--calibration-rows", "4", *DATA, "--output", output)
        assert result.exit_code == 0, result.output
    students = [EchoAttForCausalLM.from_pretrained(workplace / name) for name in ("from-file", "from-hub")]
    torch.testing.assert_close(*map(logits_of, students), rtol=1e-3, atol=1e-3)


def test_compress_writes_a_student_that_is_not_quantized(echoatt, workplace):
    result = echoatt("compress", "files/blocks.gguf", *COPY, *DATA, *TRAIN, "--output", "student")
    assert result.exit_code == 0, result.output
    config = json.loads((workplace / "student" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    for part in (config, config["text_config"]):
        assert not {"quantization_config", "gguf_file", "_model_name_or_path"} & set(part)
    report = json.loads((workplace / "student" / "report.json").read_text())
    assert report["teacher"] == {"name": "blocks", "gguf_file": "blocks.gguf"}
    assert report["settings"]["teacher"] == "files/blocks.gguf"
    model = AutoModelForCausalLM.from_pretrained(workplace / "student")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "student")
    assert tokenizer.chat_template == TEMPLATE and not getattr(model, "is_quantized", False)
    assert str(workplace) not in "".join(path.read_text() for path in (workplace / "student").glob("*.json"))
    prompt = tokenizer("Once upon", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 4


def test_teacher_that_transformers_takes_for_quantized_is_converted_if_its_weights_are_plain(workplace, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(workplace / "files", gguf_file="tiny.gguf")
    assert teacher.is_quantized and hasattr(teacher.config, "quantization_config")
    student = EchoAttForCausalLM.from_teacher(teacher, PLAN)
    assert not hasattr(student.config.text_config, "quantization_config")
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(EchoAttForCausalLM.from_pretrained(tmp_path)), logits_of(student))


def test_teacher_with_packed_weights_is_refused(workplace):
    teacher = AutoModelForCausalLM.from_pretrained(workplace / "files", gguf_file="tiny.gguf")
    projection = teacher.model.layers[0].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="teacher is quantized .*up_proj"):
        EchoAttForCausalLM.from_teacher(teacher, PLAN)


def test_every_command_that_takes_a_model_takes_a_file(echoatt, workplace, tmp_path):
    (workplace / "questions.jsonl").write_text('{"query": "Once upon", "choices": [" a time", " bears"], "gold": 0}\n')
    few, at = ["--calibration-rows", "4"], ["files", "--gguf-file", "tiny.gguf"]
    start, student = [*few, *DATA, "--output"], tmp_path / "converted"
    for command in (
        ["analyze", *at, *start, tmp_path / "analysis"],
        ["plan", *at, "--plan", "similarity", *start, tmp_path / "plan.json"],
        ["convert", *at, *COPY, *DATA, "--output", student],
        ["store-teacher", *at, *DATA, "--top-k", "8", "--output", tmp_path / "store"],
        ["distill", student, "--teacher", *at, *DATA, *TRAIN[2:], "--output", tmp_path / "live"],
        ["distill", student, "--stored-teacher", tmp_path / "store", *TRAIN[2:], "--output", tmp_path / "stored"],
        ["evaluate", *at, *DATA, "--output", tmp_path / "evaluated.json"],
        ["evaluate", student, "--teacher", *at, *DATA],
        ["zero-shot", *at, "--task", "story=questions.jsonl"],
        ["benchmark", *at, COPY[1], "--length", "16", "--context", "16", "--repeats", "1", "--baseline", "none"],
        ["compress", *at, *COPY, *DATA, *TRAIN, "--output", tmp_path / "student"],
    ):
        result = echoatt(*command)
        assert result.exit_code == 0, (command, result.output)
    assert json.loads((tmp_path / "evaluated.json").read_text())["model"] == "files/tiny.gguf"


# Names


def test_the_file_of_a_folder_or_repository_is_one_name(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert name_gguf_file("files", None) == "files" and name_gguf_file(None, None) is None
    assert name_gguf_file("files", "tiny.gguf") == "files/tiny.gguf"
    assert name_gguf_file("owner/name", "sub/tiny.gguf") == "owner/name/sub/tiny.gguf"
    assert name_gguf_file("owner/name@refs/pr/1", "tiny.gguf") == "owner/name/tiny.gguf@refs/pr/1"


def test_file_of_a_repository(workplace, online):
    api = HfApi(endpoint=online.url, token=TOKEN)
    api.create_repo(f"{USER}/files", private=True)
    api.upload_folder(repo_id=f"{USER}/files", folder_path=workplace / "files", path_in_repo="sub")
    api.create_branch(f"{USER}/files", branch="old")
    name, original = f"{USER}/files/sub/tiny.gguf", load_model(workplace / "hub")
    for each, revision in ((name, "main"), (f"{name}@old", "old")):
        model = load_model(each)
        torch.testing.assert_close(logits_of(model), logits_of(original), **FP32_TOLERANCE)
        assert load_tokenizer(each, model).chat_template == TEMPLATE
        assert describe_teacher(model) == {
            "name": f"{USER}/files",
            "repository": f"{USER}/files",
            "revision": online.repositories[f"{USER}/files"].find(revision).oid,
            "gguf_file": "sub/tiny.gguf",
        }
    with pytest.raises(FileNotFoundError, match="The repository has no file 'other.gguf'"):
        load_config(f"{USER}/files/other.gguf")
    with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'new'"):
        load_config(f"{name}@new")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "There is no file 'missing.gguf': check the path"),
        (["files/missing.gguf"], "Its GGUF files are blocks.gguf, brain.gguf, half.gguf, tiny.gguf: name one"),
        (["files"], "no config.json. Its GGUF files are blocks.gguf, brain.gguf, half.gguf, tiny.gguf: name one"),
        (["text"], "'text' holds no model: it has no config.json."),
        (["text/0.txt"], "There is no model folder 'text/0.txt'"),
        (["files", "--gguf-file", "missing.gguf"], "There is no file 'files/missing.gguf'"),
        (["files", "--gguf-file", "tiny"], "gguf_file is 'tiny'; give the name of a .gguf file"),
        (["--gguf-file", "tiny.gguf"], "no folder or repository is given in which it is"),
        (["files/tiny.gguf", "--gguf-file", "tiny.gguf"], "There is no file 'files/tiny.gguf/tiny.gguf'"),
        (["files/sub/tiny.gguf"], "'files/sub/tiny.gguf' cannot be loaded: it is not in the cache"),
        (["owner/name/tiny.gguf"], "'owner/name/tiny.gguf' cannot be loaded: it is not in the cache"),
        (["owner/name.gguf"], "'owner/name.gguf' cannot be loaded: it is not in the cache"),
    ],
)
def test_names_without_a_file_are_one_line(echoatt, arguments, message):
    assert_one_line(echoatt("convert", *arguments, *COPY, *DATA, "--output", "never"), message)


def test_damaged_files_are_one_line(echoatt, workplace, tmp_path):
    whole = (workplace / "files" / "tiny.gguf").read_bytes()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "It is not a GGUF file: its first four bytes"),
        (b"", "It is not a GGUF file"),
        (whole[: len(whole) // 2], "Give a whole GGUF file that transformers reads"),
        (whole[:30], "Give a whole GGUF file that transformers reads"),
    ):
        (tmp_path / "damaged.gguf").write_bytes(content)
        result = echoatt("convert", tmp_path / "damaged.gguf", *COPY, *DATA, "--output", "never")
        assert_one_line(result, message)


def test_file_of_another_architecture_or_without_weights_is_one_line(echoatt, workplace, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(workplace / "hub"), load_model(workplace / "hub")
    for path, options, message in (
        (
            tmp_path / "new.gguf",
            {"architecture": "minicpm3"},
            "GGUF model with architecture minicpm3 is not supported",
        ),
        (
            tmp_path / "part.gguf",
            {"leave_out": ["model.layers.2.mlp.up_proj.weight"]},
            "lacks 1 of the model's weights, such as 'model.layers.2.mlp.up_proj.weight'",
        ),
    ):
        write_gguf(path, model, tokenizer, **options)
        assert_one_line(echoatt("convert", path, *COPY, *DATA, "--output", "never"), message)


@pytest.mark.parametrize("rope", ["factors", "type", None])
def test_scaled_rotary_frequencies_are_warned_of(workplace, tmp_path, caplog, rope):
    tokenizer, model = AutoTokenizer.from_pretrained(workplace / "hub"), load_model(workplace / "hub")
    load_model(write_gguf(tmp_path / "scaled.gguf", model, tokenizer, rope=rope))
    assert ("scales its rotary frequencies" in caplog.text) == (rope is not None)


def test_missing_package_is_named_with_its_extra(echoatt, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "gguf" else find(name))
    for name in ("files/tiny.gguf", "owner/name/tiny.gguf"):
        result = echoatt("convert", name, *COPY, *DATA, "--output", "never")
        assert_one_line(result, 'not installed: `pip install "echoatt-hf[gguf]"`')


# The file of the guide


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct, where the command of examples/real_model puts it, or in the shared data folder."""
    for folder in (ROOT / "smollm2", ROOT.parent / "shared" / "data" / "smollm2"):
        for path in folder.rglob("SmolLM2-135M-Instruct*.gguf"):
            return path
    pytest.skip("SmolLM2 is not here: the first command of examples/real_model/README.md fetches it")


@pytest.mark.real_weights
def test_smollm2_answers(smollm2):
    model = load_model(smollm2, "auto")
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    model, tokenizer = model.float(), load_tokenizer(smollm2, model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.real_weights
def test_bfloat16_rounds_less_than_the_blocks_did(smollm2):
    """Why `auto` is bfloat16: what it changes in the predictions is little."""
    exact, rounded = load_model(smollm2), load_model(smollm2, torch.bfloat16).float()
    tokens = load_tokenizer(smollm2, exact)((ROOT / "README.md").read_text()[:2000], return_tensors="pt")
    with torch.no_grad():
        one, other = (model(**tokens).logits[0].log_softmax(-1) for model in (exact, rounded))
    assert torch.nn.functional.kl_div(other, one, log_target=True, reduction="batchmean") < 0.002
