"""A process that imports the package alone knows its models: the first configuration registers them."""

import pickle

import pytest
from conftest import make_teacher, plan_of, write_workplace
from peft import LoraConfig, get_peft_model
from processes import run_python

from echoatt_hf import EchoAttForCausalLM


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

# Each is the first thing that a process does with a student.
PROGRAMS = {
    "causal": "found = transformers.AutoModelForCausalLM.from_pretrained('student')",
    "from-config": "found = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained('student'))",
    "unpickled-config": "found = transformers.AutoModel.from_config(pickle.load(open('config.pickle', 'rb')))",
    "code-of-the-checkpoint": (
        "found = transformers.AutoModelForSequenceClassification.from_pretrained('student', trust_remote_code=True)"
    ),
    "pipeline": "found = transformers.pipeline('text-generation', 'student').model",
    "auto-peft": "import peft; found = peft.AutoPeftModelForCausalLM.from_pretrained('adapter').get_base_model()",
    "adapter": "found = transformers.AutoModelForCausalLM.from_pretrained('adapter')",
    "default-targets": (
        "import peft; found = transformers.AutoModelForCausalLM.from_pretrained('student'); "
        "peft.get_peft_model(found, peft.LoraConfig()); assert hasattr(found.base_model.layers[2].self_attn.v_proj, 'lora_A')"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registration")
    tokenizer = write_workplace(folder, ["a few words to learn tokens from " * 20])
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama", vocab_size=len(tokenizer)), plan_of("llama"))
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    (folder / "config.pickle").write_bytes(pickle.dumps(student.config))
    adapted = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "student"
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_first_use_of_a_student(program, folder):
    code = f"import pickle, transformers, echoatt_hf; {PROGRAMS[program]}; print(type(found).__module__)"
    result = run_python("-c", code, cwd=folder, new_interpreter=True, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == "echoatt_hf.modeling_echoatt"
