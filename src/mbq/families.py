"""Data only: model class -> its architectures. Add a family by adding an entry here and a tiny model in tests/tiny.py.

A class with several language models has one architecture for each; ``mbq.architecture.bind`` takes the one whose names
exist. A class without an entry is matched by the structure of its blocks.
"""

from __future__ import annotations

from mbq.architecture import Architecture, LinearGroup

# Qwen2, Llama, Mistral and what is built like them.
LLAMA_GROUPS = (
    LinearGroup(
        "qkv", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attn"
    ),
    LinearGroup("o", "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", "attn"),
    LinearGroup("gate_up", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp"),
    LinearGroup("down", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "mlp"),
)

# InternLM2: w1 is the gate, w3 goes up, w2 down; wqkv holds [kv_head][queries + key + value][head_dim] rows.
INTERNLM2_GROUPS = (
    LinearGroup("qkv", "attention_norm", ("attention.wqkv",), "attention", "attn"),
    LinearGroup("o", "attention.wqkv", ("attention.wo",), "attention.wo", "attn"),
    LinearGroup("gate_up", "ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "feed_forward", "mlp"),
    LinearGroup("down", "feed_forward.w3", ("feed_forward.w2",), "feed_forward.w2", "mlp"),
)

# The blocks of vision towers at their two norms, which is where SmoothQuant works (vision_tower.py).
SIGLIP_GROUPS = (  # CLIP too
    LinearGroup(
        "qkv", "layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attn"
    ),
    LinearGroup("fc1", "layer_norm2", ("mlp.fc1",), "mlp", "mlp"),
)
INTERNVL_VISION_GROUPS = (
    LinearGroup(
        "qkv", "layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention", "attn"
    ),
    LinearGroup("fc1", "layernorm_after", ("mlp.fc1",), "mlp", "mlp"),
)
FUSED_VISION_GROUPS = (  # Qwen2-VL's tower and the original InternViT
    LinearGroup("qkv", "norm1", ("attn.qkv",), "attn", "attn"),
    LinearGroup("fc1", "norm2", ("mlp.fc1",), "mlp", "mlp"),
)
VISION_GROUPS = (SIGLIP_GROUPS, INTERNVL_VISION_GROUPS, FUSED_VISION_GROUPS)

# Where configs say which tokens stand for images and videos.
VISION_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "img_context_token_id")

LLAVA_ONEVISION = Architecture(
    model_class="LlavaOnevisionForConditionalGeneration",
    blocks="model.language_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    kept=("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
    vision_tokens=VISION_TOKENS,
)

INTERNVL = Architecture(
    model_class="InternVLForConditionalGeneration",
    blocks="model.language_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    kept=("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
    vision_tokens=VISION_TOKENS,
)

QWEN2_VL = Architecture(
    model_class="Qwen2VLForConditionalGeneration",
    blocks="model.language_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.visual",
    projector="model.visual.merger",
    kept=("lm_head", "re:.*visual.*"),
    vision_tokens=VISION_TOKENS,
)

# The original InternVL2 folders, which bring their own code (--trust-remote-code).
INTERNVL_CHAT_INTERNLM2 = Architecture(
    model_class="InternVLChatModel",
    blocks="language_model.model.layers",
    groups=INTERNLM2_GROUPS,
    attn_output="attention.wo",
    mlp_output="feed_forward.w2",
    vision_tower="vision_model",
    projector="mlp1",
    kept=(r"re:.*language_model\.output$", "re:.*vision_model.*", r"re:.*mlp1\..*"),
    vision_tokens=VISION_TOKENS,
    fused_qkv=True,
)
INTERNVL_CHAT_LLAMA = Architecture(
    model_class="InternVLChatModel",
    blocks="language_model.model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="vision_model",
    projector="mlp1",
    kept=(r"re:.*language_model\.lm_head$", "re:.*vision_model.*", r"re:.*mlp1\..*"),
    vision_tokens=VISION_TOKENS,
)

FAMILIES: dict[str, tuple[Architecture, ...]] = {
    "LlavaOnevisionForConditionalGeneration": (LLAVA_ONEVISION,),
    "InternVLForConditionalGeneration": (INTERNVL,),
    "Qwen2VLForConditionalGeneration": (QWEN2_VL,),
    "InternVLChatModel": (INTERNVL_CHAT_INTERNLM2, INTERNVL_CHAT_LLAMA),
}
