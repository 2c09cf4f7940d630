"""Students for mlx_lm: the model file that it runs, and the families that the file knows."""

import json
import shutil
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..configuration_echoatt import EchoAttConfig
from ..outputs.files import write_whole


__all__ = ["MLX_FAMILIES", "MLX_FILE", "add_mlx_file", "check_mlx"]

MLX_FILE = "mlx_echoatt.py"
"""The file that mlx_lm runs. It lies beside the weights, and `model_file` in config.json names it."""

MLX_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Parameters of rotary embeddings that mlx_lm has too, and computes in the same way.
_ROPE = {
    "default": ("partial_rotary_factor",),  # which both do not read
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
}


def check_mlx(config: PreTrainedConfig) -> None:
    """
    Check that mlx_lm can run a student.

    Args:
        config (`PreTrainedConfig`): configuration of the student.

    Raises:
        `ValueError`: it has another head, is of another family, or has something that mlx_lm computes in another way or
            not at all.
    """
    if not isinstance(config, EchoAttConfig):
        raise ValueError(
            f"The model is of type {config.model_type!r}, not an EchoAtt student: make one with `echoatt convert` or `compress`."
        )
    text, architectures = config.text_config, config.architectures or []
    rope = {name: value for name, value in (getattr(text, "rope_parameters", None) or {}).items() if value is not None}
    kind = rope.get("rope_type", "default")
    unknown = {*rope} - {"rope_theta", "rope_type", "type", *_ROPE.get(kind, ())}
    reason = None
    if text.model_type not in MLX_FAMILIES:
        reason = f"is of the family {text.model_type!r}; it must be one of {', '.join(MLX_FAMILIES)}"
    elif architectures != ["EchoAttForCausalLM"]:
        reason = f"is {' and '.join(architectures) or 'of no architecture'}; it must be EchoAttForCausalLM"
    elif config.layer_plan is not None:
        reason = "has other moves than echoes in its layer_plan; it must be a student of echo layers alone"
    elif config.shared_heads:
        reason = "has heads that share weights (shared_heads); it must be a student of echo layers alone"
    elif getattr(config, "quantization_config", None) is not None:
        reason = "is quantized; export the student in plain weights and quantize it with `mlx_lm.convert -q`"
    elif text.hidden_act != "silu":
        reason = f"has the activation {text.hidden_act!r}; it must be 'silu'"
    elif kind not in _ROPE:
        reason = f"scales its rotary embedding by {kind!r}; it must be one of {', '.join(_ROPE)}"
    elif unknown:
        reason = (
            f"scales its rotary embedding by {kind!r} with {', '.join(sorted(unknown))}, which mlx_lm does not have"
        )
    if reason is not None:
        raise ValueError(f"mlx_lm cannot run the student: it {reason}.")


def add_mlx_file(folder: Path) -> None:
    """
    Add the model file of mlx_lm to the folder of a student, and name it in config.json.

    Raises:
        `ValueError`: see [`check_mlx`].
    """
    check_mlx(AutoConfig.from_pretrained(folder))
    shutil.copy(Path(__file__).parent / "templates" / MLX_FILE, folder / MLX_FILE)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    write_whole(file, json.dumps(config | {"model_file": MLX_FILE}, indent=2, sort_keys=True) + "\n")
