"""Tiny configurations of the architectures of transformers."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from architecture import WAYS, N
from torch import Tensor, nn

VOCABULARY, T = 32, 6

# sizes by the names that configurations give them; of these, each takes those that it has
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "n_embd": 16, "d_model": 16, "dim": 16, "embed_dim": 16, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 1, "decoder_layers": 1, "num_decoder_layers": 1,
    "num_encoder_layers": 1, "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "n_inner": 24, "ffn_dim": 24, "d_ff": 24,
    "hidden_dim": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_kv": 8, "head_dim": 8, "d_head": 8, "d_inner": 24,
    "max_position_embeddings": 32, "n_positions": 32, "n_ctx": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "type_vocab_size": 2, "image_size": 16, "patch_size": 8, "embedding_size": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_dropout": 0.0, "dropout_rate": 0.0,
    "classifier_dropout": 0.0, "drop_path_rate": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_top_k": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "shared_intermediate_size": 12,
}  # fmt: skip


@dataclass
class Family:
    """A configuration's and a model's class in transformers, what differs from the common sizes, and what the model is given."""

    config: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    given: str = "ids"
    sizes: dict[str, Any] = field(default_factory=lambda: SMALL)
    without: tuple[str, ...] = ()  # of the sizes
    ways: tuple[str, ...] = WAYS

    def build(self, seed: int = 0) -> nn.Module:
        import transformers

        config_class = getattr(transformers, self.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = config_class()
            config = config_class(
                **{k: v for k, v in self.sizes.items() if hasattr(known, k) and k not in self.without} | self.extra
            )
            config._attn_implementation = "eager"
            torch.manual_seed(seed)
            model = getattr(transformers, self.model)(config)
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.3 if p.ndim > 1 else p.data + 0.1 * torch.randn_like(p)
        model = Outputs(model, self.given).double()
        model.eval()
        return model

    def inputs(self, seed: int, n: int = N) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        ids = lambda: torch.randint(3, VOCABULARY, (n, T), generator=g)  # noqa: E731
        noise = lambda *shape: torch.randn(n, *shape, generator=g, dtype=torch.float64)  # noqa: E731
        given: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "ids": lambda: (ids(),),
            "masked": lambda: (ids(), (torch.arange(T) < torch.randint(2, T + 1, (n, 1), generator=g)).long()),
            "pairs": lambda: (ids(), ids()),
            "pixels": lambda: (noise(3, 16, 16),),
            "pixels32": lambda: (noise(3, 32, 32),),
            "pixels-ids": lambda: (ids(), noise(3, 16, 16)),
            "wave": lambda: (noise(400),),
            "mel": lambda: (noise(8, 20), ids()),
            "mel-time": lambda: (noise(20, 8),),
            "series": lambda: (noise(16, 3),),
        }
        return given[self.given]()


NAMES = {
    "ids": ("input_ids",), "masked": ("input_ids", "attention_mask"), "pairs": ("input_ids", "decoder_input_ids"),
    "pixels": ("pixel_values",), "pixels32": ("pixel_values",), "pixels-ids": ("input_ids", "pixel_values"),
    "wave": ("input_values",), "mel": ("input_features", "decoder_input_ids"), "mel-time": ("input_features",),
    "series": ("past_values",),
}  # fmt: skip


class Outputs(nn.Module):
    """A model called with tensors in a row, returning one tensor."""

    def __init__(self, model: nn.Module, given: str):
        super().__init__()
        self.model, self.given = model, given

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.model(**dict(zip(NAMES[self.given], inputs, strict=True)))
        for name in ("logits", "prediction_outputs", "last_hidden_state", "logits_per_text", "predicted_depth"):
            found = getattr(out, name, None)
            if found is not None:
                return found
        return next(iter(out.values()))


def _text(name: str, head: str = "ForCausalLM", **extra: Any) -> Family:
    return Family(f"{name}Config", f"{name}{head}", extra)


def _experts(name: str, head: str = "ForCausalLM", **extra: Any) -> Family:
    return Family(f"{name}Config", f"{name}{head}", extra, sizes=SMALL | EXPERTS)


def _hybrid(name: str, config: str = "", **extra: Any) -> Family:
    """Layers of several kinds; without a cache, in which they would look for a layer of attention."""
    return Family(config or f"{name}Config", f"{name}ForCausalLM", {"use_cache": False} | extra, sizes=SMALL | EXPERTS)


_LINEAR_THEN_FULL = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 3,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
# window and global attention, one layer each
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

TRANSFORMERS: dict[str, Family] = {
    # decoders
    "gpt2": _text("GPT2", "LMHeadModel"),
    "gpt-neo": _text("GPTNeo", attention_types=[[["global", "local"], 1]]),
    "gpt-neox": _text("GPTNeoX"),
    "gptj": _text("GPTJ", rotary_dim=4),
    "gpt-bigcode": _text("GPTBigCode"),
    "codegen": _text("CodeGen", rotary_dim=4, n_head=4),
    "opt": _text("OPT", word_embed_proj_dim=16),
    "bloom": _text("Bloom"),
    "mpt": _text("Mpt"),
    "falcon": Family("FalconConfig", "FalconForCausalLM", without=("head_dim",)),
    "llama": _text("Llama", num_key_value_heads=1),
    "mistral": _text("Mistral"),
    "qwen2": _text("Qwen2"),
    "qwen3": _text("Qwen3"),
    "gemma": _text("Gemma"),
    "gemma2": _text("Gemma2"),
    "gemma3": Family("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi": _text("Phi"),
    "phi3": _text("Phi3"),
    "stablelm": _text("StableLm"),
    "starcoder2": _text("Starcoder2"),
    "olmo": _text("Olmo"),
    "olmo2": _text("Olmo2"),
    "granite": _text("Granite"),
    "cohere": _text("Cohere"),
    "nemotron": _text("Nemotron"),
    "smollm3": _text("SmolLM3"),
    "glm": _text("Glm"),
    "helium": _text("Helium"),
    "biogpt": _text("BioGpt"),
    "xglm": _text("XGLM", num_layers=2, attention_heads=2),
    "olmo3": _text("Olmo3"),
    "cohere2": _text("Cohere2"),
    "exaone4": _text("Exaone4"),
    "glm4": _text("Glm4"),
    "gemma3n": Family("Gemma3nTextConfig", "Gemma3nForCausalLM", {"laurel_rank": 4, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 32, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [24, 24]} | _SLIDING),
    "ministral": _text("Ministral"),
    "hunyuan": _text("HunYuanDenseV1"),
    "seed-oss": _text("SeedOss"),
    "apertus": _text("Apertus"),
    "arcee": _text("Arcee"),
    "nanochat": _text("NanoChat"),
    "persimmon": _text("Persimmon"),
    "ernie": _text("Ernie4_5"),
    "diff-llama": _text("DiffLlama"),
    "minicpm3": _text("MiniCPM3", **_LATENT),
    "modernbert-decoder": _text("ModernBertDecoder"),
    "bitnet": _text("BitNet"),
    "vaultgemma": _text("VaultGemma"),
    "cpm-ant": _text("CpmAnt"),
    # mixtures of experts
    "mixtral": _experts("Mixtral"),
    "granite-moe": _experts("GraniteMoe"),
    "qwen2-moe": _experts("Qwen2Moe"),
    "qwen3-moe": _experts("Qwen3Moe"),
    "olmoe": _experts("Olmoe"),
    "gpt-oss": _experts("GptOss"),
    "deepseek-v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", {"n_group": 2, "topk_group": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        "n_shared_experts": 1}, sizes=SMALL | EXPERTS, without=("head_dim",)),
    "deepseek-v2": _experts(
        "DeepseekV2", n_group=2, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, n_shared_experts=1,
    ),
    "phimoe": _experts("Phimoe"),
    "jetmoe": _experts("JetMoe", kv_channels=8),
    "ernie-moe": _experts("Ernie4_5_Moe"),
    "dbrx": Family("DbrxConfig", "DbrxForCausalLM", {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2}}),
    "llama4": Family("Llama4TextConfig", "Llama4ForCausalLM", {"intermediate_size_mlp": 24, "attention_chunk_size": 8},
        sizes=SMALL | EXPERTS),
    "flex-olmo": _experts("FlexOlmo"),
    "granite-moe-shared": _experts("GraniteMoeShared"),
    "cohere2-moe": _experts("Cohere2Moe"),
    "dots1": _experts("Dots1", n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1),
    "exaone-moe": _experts("ExaoneMoe"),
    "glm4-moe": _experts("Glm4Moe"),
    "hunyuan-moe": _experts("HunYuanMoEV1"),
    "longcat": _experts("LongcatFlash", num_layers=1, zero_expert_num=1, expert_ffn_hidden_size=12, ffn_hidden_size=24, **_LATENT),
    "minimax-m2": _experts("MiniMaxM2"),
    "afmoe": _experts("Afmoe"),
    "doge": _experts("Doge"),
    "deepseek-v4": _experts("DeepseekV4"),
    # state spaces and recurrences
    "mamba": _text("Mamba", state_size=4),
    "mamba2": _text("Mamba2", state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    "falcon-mamba": _text("FalconMamba", state_size=4),
    "rwkv": _hybrid("Rwkv", attention_hidden_size=16),
    "jamba": _hybrid("Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    "bamba": _hybrid("Bamba", attn_layer_indices=[1], **_MAMBA2),
    "falcon-h1": _hybrid("FalconH1", mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1,
        mamba_chunk_size=4),
    "zamba2": _hybrid("Zamba2", layers_block_type=["mamba", "hybrid"], layer_types=["mamba", "hybrid"], mamba_d_state=4,
        mamba_ngroups=1, n_mamba_heads=2, chunk_size=4, use_mem_rope=True, num_mem_blocks=1),
    "granite-hybrid": _hybrid("GraniteMoeHybrid", layer_types=["mamba", "attention"], position_embedding_type="rope", **_MAMBA2),
    "lfm2": _text("Lfm2"),
    "lfm2-moe": _hybrid("Lfm2Moe", layer_types=["conv", "full_attention"], num_dense_layers=0),
    "qwen3-next": _hybrid("Qwen3Next", **_LINEAR_THEN_FULL),
    "qwen3.5": _hybrid("Qwen3_5", "Qwen3_5TextConfig", **_LINEAR_THEN_FULL),
    "qwen3.5-moe": _hybrid("Qwen3_5Moe", "Qwen3_5MoeTextConfig", **_LINEAR_THEN_FULL),
    "olmo-hybrid": _hybrid("OlmoHybrid", **_LINEAR_THEN_FULL),
    "minimax": _experts("MiniMax"),
    # encoders
    "bert": _text("Bert", "ForMaskedLM"),
    "roberta": _text("Roberta", "ForMaskedLM"),
    "distilbert": _text("DistilBert", "ForMaskedLM"),
    "albert": _text("Albert", "ForMaskedLM"),
    "electra": _text("Electra", "ForMaskedLM"),
    "deberta": _text("Deberta", "ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _text("DebertaV2", "ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "mpnet": _text("MPNet", "ForMaskedLM"),
    "modernbert": _text("ModernBert", "ForMaskedLM"),
    "fnet": _text("FNet", "ForMaskedLM"),
    "funnel": Family("FunnelConfig", "FunnelForMaskedLM", {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16},
        without=("num_hidden_layers", "num_blocks", "hidden_size")),
    "xlnet": Family("XLNetConfig", "XLNetLMHeadModel", without=("max_position_embeddings",)),
    "convbert": _text("ConvBert", "ForMaskedLM"),
    "squeezebert": _text("SqueezeBert", "ForMaskedLM", embedding_size=16),
    "roformer": _text("RoFormer", "ForMaskedLM"),
    "big-bird": _text("BigBird", "ForMaskedLM", attention_type="original_full"),
    "bert-masked": Family("BertConfig", "BertForMaskedLM", given="masked"),
    "llama-masked": Family("LlamaConfig", "LlamaForCausalLM", given="masked"),
    # encoder-decoders
    "t5": Family("T5Config", "T5ForConditionalGeneration", given="pairs"),
    "bart": Family("BartConfig", "BartForConditionalGeneration", given="pairs"),
    "pegasus": Family("PegasusConfig", "PegasusForConditionalGeneration", given="pairs"),
    "mbart": Family("MBartConfig", "MBartForConditionalGeneration", given="pairs"),
    "switch": Family("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", {"num_experts": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}, given="pairs"),
    # vision
    "vit": Family("ViTConfig", "ViTForImageClassification", given="pixels"),
    "deit": Family("DeiTConfig", "DeiTForImageClassification", given="pixels"),
    "beit": Family("BeitConfig", "BeitForImageClassification", given="pixels"),
    "dinov2": Family("Dinov2Config", "Dinov2ForImageClassification", given="pixels"),
    "swin": Family("SwinConfig", "SwinForImageClassification", {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8,
        "depths": [2, 1], "num_heads": [2, 2]}, given="pixels32",
        without=("num_attention_heads", "num_hidden_layers", "num_layers")),
    "convnext": Family("ConvNextConfig", "ConvNextForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 1],
        "num_stages": 2}, given="pixels32"),
    "convnextv2": Family("ConvNextV2Config", "ConvNextV2ForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 1],
        "num_stages": 2}, given="pixels32"),
    "clip": Family("CLIPVisionConfig", "CLIPVisionModel", given="pixels"),
    "siglip": Family("SiglipVisionConfig", "SiglipVisionModel", given="pixels"),
    "mobilevit": Family("MobileViTConfig", "MobileViTForImageClassification", {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes":
        [4, 4, 4, 4, 8, 8, 8], "image_size": 32, "patch_size": 2, "expand_ratio": 2.0}, given="pixels32"),
    "segformer": Family("SegformerConfig", "SegformerForImageClassification", {"hidden_sizes": [8, 8], "depths": [1, 1],
        "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2],
        "mlp_ratios": [2, 2]}, given="pixels32"),
    "pvt": Family("PvtConfig", "PvtForImageClassification", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1], "hidden_sizes": [8, 8], "patch_sizes": [4, 2], "strides": [4, 2],
        "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}, given="pixels32"),
    # speech and series
    "wav2vec2": Family("Wav2Vec2Config", "Wav2Vec2ForCTC", {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "final_dropout": 0.0,
        "feat_proj_dropout": 0.0}, given="wave"),
    "whisper": Family("WhisperConfig", "WhisperForConditionalGeneration", {"num_mel_bins": 8, "max_source_positions": 10,
        "max_target_positions": 32}, given="mel"),
    "patchtst": Family("PatchTSTConfig", "PatchTSTForPrediction", {"num_input_channels": 3, "context_length": 16, "patch_length": 4,
        "patch_stride": 4, "prediction_length": 4, "loss": "mse", "num_attention_heads": 2}, given="series"),
    "patchtsmixer": Family("PatchTSMixerConfig", "PatchTSMixerForPrediction", {"num_input_channels": 3, "context_length": 16,
        "patch_length": 4, "patch_stride": 4, "prediction_length": 4, "loss": "mse"}, given="series"),
}  # fmt: skip
