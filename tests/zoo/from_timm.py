"""Tiny configurations of the architectures of timm, as they are fine-tuned: in training mode, with frozen batch norms."""

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from architecture import WAYS, N
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Frozen(nn.Module):
    """A model whose batch norms keep their running statistics."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@dataclass
class Family:
    """A model's name in timm, or a class's path where the name does not let its sizes be changed; and its sizes."""

    model: str
    size: int  # of its images
    sizes: dict[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = WAYS

    def build(self) -> nn.Module:
        import timm

        torch.manual_seed(0)
        if "." in self.model:
            made = reduce(getattr, self.model.split("."), timm.models)(num_classes=4, **self.sizes)
        else:
            made = timm.create_model(self.model, pretrained=False, num_classes=4, **self.sizes)
        for module in made.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for p in made.parameters():
            p.data += 0.05 * torch.randn_like(p)
        return Frozen(made).double().train()

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return (torch.randn(N, 3, self.size, self.size, generator=g, dtype=torch.float64),)


_TRANSFORMER = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
_STAGES = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
_EMBEDDED = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
_WIDE = {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)}
_MAXVIT = {"img_size": 64, "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 8}

TIMM: dict[str, Family] = {
    # transformers
    "timm-vit": Family("vit_tiny_patch16_224", 16, _TRANSFORMER),
    "timm-vit-registers": Family("vit_tiny_patch16_224", 16, _TRANSFORMER | {"global_pool": "map", "init_values": 0.1,
        "qk_norm": True, "reg_tokens": 2, "class_token": False}),
    "timm-naflexvit": Family("naflexvit_base_patch16_gap", 32, {"embed_dim": 16, "depth": 2, "num_heads": 2}),
    "timm-vit-relpos": Family("vit_relpos_small_patch16_224", 16, _TRANSFORMER),
    "timm-vit-sam": Family("samvit_base_patch16", 16, _TRANSFORMER | {"global_attn_indexes": (1,), "window_size": 1,
        "neck_chans": 8}),
    "timm-deit": Family("deit_tiny_distilled_patch16_224", 16, _TRANSFORMER),
    "timm-deit3": Family("deit3_small_patch16_224", 16, _TRANSFORMER),
    "timm-beit": Family("beit_base_patch16_224", 16, _TRANSFORMER),
    "timm-eva": Family("eva02_tiny_patch14_224", 16, _TRANSFORMER),
    "timm-cait": Family("cait_xxs24_224", 16, _TRANSFORMER),
    "timm-convit": Family("convit_tiny", 16, _TRANSFORMER | {"local_up_to_layer": 1}),
    "timm-tnt": Family("tnt_s_legacy_patch16_224", 32, {"img_size": 32, "embed_dim": 16, "inner_dim": 8, "depth": 1,
        "num_heads_inner": 2, "num_heads_outer": 2}),
    "timm-swin": Family("swin_tiny_patch4_window7_224", 32, _SWIN),
    "timm-swin2": Family("swinv2_tiny_window8_256", 32, _SWIN),
    "timm-pvt2": Family("pvt_v2_b0", 32, _EMBEDDED),
    "timm-twins": Family("twins_pcpvt_small", 32, _EMBEDDED | {"img_size": 32}),
    "timm-pit": Family("pit_ti_224", 32, {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8), "depth": (1, 1),
        "heads": (1, 2), "mlp_ratio": 2}),
    "timm-davit": Family("davit_tiny", 32, {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}),
    "timm-hiera": Family("hiera_tiny_224", 32, {"img_size": (32, 32), "embed_dim": 8, "num_heads": 1, "stages": (1, 1), "q_pool": 1,
        "q_stride": (2, 2), "mask_unit_size": (2, 2)}),
    "timm-coat": Family("coat_tiny", 32, {"img_size": 32, "embed_dims": (8, 8, 8, 8), "serial_depths": (1, 1, 1, 1)}),
    "timm-focalnet": Family("focalnet.FocalNet", 32, {"embed_dim": 8, "depths": (1, 1)}),
    "timm-nest": Family("nest.Nest", 32, {"img_size": 32, "embed_dims": (8, 16), "num_heads": (1, 2), "depths": (1, 1),
        "num_levels": 2}),
    "timm-volo": Family("volo.VOLO", 32, {"img_size": 32, "layers": (1, 1), "embed_dims": (16, 16), "num_heads": (2, 2),
        "mlp_ratio": 2.0, "outlook_attention": (True, False), "downsamples": (True, False), "stem_hidden_dim": 8}),
    # convolutions with attention
    "timm-coatnet": Family("coatnet_pico_rw_224", 64, _MAXVIT),
    "timm-maxvit": Family("maxvit_pico_rw_256", 64, _MAXVIT),
    "timm-maxxvit": Family("maxxvit_rmlp_nano_rw_256", 64, _MAXVIT),
    "timm-edgenext": Family("edgenext_xx_small", 64, _STAGES | {"heads": (2, 2, 2, 2)}),
    "timm-mobilevit": Family("mobilevit_xxs", 32),
    "timm-efficientformer2": Family("efficientformer_v2.EfficientFormerV2", 32, {"depths": (1, 1, 1, 1), "img_size": 32,
        "embed_dims": (8, 8, 16, 16), "num_vit": 1, "mlp_ratios": ((2,), (2,), (2,), (2,))}),
    "timm-tiny-vit": Family("tiny_vit.TinyVit", 32, {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2),
        "window_sizes": (4, 4)}),
    "timm-visformer": Family("visformer_tiny", 64, {"img_size": 64, "embed_dim": 32, "depth": (1, 1, 1)}),
    "timm-caformer": Family("metaformer.MetaFormer", 32, _STAGES),
    # convolutions
    "timm-resnet": Family("resnet18", 32, _RESNET),
    "timm-resnet-groupnorm": Family("resnet18", 64, _WIDE | {"norm_layer": "groupnorm"}),
    "timm-resnet-bottleneck": Family("resnet50", 32, _RESNET | {"block_args": {"attn_layer": "se"}}),
    "timm-resnetv2": Family("resnetv2_50", 32, {"layers": (1, 1), "channels": (32, 32), "stem_chs": 32}),
    "timm-convnext": Family("convnext_atto", 32, _STAGES),
    "timm-convnext2": Family("convnextv2_atto", 32, _STAGES),
    "timm-efficientnet": Family("test_efficientnet", 32),
    "timm-efficientnet2": Family("test_efficientnet_evos", 32),
    "timm-mobilenet2": Family("mobilenetv2_035", 32),
    "timm-mobilenet3": Family("mobilenetv3_small_050", 32),
    "timm-mobilenet4": Family("mobilenetv4_conv_small_035", 32),
    "timm-regnet": Family("regnetx_002", 32),
    "timm-nfnet": Family("test_nfnet", 32),
    "timm-densenet": Family("densenet121", 32, {"growth_rate": 4, "block_config": (1, 1)}),
    "timm-inception-next": Family("inception_next_atto", 64, _STAGES),
    "timm-repvit": Family("repvit_m0_9", 32, {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 1, 1)}),
    "timm-fastvit": Family("fastvit_t8", 64, {"embed_dims": (8, 8, 16, 16), "layers": (1, 1, 1, 1)}),
    "timm-starnet": Family("starnet_s050", 32),
    "timm-convmixer": Family("convmixer.ConvMixer", 32, {"dim": 16, "depth": 2, "patch_size": 8}),
    "timm-mambaout": Family("mambaout_femto", 32, {"depths": (1, 1), "dims": (8, 16)}),
    # mixtures of tokens by products
    "timm-mixer": Family("mlp_mixer.MlpMixer", 32, {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}),
    "timm-sequencer": Family("sequencer.Sequencer2d", 32, {"img_size": 32, "layers": (1, 1), "patch_sizes": (8, 2),
        "embed_dims": (16, 16), "hidden_sizes": (8, 8), "mlp_ratios": (2.0, 2.0)}),
}  # fmt: skip
