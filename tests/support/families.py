"""Settings of one small random model of each family; windows are shorter than the rows."""

from .speeds import slow_but_for

FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},  # capped scores
    "gemma3_text": {"sliding_window": 8},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "smollm3": {},
    "granite": {},
    "cohere2": {"sliding_window": 8},
    "glm4": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,  # unlike the keys'
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt2": {  # learned positions
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},  # attention sinks
}
# One of each kind: plain, with windows, with latent attention and experts, with sinks
EVERY_FAMILY = slow_but_for(FAMILIES, {"qwen3", "gemma3_text", "deepseek_v3", "gpt_oss"})
