"""The one list of families the tests know: a tiny configuration of each, and what is expected of it."""

from dataclasses import dataclass, field

from transformers import CONFIG_MAPPING


VOCAB_SIZE = 97
# Of families without grouped heads `num_key_value_heads` is set to what they have: paged caches read it where it is.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 3}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Prompts of the tests are shorter and longer than the window.
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3}

# Low enough to matter. Older transformers let these families have sdpa, which ignores the cap.
SOFT_CAP = {"attn_logit_softcapping": 1.0}
NO_SOFT_CAP = dict.fromkeys(("logits sdpa", "gradients sdpa"), "its sdpa ignores the soft cap of the family")
NO_FLEX_SINKS = {"logits flex_attention": "flex attention with sinks needs an accelerator"}
MIXED_UP_ROWS = {"packed_rows": "packed rows see each other"}
RECURRENT = {
    **MIXED_UP_ROWS,
    "cache dynamic-without-config": "its recurrent layers need a cache made for its configuration",
    "continuous_batching": "paged caches do not hold recurrent states",
}
STATEFUL = {
    **RECURRENT,
    **dict.fromkeys(("generation prompt-lookup", "generation assisted"), "its recurrent states cannot go back"),
}
NO_GOING_BACK = {name: reason for name, reason in STATEFUL.items() if name not in RECURRENT}
ROUNDING = dict.fromkeys(
    ("cache dynamic", "cache static"),
    "its recurrent layers compute prompts and tokens in two ways, which round differently",
)
OWN_CACHE = STATEFUL | dict.fromkeys(
    [
        *("cache dynamic", "cache static", "output attentions"),
        *(f"generation {how}" for how in ("greedy", "sampling", "beams", "beam-sampling")),
        *(f"generation {how}" for how in ("chunked-prefill", "static", "static-beams")),
    ],
    "its own cache gives other results than none, with padding or beams",
)
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

PLAN = (0, 1, 1, 3, 3, 5)
# Two blocks that interleave, as an echo has the type of its source.
MIXED_PLAN = (0, 1, 0, 1, 4, 1)
# Where every second layer has attention.
HYBRID_PLAN = (0, 1, 2, 1, 4, 1)
# Where every fourth layer is of another type.
FOURTH_PLAN = (0, 1, 1, 3, 1, 1)


@dataclass(frozen=True)
class Family:
    """
    A family, or a variant of one.

    Args:
        name (`str`): its row in the table: the `model_type`, unless that is given.
        overrides (`dict`): of its configuration, on top of `SIZES`.
        plan (`tuple[int]`): sharing plan with two blocks.
        model_type (`str`, *optional*): where `name` is that of a variant.
        attention (`str`, *optional*): implementation where a test asks for none; the family's default without it.
        refused (`str`, *optional*): pattern of the error that refuses it; without one it is supported.
        lacks (`dict[str, str]`): features that the unconverted family does not have itself, each with the reason.
        representative (`bool`): one of the few tested whenever tests run.
    """

    name: str
    overrides: dict = field(default_factory=dict)
    plan: tuple[int, ...] = PLAN
    model_type: str | None = None
    attention: str | None = None
    refused: str | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    representative: bool = False

    @property
    def config_type(self) -> str:
        return self.model_type or self.name

    @property
    def is_known(self) -> bool:
        """Whether the transformers at hand has the family."""
        return self.config_type in CONFIG_MAPPING


NO_PROJECTIONS = "no attention with query, key and value projections"
NO_ATTENTION = "none of whose layers has attention weights to share"
NO_INTERFACE = "does not call the attention interface"
MODULES = "has the modules {}"
PARAMETERS = "has parameters of its own: {}"

_ALL = [
    # Representative of the others: these are tested by default.
    Family("llama", {"tie_word_embeddings": True}, (0, 1, 1, 1, 4, 4), representative=True),
    Family("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, (0, 1, 2, 1, 2, 2), representative=True),
    Family("gemma3_text", {**HEADS, **MIXED, "query_pre_attn_scalar": 8}, MIXED_PLAN, representative=True),
    Family("olmo2", representative=True),
    Family("phi", {"tie_word_embeddings": False, "partial_rotary_factor": 0.5}, representative=True),
    Family("mixtral", {**WINDOW, "num_local_experts": 3}, representative=True),
    # Dense.
    Family("apertus"),
    Family("arcee"),
    Family("cohere"),
    Family("cohere2", MIXED, MIXED_PLAN),
    Family("cwm", {**HEADS, **MIXED}, MIXED_PLAN),
    Family("ernie4_5", HEADS),
    Family("exaone4", MIXED, MIXED_PLAN),
    Family("gemma", HEADS),
    Family("gemma2", {**HEADS, **MIXED, **SOFT_CAP}, MIXED_PLAN, attention="eager", lacks=NO_SOFT_CAP),
    Family("glm", HEADS),
    Family("glm4", HEADS),
    Family("granite"),
    Family("helium", HEADS),
    Family("hunyuan_v1_dense", HEADS),
    Family("hyperclovax"),
    Family("internlm3", HEADS),
    Family("iquestcoder", HEADS),
    Family("jais2"),
    Family("ministral", {**HEADS, **WINDOW}),
    Family("ministral3", HEADS),
    Family("mistral", {**HEADS, **WINDOW}, (0, 0, 2, 2, 2, 5)),
    Family("nanochat", HEADS),
    Family("olmo"),
    Family("olmo3", MIXED, MIXED_PLAN),
    Family("qwen2"),
    Family("seed_oss", {**HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    Family("smollm3"),
    Family("starcoder2", WINDOW),
    Family("vaultgemma", {**HEADS, **MIXED, **SOFT_CAP}, MIXED_PLAN, attention="eager", lacks=NO_SOFT_CAP),
    # Mixtures of experts.
    Family("cohere2_moe", {**LOCAL_EXPERTS, **MIXED, "num_experts": 4}, MIXED_PLAN),
    Family("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    Family("exaone_moe", {**EXPERTS, **MIXED}, MIXED_PLAN),
    Family("flex_olmo", EXPERTS),
    Family("glm4_moe", {**EXPERTS, **HEADS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    Family("granitemoe", LOCAL_EXPERTS),
    Family("granitemoeshared", {**LOCAL_EXPERTS, "shared_intermediate_size": 16}),
    Family("hunyuan_v1_moe", {**HEADS, "num_experts": 4, "moe_topk": 2}),
    Family("hy_v3", {**EXPERTS, **HEADS}),
    Family("mellum", {**EXPERTS, **HEADS, **MIXED}, MIXED_PLAN),
    Family("minimax_m2", {**LOCAL_EXPERTS, **HEADS}),
    Family("olmoe", EXPERTS),
    Family("phimoe", {**LOCAL_EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    Family("qwen3_moe", {**EXPERTS, **HEADS}),
    Family("solar_open", {**EXPERTS, **HEADS, "n_routed_experts": 4}),
    # Fused projections, learned positions, other names.
    Family(
        "biogpt",
        {"num_key_value_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        lacks=MIXED_UP_ROWS,
    ),
    Family("gpt2", {"num_key_value_heads": 4, **NO_DROPOUT}, representative=True),
    Family("gpt_bigcode", {"num_key_value_heads": 1, **NO_DROPOUT}),
    Family("gpt_neox", {"num_key_value_heads": 4}, representative=True),
    Family(
        "opt",
        {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        lacks=MIXED_UP_ROWS,
    ),
    Family("persimmon", {"num_key_value_heads": 4}),
    Family("phi3", WINDOW),
    Family(
        "llama4_text",
        {**LOCAL_EXPERTS, **HEADS},
        FOURTH_PLAN,
        lacks={
            "continuous_batching": "paged caches have no chunked attention",
            **dict.fromkeys(
                ("generation static", "generation static-beams"),
                "older transformers make no masks of chunked attention for static caches",
            ),
        },
    ),
    # Sinks, clipping, output gates.
    Family("afmoe", {**EXPERTS, **HEADS}, FOURTH_PLAN, lacks=MIXED_UP_ROWS),
    Family("gpt_oss", {**LOCAL_EXPERTS, **HEADS, **MIXED}, MIXED_PLAN, lacks={**MIXED_UP_ROWS, **NO_FLEX_SINKS}),
    Family("granite_swa", {**HEADS, **MIXED}, MIXED_PLAN, lacks=NO_FLEX_SINKS),
    Family("granitemoe_swa", {**LOCAL_EXPERTS, **HEADS, **MIXED}, MIXED_PLAN, lacks=NO_FLEX_SINKS),
    Family("olmo with clip_qkv", {"clip_qkv": 0.1}, model_type="olmo"),
    Family("olmoe with clip_qkv", {**EXPERTS, "clip_qkv": 0.1}, model_type="olmoe"),
    Family(
        "qwen3_next without linear attention",
        {**EXPERTS, **HEADS, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"] * 6},
        model_type="qwen3_next",
        lacks=NO_GOING_BACK,
    ),
    # Hybrids: some layers have no attention weights, or more beside them.
    Family("bamba", {**MAMBA, "attn_layer_indices": [1, 3, 5]}, HYBRID_PLAN, lacks=STATEFUL),
    Family("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}, lacks=STATEFUL),
    Family(
        "granitemoehybrid",
        {**MAMBA, **HYBRID, "num_local_experts": 0, "shared_intermediate_size": 32},
        HYBRID_PLAN,
        lacks=STATEFUL,
    ),
    Family(
        "jamba",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
        HYBRID_PLAN,
        lacks={**STATEFUL, "generation chunked-prefill": "its recurrent layers take no prompt in chunks"},
    ),
    Family("lfm2", {"full_attn_idxs": [1, 3, 5]}, HYBRID_PLAN, lacks=RECURRENT),
    Family("minimax", {**LOCAL_EXPERTS, **HEADS, **HYBRID}, HYBRID_PLAN, lacks=OWN_CACHE),
    Family(
        "nemotron_h",
        {
            **HEADS,
            "layers_block_type": ["mamba", "attention", "moe", "attention", "mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        HYBRID_PLAN,
        lacks={**STATEFUL, **ROUNDING, "bf16": "its head computes in float32"},
    ),
    Family("olmo_hybrid", HYBRID, HYBRID_PLAN, lacks=STATEFUL),
    Family(
        "qwen3_5_text",
        {**HEADS, **LINEAR, **HYBRID},
        HYBRID_PLAN,
        lacks={**STATEFUL, **ROUNDING},
        representative=True,
    ),
    Family(
        "qwen3_next",
        {**EXPERTS, **HEADS, **LINEAR, **HYBRID, "shared_expert_intermediate_size": 16},
        HYBRID_PLAN,
        lacks=STATEFUL,
    ),
    # Refused.
    Family("bitnet", refused=MODULES.format("attn_sub_norm")),
    Family("bloom", refused=NO_INTERFACE),
    Family("codegen", {"rotary_dim": 4}, refused=NO_INTERFACE),
    Family(
        "deepseek_v3",
        {**HEADS, "q_lora_rank": 8, "kv_lora_rank": 8, "n_routed_experts": 8, "moe_intermediate_size": 16},
        refused=MODULES.format("q_a_proj"),
    ),
    Family("diffllama", refused=MODULES.format("groupnorm")),
    Family("doge", refused=MODULES.format("dt_proj")),
    Family("falcon", refused=NO_INTERFACE),
    Family("falcon_mamba", refused=NO_ATTENTION),
    Family(
        "gemma4_text",
        {**HEADS, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE},
        refused="layers have configurations of their own",
    ),
    Family("gptj", {"rotary_dim": 4}, refused=NO_INTERFACE),
    # Its initialization reaches for the query projection of each layer by name.
    Family(
        "modernbert-decoder", {**MIXED, "num_key_value_heads": 4}, MIXED_PLAN, refused=MODULES.format("Wo, out_drop")
    ),
    Family("mamba", refused=NO_ATTENTION),
    Family(
        "mimo_v2_flash",
        {**EXPERTS, **HEADS, "n_routed_experts": 4, "num_local_experts": 4},
        refused="its converted model fails",
    ),
    Family("mpt", refused=NO_PROJECTIONS),
    Family("nemotron", HEADS, refused="do not hand keyword arguments on to their attention"),
    Family("recurrent_gemma", HEADS, (0, 1, 2, 3, 4, 2), refused=MODULES.format("rotary_emb")),
    Family("rwkv", {"attention_hidden_size": 32}, refused=NO_PROJECTIONS),
    Family("stablelm", refused="do not hand keyword arguments on to their attention"),
    Family(
        "xglm",
        {"num_key_value_heads": 4, "d_model": 32, "ffn_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
        refused=NO_INTERFACE,
    ),
]
FAMILIES = {family.name: family for family in _ALL}
SUPPORTED = [family for family in _ALL if family.refused is None]
REFUSED = [family for family in _ALL if family.refused is not None]
# A few, different enough from each other, for tests that are not about families.
DIVERSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi", "gpt2"]
