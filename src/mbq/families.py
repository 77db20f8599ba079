"""Data only: model class -> its architectures. docs/families.md says how to add one.

A class with several language models has one architecture for each; ``mbq.architecture.bind`` takes the one whose names
exist. A class without an entry is matched by the structure of its blocks.
"""

from __future__ import annotations

from dataclasses import replace

from mbq.architecture import Architecture, BlockKind, LinearGroup

# Qwen2, Llama, Mistral and what is built like them.
LLAMA_GROUPS = (
    LinearGroup(
        "qkv", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attn"
    ),
    LinearGroup("o", "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", "attn"),
    LinearGroup("gate_up", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp"),
    LinearGroup("down", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "mlp"),
)

# GLM-4.1V has more norms, behind attention and MLP, into which nothing is folded.
GLM_GROUPS = (
    *LLAMA_GROUPS[:2],
    LinearGroup("gate_up", "post_attention_layernorm", ("mlp.gate_up_proj",), "mlp", "mlp"),
    LinearGroup("down", "mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj", "mlp", section=1),
)

# So has Gemma 3, where post_attention_layernorm is one of them.
GEMMA3_GROUPS = (
    *LLAMA_GROUPS[:2],
    LinearGroup("gate_up", "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp"),
    LLAMA_GROUPS[3],
)

# InternLM2: w1 is the gate, w3 goes up, w2 down; wqkv holds [kv_head][queries + key + value][head_dim] rows.
INTERNLM2_GROUPS = (
    LinearGroup("qkv", "attention_norm", ("attention.wqkv",), "attention", "attn"),
    LinearGroup("o", "attention.wqkv", ("attention.wo",), "attention.wo", "attn"),
    LinearGroup("gate_up", "ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "feed_forward", "mlp"),
    LinearGroup("down", "feed_forward.w3", ("feed_forward.w2",), "feed_forward.w2", "mlp"),
)

# LFM2: w1 is the gate. Its convolutions multiply what they mix by the second third of what in_proj gives.
_LFM2_MLP = (
    LinearGroup("gate_up", "ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "feed_forward", "mlp"),
    LinearGroup("down", "feed_forward.w3", ("feed_forward.w2",), "feed_forward.w2", "mlp"),
)
LFM2_GROUPS = (
    LinearGroup(
        "qkv", "operator_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attn"
    ),
    LinearGroup("o", "self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", "attn"),
    *_LFM2_MLP,
)
LFM2_CONVOLUTION = BlockKind(
    groups=(
        LinearGroup("in", "operator_norm", ("conv.in_proj",), "conv", "attn"),
        LinearGroup("out", "conv.in_proj", ("conv.out_proj",), "conv.out_proj", "attn", section=1),
        *_LFM2_MLP,
    ),
    attn_output="conv.out_proj",
    mlp_output="feed_forward.w2",
)

# Qwen3.5: what decides how fast a head forgets (in_proj_a) and learns (in_proj_b) is a row a head, and stays 16-bit.
# out_proj reads a norm whose weight all heads share, so nothing is folded there.
DELTA_NET = BlockKind(
    groups=(
        LinearGroup(
            "in",
            "input_layernorm",
            ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
            "linear_attn",
            "attn",
        ),
        LinearGroup("out", "", ("linear_attn.out_proj",), "linear_attn.out_proj", "attn"),
        *LLAMA_GROUPS[2:],
    ),
    attn_output="linear_attn.out_proj",
    mlp_output="mlp.down_proj",
)

# Llama 3.2 Vision: blocks that read pictures by cross-attention. What their keys and values read has no norm and is the
# same in all of them, so that nothing is folded there.
CROSS_ATTENTION = BlockKind(
    groups=(
        LinearGroup("q", "input_layernorm", ("cross_attn.q_proj",), "cross_attn", "attn"),
        LinearGroup("kv", "", ("cross_attn.k_proj", "cross_attn.v_proj"), "cross_attn", "attn", tokens=False),
        LinearGroup("o", "cross_attn.v_proj", ("cross_attn.o_proj",), "cross_attn.o_proj", "attn"),
        *LLAMA_GROUPS[2:],
    ),
    attn_output="cross_attn.o_proj",
    mlp_output="mlp.down_proj",
)

# A mixture of experts in the place of the MLP. The router reads the same norm: it is folded, and stays in 16 bits.
# "down" is a group an expert, which sees the tokens that are sent there.
ROUTER_PATH = "mlp.gate"
ROUTER = r"re:.*mlp\.gate$"
_EXPERTS_GATE_UP = (ROUTER_PATH, "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_EXPERTS_DOWN = LinearGroup(
    "down", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), "mlp.experts.*.down_proj", "mlp"
)
MIXTURE_GROUPS = (
    *LLAMA_GROUPS[:2],
    LinearGroup("gate_up", "post_attention_layernorm", _EXPERTS_GATE_UP, "mlp", "mlp"),
    _EXPERTS_DOWN,
)
LLAMA_KIND = BlockKind(LLAMA_GROUPS, "self_attn.o_proj", "mlp.down_proj")

# GLM-4.5V and Qwen3.5 have an expert beside them that every token goes to, Qwen3.5 with a gate of its own, a row.
GLM_MIXTURE_GROUPS = (
    *LLAMA_GROUPS[:2],
    LinearGroup(
        "gate_up",
        "post_attention_layernorm",
        (*_EXPERTS_GATE_UP, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        "mlp",
        "mlp",
    ),
    LinearGroup(
        "shared_down",
        "mlp.shared_experts.up_proj",
        ("mlp.shared_experts.down_proj",),
        "mlp.shared_experts.down_proj",
        "mlp",
    ),
    _EXPERTS_DOWN,
)
_QWEN3_5_MIXTURE = (
    LinearGroup(
        "gate_up",
        "post_attention_layernorm",
        (
            *_EXPERTS_GATE_UP,
            "mlp.shared_expert_gate",
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
        ),
        "mlp",
        "mlp",
    ),
    LinearGroup(
        "shared_down",
        "mlp.shared_expert.up_proj",
        ("mlp.shared_expert.down_proj",),
        "mlp.shared_expert.down_proj",
        "mlp",
    ),
    _EXPERTS_DOWN,
)
SHARED_GATE = r"re:.*mlp\.shared_expert_gate$"

# OPT has no module around its MLP, and a ReLU, through which factors pass.
OPT_GROUPS = (
    LinearGroup(
        "qkv", "self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attn"
    ),
    LinearGroup("o", "self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", "attn"),
    LinearGroup("gate_up", "final_layer_norm", ("fc1",), "fc1", "mlp"),
    LinearGroup("down", "fc1", ("fc2",), "fc2", "mlp"),
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
DINOV2_GROUPS = (
    LinearGroup("qkv", "norm1", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention", "attn"),
    LinearGroup("fc1", "norm2", ("mlp.fc1",), "mlp", "mlp"),
)
DINOV2_GROUPS_5_17 = (  # as transformers 5.17 names them
    LinearGroup(
        "qkv",
        "norm1",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention",
        "attn",
    ),
    DINOV2_GROUPS[1],
)
FUSED_VISION_GROUPS = (  # Qwen2-VL's tower and the original InternViT
    LinearGroup("qkv", "norm1", ("attn.qkv",), "attn", "attn"),
    LinearGroup("fc1", "norm2", ("mlp.fc1",), "mlp", "mlp"),
)
QWEN2_5_VISION_GROUPS = (  # GLM-4.1V too
    LinearGroup("qkv", "norm1", ("attn.qkv",), "attn", "attn"),
    LinearGroup("gate_up", "norm2", ("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp"),
)
QWEN3_VISION_GROUPS = (
    LinearGroup("qkv", "norm1", ("attn.qkv",), "attn", "attn"),
    LinearGroup("fc1", "norm2", ("mlp.linear_fc1",), "mlp", "mlp"),
)
BLIP2_VISION_GROUPS = (
    LinearGroup("qkv", "layer_norm1", ("self_attn.qkv",), "self_attn", "attn"),
    LinearGroup("fc1", "layer_norm2", ("mlp.fc1",), "mlp", "mlp"),
)
PIXTRAL_GROUPS = (
    LinearGroup(
        "qkv", "attention_norm", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention", "attn"
    ),
    LinearGroup("gate_up", "ffn_norm", ("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward", "mlp"),
)
VISION_GROUPS = (
    SIGLIP_GROUPS,
    INTERNVL_VISION_GROUPS,
    DINOV2_GROUPS,
    DINOV2_GROUPS_5_17,
    FUSED_VISION_GROUPS,
    QWEN2_5_VISION_GROUPS,
    QWEN3_VISION_GROUPS,
    BLIP2_VISION_GROUPS,
    PIXTRAL_GROUPS,
)

# Where configs say which tokens stand for images and videos.
VISION_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "img_context_token_id")

LLAVA_ONEVISION = Architecture(
    model_class="LlavaOnevisionForConditionalGeneration",
    models="LLaVA-OneVision",
    blocks="model.language_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    kept=("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
    vision_tokens=VISION_TOKENS,
    packs=True,
)

# The same names.
INTERNVL = replace(
    LLAVA_ONEVISION, model_class="InternVLForConditionalGeneration", models="InternVL3, InternVL3.5 (dense)"
)
INTERNVL_MOE = replace(
    INTERNVL,
    models="InternVL3.5 (mixtures of experts)",
    groups=MIXTURE_GROUPS,
    mlp_output="mlp",
    kept=(*INTERNVL.kept, ROUTER),
    others=(LLAMA_KIND,),
)
LLAVA = replace(LLAVA_ONEVISION, model_class="LlavaForConditionalGeneration", models="LLaVA-1.5, Pixtral")
LLAVA_NEXT = replace(LLAVA_ONEVISION, model_class="LlavaNextForConditionalGeneration", models="LLaVA-NeXT (1.6)")
MISTRAL3 = replace(LLAVA_ONEVISION, model_class="Mistral3ForConditionalGeneration", models="Mistral Small 3.1, 3.2")

QWEN2_VL = Architecture(
    model_class="Qwen2VLForConditionalGeneration",
    models="Qwen2-VL",
    blocks="model.language_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.visual",
    projector="model.visual.merger",
    kept=("lm_head", "re:.*visual.*"),
    vision_tokens=VISION_TOKENS,
    packs=True,
)

GEMMA3 = replace(
    LLAVA_ONEVISION,
    model_class="Gemma3ForConditionalGeneration",
    models="Gemma 3",
    groups=GEMMA3_GROUPS,
    norm_offset=1.0,
    packs=False,
)

QWEN2_5_VL = replace(QWEN2_VL, model_class="Qwen2_5_VLForConditionalGeneration", models="Qwen2.5-VL")
# Features of early vision blocks are added to the hidden states behind early decoder blocks, which blocks.py sees.
QWEN3_VL = replace(QWEN2_VL, model_class="Qwen3VLForConditionalGeneration", models="Qwen3-VL (dense)", packs=False)

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    model_class="Qwen3VLMoeForConditionalGeneration",
    models="Qwen3-VL (mixtures of experts)",
    groups=MIXTURE_GROUPS,
    mlp_output="mlp",
    kept=(*QWEN3_VL.kept, ROUTER),
    others=(LLAMA_KIND,),
)

QWEN3_5 = replace(
    QWEN2_VL,
    model_class="Qwen3_5ForConditionalGeneration",
    models="Qwen3.5 (dense)",
    kept=("lm_head", "re:.*visual.*", r"re:.*in_proj_a$", r"re:.*in_proj_b$"),
    norm_offset=1.0,
    others=(DELTA_NET,),
    packs=False,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    model_class="Qwen3_5MoeForConditionalGeneration",
    models="Qwen3.5 (mixtures of experts)",
    groups=(*LLAMA_GROUPS[:2], *_QWEN3_5_MIXTURE),
    mlp_output="mlp",
    kept=(*QWEN3_5.kept, ROUTER, SHARED_GATE),
    others=(replace(DELTA_NET, groups=(*DELTA_NET.groups[:2], *_QWEN3_5_MIXTURE), mlp_output="mlp"),),
)
GLM4V = replace(
    QWEN2_VL,
    model_class="Glm4vForConditionalGeneration",
    models="GLM-4.1V",
    groups=GLM_GROUPS,
)

GLM4V_MOE = replace(
    QWEN2_VL,
    model_class="Glm4vMoeForConditionalGeneration",
    models="GLM-4.5V",
    groups=GLM_MIXTURE_GROUPS,
    mlp_output="mlp",
    kept=(*QWEN2_VL.kept, ROUTER),
    others=(LLAMA_KIND,),
    packs=False,
)

IDEFICS3 = Architecture(
    model_class="Idefics3ForConditionalGeneration",
    models="Idefics3",
    blocks="model.text_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.vision_model",
    projector="model.connector",
    kept=("lm_head", "re:.*vision_model.*", "re:.*connector.*"),
    vision_tokens=VISION_TOKENS,
    packs=True,
)
SMOLVLM = replace(IDEFICS3, model_class="SmolVLMForConditionalGeneration", models="SmolVLM, SmolVLM2")

LFM2_VL = Architecture(
    model_class="Lfm2VlForConditionalGeneration",
    models="LFM2-VL",
    blocks="model.language_model.layers",
    groups=LFM2_GROUPS,
    attn_output="self_attn.out_proj",
    mlp_output="feed_forward.w2",
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    kept=("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
    vision_tokens=VISION_TOKENS,
    others=(LFM2_CONVOLUTION,),
)

# A picture is one token that stands for nothing, so it is no vision token. Checkpoints put lm_head into language_model.
MLLAMA = Architecture(
    model_class="MllamaForConditionalGeneration",
    models="Llama 3.2 Vision",
    blocks="model.language_model.layers",
    groups=LLAMA_GROUPS,
    attn_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    vision_tower="model.vision_model",
    projector="model.multi_modal_projector",
    kept=("re:.*lm_head$", "re:.*vision_model.*", "re:.*multi_modal_projector.*"),
    vision_tokens=(),
    others=(CROSS_ATTENTION,),
)

BLIP2 = Architecture(
    model_class="Blip2ForConditionalGeneration",
    models="BLIP-2 (OPT)",
    blocks="language_model.model.decoder.layers",
    groups=OPT_GROUPS,
    attn_output="self_attn.out_proj",
    mlp_output="fc2",
    vision_tower="vision_model",
    projector="qformer",
    kept=(r"re:.*language_model\.lm_head$", "re:.*vision_model.*", "re:.*qformer.*", "re:.*language_projection.*"),
    vision_tokens=VISION_TOKENS,
)

# The original InternVL2 folders, which bring their own code (--trust-remote-code).
INTERNVL_CHAT_INTERNLM2 = Architecture(
    model_class="InternVLChatModel",
    models="InternVL2 (its own code; InternLM2)",
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
    models="InternVL2 (its own code; Qwen2, Llama)",
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
    "LlavaForConditionalGeneration": (LLAVA,),
    "LlavaNextForConditionalGeneration": (LLAVA_NEXT,),
    "InternVLForConditionalGeneration": (INTERNVL, INTERNVL_MOE),
    "InternVLChatModel": (INTERNVL_CHAT_INTERNLM2, INTERNVL_CHAT_LLAMA),
    "Qwen2VLForConditionalGeneration": (QWEN2_VL,),
    "Qwen2_5_VLForConditionalGeneration": (QWEN2_5_VL,),
    "Qwen3VLForConditionalGeneration": (QWEN3_VL,),
    "Qwen3VLMoeForConditionalGeneration": (QWEN3_VL_MOE,),
    "Qwen3_5ForConditionalGeneration": (QWEN3_5,),
    "Qwen3_5MoeForConditionalGeneration": (QWEN3_5_MOE,),
    "Mistral3ForConditionalGeneration": (MISTRAL3,),
    "Gemma3ForConditionalGeneration": (GEMMA3,),
    "Glm4vForConditionalGeneration": (GLM4V,),
    "Glm4vMoeForConditionalGeneration": (GLM4V_MOE,),
    "Idefics3ForConditionalGeneration": (IDEFICS3,),
    "SmolVLMForConditionalGeneration": (SMOLVLM,),
    "Lfm2VlForConditionalGeneration": (LFM2_VL,),
    "MllamaForConditionalGeneration": (MLLAMA,),
    "Blip2ForConditionalGeneration": (BLIP2,),
}

# Those with a trained model in models/; the tests run the others on random weights alone.
TRAINED = (
    "LlavaOnevisionForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
)

# Known, and not quantized yet: what they have that no group of linears describes.
REFUSED = {
    "Llama4ForConditionalGeneration": "experts whose inputs are scaled by the router, in one tensor a block",
}
