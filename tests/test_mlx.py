"""Students in mlx_lm: what is exported, what is refused, and, where mlx_lm is installed, that they say the same there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher, plan_of, process_environment, write_workplace
from hub_server import USER
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM, EchoAttForSequenceClassification, push_student
from echoatt_hf.cli.app import app
from echoatt_hf.models.loading import load_folder
from echoatt_hf.publishing import push as publishing
from echoatt_hf.publishing.mlx import MLX_FAMILIES, MLX_FILE, add_mlx_file, check_mlx


pytestmark = pytest.mark.once


ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip

# What the families can have, beside what their tiny configuration has.
VARIANTS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    **{
        f"llama, {kind} positions": ("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}})
        for kind, values in ROPE.items()
    },
    "mistral with a window": ("mistral", {}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
}  # fmt: skip


def make_student(family, **overrides):
    return EchoAttForCausalLM.from_teacher(make_teacher(family, **overrides), plan_of(family)).eval()


def logits_of(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student that says something, and its tokenizer, as `echoatt export` writes them, and a word it may be asked about."""
    work = tmp_path_factory.mktemp("mlx")
    tokenizer = write_workplace(work, [f"Story {n}. Once upon a time there were {n} bears.\n" * 6 for n in range(12)])
    student = make_student("llama", vocab_size=300, hidden_size=64, intermediate_size=64, head_dim=32)
    student.save_pretrained(work / "student")
    tokenizer.save_pretrained(work / "student")
    (work / "student" / "checkpoint-1").mkdir()
    (work / "student" / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    result = run("export", work / "student", "--to", "mlx", "--output", work / "exported")
    assert result.exit_code == 0, result.output
    (work / "printed.txt").write_text(result.stdout)
    return work / "exported"


# The export.


def test_an_exported_student_is_the_student_and_the_file_of_mlx(folder):
    student = folder.parent / "student"
    added = {MLX_FILE, "README.md", "configuration_echoatt.py", "modeling_echoatt.py"}
    files = {path.name for path in folder.rglob("*")}
    assert files == {path.name for path in student.iterdir() if path.is_file()} | added
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    before, after = (json.loads((each / "config.json").read_text()) for each in (student, folder))
    assert after == before | {"model_file": MLX_FILE}
    ids = make_batch()["input_ids"]
    models = [AutoModelForCausalLM.from_pretrained(each) for each in (student, folder)]
    assert torch.equal(*(logits_of(model, ids) for model in models))
    printed = (folder.parent / "printed.txt").read_text()
    assert printed.splitlines()[: len(files)] == sorted(files) and "--trust-remote-code" in printed


def test_the_card_of_an_exported_student_says_how_to_run_it(folder, tmp_path):
    card = (folder / "README.md").read_text()
    assert "mlx" in ModelCard(card).data.tags and "mlx_lm.generate --model exported --trust-remote-code" in card
    student = shutil.copytree(folder.parent / "student", tmp_path / "mine")
    publishing.write_whole(student / "README.md", publishing.make_card(student))
    card = (student / "README.md").read_text()
    assert "mlx" not in ModelCard(card).data.tags and "mlx_lm.generate" not in card


def test_the_output_is_not_overwritten_unasked(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    command = ["export", folder.parent / "student", "--output", tmp_path / "out"]
    refused = run(*command)
    assert refused.exit_code == 2 and "is not empty" in refused.stderr
    assert (tmp_path / "out" / "mine.txt").exists()
    assert run(*command, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / MLX_FILE).exists() and not (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "--output", "out"], "There is no model folder 'nowhere/at/all'"),
        (["builtin", "--output", "out"], "is of type 'llama', not an EchoAtt student"),
        (["student", "--to", "gguf", "--output", "out"], "to is 'gguf'; it must be one of 'mlx'"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder.parent / "student", "student")
    result = run("export", *arguments)
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("echoatt: error:"))
    assert message in line and not Path("out").exists()


def config_of(family="llama", **overrides):
    shared = overrides.pop("shared_heads", None)
    plan = overrides.pop("layer_plan", None if shared else plan_of(family))
    text_config = make_teacher(family, **overrides).config
    config = EchoAttConfig(text_config=text_config, layer_plan=plan, shared_heads=shared)
    config.architectures = ["EchoAttForCausalLM"]
    return config


def scaled(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


LONG = {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: config_of("gemma"), "it is of the family 'gemma'; it must be one of llama, mistral, qwen2, qwen3"),
        (lambda: config_of("phi3"), "it is of the family 'phi3'"),
        (lambda: config_of(hidden_act="gelu"), "the activation 'gelu'; it must be 'silu'"),
        (lambda: config_of(**scaled("longrope", **LONG)), "by 'longrope'; it must be one of default, linear"),
        (
            lambda: config_of(**scaled("yarn", **ROPE["yarn"], attention_factor=1.5, truncate=False)),
            "by 'yarn' with attention_factor, truncate, which mlx_lm does not have",
        ),
        (lambda: config_of(layer_plan=[0, 1, 1, "kv 1", 4, 5]), "it has other moves than echoes in its layer_plan"),
        (lambda: config_of(shared_heads={"2.1": "1.0"}), "it has heads that share weights (shared_heads)"),
    ],
    ids=["gemma", "phi3", "activation", "longrope", "yarn", "moves", "heads"],
)
def test_what_mlx_cannot_run_is_refused(config, message):
    with pytest.raises(ValueError, match="mlx_lm cannot run the student") as refused:
        check_mlx(config())
    assert message in str(refused.value)


def test_other_heads_quantized_students_and_teachers_are_refused(tmp_path):
    config = config_of()
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"is quantized; export the student in plain weights"):
        check_mlx(config)
    with pytest.raises(ValueError, match="type 'llama', not an EchoAtt student"):
        check_mlx(LlamaConfig())
    EchoAttForSequenceClassification(EchoAttConfig(text_config=make_teacher().config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is EchoAttForSequenceClassification; it must be EchoAttForCausalLM"):
        add_mlx_file(tmp_path)
    assert not (tmp_path / MLX_FILE).exists()


def test_a_repository_is_exported_from_the_cache(folder, monkeypatch, tmp_path):
    from echoatt_hf.models import loading

    asked = []
    monkeypatch.setattr(
        loading, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(folder)
    )
    assert load_folder(f"{USER}/student@v1") == folder
    assert asked == [(f"{USER}/student", {"revision": "v1"})]


@pytest.mark.hub
def test_a_push_sends_the_file_where_it_is_asked_for_or_there(folder, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(publishing, "_check_remote_load", lambda staged: None)
    monkeypatch.setattr(publishing.constants, "ENDPOINT", hub.url)
    push = ["push", f"{USER}/student", "--license", "mit", "--dry-run"]
    plain = run(push[0], folder.parent / "student", *push[1:])
    asked = run(push[0], folder.parent / "student", *push[1:], "--mlx")
    assert MLX_FILE not in plain.stdout and MLX_FILE in asked.stdout, asked.output
    # A file of another version is not sent.
    copy = shutil.copytree(folder, tmp_path / "mine")
    (copy / MLX_FILE).write_text("old = True\n")
    files = push_student(copy, f"{USER}/student", license="mit", dry_run=True).files
    assert files[MLX_FILE][1] == publishing.hash_file(folder / MLX_FILE)


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.modules["torch"] = sys.modules["echoatt_hf"] = None
from transformers import AutoConfig, AutoTokenizer
print(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).echo_sources)
print(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True).decode([5]))
"""


def test_configuration_and_tokenizer_load_without_torch(folder, tmp_path):
    """As on a Mac with mlx_lm alone, which loads the tokenizer by transformers."""
    environment = process_environment() | {"HF_MODULES_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, folder], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(plan_of("llama"))


# In mlx_lm.


@pytest.fixture(scope="module")
def mx():
    pytest.importorskip("mlx_lm", reason='mlx_lm is not installed: pip install "mlx[cpu]" mlx-lm')
    import mlx.core

    return mlx.core


def load(mx, folder):
    from mlx_lm.utils import load_model

    return load_model(Path(folder), trust_remote_code=True)[0]


@pytest.fixture(params=VARIANTS)
def variant(request, mx, tmp_path):
    """A student, the same in mlx_lm, rows, and the logits of the student."""
    family, overrides = VARIANTS[request.param]
    student = make_student(family, **overrides)
    student.save_pretrained(tmp_path)
    add_mlx_file(tmp_path)
    length = 160 if "dynamic" in request.param else 40  # beyond all windows, and the positions that dynamic ones have
    ids = make_batch(length=length)["input_ids"]
    return student, load(mx, tmp_path), ids, logits_of(student, ids)


def assert_same(logits, expected):
    torch.testing.assert_close(torch.tensor(logits.tolist()), expected, **FP32_TOLERANCE)


def test_logits_are_those_of_torch(variant, mx):
    _, model, ids, expected = variant
    assert_same(model(mx.array(ids.numpy())), expected)


def decode(mx, model, ids, cache, parts):
    logits, start = [], 0
    for length in parts:
        logits.append(model(mx.array(ids[:, start : start + length].numpy()), cache=cache))
        start += length
    return mx.concatenate(logits, axis=1)


def test_decoding_gives_the_logits_of_torch(variant, mx, request):
    from mlx_lm.models.cache import make_prompt_cache

    student, model, ids, expected = variant
    if "dynamic" in request.node.name:  # its frequencies follow the length, so that a cache is another thing
        ids = ids[:, :40]
        expected = logits_of(student, ids)
    length = ids.shape[1]
    for parts in ([1] * length, [5, 20, *[1] * (length - 25)]):
        assert_same(decode(mx, model, ids, make_prompt_cache(model), parts), expected)


def test_echo_layers_cache_values_alone(variant, mx):
    from mlx_lm.models.cache import make_prompt_cache

    student, model, ids, _ = variant
    cache = make_prompt_cache(model)
    model(mx.array(ids.numpy()), cache=cache)
    text = student.config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for layer, (source, each) in enumerate(zip(student.config.echo_sources, cache, strict=True)):
        tokens = each.keys.shape[2]  # in steps of 256, or the window
        values = 2 * text.num_key_value_heads * width * 4 * tokens
        assert each.nbytes == values * (1 if source != layer else 2), layer


def test_the_families_of_the_file_are_those_that_are_exported(variant):
    assert {family for family, _ in VARIANTS.values()} == {*MLX_FAMILIES}


@pytest.fixture(scope="module")
def loaded(mx, folder):
    return load(mx, folder), make_batch(length=40)["input_ids"]


def test_a_quantized_cache_holds_the_same(loaded, mx):
    from mlx_lm.models.cache import make_prompt_cache

    model, ids = loaded
    expected = model(mx.array(ids.numpy()))[:, 20:]
    cache = make_prompt_cache(model)
    model(mx.array(ids[:, :20].numpy()), cache=cache)
    cache = [each.to_quantized(group_size=32, bits=8) for each in cache]
    found = decode(mx, model, ids[:, 20:], cache, [1] * 20)
    worst = mx.abs(found - expected).max().item()
    assert 0 < worst < 0.02 * mx.abs(expected).max().item()


def test_rows_of_several_lengths_are_decoded_together(loaded, mx):
    from mlx_lm.generate import batch_generate
    from mlx_lm.models.cache import make_prompt_cache

    class Tokenizer:
        eos_token_ids = ()

        def decode(self, tokens):
            return tokens

        @property
        def detokenizer(self):
            raise AssertionError("no text is asked for")

    model, ids = loaded
    prompts = [ids[0, :17].tolist(), ids[1, :5].tolist(), ids[0, 3:9].tolist()]
    texts = batch_generate(model, Tokenizer(), prompts, max_tokens=12).texts
    for prompt, text in zip(prompts, texts, strict=True):
        cache, tokens = make_prompt_cache(model), []
        logits = model(mx.array([prompt]), cache=cache)
        while len(tokens) < 12:
            tokens.append(mx.argmax(logits[0, -1]).item())
            logits = model(mx.array([[tokens[-1]]]), cache=cache)
        assert list(text)[:12] == tokens


def test_a_prompt_cache_is_saved_and_loaded(loaded, mx, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

    model, ids = loaded
    cache = make_prompt_cache(model)
    model(mx.array(ids[:, :20].numpy()), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    step = mx.array(ids[:, 20:21].numpy())
    assert mx.array_equal(model(step, cache=cache), model(step, cache=again))


def test_gradients_reach_all_weights_with_checkpointing_too(loaded, mx, folder):
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import grad_checkpoint

    def gradients(model):
        ids = mx.array(loaded[1].numpy())
        loss = nn.value_and_grad(model, lambda ids: nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean())
        return dict(tree_flatten(loss(ids)[1]))

    model = load(mx, folder)
    plain = gradients(model)
    assert all(mx.abs(gradient).max().item() > 0 for gradient in plain.values())
    grad_checkpoint(model.layers[0])
    again = gradients(model)
    assert all(mx.allclose(plain[name], again[name], atol=1e-6).item() for name in plain)


def in_clean_process(*arguments):
    """A command of mlx_lm where neither echoatt_hf nor torch can be imported."""
    code = (
        WITHOUT_TORCH.split("from transformers")[0] + "import runpy; runpy.run_module('mlx_lm', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--trust-remote-code"],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_text_is_generated_plain_and_in_4_bits(mx, folder, tmp_path):
    prompt = ["--prompt", "Once upon", "--max-tokens", "8"]
    text = in_clean_process("generate", "--model", folder, *prompt)
    assert "Generation: 8 tokens" in text
    assert in_clean_process("generate", "--model", folder, *prompt).split("===")[1:-1] == text.split("===")[1:-1]
    assert "bits per weight" in in_clean_process("convert", "--hf-path", folder, "--mlx-path", tmp_path / "q", "-q")
    small, whole = (Path(each, "model.safetensors").stat().st_size for each in (tmp_path / "q", folder))
    assert small < 0.4 * whole
    assert "Generation: 8 tokens" in in_clean_process("generate", "--model", tmp_path / "q", *prompt)
