"""Transformers' layouts: whole, and with one tensor missing, one too many, one of another shape; timm is the oracle.

Each file is drawn from timm's network, its tensors under the code base's names: restated from its code, not from ours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from checkpoints import HF_VIT_FILE, TORCHVISION_VIT, VIT, apart, error, linear, mlp, under, used, walk, written
from torch import Tensor, nn

from moco_eval.encoders.architectures import build_backbone
from moco_eval.encoders.layouts_vit import TRANSFORMERS_OF_METHODS
from moco_eval.encoders.load import load
from moco_eval.encoders.vit_tensors import resampled

SMALL = "img_size=32,embed_dim=48,depth=2,num_heads=3"
PLAIN = f"timm:vit_base_patch16_224,{SMALL}"
SCALED = f"{PLAIN},init_values=1e-05"
REGISTERS = f"{PLAIN},reg_tokens=4,no_embed_class=True,init_values=1e-05"
PATCHES = f"{PLAIN},class_token=False,global_pool=avg,fc_norm=False"
CLIP = f"timm:vit_base_patch16_clip_224,{SMALL}"
QUICK = f"{CLIP},act_layer=quick_gelu"
TIMM_SIGLIP = f"timm:vit_base_patch16_siglip_224,{SMALL}"
SIGLIP = f"{TIMM_SIGLIP},act_layer=gelu_tanh"
BEIT = f"timm:beit_base_patch16_224,{SMALL}"
SHARED = f"{BEIT},use_fc_norm=False,use_rel_pos_bias=False,use_shared_rel_pos_bias=True"
DINOV3 = "timm:vit_base_patch16_dinov3,embed_dim=48,depth=2,num_heads=3,global_pool=token,qkv_bias=True"


def network(arch: str, seed: int = 0) -> nn.Module:
    """Every parameter drawn, LayerScale, positions and tokens too."""
    torch.manual_seed(seed)
    net = used(build_backbone(arch), seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


@cache
def _body(arch: str, seed: int) -> dict[str, Tensor]:
    return network(arch, seed).state_dict()


def body(arch: str, seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _body(arch, seed).items()}


def renamed(tensors: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    for pattern, replacement in rules:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


# From timm's tensors to each code base's


def dinov2(seed: int = 0) -> dict[str, Tensor]:
    return body(SCALED, seed) | {"mask_token": torch.ones(1, 48)}


def with_registers(seed: int = 0) -> dict[str, Tensor]:
    """A class token that lacks its position, which stands before the patches' positions."""
    tensors = body(REGISTERS, seed)
    place = torch.full((1, 1, 48), 0.25)
    tensors["cls_token"] = tensors["cls_token"] - place
    tensors["pos_embed"] = torch.cat([place, tensors["pos_embed"]], dim=1)
    return renamed(tensors, (r"^reg_token$", "register_tokens")) | {"mask_token": torch.ones(1, 48)}


def dinov3(seed: int = 0) -> dict[str, Tensor]:
    """Biases of all three with a mask that takes the keys' away, and rotary periods."""
    tensors = renamed(body(DINOV3, seed), (r"\.gamma_([12])$", r".ls\1.gamma"), (r"^reg_token$", "storage_tokens"))
    for i in range(2):
        query, value = (tensors.pop(f"blocks.{i}.attn.{letter}_bias") for letter in "qv")
        tensors[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, torch.randn(48), value])
        tensors[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
    periods = (100.0 ** (torch.arange(4) / 4)).bfloat16().float()
    return tensors | {"rope_embed.periods": periods, "mask_token": torch.zeros(1, 48)}


def beit(arch: str = BEIT, seed: int = 0) -> dict[str, Tensor]:
    return body(arch, seed)


def clip(seed: int = 0) -> dict[str, Tensor]:
    tensors = body(CLIP, seed)
    tensors |= {"cls_token": tensors["cls_token"].flatten(), "pos_embed": tensors["pos_embed"][0]}
    return renamed(
        tensors,
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.(\d)\.norm(\d)\.", r"blocks.\1.ln_\2."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.fc1\.", ".c_fc."),
        (r"\.fc2\.", ".c_proj."),
        (r"^blocks\.", "transformer.resblocks."),
    )


_HF_TOWER = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm_pre\.", "pre_layrnorm."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d)\.norm(\d)\.", r"blocks.\1.layer_norm\2."),
    (r"^(blocks\.\d)\.attn\.(query|key|value)\.", lambda match: f"{match[1]}.self_attn.{match[2][0]}_proj."),
    (r"^(blocks\.\d)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"^blocks\.", "encoder.layers."),
)


def hf_clip(seed: int = 0) -> dict[str, Tensor]:
    tensors = body(QUICK, seed)
    tensors |= {"cls_token": tensors["cls_token"].flatten(), "pos_embed": tensors["pos_embed"][0]}
    return renamed(apart(tensors), *_HF_TOWER)


def hf_siglip(seed: int = 0) -> dict[str, Tensor]:
    tensors = body(SIGLIP, seed)
    tensors["pos_embed"] = tensors["pos_embed"][0]
    for kind in ("weight", "bias"):
        both = [tensors.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
        tensors[f"head.attention.in_proj_{kind}"] = torch.cat(both)
    pooling = (
        (r"^attn_pool\.latent$", "head.probe"),
        (r"^attn_pool\.proj\.", "head.attention.out_proj."),
        (r"^attn_pool\.norm\.", "head.layernorm."),
        (r"^attn_pool\.", "head."),
    )
    return renamed(apart(tensors), *pooling, *_HF_TOWER)


def hf_dinov2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    table = HF_VIT_FILE | {"mask_token": "embeddings.mask_token", "register_tokens": "embeddings.register_tokens"}
    table |= {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    table |= {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    return under(
        "", apart(tensors), lambda name: walk({k: table[k] for k in sorted(table, key=len, reverse=True)}, name)
    )


def hf_dinov3(seed: int = 0) -> dict[str, Tensor]:
    return renamed(
        apart(body(DINOV3, seed)),
        (r"^(cls_token)$", r"embeddings.\1"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"\.attn\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
        (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
        (r"\.fc1\.", ".up_proj."),
        (r"\.fc2\.", ".down_proj."),
        (r"^blocks\.", "layer."),
    )


def hf_beit(seed: int = 0) -> dict[str, Tensor]:
    return renamed(
        apart(body(BEIT, seed)),
        (r"^(cls_token)$", r"embeddings.\1"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.attn\.([qv])_bias$", lambda match: f".attention.attention.{'query' if match[1] == 'q' else 'value'}.bias"),
        (r"\.attn\.(relative_position_bias_table)$", r".attention.attention.relative_position_bias.\1"),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.gamma_([12])$", r".lambda_\1"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^fc_norm\.", "pooler.layernorm."),
        (r"^blocks\.", "encoder.layer."),
    )


def torchvision(seed: int = 0) -> dict[str, Tensor]:
    return under("", body(VIT, seed), lambda name: walk(TORCHVISION_VIT, name))


def hf_ijepa() -> dict[str, Tensor]:
    return under("", apart(body(PATCHES)), lambda name: walk(HF_VIT_FILE, name))


# Whole files


@dataclass
class File:
    """A checkpoint in somebody's layout.

    Attributes:
        arch: what it must be taken for.
        tensors, beside: of the backbone that is evaluated, and the others.
        usual: see Layout.
        wrap: puts them into entries.
    """

    arch: str
    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]
    usual: str = "query"
    wrap: Callable[[dict[str, Tensor]], dict] = lambda tensors: tensors

    def values(self) -> dict:
        return self.wrap(self.tensors | self.beside)


def pair(arch: str, make: Callable[[int], dict[str, Tensor]], **beside) -> File:
    """Student and teacher in one state dict of two entries, of which the teacher is evaluated."""
    heads = {"student.dino_head.mlp.0.weight": torch.ones(3, 48), "teacher.dino_head.mlp.0.weight": torch.ones(3, 48)}

    def split(tensors: dict[str, Tensor]) -> dict:
        parts = {who: {n[8:]: t for n, t in tensors.items() if n.startswith(who)} for who in ("student", "teacher")}
        return parts | {"optimizer": {}, "epoch": 3}

    return File(
        arch, under("teacher.backbone.", make(0)), under("student.backbone.", make(1)) | heads | beside, "key", split
    )


def ibot(seed: int) -> dict[str, Tensor]:
    return body(VIT, seed) | ({"masked_embed": torch.ones(1, 48)} if seed else {})


def ijepa() -> File:
    def split(tensors: dict[str, Tensor]) -> dict:
        encoders = {who: {} for who in ("encoder", "predictor", "target_encoder")}  # type: ignore[var-annotated]
        for name, tensor in tensors.items():
            who, _, rest = name.partition(".")
            encoders[who][f"module.{rest}"] = tensor
        return encoders | {"opt": {}, "scaler": None, "epoch": 3, "loss": 0.5, "lr": 0.1}

    beside = under("encoder.", body(PATCHES, 1)) | {"predictor.predictor_blocks.0.norm1.weight": torch.ones(9)}
    return File(PATCHES, under("target_encoder.", body(PATCHES)), beside, "key", split)


TEXT = {"logit_scale": torch.tensor(2.6), "token_embedding.weight": torch.ones(9, 16), "ln_final.bias": torch.ones(16)}
HF_TEXT = {"logit_scale": torch.tensor(2.6), "text_model.final_layer_norm.bias": torch.ones(16)}

FILES: dict[str, Callable[[], File]] = {
    "facebookresearch/dinov2": lambda: File(SCALED, dinov2(), {}),
    "facebookresearch/dinov2 with registers": lambda: File(REGISTERS, with_registers(), {}),
    "facebookresearch/dinov2, student and teacher": lambda: pair(SCALED, dinov2),
    "facebookresearch/dinov2 with registers, student and teacher": lambda: pair(REGISTERS, with_registers),
    "facebookresearch/dinov3": lambda: File(DINOV3, dinov3(), {}),
    "facebookresearch/dinov3, student and teacher": lambda: pair(DINOV3, dinov3),
    "bytedance/ibot": lambda: pair(VIT, ibot),
    "facebookresearch/ijepa": ijepa,
    "microsoft/SimMIM ViT": lambda: File(
        SHARED,
        under("encoder.", beit(SHARED)),
        {"encoder.mask_token": torch.ones(1, 1, 48), "decoder.0.weight": torch.ones(3, 48, 1, 1)},
        wrap=lambda tensors: {"model": tensors, "epoch": 3, "optimizer": {}},
    ),
    "CLIP or OpenCLIP": lambda: File(CLIP, under("visual.", clip()), TEXT | {"visual.proj": torch.ones(48, 16)}),
    "CLIP's or OpenCLIP's visual tower alone": lambda: File(CLIP, clip(), {"proj": torch.ones(48, 16)}),
    "OpenCLIP with timm's network": lambda: File(
        TIMM_SIGLIP,
        under("visual.trunk.", body(TIMM_SIGLIP)),
        {"logit_bias": torch.ones(()), "text.ln.bias": torch.ones(9)},
    ),
    "Hugging Face CLIP": lambda: File(
        QUICK, under("vision_model.", hf_clip()), HF_TEXT | {"visual_projection.weight": torch.ones(16, 48)}
    ),
    "Hugging Face SigLIP": lambda: File(SIGLIP, under("vision_model.", hf_siglip()), HF_TEXT),
    "Hugging Face DINOv2": lambda: File(SCALED, hf_dinov2(dinov2()), {}),
    "Hugging Face DINOv2 with registers": lambda: File(REGISTERS, hf_dinov2(with_registers()), {}),
    "Hugging Face DINOv3": lambda: File(DINOV3, hf_dinov3(), {"embeddings.mask_token": torch.ones(1, 1, 48)}),
    "Hugging Face BEiT or data2vec": lambda: File(
        BEIT, under("beit.", hf_beit()), under("classifier.", linear(48).state_dict())
    ),
    "Hugging Face I-JEPA": lambda: File(PATCHES, hf_ijepa(), {}),
    "lightly with torchvision's ViT": lambda: File(
        VIT,
        under("backbone.vit.", torchvision()),
        {"mask_token": torch.ones(1, 1, 48), "decoder.weight": torch.ones(9, 48), "decoder.bias": torch.ones(9)},
    ),
    "lightly MSN or PMSN": lambda: File(
        VIT,
        under("backbone.vit.", torchvision()),
        under("anchor_backbone.vit.", torchvision(1))
        | {"backbone.mask_token": torch.ones(1, 1, 48), "prototypes": torch.ones(9, 16)}
        | under("anchor_projection_head.layers.", mlp(48).state_dict()),
        "key",
    ),
    "BEiT, BEiT v2 or data2vec": lambda: File(
        SHARED, beit(SHARED), {"mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(9, 48)}
    ),
}
layouts = pytest.mark.parametrize("layout", FILES)


def test_no_layout_is_left_out():
    elsewhere = {"CLIP's ResNet"}
    assert FILES.keys() | elsewhere == {row.origin for row in TRANSFORMERS_OF_METHODS}


@layouts
def test_every_layout_loads(layout, tmp_path):
    """With every tensor in its place and timm's own feature."""
    file = FILES[layout]()
    encoder = load(written(tmp_path, file.values()))
    assert (encoder.origin, encoder.arch, encoder.usual) == (layout, file.arch, file.usual)
    expected = body(file.arch)
    arrived = encoder.backbone.state_dict()
    assert arrived.keys() == expected.keys()
    assert all(torch.allclose(arrived[name], tensor, atol=1e-7) for name, tensor in expected.items())
    images = torch.randn(2, 3, 32, 32)
    net = network(file.arch)
    assert encoder.norm_eps is None or any(set_eps(net, encoder.norm_eps))
    with torch.no_grad():
        assert torch.allclose(encoder.backbone(images), net(images), atol=1e-5)


def set_eps(net: nn.Module, eps: float) -> list[bool]:
    norms = [module for module in net.modules() if isinstance(module, nn.LayerNorm)]
    for module in norms:
        module.eps = eps
    return [True for _ in norms]


def a_shift(file: File) -> str:
    """The name in the file of the second block's second norm's shift."""
    pattern = r"(1\.(norm2|ln_2|layer_norm2|layernorm_after)\.bias)$"
    return next(name for name in file.tensors if re.search(pattern, name))


@layouts
def test_one_tensor_missing(layout, tmp_path):
    file = FILES[layout]()
    del file.tensors[a_shift(file)]
    message = error(written(tmp_path, file.values()))
    assert "1 are missing (first: blocks.1.norm2.bias, 48)" in message


@layouts
def test_one_tensor_of_another_shape(layout, tmp_path):
    file = FILES[layout]()
    file.tensors[a_shift(file)] = torch.zeros(47)
    message = error(written(tmp_path, file.values()))
    assert "1 have another shape (first: blocks.1.norm2.bias, 47, expected 48)" in message


@layouts
def test_one_tensor_too_many(layout, tmp_path):
    file = FILES[layout]()
    file.tensors[a_shift(file).replace("bias", "extra")] = torch.zeros(3)
    assert "1 are unexpected" in error(written(tmp_path, file.values()))


@layouts
def test_a_tensor_that_belongs_to_no_part(layout, tmp_path):
    file = FILES[layout]()
    name = next(iter(file.tensors))
    before = name.partition("backbone.")[0] if file.usual == "key" else ""
    file.beside[f"{before}surprise.weight"] = torch.zeros(3)
    path = written(tmp_path, file.values())
    if layout in ("CLIP or OpenCLIP", "OpenCLIP with timm's network"):
        assert load(path).origin == layout  # beside the visual tower
    else:
        assert "surprise" in error(path)


@pytest.mark.parametrize(
    ("layout", "said"), [("BEiT, BEiT v2 or data2vec", "BEiT's own are 0.5"), ("microsoft/SimMIM ViT", "")]
)
def test_relative_positions_tell_the_heads(layout, said, tmp_path):
    """BEiT's pixels are told by nothing; `--pixels` settles them."""
    path = written(tmp_path, FILES[layout]().values())
    warnings = load(path).warnings
    assert not any("heads" in warning for warning in warnings)
    assert [warning for warning in warnings if "--pixels" in warning] == [w for w in warnings if said and said in w]


# Positions for another size


@pytest.mark.parametrize(
    ("make", "arch", "given"), [(dinov2, SCALED, (0.1, False)), (with_registers, REGISTERS, (0.0, True))]
)
def test_dinov2s_positions_are_interpolated_once_for_its_evaluation(make, arch, given, tmp_path):
    """Trained with images of 272 pixels, say, it is evaluated at 224; the larger size can be asked for."""
    prefix = 1
    state = make() | {"pos_embed": torch.randn(1, prefix + 17 * 17, 48)}
    path = written(tmp_path, state)
    encoder = load(path)
    assert encoder.network.size == 224 and encoder.preprocessing.size == 224
    assert any("of images of 272 pixels and were interpolated for 224" in warning for warning in encoder.warnings)
    ours, prefix_ours = encoder.backbone.pos_embed, 0 if "reg_tokens" in arch else 1
    assert torch.equal(ours[:, prefix_ours:], resampled(state["pos_embed"][:, prefix:], 14, *given))
    whole = load(path, arch=arch.replace("img_size=32", "img_size=272"))
    assert whole.network.size == 272 and not any("interpolated" in warning for warning in whole.warnings)
    assert torch.equal(whole.backbone.pos_embed[:, prefix_ours:], state["pos_embed"][:, prefix:])


def test_positions_are_interpolated_as_dinov2_does_it():
    """Restated: bicubic, at a scale of (side + 0.1) / old side, which is not what the size alone gives."""
    torch.manual_seed(0)
    positions = torch.randn(1, 37 * 37, 8)
    grid = positions.reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    scale = 16.1 / 37
    theirs = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert torch.equal(resampled(positions, 16, 0.1, False), theirs.permute(0, 2, 3, 1).reshape(1, 256, 8))
    plain = nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    assert torch.equal(resampled(positions, 16, 0.0, True), plain.permute(0, 2, 3, 1).reshape(1, 256, 8))


# MoCo v3's own network with a stem of convolutions


@pytest.mark.parametrize("wrapped", [False, True])
def test_moco_v3s_convolutional_stem(wrapped, tmp_path):
    arch = "vit_conv_narrow_32"
    state = body(arch)
    if wrapped:
        state = under("module.base_encoder.", state) | under("module.momentum_encoder.", body(arch, 1))
        state |= under("module.predictor.", mlp(16).state_dict())
    encoder = load(written(tmp_path, {"state_dict": state, "epoch": 3}))
    assert encoder.arch == arch and encoder.network.pooling == "class token"
    assert all(torch.equal(encoder.backbone.state_dict()[name], tensor) for name, tensor in body(arch).items())
    assert not any("heads" in warning for warning in encoder.warnings)


@torch.no_grad()
def test_the_convolutional_stem_is_moco_v3s():
    """Restated from its code: 3x3 convolutions of stride 2 with batch norms and ReLUs, then a 1x1 with a bias."""
    net = network("vit_conv_small")
    assert [tuple(net.patch_embed.proj[i].weight.shape) for i in (0, 3, 6, 9, 12)] == [
        *((48, 3, 3, 3), (96, 48, 3, 3), (192, 96, 3, 3), (384, 192, 3, 3), (384, 384, 1, 1))
    ]
    assert len(net.blocks) == 11 and net.blocks[0].attn.num_heads == 12 and net.pos_embed.shape == (1, 197, 384)
    images = torch.randn(2, 3, 224, 224)
    x = images
    for i in (0, 3, 6, 9):
        convolution, norm = net.patch_embed.proj[i], net.patch_embed.proj[i + 1]
        x = nn.functional.conv2d(x, convolution.weight, stride=2, padding=1)
        x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5).relu()
    last = net.patch_embed.proj[12]
    tokens = nn.functional.conv2d(x, last.weight, last.bias).flatten(2).transpose(1, 2)
    assert torch.allclose(net.patch_embed(images), tokens, atol=1e-5)


# Transformers under timm's names


@pytest.mark.parametrize(
    "arguments",
    [
        "global_pool=avg",  # MAE fine-tuned
        "init_values=1e-05",  # UNI
        "class_token=False,global_pool=avg,fc_norm=False",
        "reg_tokens=7,init_values=1e-05",  # lightly's CAPI and Pixio
        "no_embed_class=True,init_values=1e-05",
        "class_token=False,global_pool=avg",
        "qkv_bias=False",
        "qk_norm=True",
        "final_norm=False",
        "in_chans=5,init_values=1e-05",
        "mlp_ratio=3.0",
    ],
)
@torch.no_grad()
def test_a_transformer_is_read_off_its_tensors(arguments, tmp_path):
    built = f"{PLAIN},{arguments}"
    net = network(built)
    encoder = load(written(tmp_path, net.state_dict() | {"head.weight": torch.ones(9, 48), "head.bias": torch.ones(9)}))
    images = torch.randn(2, encoder.network.in_channels, 32, 32)
    assert torch.allclose(encoder.backbone(images), net(images), atol=1e-6)
    assert any("attention heads; 3 were taken" in warning for warning in encoder.warnings)


def test_dinov3_takes_images_of_any_size(tmp_path):
    encoder = load(written(tmp_path, dinov3()))
    assert encoder.network.size is None and (encoder.preprocessing.size, encoder.preprocessing.resize) == (224, 256)
    assert encoder.backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 48)


# True words


def test_a_clip_of_openai_has_its_activation(tmp_path):
    """Its files hold half-precision kernels beside norms in full, or say so in entries that OpenCLIP's lack."""
    half = {name: t.half() if t.ndim == 2 or "in_proj" in name or "c_fc" in name else t for name, t in clip().items()}
    half["conv1.weight"] = half["conv1.weight"].half()
    for state in (under("visual.", half), under("visual.", clip()) | {"input_resolution": torch.tensor(32)}):
        encoder = load(written(tmp_path, state | TEXT))
        assert encoder.arch == QUICK and not any("QuickGELU" in warning for warning in encoder.warnings)
    encoder = load(written(tmp_path, under("visual.", clip()) | TEXT))
    assert encoder.arch == CLIP
    assert any(warning.endswith(f"--arch {QUICK}") for warning in encoder.warnings)


def test_clips_resnet_is_refused_truly(tmp_path):
    state = {"visual.attnpool.positional_embedding": torch.ones(2, 3), "visual.layer1.0.conv1.weight": torch.ones(1)}
    message = error(written(tmp_path, state | TEXT))
    assert "CLIP's ResNet" in message and "moco_eval.wrap" in message


def test_dinov3_with_other_positions_or_biases_is_refused(tmp_path):
    state = dinov3()
    assert "rope_embed.periods are not DINOv3's" in error(
        written(tmp_path, state | {"rope_embed.periods": torch.ones(4)})
    )
    mask = {"blocks.0.attn.qkv.bias_mask": torch.ones(144)}
    assert "biases of keys other than 0" in error(written(tmp_path, state | mask))
    mask = {"blocks.0.attn.qkv.bias_mask": torch.full((144,), torch.nan)}
    assert "is not of zeros and ones" in error(written(tmp_path, state | mask))
