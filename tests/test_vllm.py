"""Students in vLLM: the plugin, which is looked at everywhere, and what it generates, where vLLM is installed."""

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, make_teacher, process_environment
from families import SUPPORTED

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM, EchoAttModel
from echoatt_hf.serving.vllm import ARCHITECTURE, FAILING_FAMILIES, check_vllm_config, register


ROOT = Path(__file__).parents[1]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def vllm_config_of(config, heads=2, **parallel):
    """What the check reads of vLLM's configuration."""
    model = SimpleNamespace(hf_config=config, get_total_num_kv_heads=lambda: heads)
    sizes = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1} | parallel
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(**sizes))


def student_config(family="llama", plan=(0, 1, 1, 1, 4, 4)):
    return EchoAttConfig(text_config=make_config(family), layer_plan=list(plan))


def test_the_plugin_is_declared_and_imports_neither_torch_nor_vllm():
    declared = re.search(
        r'^echoatt = "(echoatt_hf\.serving.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )[1]
    assert EntryPoint("echoatt", declared, "vllm.general_plugins").load() is register
    code = (
        "import sys; sys.argv = ['echoatt']; import echoatt_hf; before = {*sys.modules}; import echoatt_hf.serving.vllm;"
        "print(sorted({name.split('.')[0] for name in {*sys.modules} - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "vllm"} & {*eval(result.stdout)}


def test_the_architecture_is_the_one_that_students_are_saved_with(tmp_path):
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama"), [0, 1, 1, 1, 4, 4])
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [ARCHITECTURE]


def test_a_student_that_vllm_runs_is_let_through():
    check_vllm_config(vllm_config_of(student_config(), tensor_parallel_size=2))


@pytest.mark.parametrize(
    "parallel, said",
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2, but an echo layer needs"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size is 4, but the student has 2 key-value heads"),
    ],
    ids=["pipeline", "more processes than heads"],
)
def test_what_is_divided_wrongly_is_refused(parallel, said):
    with pytest.raises(ValueError, match=said):
        check_vllm_config(vllm_config_of(student_config(), **parallel))


def test_heads_that_share_weights_are_refused():
    config = EchoAttConfig(text_config=make_config("llama"), shared_heads={"2.1": "1.0"})
    with pytest.raises(ValueError, match=r"vLLM does not run students whose heads share weights \(shared_heads\)"):
        check_vllm_config(vllm_config_of(config))


def test_layers_without_attention_are_refused():
    check_vllm_config(vllm_config_of(student_config(plan=(0, 1, 1, "kv 1", 4, 5))))
    with pytest.raises(ValueError, match="vLLM does not run students with layers without attention, such as layer 3"):
        check_vllm_config(vllm_config_of(student_config(plan=(0, 1, 1, "skip attention", 4, 5))))


RECURRENT = [family for family in SUPPORTED if "paged caches do not hold recurrent states" in family.lacks.values()]


@pytest.mark.parametrize("family", [family for family in RECURRENT if family.is_known], ids=lambda each: each.name)
def test_recurrent_families_are_refused_by_name(family):
    config = student_config(family.name, family.plan)
    with pytest.raises(
        ValueError, match=f"students of the family '{family.config_type}': .* keeps no states of recurrent"
    ):
        check_vllm_config(vllm_config_of(config))


@pytest.mark.parametrize("name", FAILING_FAMILIES)
def test_families_that_fail_there_are_refused_by_name(name):
    plan = next(family.plan for family in SUPPORTED if family.name == name)
    with pytest.raises(ValueError, match=f"students of the family '{name}': .* does not run it, unconverted either"):
        check_vllm_config(vllm_config_of(student_config(name, plan)))


def test_the_headless_model_takes_embeddings():
    """vLLM looks for the argument by its name."""
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama"), [0, 1, 1, 1, 4, 4])
    model = EchoAttModel(student.config).eval()
    ids = torch.randint(3, 90, (1, 7))
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    assert torch.equal(embedded, model(input_ids=ids).last_hidden_state)


# Where vLLM is installed. `examples/serve_vllm/try_families.py` tries all families.

CODE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
from vllm import LLM, SamplingParams
prompts, options = json.loads(sys.argv[2]), json.loads(sys.argv[3])
engine = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=128, enforce_eager=True, **options)
how = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
for _ in range(2):  # again, from cached prefixes
    outputs = engine.generate([{"prompt_token_ids": each} for each in prompts], how, use_tqdm=False)
    print("blocks", engine.llm_engine.vllm_config.cache_config.num_gpu_blocks)
    print("tokens", json.dumps([list(each.outputs[0].token_ids) for each in outputs]))
"""


def run_vllm(folder, prompts, **options):
    arguments = [str(folder), json.dumps(prompts), json.dumps(options)]
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_vllm
@pytest.mark.parametrize("moves", ["echo", "kv"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt_oss", "mixtral"])
def test_vllm_generates_the_same(family, moves, tmp_path):
    """Eight requests in chunks of prompts, twice: the second time from cached prefixes."""
    sizes = {"hidden_size": 128, "intermediate_size": 64}  # its CPU kernels take heads of 32 and experts of 64
    heads = {} if family in ("phi3", "gpt_neox") else {"head_dim": 32}
    teacher = make_teacher(family, None, **sizes, **heads)
    plan = list(next(known.plan for known in SUPPORTED if known.name == family))
    if moves == "kv":
        last = max(layer for layer, source in enumerate(plan) if layer != source)
        plan[last] = f"kv {plan[last]}"
    student = EchoAttForCausalLM.from_teacher(teacher, plan).eval()
    student.save_pretrained(tmp_path)
    prompts = [[3 + (5 * i * n + 7 * i + n) % 90 for i in range(6 + 5 * n)] for n in range(8)]
    expected = [
        student.generate(
            torch.tensor([each]),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(each) :].tolist()
        for each in prompts
    ]
    chunked = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": True}
    result = run_vllm(tmp_path, prompts, **chunked)
    found = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("tokens ")]
    assert found == [expected, expected], result.stderr[-3000:]


@needs_vllm
def test_two_echo_layers_have_one_page(tmp_path):
    """On a CPU: of six layers three echo, so that two pages do for them, and the same memory holds 6/5 of the tokens."""
    blocks = []
    for plan in ([0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 4, 4], [0, 1, "kv 1", "kv 1", 4, "kv 4"]):
        teacher = make_teacher("llama", hidden_size=128, intermediate_size=64, head_dim=32)
        EchoAttForCausalLM.from_teacher(teacher, plan).save_pretrained(tmp_path / str(len(blocks)))
        result = run_vllm(tmp_path / str(len(blocks)), [[3, 4, 5]])
        blocks.append(int(re.search(r"^blocks (\d+)$", result.stdout, re.MULTILINE)[1]))
    assert blocks[1] / blocks[0] == pytest.approx(6 / 5, rel=0.01)
    assert blocks[2] / blocks[0] == pytest.approx(
        6 / 3, rel=0.01
    )  # nothing of layers that use keys and values of others


@needs_vllm
def test_vllm_refuses_before_it_starts(tmp_path):
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama"), [0, 1, 1, 1, 4, 4])
    student.save_pretrained(tmp_path)
    result = run_vllm(tmp_path, [[3]], pipeline_parallel_size=2)
    assert result.returncode and "pipeline_parallel_size is 2, but an echo layer needs" in result.stderr
