"""Configuration of an EchoAtt model: the base family's own configuration and the sharing plan."""

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import is_torch_available


ECHOATT_VERSION = "0.2.0"

ECHO_DECODES = ("auto", "weights", "replay")

# Types of layers, in a configuration's `layer_types`, that have no attention weights to share.
TYPES_WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "moe")


def read_entry(layer: int, entry: int | str) -> tuple[str, int | None] | None:
    """
    What a layer does by its entry in a plan, as `(move, source)`; `None` if it is no entry.

    A number is the layer's own where it stays as it is, `("plain", None)`, and that of its source where it echoes, `("echo",
    source)`. Else it is one of `"kv N"`, `("kv", N)`, `"skip attention"` and `"drop"`, which have no source.
    """
    if isinstance(entry, int) and not isinstance(entry, bool):
        return ("plain", None) if entry == layer else ("echo", entry)
    if entry in ("skip attention", "drop"):
        return entry, None
    shared = re.fullmatch(r"kv (\d+)", entry) if isinstance(entry, str) else None
    return ("kv", int(shared[1])) if shared else None


def read_layer_plan(layer_plan: Sequence[int | str]) -> list[tuple[str, int | None]]:
    """
    What each layer of a plan does, see [`read_entry`]. Whether the sources are possible is left to [`check_layer_plan`].

    Raises:
        `ValueError`: the plan is no list, or has something else in it.
    """
    if not isinstance(layer_plan, (list, tuple)):
        raise ValueError(f"echo_sources is {layer_plan!r}; it must be a list of layer indices, one for each layer.")
    moves = [read_entry(layer, entry) for layer, entry in enumerate(layer_plan)]
    if None in moves:
        raise ValueError(
            f"{_name_entry(layer_plan, moves.index(None))}; it must be a layer index (an integer), the layer's own if it stays "
            "as it is and that of its source if it echoes, or 'kv N', 'skip attention' or 'drop'."
        )
    return moves


def find_echo_sources(layer_plan: Sequence[int | str]) -> list[int]:
    """For each layer of a plan the layer whose attention weights it uses, itself where it echoes none."""
    return [source if move == "echo" else layer for layer, (move, source) in enumerate(read_layer_plan(layer_plan))]


def check_layer_plan(layer_plan: Sequence[int | str], num_layers: int, layer_types: list[str] | None = None) -> None:
    """Raise `ValueError` if `layer_plan`, see [`read_layer_plan`], is no plan for that many layers, of those types."""
    moves = read_layer_plan(layer_plan)
    if len(moves) != num_layers:
        raise ValueError(
            f"{_name_plan(layer_plan)} has {len(moves)} entries for {num_layers} layers: give one source index per layer, "
            "a layer's own index where it computes its own attention."
        )
    types = layer_types or [None] * num_layers
    for layer, (move, source) in enumerate(moves):
        entry = _name_entry(layer_plan, layer)
        if source is not None and not 0 <= source < layer:
            own = "can echo itself or an earlier layer" if move == "echo" else "can use those of an earlier layer"
            raise ValueError(f"{entry}; a layer {own}, 0 to {layer if move == 'echo' else layer - 1}.")
        if source is not None and moves[source][0] != "plain":
            found, instead = moves[source]
            does = f"is itself an echo of layer {instead}" if found == "echo" else f"is {layer_plan[source]!r}"
            raise ValueError(
                f"{entry}, but layer {source} {does}: a source must compute its own attention."
                + (f" Use {instead} instead." if instead is not None else "")
            )
        if source is not None and types[layer] != types[source]:
            raise ValueError(
                f"{entry}, but layer {layer} is of type {types[layer]!r} and layer {source} of type {types[source]!r}: "
                "an echo must have the type of its source."
            )
        if move not in ("plain", "drop") and types[layer] in TYPES_WITHOUT_ATTENTION:
            raise ValueError(
                f"{entry}, but these layers are of type {types[layer]!r}, which has no attention weights to share: "
                "leave them plain."
            )
    for kind in dict.fromkeys(types):
        first = types.index(kind)
        if moves[first][0] == "skip attention":
            raise ValueError(
                f"{_name_entry(layer_plan, first)}, but layer {first} is the first of its type, from which caches take their "
                "length: leave its attention in."
            )
    if all(move == "drop" for move, _ in moves):
        raise ValueError("The plan drops every layer: leave at least one.")


def _name_plan(layer_plan: Sequence[int | str]) -> str:
    return "layer_plan" if any(isinstance(entry, str) for entry in layer_plan) else "echo_sources"


def _name_entry(layer_plan: Sequence[int | str], layer: int) -> str:
    return f"{_name_plan(layer_plan)}[{layer}] is {layer_plan[layer]!r}"


def read_shared_heads(shared_heads: dict[str, str]) -> dict[tuple[int, int], tuple[int, int]]:
    """
    `shared_heads` of [`EchoAttConfig`] as `{(layer, head): (layer, head)}`.

    Raises:
        `ValueError`: it is something else.
    """
    is_known = isinstance(shared_heads, dict) and all(
        isinstance(place, str) and re.fullmatch(r"\d+\.\d+", place) for pair in shared_heads.items() for place in pair
    )
    if not is_known:
        raise ValueError(
            f"shared_heads is {shared_heads!r}; it must be a dict such as {{'7.2': '3.0'}}: head 2 of layer 7 has the weights "
            "of head 0 of layer 3."
        )
    pairs = ([tuple(map(int, place.split("."))) for place in pair] for pair in shared_heads.items())
    return dict(pairs)


def check_base_family(config: PreTrainedConfig) -> None:
    """Raise `ValueError` if a configuration is not that of a decoder language model with attention to share."""
    if not is_torch_available():  # as on a Mac with mlx_lm, where tokenizers ask for the configuration
        return
    # Encoders have a causal language model too, for use inside of encoder-decoders.
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    layer_types, reason = getattr(config, "layer_types", None), None
    if config.is_encoder_decoder or is_encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = (
            "not a decoder language model: EchoAtt needs a causal language model, such as llama, qwen3 or mistral."
        )
    elif (inner := config.get_text_config()) is not config:
        reason = f"which holds a language model of type {inner.model_type!r} beside others: give that one."
    elif layer_types and {*layer_types} <= {*TYPES_WITHOUT_ATTENTION}:
        reason = "none of whose layers has attention weights to share."
    elif getattr(config, "is_heterogeneous", False):
        reason = "whose layers have configurations of their own, which EchoAtt does not support."
    if reason is not None:
        raise ValueError(f"The model is of type {config.model_type!r}, {reason}")


@strict
class EchoAttConfig(PreTrainedConfig):
    r"""
    Configuration of a model whose echo layers reuse the attention weights of an earlier layer.

    Attributes that this class does not have are read from and written to `text_config`, so `config.hidden_size` and
    `config.pad_token_id = 0` do what they do for the base family.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlamaConfig()`):
            Configuration of the base family. A `dict` needs its `model_type`.
        echo_sources (`list[int]`, *optional*):
            The sharing plan: for each layer the 0-based index of the layer whose attention weights it uses, its own
            index for source and plain layers. `[0, 1, 1, 1, 4]`: layers 2 and 3 echo layer 1. Without it no layer
            echoes.
        layer_plan (`list[int | str]`, *optional*):
            A plan with other moves than echoes, in place of `echo_sources`, which then follows from it: for each layer a
            number as there, `"kv N"` for a layer that attends with queries of its own to the keys and values of layer N, or
            `"skip attention"` for a layer without attention, which adds a constant in its place.
            `[0, 1, 1, "kv 1", "skip attention"]`: layer 2 echoes layer 1, layer 3 uses its keys and values.
        shared_heads (`dict[str, str]`, *optional*):
            Heads that have the weights of earlier heads, which exist once and are trained as one. `{"7.2": "3.0"}`: head 2 of
            layer 7 has those of head 0 of layer 3, of queries, keys, values and output. Of grouped queries a head is one of
            keys and values, with all its queries. What the heads compute stays their own.
        echo_decode (`str`, *optional*, defaults to `"auto"`):
            How echo layers reuse the attention of their source. `"replay"`: an echo layer repeats the attention call of
            the source with its own values. `"auto"`: the source keeps its attention weights where it has them at hand,
            and an echo layer multiplies them with its values: in `eager` attention without sinks and dropout, and for a single
            query token, as in decoding, in `sdpa` attention without soft cap, sinks and dropout. All else is replayed.
            `"weights"`: as `"auto"`, but a single query token that would be replayed is an error. May be changed at
            any time.
        echoatt_version (`str`, *optional*):
            Version of `echoatt_hf` that wrote the configuration.

    Raises:
        `ValueError`: the plan does not fit the layers, the base family is not a decoder language model, a field is
            unknown, or `echo_decode` is.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from echoatt_hf import EchoAttConfig, EchoAttForCausalLM

    >>> config = EchoAttConfig(text_config=LlamaConfig(num_hidden_layers=5), echo_sources=[0, 1, 1, 1, 4])
    >>> model = EchoAttForCausalLM(config)
    ```
    """

    model_type = "echoatt"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    has_no_defaults_at_init = True

    text_config: Any = None
    echo_sources: Any = None
    layer_plan: Any = None
    shared_heads: Any = None
    echo_decode: Any = "auto"
    echoatt_version: str | None = None

    def __new__(cls, *args, **kwargs):
        _register_models()  # here, as unpickling does not call `__post_init__`
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        own_version = self.echoatt_version or ECHOATT_VERSION
        text_config = _resolve_text_config(self.text_config)
        if kwargs.get("tie_word_embeddings") is text_config.tie_word_embeddings:  # as `to_dict` says it
            del kwargs["tie_word_embeddings"]
        _check_fields(kwargs, text_config, own_version)
        # The base class looks for fields of other families on `self`; it must not find those of `text_config`.
        self.text_config = None
        super().__post_init__(**kwargs)
        self.text_config = text_config
        self.echoatt_version = own_version
        for name in ("attn_implementation", "experts_implementation"):
            if kwargs.get(name) is not None:  # again, as only now there is a text_config to hand it down to
                setattr(self, f"_{name}", kwargs[name])
        if self.echo_sources is None and self.layer_plan is None:
            self.echo_sources = list(range(text_config.num_hidden_layers))
        if self.echo_sources is None:
            self.echo_sources = find_echo_sources(self.layer_plan)
        self.validate_echo_sources()
        self.echo_sources = list(self.echo_sources)
        if self.layer_plan is not None:  # kept where it says more than `echo_sources` does
            self.layer_plan = list(self.layer_plan) if _name_plan(self.layer_plan) == "layer_plan" else None
        self.validate_shared_heads()

    def validate_echo_sources(self) -> None:
        """Check the sharing plan against the layers of `text_config`. Runs at construction and before saving."""
        layer_types = getattr(self.text_config, "layer_types", None)
        check_layer_plan(self.plan, self.text_config.num_hidden_layers, layer_types)
        if "drop" in self.plan:
            raise ValueError(
                f"layer_plan drops layer {self.plan.index('drop')}: a configuration has only the layers that are there. Give "
                "the plan to `from_teacher` or `convert`, which leave that layer out."
            )
        if list(self.echo_sources) != find_echo_sources(self.plan):
            raise ValueError(
                f"echo_sources is {self.echo_sources} and layer_plan {self.layer_plan}, which do not agree: give one of them."
            )

    def validate_shared_heads(self) -> None:
        """Check `shared_heads` against the layers and the plan. Runs at construction and before saving."""
        shared = read_shared_heads(self.shared_heads or {})
        for (layer, head), (source_layer, source_head) in shared.items():
            entry = f"shared_heads has {layer}.{head}: {source_layer}.{source_head}"
            if max(layer, source_layer) >= self.text_config.num_hidden_layers:
                raise ValueError(f"{entry}, but the model has {self.text_config.num_hidden_layers} layers.")
            if (source_layer, source_head) >= (layer, head) or (source_layer, source_head) in shared:
                raise ValueError(f"{entry}; a head can have the weights of an earlier head that has its own.")
            for each in (source_layer, layer):
                if self.plan[each] != each:
                    raise ValueError(
                        f"{entry}, but layer {each} is changed by the plan: it lacks some of these weights."
                    )

    def validate_layer_type(self) -> None:
        """The base family's configuration checks its layers itself; done here, it would rename some of them."""

    @property
    def echo_layers(self) -> list[int]:
        """`list[int]`: indices of the layers that reuse the attention weights of another layer."""
        return [layer for layer, source in enumerate(self.echo_sources) if layer != source]

    @property
    def source_layers(self) -> list[int]:
        """`list[int]`: indices of the layers whose attention weights, or keys and values, other layers use."""
        return sorted({source for _, source in read_layer_plan(self.plan) if source is not None})

    @property
    def plan(self) -> list[int | str]:
        """`list[int | str]`: the whole plan, `layer_plan` where there is one, else `echo_sources`."""
        return self.echo_sources if self.layer_plan is None else self.layer_plan

    @property
    def kv_sources(self) -> dict[int, int]:
        """`dict[int, int]`: for each layer that uses the keys and values of another the layer it has them from."""
        return {layer: source for layer, (move, source) in enumerate(read_layer_plan(self.plan)) if move == "kv"}

    @property
    def layers_without_attention(self) -> list[int]:
        """`list[int]`: indices of the layers whose attention is left out."""
        return [layer for layer, (move, _) in enumerate(read_layer_plan(self.plan)) if move == "skip attention"]

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what tools look for among them: whether the embeddings of the family are tied."""
        return super().to_dict() | {"tie_word_embeddings": self.text_config.tie_word_embeddings}

    def _is_own(self, name: str) -> bool:
        return name.startswith("_") or name in _OWN_NAMES or hasattr(type(self), name)

    def __getattr__(self, name: str):
        # Only reached for what this class and its base do not have. `__dict__` holds no text_config while unpickling.
        text_config = self.__dict__.get("text_config")
        if self._is_own(name) or not isinstance(text_config, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(text_config, name)

    def __setattr__(self, name: str, value) -> None:
        if name == "echo_decode" and value not in ECHO_DECODES:
            raise ValueError(f"echo_decode is {value!r}; it must be one of {', '.join(ECHO_DECODES)}.")
        text_config = self.__dict__.get("text_config")
        is_handed_down = not self._is_own(name) and name not in self.__dict__
        if is_handed_down and isinstance(text_config, PreTrainedConfig) and hasattr(text_config, name):
            setattr(text_config, name, value)
        else:
            super().__setattr__(name, value)


_OWN_FIELDS = tuple(EchoAttConfig.__annotations__)

# What transformers keeps in every configuration without a declaration, so that a family's may have it too.
_OWN_NAMES = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "num_labels",
    "quantization_config",
    "torch_dtype",
}


def _register_models() -> None:
    """Register the model classes, which take seconds to import, where the package is imported and not this file alone."""
    registration = sys.modules.get("echoatt_hf.registration")
    if registration is not None:
        registration.register_models()


def _check_fields(fields: dict[str, Any], text_config: PreTrainedConfig, version: str) -> None:
    """Check that the fields that this class does not declare are neither misspelt nor those of `text_config`."""
    inherited = {*type(text_config).__dataclass_fields__, *text_config.attribute_map} - _OWN_NAMES
    for name in fields:
        near = difflib.get_close_matches(name, _OWN_FIELDS, n=1, cutoff=0.75)
        if near or name.startswith("echo"):
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_OWN_FIELDS)}."
            if version != ECHOATT_VERSION:
                hint += (
                    f" The configuration was written by echoatt_hf {version}, this is {ECHOATT_VERSION}: upgrade it."
                )
        elif name in inherited and not hasattr(PreTrainedConfig, name):
            hint = "it belongs to the base family, set it in text_config."
        else:
            continue
        raise ValueError(f"EchoAttConfig has no field {name!r}: {hint}")


def _resolve_text_config(text_config: Any) -> PreTrainedConfig:
    if text_config is None:
        text_config = AutoConfig.for_model("llama")
    if isinstance(text_config, dict):
        if "model_type" not in text_config:
            raise ValueError("text_config has no 'model_type': name the base family, for instance 'llama'.")
        text_config = AutoConfig.for_model(**text_config)
    if not isinstance(text_config, PreTrainedConfig):
        raise ValueError(
            f"text_config is {text_config!r}; give the configuration of the base model, a PreTrainedConfig such as "
            "LlamaConfig or a dict with its 'model_type'."
        )
    if isinstance(text_config, EchoAttConfig) or text_config.model_type == EchoAttConfig.model_type:
        raise ValueError("text_config is an EchoAttConfig; give the configuration of the base model it was made from.")
    check_base_family(text_config)
    return text_config


EchoAttConfig.register_for_auto_class()

__all__ = [
    "EchoAttConfig",
    "check_base_family",
    "check_layer_plan",
    "find_echo_sources",
    "read_layer_plan",
    "read_shared_heads",
]
