"""Whose tensors are named how: EfficientNets, ConvNeXts, Swins, RegNets, DenseNets, and timm's other networks.

Rules and conversions lead to timm's names, under which each of these networks is built.
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from moco_eval.encoders.layout import Layout, Rules, rename
from moco_eval.encoders.pixel_choice import Doubt
from moco_eval.encoders.timm_index import HEADS, STEM
from moco_eval.preprocessing import Preprocessing

Tensors = dict[str, Tensor]
BICUBIC = Preprocessing(interpolation="bicubic")
_LITE = Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic")
_CLASSIFIER = "a classifier on the pooled feature, no part of the encoder"
_OTHER_HEAD = "a projection head of a kind that is not read"
_QUEUE = (
    (r"queue$", "queue", "the negative keys of pretraining"),
    (r"queue_ptr$", "queue_ptr", "the queue's position"),
)


# EfficientNet

# By a block's kind: its parts, from the input to the output, and the names that timm gives them
_INVERTED = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
_SEPARABLE = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
_FUSED = {"expand": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")}
_PLAIN = {"expand": ("conv", "bn1")}
_LUKEMELAS: Rules = (
    (r"^_conv_stem\.", "conv_stem."),
    (r"^_bn0\.", "bn1."),
    (r"^_conv_head\.", "conv_head."),
    (r"^_bn1\.", "bn2."),
    (r"^_blocks\.", "blocks."),
    (r"\._expand_conv\.", ".expand.0."),
    (r"\._bn0\.", ".expand.1."),
    (r"\._depthwise_conv\.", ".depthwise.0."),
    (r"\._bn1\.", ".depthwise.1."),
    (r"\._se_reduce\.", ".se.conv_reduce."),
    (r"\._se_expand\.", ".se.conv_expand."),
    (r"\._project_conv\.", ".project.0."),
    (r"\._bn2\.", ".project.1."),
)
_TORCHVISION_EFFICIENTNET: Rules = (
    (r"^features\.0\.0\.", "conv_stem."),
    (r"^features\.0\.1\.", "bn1."),
    (r"^features\.\d\.0\.(?!block)", "conv_head."),
    (r"^features\.\d\.1\.(?!block)", "bn2."),
    (r"^features\.(\d)\.(\d+)\.block\.", lambda match: f"blocks.{int(match[1]) - 1}.{match[2]}."),
    (r"\.fc1\.", ".conv_reduce."),
    (r"\.fc2\.", ".conv_expand."),
)


def _of_lukemelas(tensors: Tensors) -> Tensors:
    """Blocks that are counted through, in stages: a stage begins where the number of channels changes."""
    numbers = sorted({int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    places: dict[str, str] = {}
    stage, block, channels = -1, 0, -1
    for number in numbers:
        project = tensors.get(f"blocks.{number}.project.0.weight")
        width = project.shape[0] if project is not None else channels
        stage, block = (stage, block + 1) if width == channels else (stage + 1, 0)
        places[str(number)], channels = f"{stage}.{block}", width
    rules: Rules = ((r"^blocks\.(\d+)\.", lambda match: f"blocks.{places[match[1]]}."),)
    return _named_blocks({rename(name, rules): tensor for name, tensor in tensors.items()})


def _of_torchvision_efficientnet(tensors: Tensors) -> Tensors:
    """A block's parts that are counted through, by what they are: a 1x1 convolution expands or projects."""
    parts: dict[str, set[int]] = {}
    for name in tensors:
        if match := re.match(r"(blocks\.\d\.\d+)\.(\d)\.", name):
            parts.setdefault(match[1], set()).add(int(match[2]))
    kinds = {1: ("expand",), 2: ("expand", "project"), 3: ("depthwise", "se", "project")}
    kinds[4] = ("expand", *kinds[3])

    def named(name: str) -> str:
        if not (match := re.match(r"(blocks\.\d\.\d+)\.(\d)\.", name)):
            return name
        kind = kinds.get(len(parts[match[1]]), ())
        part = int(match[2])
        return f"{match[1]}.{kind[part]}.{name[match.end() :]}" if part < len(kind) else name

    return _named_blocks({named(name): tensor for name, tensor in tensors.items()})


def _named_blocks(tensors: Tensors) -> Tensors:
    """Parts of blocks, such as `expand.0`, under the names that timm gives them in a block of that kind."""
    parts: dict[str, set[str]] = {}
    for name in tensors:
        if match := re.match(r"(blocks\.\d+\.\d+)\.(\w+)\.", name):
            parts.setdefault(match[1], set()).add(match[2])

    def named(name: str) -> str:
        match = re.match(r"(blocks\.\d+\.\d+)\.(\w+)\.([01])\.", name)
        if not match:
            return name
        there = parts[match[1]]
        full = _INVERTED if {"expand", "depthwise"} <= there else _SEPARABLE if "depthwise" in there else None
        kind = full or (_FUSED if "project" in there else _PLAIN)
        names = kind.get(match[2])
        return f"{match[1]}.{names[int(match[3])]}.{name[match.end() :]}" if names else name

    return {named(name): tensor for name, tensor in tensors.items()}


# ConvNeXt

_CONVNEXT: Rules = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.([1-3])\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.(gamma|weight)$", ".mlp.grn.weight"),
    (r"\.grn\.(beta|bias)$", ".mlp.grn.bias"),
    (r"\.(ln|linear)\.", "."),
    (r"^norm\.", "head.norm."),
)
_HF_CONVNEXT: Rules = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
    (r"^layernorm\.", "head.norm."),
)
_HF_DINOV3_CONVNEXT: Rules = (
    (r"^model\.", ""),
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"^stages\.([1-3])\.downsample_layers\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv([12])\.", r".mlp.fc\1."),
    (r"^layer_norm\.", "head.norm."),
)
_TORCHVISION_CONVNEXT: Rules = (
    (r"^features\.0\.", "stem."),
    (r"^features\.([246])\.", lambda match: f"stages.{int(match[1]) // 2}.downsample."),
    (r"^features\.([1357])\.(\d+)\.", lambda match: f"stages.{int(match[1]) // 2}.blocks.{match[2]}."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"^classifier\.0\.", "head.norm."),
)


_OF_1X1 = (40, 48, 64, 80)  # atto, femto, pico and nano, whose linear layers timm has as convolutions


def _of_convnext(tensors: Tensors) -> Tensors:
    """Scales as vectors, and the linear layers of the smallest networks as timm has them."""
    stem = tensors.get("stem.0.weight")
    as_convolutions = stem is not None and stem.shape[:1] in [(width,) for width in _OF_1X1]
    converted = {}
    for name, tensor in tensors.items():
        if re.search(r"\.(gamma|grn\.weight|grn\.bias)$", name) and tensor.ndim > 1:
            tensor = tensor.reshape(-1)
        if as_convolutions and re.search(r"\.mlp\.fc[12]\.weight$", name) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        converted[name] = tensor
    return converted


def _of_sparse(tensors: Tensors) -> Tensors:
    """Kernels of MinkowskiEngine, (positions, [in,] out), as ordinary ones, and its biases, (1, out), as vectors."""
    converted = {}
    for name, tensor in tensors.items():
        if name.endswith(".kernel"):
            name, tensor = f"{name.removesuffix('kernel')}weight", _dense(tensor)
        if name.endswith(".bias") and tensor.ndim == 2 and len(tensor) == 1:
            tensor = tensor[0]
        converted[name] = tensor
    return converted


def _dense(kernel: Tensor) -> Tensor:
    """A sparse convolution's kernel as (out, in, rows, columns); its positions count columns first.

    A depthwise one has no axis of inputs. One of a shape that is none comes back as it is, for the proof to refuse.
    """
    side = math.isqrt(kernel.shape[0])
    if side**2 != kernel.shape[0] or kernel.ndim not in (2, 3):
        return kernel
    ordered = kernel.permute(2, 1, 0) if kernel.ndim == 3 else kernel.T[:, None]
    return ordered.reshape(*ordered.shape[:2], side, side).transpose(3, 2).contiguous()


def _of_fcmae(tensors: Tensors) -> Tensors:
    """The same with the norm on the pooled feature as fine-tuning begins with it: scale 1, shift 0."""
    converted = _of_convnext(_of_sparse(tensors))
    last = converted.get("stages.3.downsample.1.bias")
    if last is None or "head.norm.weight" in converted:
        return converted
    return {**converted, "head.norm.weight": torch.ones_like(last), "head.norm.bias": torch.zeros_like(last)}


_NEW_NORM = (
    "head.norm.weight",
    "FCMAE trains no norm on the pooled feature; the one that fine-tuning begins with was added, with "
    "scale 1 and shift 0",
)


# Swin

_HF_SWIN: Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.(self\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_TORCHVISION_SWIN: Rules = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.([246])\.", lambda match: f"layers.{int(match[1]) // 2}.downsample."),
    (r"^features\.([1357])\.(\d+)\.", lambda match: f"layers.{int(match[1]) // 2}.blocks.{match[2]}."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_BUFFERS = (
    r".*\.(relative_position_index|attn_mask)$",
    "relative_position_index, attn_mask",
    "computed from the size of windows and images",
)


def _of_swin(tensors: Tensors) -> Tensors:
    """Merging patches at the beginning of a stage, as timm does, instead of at the end of the one before."""
    if not any(name.startswith("layers.0.downsample.") for name in tensors):
        return tensors
    rule = (r"^layers\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.")
    return {rename(name, (rule,)): tensor for name, tensor in tensors.items()}


# RegNet

_PARTS_OF_REGNET: Rules = (
    (r"\.f\.([abc])\.0\.", lambda match: f".conv{'abc'.index(match[1]) + 1}.conv."),
    (r"\.f\.([abc])\.1\.", lambda match: f".conv{'abc'.index(match[1]) + 1}.bn."),
    (r"\.f\.c\.", ".conv3.conv."),
    (r"\.f\.final_bn\.", ".conv3.bn."),
    (r"\.f\.se\.excitation\.0\.", ".se.fc1."),
    (r"\.f\.se\.excitation\.2\.", ".se.fc2."),
    (r"\.f\.se\.", ".se."),
    (r"\.proj\.0\.", ".downsample.conv."),
    (r"\.proj\.1\.", ".downsample.bn."),
    (r"\.proj\.", ".downsample.conv."),
    (r"^(s\d\.b\d+)\.bn\.", r"\1.downsample.bn."),
)


def _regnet(stem: str, stage: str) -> Rules:
    """Rules to timm's names from those that have the stem and the stages under these."""
    return (
        (rf"^{stem}0\.", "stem.conv."),
        (rf"^{stem}1\.", "stem.bn."),
        (rf"^{stage}block(\d)-(\d+)\.", lambda match: f"s{match[1]}.b{int(match[2]) + 1}."),
        *_PARTS_OF_REGNET,
    )


# DenseNet, under the names of torchvision before 0.3 too
_DENSENET: Rules = ((r"\.(norm|conv)\.([12])\.", r".\1\2."),)

# nn.Sequential of torchvision's children
_CHILDREN: Rules = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda match: f"layer{int(match[1]) - 3}."),
)

# Pixels that depend on the architecture


def _square(side: int, resize: int = 0, interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(side, resize or side, interpolation=interpolation)


_B = (224, 240, 260, 300, 380, 456, 528, 600, 672)
_OF_LUKEMELAS = tuple((rf"^tf_efficientnet_b{i}$", _square(side)) for i, side in enumerate(_B))
_OF_LUKEMELAS += ((r"^tf_efficientnet_l2$", _square(800)),)
_ADVPROP = Doubt(
    ("mean", "std"),
    "no tensor tells weights that were trained with AdvProp, whose pixels have mean and std 0.5; ImageNet's were taken",
    Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic"),
)
_RESIZES = (256, 256, 288, 320, 384, 456, 528, 600)
_OF_TORCHVISIONS_EFFICIENTNET = (
    *(
        (rf"^efficientnet_b{i}$", _square(side, resize))
        for i, (side, resize) in enumerate(zip((224, 240, 288, 300, *_B[4:8]), _RESIZES))
    ),
    (r"^efficientnetv2_s$", _square(384, interpolation="bilinear")),
    (r"^efficientnetv2_m$", _square(480, interpolation="bilinear")),
    (r"^efficientnetv2_l$", Preprocessing(480, 480, (0.5,) * 3, (0.5,) * 3, interpolation="bicubic")),
)
_OF_TORCHVISIONS_CONVNEXT = (
    (r"^convnext_tiny$", _square(224, 236, "bilinear")),
    (r"^convnext_small$", _square(224, 230, "bilinear")),
    (r"^convnext_(base|large)$", _square(224, 232, "bilinear")),
)
_OF_TORCHVISIONS_SWIN = (
    (r"^swin_tiny", _square(224, 232)),
    (r"^swin_small", _square(224, 246)),
    (r"^swin_base", _square(224, 238)),
)

# The rows: the specific ones stand first

_EFFICIENTNET = Layout(
    "EfficientNet-PyTorch",
    "lukemelas/EfficientNet-PyTorch@7e8b0d3: efficientnet_pytorch/model.py, utils.py, examples/imagenet/main.py",
    marks=(r"^_blocks\.\d+\._depthwise_conv\.", r"^_conv_stem\."),
    names=_LUKEMELAS,
    convert=_of_lukemelas,
    prefer=r"^tf_efficientnet_",
    dropped=((r"_fc\.", "_fc", _CLASSIFIER),),
    preprocessing=BICUBIC,
    pixels=_OF_LUKEMELAS,
    pixel_doubt=_ADVPROP,
)
_FACEBOOK_CONVNEXT = Layout(
    "facebookresearch/ConvNeXt",
    "facebookresearch/ConvNeXt@048efce: models/convnext.py, datasets.py; ConvNeXt-V2@d7cc26f: models/convnextv2.py",
    marks=(r"^downsample_layers\.0\.0\.", r"^stages\.\d\.\d+\.dwconv\.", r"^norm\."),
    names=_CONVNEXT,
    convert=_of_convnext,
    dropped=((r"head\.", "head", _CLASSIFIER),),
    preprocessing=BICUBIC,
)
_SWINS = r"^swin_(tiny|small|base|large)_"
_SWIN = Layout(
    "microsoft/Swin-Transformer",
    "microsoft/Swin-Transformer@f82860b: models/swin_transformer.py, data/build.py",
    marks=(r"^layers\.0\.blocks\.0\.attn\.", r"^layers\.0\.downsample\."),
    convert=_of_swin,
    dropped=(_BUFFERS, (r"head\.", "head", _CLASSIFIER)),
    prefer=_SWINS,
    preprocessing=BICUBIC,
)
CONVOLUTIONAL: tuple[Layout, ...] = (
    replace(
        _EFFICIENTNET,
        origin="EfficientNet-Lite-PyTorch",
        source="ml-illustrated/EfficientNet-Lite-PyTorch 0.1.0: efficientnet_lite_pytorch/model.py",
        unless=(r"\._se_reduce\.",),
        preprocessing=_LITE,
        pixels=(),
        pixel_doubt=None,
    ),
    _EFFICIENTNET,
    replace(
        _FACEBOOK_CONVNEXT,
        origin="facebookresearch/ConvNeXt-V2 FCMAE",
        source="facebookresearch/ConvNeXt-V2@2553895: models/fcmae.py, convnextv2_sparse.py, utils.py; "
        "NVIDIA/MinkowskiEngine@02fc608: MinkowskiEngine/MinkowskiConvolution.py",
        marks=(r"^encoder\.downsample_layers\.0\.0\.", r"^encoder\.stages\.\d\.\d+\.dwconv\."),
        query=r"encoder\.",
        convert=_of_fcmae,
        supplied=_NEW_NORM,
        dropped=((r"decoder\.|mask_token$|proj\.|pred\.", "decoder, mask_token", "for masked pretraining"),),
    ),
    replace(
        _FACEBOOK_CONVNEXT,
        origin="facebookresearch/dinov3 ConvNeXt",
        source="facebookresearch/dinov3@6876159: dinov3/models/convnext.py, dinov3/data/transforms.py",
        marks=(*_FACEBOOK_CONVNEXT.marks, r"^norms\.3\."),
        dropped=((r"norms\.", "norms", "the last norm under a second name"),),
        settled=True,
    ),
    replace(
        _FACEBOOK_CONVNEXT,
        origin="facebookresearch/ConvNeXt-V2 FCMAE, dense",
        source="facebookresearch/ConvNeXt-V2@2553895: main_finetune.py, utils.py, datasets.py, models/convnextv2.py",
        marks=_FACEBOOK_CONVNEXT.marks[:2],
        unless=(r"^norm\.", r"^head\."),
        convert=_of_fcmae,
        supplied=_NEW_NORM,
    ),
    _FACEBOOK_CONVNEXT,
    Layout(
        "Hugging Face ConvNeXt",
        "huggingface/transformers 5.24: models/convnext/modeling_convnext.py, convnextv2/modeling_convnextv2.py",
        marks=(r"^((convnext|convnextv2)\.)?embeddings\.patch_embeddings\.", r"\.downsampling_layer\.", r"\.pwconv1\."),
        query=r"((convnext|convnextv2)\.)?",
        names=_HF_CONVNEXT,
        convert=_of_convnext,
        dropped=((r"classifier\.", "classifier", _CLASSIFIER),),
        preprocessing=BICUBIC,
    ),
    Layout(
        "Hugging Face DINOv3 ConvNeXt",
        "huggingface/transformers 5.24: models/dinov3_convnext/modeling_dinov3_convnext.py",
        marks=(r"^(model\.)?stages\.0\.downsample_layers\.", r"\.depthwise_conv\."),
        names=_HF_DINOV3_CONVNEXT,
        convert=_of_convnext,
        preprocessing=BICUBIC,  # facebookresearch/dinov3@6876159: dinov3/data/transforms.py
    ),
    Layout(
        "torchvision ConvNeXt",
        "pytorch/vision 0.29: models/convnext.py",
        marks=(r"^features\.1\.0\.layer_scale$",),
        names=_TORCHVISION_CONVNEXT,
        convert=_of_convnext,
        dropped=((r"classifier\.2\.", "classifier", _CLASSIFIER),),
        pixels=_OF_TORCHVISIONS_CONVNEXT,
    ),
    Layout(
        "microsoft/esvit",
        "microsoft/esvit@2d6becd: models/swin_transformer.py, main_esvit.py, eval_knn.py, utils.py",
        marks=(r"^(student|teacher)\.layers\.0\.blocks\.",),
        query=r"student\.",
        key=r"teacher\.",
        usual="key",
        convert=_of_swin,
        prefer=_SWINS,
        dropped=(_BUFFERS, (r"(student|teacher)\.head(_dense)?\.", "heads", _OTHER_HEAD)),
        preprocessing=BICUBIC,
        settled=True,
    ),
    replace(
        _SWIN,
        origin="microsoft/SimMIM Swin",
        source="microsoft/SimMIM@d3e29bc: models/simmim.py, swin_transformer.py; data/data_finetune.py, configs/",
        marks=(r"^encoder\.layers\.0\.blocks\.0\.attn\.", r"^(encoder\.mask_token|decoder\.)"),
        query=r"encoder\.",
        dropped=(_BUFFERS, (r"encoder\.mask_token$|decoder\.", "decoder, mask_token", "for masked pretraining")),
    ),
    _SWIN,
    Layout(
        "Hugging Face Swin",
        "huggingface/transformers 5.24: models/swin/modeling_swin.py",
        marks=(r"^(swin\.)?encoder\.layers\.0\.blocks\.0\.attention\.",),
        query=r"(swin\.)?",
        names=_HF_SWIN,
        convert=_of_swin,
        prefer=_SWINS,
        dropped=(
            _BUFFERS,
            (r"classifier\.", "classifier", _CLASSIFIER),
            (r"(swin\.)?embeddings\.mask_token$|decoder\.", "decoder, mask_token", "for masked pretraining"),
        ),
        preprocessing=BICUBIC,
    ),
    Layout(
        "torchvision Swin",
        "pytorch/vision 0.29: models/swin_transformer.py",
        marks=(r"^features\.1\.0\.attn\.relative_position_bias_table$",),
        names=_TORCHVISION_SWIN,
        prefer=_SWINS,
        dropped=(_BUFFERS, (r"head\.", "head", _CLASSIFIER)),
        preprocessing=BICUBIC,
        pixels=_OF_TORCHVISIONS_SWIN,
    ),
    Layout(
        "VISSL RegNet (SEER)",
        "facebookresearch/vissl@09270ed: vissl/models/trunks/regnet.py, configs/config/benchmark/"
        "linear_image_classification/imagenet1k/eval_resnet_8gpu_transfer_in1k_linear.yaml; "
        "facebookresearch/ClassyVision@08a82e8: classy_vision/models/anynet.py",
        marks=(r"^(trunk\.)?_feature_blocks\.res2\.block1-0\.",),
        query=r"(trunk\.)?_feature_blocks\.",
        names=_regnet(r"conv1\.stem\.", r"res\d\."),
        dropped=((r"heads\.", "heads", _OTHER_HEAD),),
        prefer=r"^regnet[xy]_",
    ),
    Layout(
        "torchvision RegNet",
        "pytorch/vision 0.29: models/regnet.py",
        marks=(r"^trunk_output\.block1\.block1-0\.",),
        names=_regnet(r"stem\.", r"trunk_output\.block\d\."),
        dropped=((r"fc\.", "fc", _CLASSIFIER),),
        prefer=r"^regnet[xy]_",
    ),
    Layout(
        "torchvision EfficientNet",
        "pytorch/vision 0.29: models/efficientnet.py",
        marks=(r"^features\.1\.0\.block\.0\.0\.", r"^features\.2\.0\.block\.1\.0\."),
        names=_TORCHVISION_EFFICIENTNET,
        convert=_of_torchvision_efficientnet,
        prefer=r"^efficientnet(v2_[sml]|_b\d)$",
        variants=((r"^(timm:efficientnet(v2_[sml]|_b[567]))$", r"\1,bn_eps=0.001"),),
        dropped=((r"classifier\.", "classifier", _CLASSIFIER),),
        preprocessing=BICUBIC,
        pixels=_OF_TORCHVISIONS_EFFICIENTNET,
    ),
    Layout(
        "MoCo-CXR DenseNet",
        "stanfordmlgroup/MoCo-CXR@d433aca: moco_pretraining/moco/moco/builder.py, aihc_utils/image_transform.py, "
        "scripts/training_scripts/sbatch_lincls_template.sh; chexpert_supervised/chexpert-model/saver/model_saver.py",
        marks=(r"^encoder_[qk]\.features\.denseblock1\.",),
        query=r"encoder_q\.",
        key=r"encoder_k\.",
        head=r"encoder_q\.classifier\.",
        key_head=r"encoder_k\.classifier\.",
        names=_DENSENET,
        dropped=_QUEUE,
        preprocessing=Preprocessing(320, 320, (0.5020,) * 3, (0.085585,) * 3),
    ),
    Layout(
        "torchvision DenseNet",
        "pytorch/vision 0.29: models/densenet.py (timm names alike)",
        marks=(r"^features\.denseblock1\.denselayer1\.",),
        names=_DENSENET,
        dropped=((r"classifier\.", "classifier", _CLASSIFIER),),
    ),
    Layout(
        "ServiceNow/seasonal-contrast (SeCo)",
        "ServiceNow/seasonal-contrast@8285173: models/moco2_module.py, datasets/eurosat_datamodule.py, main_eurosat.py",
        marks=(r"^encoder_[qk]\.0\.weight$", r"^encoder_[qk]\.7\.\d", r"^heads_[qk]\."),
        query=r"encoder_q\.",
        key=r"encoder_k\.",
        head=r"heads_q\.0\.",
        key_head=r"heads_k\.0\.",
        names=_CHILDREN,
        dropped=(*_QUEUE, (r"heads_[qk]\.[1-9]\d*\.", "heads", "heads of the embedding spaces that see the seasons")),
        preprocessing=Preprocessing(64, 64, (0.0,) * 3, (1.0,) * 3),
    ),
)
# What fits every network of timm's that no row before it takes; it stands last
TIMM = Layout(
    "timm network",
    "huggingface/pytorch-image-models 1.0.31: timm/models",
    marks=(rf"^({STEM.pattern})",),
    prefer=_SWINS,
    dropped=((rf"({HEADS.pattern})$", "head", _CLASSIFIER),),
    preprocessing=BICUBIC,
)
