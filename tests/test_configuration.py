import copy
import dataclasses
import json
import pickle

import pytest
from conftest import make_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM
from echoatt_hf.configuration_echoatt import ECHOATT_VERSION, check_layer_plan


PLAN = [0, 1, 1, 1, 4]


def make_echo_config(**kwargs) -> EchoAttConfig:
    return EchoAttConfig(
        **{"text_config": make_config("llama", num_hidden_layers=5), "echo_sources": list(PLAN), **kwargs}
    )


def fields(config: PreTrainedConfig) -> dict:
    """Fields of a configuration, without those that saving and loading set."""
    content = config.to_dict()
    for part in (content, content.get("text_config", {})):
        for name in ("_name_or_path", "auto_map", "transformers_version"):
            part.pop(name, None)
    return content


# Round trips


def test_round_trip_through_a_folder(tmp_path):
    config = make_echo_config(num_labels=3, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is EchoAttConfig
    assert type(loaded.text_config) is LlamaConfig
    assert fields(loaded) == fields(config)
    assert loaded.num_labels == 3
    assert str(loaded.dtype) == "torch.bfloat16"


def test_saved_fields(tmp_path):
    make_echo_config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "echoatt"
    assert content["echo_sources"] == PLAN
    assert content["echoatt_version"] == ECHOATT_VERSION
    assert content["text_config"]["model_type"] == "llama"
    assert content["text_config"]["num_key_value_heads"] == 2
    # What belongs to the family is written once, where it belongs.
    assert not {"hidden_size", "vocab_size", "pad_token_id", "num_hidden_layers"} & set(content)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(copier):
    config = make_echo_config()
    twin = copier(config)
    assert type(twin) is EchoAttConfig
    assert twin.to_dict() == config.to_dict()
    twin.echo_sources[1] = 0
    twin.hidden_size = 64
    assert config.echo_sources == PLAN
    assert config.text_config.hidden_size == 32


def test_text_config_as_dict():
    config = make_echo_config(text_config=make_config("llama", num_hidden_layers=5).to_dict())
    assert type(config.text_config) is LlamaConfig
    assert fields(config) == fields(make_echo_config())


def test_version_of_the_writer_is_kept():
    assert make_echo_config().echoatt_version == ECHOATT_VERSION
    assert make_echo_config(echoatt_version="0.0.1").echoatt_version == "0.0.1"


def test_without_a_plan_no_layer_echoes():
    config = make_echo_config(echo_sources=None)
    assert config.echo_sources == [0, 1, 2, 3, 4]
    assert config.echo_layers == config.source_layers == []


def test_echo_and_source_layers():
    config = make_echo_config(echo_sources=[0, 1, 1, 3, 3])
    assert config.echo_layers == [2, 4]
    assert config.source_layers == [1, 3]


def test_one_layer_type_may_be_shared_across_another():
    text_config = make_config("gemma3_text")
    assert EchoAttConfig(text_config=text_config, echo_sources=[0, 1, 0, 1, 4, 1]).echo_layers == [2, 3, 5]


# Delegation to text_config


def test_without_arguments_it_is_that_of_a_llama(tmp_path):
    config = EchoAttConfig()
    assert fields(config.text_config) == fields(LlamaConfig())
    assert config.echo_layers == []
    assert fields(EchoAttConfig.from_dict(config.to_dict())) == fields(config)


@pytest.mark.parametrize("tied", [True, False])
def test_tools_see_whether_embeddings_are_tied(tied, tmp_path):
    """PEFT reads it from the dictionary."""
    config = make_echo_config(text_config=make_config("llama", num_hidden_layers=5, tie_word_embeddings=tied))
    assert config.to_dict()["tie_word_embeddings"] is tied
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.tie_word_embeddings is tied
    with pytest.raises(ValueError, match="no field 'tie_word_embeddings': it belongs to the base family"):
        EchoAttConfig(**(config.to_dict() | {"tie_word_embeddings": not tied}))


def test_reads_what_it_does_not_have_from_text_config():
    config = make_echo_config()
    assert config.hidden_size == config.text_config.hidden_size == 32
    assert config.num_hidden_layers == 5
    assert config.vocab_size == config.text_config.vocab_size
    assert config.get_text_config() is config.text_config


@pytest.mark.parametrize(("name", "value"), [("pad_token_id", 7), ("use_cache", False), ("vocab_size", 99)])
def test_writes_what_it_does_not_have_to_text_config(name, value):
    config = make_echo_config()
    setattr(config, name, value)
    assert getattr(config.text_config, name) == value
    assert getattr(config, name) == value
    assert name not in config.__dict__


def test_own_fields_stay_its_own():
    config = make_echo_config()
    config.num_labels = 5
    config.problem_type = "regression"
    config.architectures = ["EchoAttForCausalLM"]
    assert config.text_config.num_labels == 2
    assert config.text_config.problem_type is None
    assert config.text_config.architectures is None
    assert config.model_type == "echoatt"


# What transformers writes into configurations without declaring it, too.
UNDECLARED = ["auto_map", "custom_pipelines", "quantization_config"]


@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(PreTrainedConfig)), *UNDECLARED])
def test_what_every_configuration_has_is_not_handed_down(name):
    """Nor taken from the family's: each of the two configurations has its own."""
    config, of_family = make_echo_config(), object()
    own = object() if name in UNDECLARED else getattr(config, name)  # of declared fields the type may be checked
    config.text_config.__dict__[name] = of_family
    assert getattr(config, name, None) is not of_family
    setattr(config, name, own)
    assert getattr(config, name) == own
    assert config.text_config.__dict__[name] is of_family


def test_field_that_nobody_declares_on_both_levels(tmp_path):
    config = make_echo_config()
    config.revision_of_data, config.text_config.revision_of_data = "a", "b"
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.revision_of_data, loaded.text_config.revision_of_data) == ("a", "b")


@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("how", ["as a whole", "by part"])
def test_implementations_are_handed_down(name, how, tmp_path):
    value = "eager" if how == "as a whole" else {"text_config": "eager"}
    make_echo_config().save_pretrained(tmp_path)
    for config in (make_echo_config(**{name: value}), AutoConfig.from_pretrained(tmp_path, **{name: value})):
        assert getattr(config.text_config, f"_{name}") == "eager"


def test_unknown_attribute_raises():
    config = make_echo_config()
    assert not hasattr(config, "no_such_field")
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = config.no_such_field
    config.no_such_field = 3
    assert config.no_such_field == 3
    assert not hasattr(config.text_config, "no_such_field")


def test_loading_overrides_reach_text_config(tmp_path):
    make_echo_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, pad_token_id=5, use_cache=False, num_labels=4)
    assert (config.text_config.pad_token_id, config.text_config.use_cache) == (5, False)
    assert config.num_labels == 4


def test_attention_implementation_reaches_text_config():
    config = make_echo_config(attn_implementation="eager")
    assert config._attn_implementation == config.text_config._attn_implementation == "eager"


# Errors: the plan


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([0, 1], r"echo_sources has 2 entries for 5 layers: give one source index per layer"),
        ([0, 2, 2, 3, 4], r"echo_sources\[1\] is 2; a layer can echo itself or an earlier layer, 0 to 1"),
        ([0, 1, -1, 3, 4], r"echo_sources\[2\] is -1; a layer can echo itself or an earlier layer, 0 to 2"),
        ([0, 1, 1, 2, 4], r"echo_sources\[3\] is 2, but layer 2 is itself an echo of layer 1.*Use 1 instead"),
    ],
    ids=["length", "forward", "negative", "chain"],
)
def test_bad_plan(sources, message):
    with pytest.raises(ValueError, match=message):
        make_echo_config(echo_sources=sources)
    with pytest.raises(ValueError, match=message):
        check_layer_plan(sources, 5)


@pytest.mark.parametrize("sources", ["01114", 3, {0: 0}], ids=repr)
def test_plan_that_is_no_list(sources):
    with pytest.raises(ValueError, match="it must be a list of layer indices"):
        make_echo_config(echo_sources=sources)


def test_tuple_becomes_a_list():
    assert make_echo_config(echo_sources=(0, 1, 1, 1, 4)).echo_sources == [0, 1, 1, 1, 4]


@pytest.mark.parametrize("source", ["1", 1.0, True, None], ids=repr)
def test_source_that_is_no_integer(source):
    sources = [0, 1, source, 1, 4]
    with pytest.raises(ValueError, match=r"(echo_sources|layer_plan)\[2\] is .*must be a layer index \(an integer\)"):
        make_echo_config(echo_sources=sources)
    with pytest.raises(ValueError, match=r"(echo_sources|layer_plan)\[2\] is .*must be a layer index \(an integer\)"):
        check_layer_plan(sources, 5)


def test_mixed_layer_types():
    message = (
        r"echo_sources\[1\] is 0, but layer 1 is of type 'full_attention' and layer 0 of type 'sliding_attention'"
    )
    with pytest.raises(ValueError, match=message):
        EchoAttConfig(text_config=make_config("gemma3_text"), echo_sources=[0, 0, 2, 3, 4, 5])


def test_plan_is_checked_again_before_saving(tmp_path):
    config = make_echo_config()
    config.echo_sources = [0, 0, 1, 3, 4]
    with pytest.raises(Exception, match="layer 1 is itself an echo of layer 0"):
        config.save_pretrained(tmp_path)


# Errors: fields


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("echo_source", "has no field 'echo_source': did you mean 'echo_sources'"),
        ("ehco_sources", "has no field 'ehco_sources': did you mean 'echo_sources'"),
        ("echoat_version", "has no field 'echoat_version': did you mean 'echoatt_version'"),
        ("text_configs", "has no field 'text_configs': did you mean 'text_config'"),
        (
            "echo_temperature",
            "has no field 'echo_temperature': known are text_config, echo_sources, layer_plan, shared_heads, echo_decode, echoatt_version",
        ),
    ],
)
def test_misspelt_field(name, message):
    with pytest.raises(ValueError, match=message) as error:
        make_echo_config(**{name: 1})
    assert "upgrade" not in str(error.value)


def test_misspelt_text_config_gets_the_suggestion_too():
    with pytest.raises(ValueError, match="did you mean 'text_config'"):
        EchoAttConfig(txt_config=make_config("llama", num_hidden_layers=5), echo_sources=PLAN)


def test_field_of_a_newer_version(tmp_path):
    make_echo_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "echo_mixing": 1, "echoatt_version": "99.1"}))
    message = f"has no field 'echo_mixing'.*written by echoatt_hf 99.1, this is {ECHOATT_VERSION}: upgrade it"
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "use_cache", "rms_norm_eps", "vocab_size"])
def test_field_of_the_family_at_top_level(name):
    with pytest.raises(
        ValueError, match=f"has no field {name!r}: it belongs to the base family, set it in text_config"
    ):
        make_echo_config(**{name: 1})


@pytest.mark.parametrize(("name", "value"), [("num_labels", 1), ("output_hidden_states", True)])
def test_common_fields_are_allowed_at_top_level(name, value):
    assert getattr(make_echo_config(**{name: value}), name) == value


# Errors: the base family


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        ("llama", "text_config is 'llama'; give the configuration of the base model"),
        ({"hidden_size": 32}, "text_config has no 'model_type': name the base family"),
        ({"model_type": "no-such-family"}, "no-such-family"),
        (T5Config(), "of type 't5', not a decoder language model"),
        (ViTConfig(), "of type 'vit', not a decoder language model"),
        (BertConfig(), "of type 'bert', not a decoder language model"),
        (make_echo_config(), "text_config is an EchoAttConfig"),
        (make_echo_config().to_dict(), "text_config is an EchoAttConfig"),
    ],
    ids=["string", "no-model-type", "unknown-model-type", "t5", "vit", "bert", "nested", "nested-dict"],
)
def test_bad_text_config(text_config, message):
    with pytest.raises(ValueError, match=message):
        EchoAttConfig(text_config=text_config)


def test_bert_as_a_decoder_is_refused_by_the_model():
    """It passes the configuration, as a decoder with a causal head, but not the check of its attention."""
    text_config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        is_decoder=True,
    )
    config = EchoAttConfig(text_config=text_config, echo_sources=[0, 1, 1])
    with pytest.raises(ValueError, match="does not support the family 'bert'"):
        EchoAttForCausalLM(config)


def test_multimodal_family_is_refused_with_advice():
    """Its configuration has no layers of its own: they are in its text_config."""
    with pytest.raises(ValueError, match="gemma3"):
        EchoAttConfig(text_config=Gemma3Config(text_config={"num_hidden_layers": 4}))


def test_heterogeneous_family_is_refused():
    """Gemma 4 gives layers their own configurations, found by a private attribute that must not be delegated."""
    text_config = AutoConfig.for_model("gemma4_text", num_hidden_layers=6, hidden_size=32, vocab_size=97)
    with pytest.raises(ValueError, match="gemma4_text.*configurations of their own"):
        EchoAttConfig(text_config=text_config)


def test_model_of_the_configuration_has_its_own_text_config():
    """Building a model sets its attention implementation; other models from equal configurations are not affected."""
    config = make_echo_config()
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    sdpa = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
    assert eager.config.text_config._attn_implementation == "eager"
    assert sdpa.config.text_config._attn_implementation == "sdpa"


def test_layer_types_of_the_base_family_are_left_alone():
    """Old names of types, which transformers renames where it checks a configuration, are what the family reads."""
    text_config = AutoConfig.for_model("lfm2", num_hidden_layers=4, full_attn_idxs=[1, 3])
    before = list(text_config.layer_types)
    config = EchoAttConfig(text_config=text_config, echo_sources=[0, 1, 2, 1])
    config.validate()
    assert config.layer_types == text_config.layer_types == before
