"""Checkpoints of convolutional and hierarchical networks in the layouts of their code bases, small enough to write."""

import re
from collections.abc import Callable
from functools import cache

import torch
from checkpoints import STATE, File, body, linear, mlp, nested, queue, under
from torch import Tensor

LITE, B0 = "timm:tf_efficientnet_lite0", "timm:tf_efficientnet_b0"
CONVNEXT, CONVNEXT_V2 = "timm:convnext_atto", "timm:convnextv2_atto"
SWIN = "timm:swin_tiny_patch4_window7_224,embed_dim=24"
REGNET, DENSENET = "timm:regnety_002", "timm:densenet121"
PLAIN_B0, TINY = "timm:efficientnet_b0", "timm:tinynet_e"
WIDTHS = {LITE: 1280, B0: 1280, CONVNEXT: 320, CONVNEXT_V2: 320, SWIN: 192, REGNET: 368, DENSENET: 1024}
WIDTHS |= {PLAIN_B0: 1280, TINY: 1280}
# A kernel and a shift in the middle of each
PLACES = {
    LITE: ("blocks.2.1.conv_pw.weight", "blocks.3.1.bn2.bias"),
    CONVNEXT: ("stages.2.blocks.1.mlp.fc1.weight", "stages.1.blocks.1.norm.bias"),
    SWIN: ("layers.2.blocks.1.mlp.fc1.weight", "layers.1.blocks.1.norm2.bias"),
    REGNET: ("s3.b2.conv1.conv.weight", "s2.b1.conv1.bn.bias"),
    DENSENET: ("features.denseblock3.denselayer2.conv1.weight", "features.denseblock2.denselayer2.norm1.bias"),
}
PLACES |= {
    B0: PLACES[LITE],
    PLAIN_B0: PLACES[LITE],
    TINY: ("blocks.2.0.conv_pw.weight", "blocks.3.0.bn2.bias"),
    CONVNEXT_V2: PLACES[CONVNEXT],
}

# Names, from timm's to theirs


def renaming(*rules: tuple[str, str | Callable]) -> Callable[[str], str]:
    def renamed(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return renamed


@cache
def counted(arch: str) -> dict[tuple[str, str], int]:
    """Blocks of an EfficientNet counted through."""
    places = dict.fromkeys(
        (match[1], match[2]) for name in body(0, arch) if (match := re.match(r"blocks\.(\d)\.(\d+)\.", name))
    )
    return {place: number for number, place in enumerate(places)}


def lukemelas(arch: str) -> Callable[[str], str]:
    expanding = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    expanding |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}

    def renamed(name: str) -> str:
        match = re.match(r"blocks\.(\d)\.(\d+)\.(se\.)?(\w+)\.", name)
        if not match:
            module, _, rest = name.partition(".")
            return f"{outside[module]}.{rest}"
        number = counted(arch)[match[1], match[2]]
        table = first if match[1] == "0" else expanding
        part = f"_{match[4].replace('conv_', 'se_')}" if match[3] else table[match[4]]
        return f"_blocks.{number}.{part}.{name[match.end() :]}"

    return renamed


facebook_convnext = renaming(
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight", ".grn.gamma"),
    (r"\.mlp\.grn\.bias", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
)
sparse_convnext = renaming(
    (r"^(?=stem|stages)", "encoder."),
    (r"^encoder\.stem\.", "encoder.downsample_layers.0."),
    (r"stages\.(\d)\.downsample\.0\.", r"downsample_layers.\1.0.ln."),
    (r"stages\.(\d)\.downsample\.1\.weight", r"downsample_layers.\1.1.kernel"),
    (r"stages\.(\d)\.downsample\.1\.", r"downsample_layers.\1.1."),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.weight", ".dwconv.kernel"),
    (r"\.conv_dw\.", ".dwconv."),
    (r"(stages\.\d\.\d+)\.norm\.", r"\1.norm.ln."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1.linear."),
    (r"\.mlp\.grn\.weight", ".grn.gamma"),
    (r"\.mlp\.grn\.bias", ".grn.beta"),
)
hugging_face_convnext = renaming(
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d)\.blocks\.", r"encoder.stages.\1.layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"(layers\.\d+)\.norm\.", r"\1.layernorm."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"^head\.norm\.", "layernorm."),
)
hugging_face_dinov3 = renaming(
    (r"^stem\.", "stages.0.downsample_layers."),
    (r"^(stages\.\d)\.downsample\.", r"\1.downsample_layers."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".depthwise_conv."),
    (r"(layers\.\d+)\.norm\.", r"\1.layer_norm."),
    (r"\.mlp\.fc([12])\.", r".pointwise_conv\1."),
    (r"^head\.norm\.", "layer_norm."),
)
torchvision_convnext = renaming(
    (r"^stem\.", "features.0."),
    (r"^stages\.(\d)\.downsample\.", lambda match: f"features.{2 * int(match[1])}."),
    (r"^stages\.(\d)\.blocks\.", lambda match: f"features.{2 * int(match[1]) + 1}."),
    (r"\.conv_dw\.", ".block.0."),
    (r"(\d+)\.norm\.", r"\1.block.2."),
    (r"\.mlp\.fc1\.", ".block.3."),
    (r"\.mlp\.fc2\.", ".block.5."),
    (r"\.gamma$", ".layer_scale"),
    (r"^head\.norm\.", "classifier.0."),
)
merged_last = renaming((r"^layers\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."))
hugging_face_swin = renaming(
    (r"^layers\.(\d)\.downsample\.", lambda match: f"encoder.layers.{int(match[1]) - 1}.downsample."),
    (r"^layers\.", "encoder.layers."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.(query|key|value|relative_position)", r".attention.self.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)
_in_memory = renaming(  # as transformers 5 has it in memory, and torch.save writes it
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.self\.relative", ".attention.relative_position_bias.relative"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
torchvision_swin = renaming(
    (r"^patch_embed\.proj\.", "features.0.0."),
    (r"^patch_embed\.norm\.", "features.0.2."),
    (r"^layers\.(\d)\.downsample\.", lambda match: f"features.{2 * int(match[1])}."),
    (r"^layers\.(\d)\.blocks\.", lambda match: f"features.{2 * int(match[1]) + 1}."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def regnet(stem: str, stage: str, vissl: bool) -> Callable[[str], str]:
    stages = (
        r"^s(\d)\.b(\d+)\.",
        lambda match: f"{stage.format(int(match[1]) + vissl)}block{match[1]}-{int(match[2]) - 1}.",
    )
    parts = (
        (r"^stem\.conv\.", f"{stem}0."),
        (r"^stem\.bn\.", f"{stem}1."),
        stages,
        (r"\.conv1\.conv\.", ".f.a.0."),
        (r"\.conv1\.bn\.", ".f.a.1."),
        (r"\.conv2\.conv\.", ".f.b.0."),
        (r"\.conv2\.bn\.", ".f.b.1."),
    )
    if vissl:
        return renaming(
            *parts,
            (r"\.conv3\.conv\.", ".f.c."),
            (r"\.conv3\.bn\.", ".f.final_bn."),
            (r"\.se\.fc1\.", ".f.se.excitation.0."),
            (r"\.se\.fc2\.", ".f.se.excitation.2."),
            (r"\.downsample\.conv\.", ".proj."),
            (r"\.downsample\.bn\.", ".bn."),
        )
    return renaming(
        *parts,
        (r"\.conv3\.conv\.", ".f.c.0."),
        (r"\.conv3\.bn\.", ".f.c.1."),
        (r"\.se\.", ".f.se."),
        (r"\.downsample\.conv\.", ".proj.0."),
        (r"\.downsample\.bn\.", ".proj.1."),
    )


def torchvision_efficientnet(name: str) -> str:
    parts = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "3.0", "bn3": "3.1"}
    first = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "2.0", "bn2": "2.1"}
    outside = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": "8.0", "bn2": "8.1"}
    match = re.match(r"blocks\.(\d)\.(\d+)\.(se\.)?(\w+)\.", name)
    if not match:
        module, _, rest = name.partition(".")
        return f"features.{outside[module]}.{rest}"
    stage, table = int(match[1]), first if match[1] == "0" else parts
    squeeze = "1" if stage == 0 else "2"
    part = {"conv_reduce": f"{squeeze}.fc1", "conv_expand": f"{squeeze}.fc2"}[match[4]] if match[3] else table[match[4]]
    return f"features.{stage + 1}.{match[2]}.block.{part}.{name[match.end() :]}"


# Values


def folded(tensors: dict[str, Tensor], shape: Callable[[Tensor], Tensor], mark: str) -> dict[str, Tensor]:
    """The same with another shape of those that a mark names."""
    return {name: shape(tensor) if re.search(mark, name) else tensor for name, tensor in tensors.items()}


def sparse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels of MinkowskiEngine, (positions, [in,] out), the columns' positions first."""
    depthwise = folded(tensors, lambda t: t.transpose(2, 3).reshape(len(t), -1).T, r"\.conv_dw\.weight")
    whole = folded(
        depthwise, lambda t: t.transpose(2, 3).reshape(*t.shape[:2], -1).permute(2, 1, 0), r"downsample\.1\.weight"
    )
    biases = folded(whole, lambda t: t[None], r"(\.conv_dw|stages\.\d\.downsample\.1)\.bias")
    return folded(biases, lambda t: t[None], r"\.grn\.")


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = [name.replace("qkv", word) for word in ("query", "key", "value")]
        parts |= dict(zip(names, tensor.chunk(3))) if ".attn.qkv." in name else {name: tensor}
    return parts


def positions(prefix: str) -> dict[str, Tensor]:
    """What Swins keep that is computed."""
    at = f"{prefix}layers.0.blocks.1."
    return {f"{at}attn.relative_position_index": torch.zeros(49, 49).long(), f"{at}attn_mask": torch.zeros(64, 49, 49)}


# The files


def _file(origin: str, arch: str, names: Callable, change: Callable = lambda tensors: tensors, **further) -> File:
    tensors = (
        folded(body(0, arch), lambda t: t[:, :, 0, 0], r"\.mlp\.fc\d\.weight") if "convnext" in arch else body(0, arch)
    )
    state = {names(name): tensor for name, tensor in change(tensors).items()} | further.pop("beside", {})
    at = further.pop("at", ())
    given = {"arch": arch} if arch == SWIN else {}
    return File(origin, nested(at, state) if at else state, at, "", names, built=arch, given=given, **further)


def _classifier(name: str, width: int = 4) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(3, width), f"{name}.bias": torch.ones(3)}


def _without_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.norm.")}


def _fcmae_sparse() -> File:
    beside = {"mask_token": torch.ones(1), "decoder.0.dwconv.weight": torch.ones(1), "proj.bias": torch.ones(1)}
    made = lambda tensors: sparse(_without_norm(tensors))  # noqa: E731
    return _file("facebookresearch/ConvNeXt-V2 FCMAE", CONVNEXT_V2, sparse_convnext, made, beside=beside, at=("model",))


def _fcmae_dense() -> File:
    made = lambda tensors: folded(_without_norm(tensors), lambda t: t[None, None, None], r"\.grn\.")  # noqa: E731
    origin = "facebookresearch/ConvNeXt-V2 FCMAE, dense"
    return _file(origin, CONVNEXT_V2, facebook_convnext, made, at=("model",))


def _convnext_v2() -> File:
    made = lambda tensors: folded(tensors, lambda t: t[None, None, None], r"\.grn\.")  # noqa: E731
    beside = _classifier("head", 320)
    return _file("facebookresearch/ConvNeXt", CONVNEXT_V2, facebook_convnext, made, beside=beside, at=("model",))


def _dinov3() -> File:
    last = {f"norms.3.{name}": body(0, CONVNEXT)[f"head.norm.{name}"] for name in ("weight", "bias")}
    return _file("facebookresearch/dinov3 ConvNeXt", CONVNEXT, facebook_convnext, beside=last)


def _hf_convnext() -> File:
    beside = _classifier("classifier", 320)
    made = lambda tensors: folded(tensors, lambda t: t[None, None, None], r"\.grn\.")  # noqa: E731
    return _file("Hugging Face ConvNeXt", CONVNEXT_V2, hugging_face_convnext, made, beside=beside)


def _torchvision_convnext() -> File:
    made = lambda tensors: folded(tensors, lambda t: t[:, None, None], r"\.gamma$")  # noqa: E731
    return _file("torchvision ConvNeXt", CONVNEXT, torchvision_convnext, made, beside=_classifier("classifier.2", 320))


def _swin() -> File:
    beside = positions("") | _classifier("head")
    return _file("microsoft/Swin-Transformer", SWIN, merged_last, beside=beside, at=("model",))


def _simmim() -> File:
    names = lambda name: f"encoder.{merged_last(name)}"  # noqa: E731
    beside = positions("encoder.") | {"encoder.mask_token": torch.ones(1), "decoder.0.weight": torch.ones(1)}
    return _file("microsoft/SimMIM Swin", SWIN, names, beside=beside, at=("model",))


def _esvit() -> File:
    first, second = (
        under("module.", body(seed, SWIN), merged_last)
        | positions("module.")
        | {"module.head.mlp.0.weight": torch.ones(1)}
        for seed in (0, 1)
    )
    values = {"student": first, "teacher": second, "epoch": 3}
    more = {"built": SWIN, "usual": "key", "given": {"arch": SWIN}}
    return File("microsoft/esvit", values, ("student",), "module.", merged_last, other="module.", **more)


def _hf_swin() -> File:
    buffers = {"encoder.layers.0.blocks.1.attention.self.relative_position_index": torch.zeros(49, 49).long()}
    return _file("Hugging Face Swin", SWIN, hugging_face_swin, apart, beside=buffers | _classifier("classifier"))


def _hf_swin_in_memory() -> File:
    masked = {"swin.embeddings.mask_token": torch.ones(1), "decoder.0.weight": torch.ones(1)}
    names = lambda name: f"swin.{_in_memory(hugging_face_swin(name))}"  # noqa: E731
    return _file("Hugging Face Swin", SWIN, names, apart, beside=masked)


def _torchvision_swin() -> File:
    buffers = {"features.1.1.attn.relative_position_index": torch.zeros(2401).long()}
    return _file("torchvision Swin", SWIN, torchvision_swin, beside=buffers | _classifier("head"))


def _seer() -> File:
    at = ("classy_state_dict", "base_model", "model", "trunk")
    names = regnet("_feature_blocks.conv1.stem.", "_feature_blocks.res{}.", vissl=True)
    return _file("VISSL RegNet (SEER)", REGNET, names, at=at)


def _torchvision_regnet() -> File:
    names = regnet("stem.", "trunk_output.block{}.", vissl=False)
    return _file("torchvision RegNet", REGNET, names, beside=_classifier("fc", 368))


def _moco_cxr() -> File:
    first, second = "module.encoder_q.", "module.encoder_k."
    state = under(first, body(0, DENSENET)) | under(second, body(1, DENSENET)) | under("module.", queue())
    state |= under(f"{first}classifier.", mlp(1024).state_dict()) | under(
        f"{second}classifier.", mlp(1024, 1).state_dict()
    )
    values = {"epoch": 3, "arch": "densenet121", "state_dict": state}
    return File("MoCo-CXR DenseNet", values, STATE, first, head=mlp(1024), other=second, built=DENSENET)


def _old_densenet() -> File:
    names = renaming((r"\.(norm|conv)([12])\.", r".\1.\2."))
    return _file("torchvision DenseNet", DENSENET, names, beside=_classifier("classifier", 1024))


def _seco() -> File:
    from checkpoints import children, two

    state = two("encoder_q.", "encoder_k.", children) | queue()
    for space in range(3):
        state |= under(f"heads_q.{space}.", mlp(128, space).state_dict()) | under(
            f"heads_k.{space}.", mlp(128, 9).state_dict()
        )
    origin = "ServiceNow/seasonal-contrast (SeCo)"
    values = {"state_dict": state, "hyper_parameters": {"base_encoder": "resnet18"}, "epoch": 3}
    return File(origin, values, STATE, "encoder_q.", children, mlp(128), "encoder_k.")


def _timm() -> File:
    return _file("timm network", TINY, lambda name: name, beside=_classifier("classifier", 1280))


CONV_FILES: dict[str, Callable[[], File]] = {
    "EfficientNet-Lite": lambda: _file("EfficientNet-Lite-PyTorch", LITE, lukemelas(LITE), beside=linear_of("_fc")),
    "EfficientNet-PyTorch": lambda: _file("EfficientNet-PyTorch", B0, lukemelas(B0), beside=linear_of("_fc")),
    "torchvision EfficientNet": lambda: _file("torchvision EfficientNet", PLAIN_B0, torchvision_efficientnet),
    "ConvNeXt-V2 FCMAE": _fcmae_sparse,
    "ConvNeXt-V2 FCMAE dense": _fcmae_dense,
    "ConvNeXt-V2": _convnext_v2,
    "DINOv3 ConvNeXt": _dinov3,
    "Hugging Face ConvNeXt": _hf_convnext,
    "Hugging Face ConvNeXt, first version": lambda: _file("Hugging Face ConvNeXt", CONVNEXT, hugging_face_convnext),
    "Hugging Face DINOv3 ConvNeXt": lambda: _file("Hugging Face DINOv3 ConvNeXt", CONVNEXT, hugging_face_dinov3),
    "torchvision ConvNeXt": _torchvision_convnext,
    "Swin": _swin,
    "SimMIM Swin": _simmim,
    "EsViT": _esvit,
    "Hugging Face Swin": _hf_swin,
    "Hugging Face Swin in memory": _hf_swin_in_memory,
    "torchvision Swin": _torchvision_swin,
    "SEER": _seer,
    "torchvision RegNet": _torchvision_regnet,
    "MoCo-CXR": _moco_cxr,
    "old torchvision DenseNet": _old_densenet,
    "SeCo": _seco,
    "timm network": _timm,
}


def linear_of(name: str) -> dict[str, Tensor]:
    return under(f"{name}.", linear(1280).state_dict())
