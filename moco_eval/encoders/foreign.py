"""What a file is that holds no encoder built here, as far as its names and shapes tell, and the way out: as data."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_WRAP = "build it and give it to moco_eval.wrap, which judges any network of images"
_AROUND = "build a module around it that takes images and gives features, and give that to moco_eval.wrap"
_BACKBONE = "give the checkpoint that holds the backbone it was trained with"
_NO_IMAGES = "give an encoder of images"
_WEIGHTS = "give the file that holds the network's weights"


@dataclass(frozen=True)
class Kind:
    """A family of files.

    Attributes:
        sentence: what it is, after "it is".
        way_out: what its owner can do.
        marks: regular expressions, each of which must be found in some name, which its shape follows: 'fc.bias 10'.
        every: a regular expression that must match at the start of every name; None where any others may stand beside.
    """

    sentence: str
    way_out: str
    marks: tuple[str, ...] = ()
    every: str | None = None


_TOKEN = r"(^|\.)(token_embedding|word_embeddings|embed_tokens|wte)\.weight "
_3D = r"\.weight \d+x\d+x\d+x\d+x\d+$"

# The first kind that fits is said: the specific ones stand first.
KINDS: tuple[Kind, ...] = (
    # of a training, without a network
    Kind("the state of an optimiser alone, without the network's weights", _WEIGHTS, (r"(^|\.)param_groups$",)),
    Kind("the state of a learning-rate schedule alone", _WEIGHTS, (r"(^|\.)(base_lrs|_last_lr)$",)),
    Kind("the state of a loss scaler alone", _WEIGHTS, (r"(^|\.)growth_factor$",)),
    Kind(
        "a moving average of weights in a list, without their names (torch_ema's shadow_params)",
        "copy it into the network (ema.copy_to) and save the network's state_dict()",
        (r"(^|\.)shadow_params$",),
    ),
    Kind(
        "features or labels, not weights",
        "give the encoder; moco_eval.classification.logistic.on_features judges features",
        every=r"(\w*(features?|embeddings?|labels?|targets?|ids|indices|paths|names|logits))( |$)",
    ),
    # images from noise
    Kind(
        "a diffusion model's network, which predicts noise (a U-Net or transformer told the time step)",
        _AROUND,
        (r"(^|\.)(time_embed(ding|der)?|t_embedder|adaLN_modulation)\.|model\.diffusion_model\.",),
    ),
    Kind("an autoencoder of images (VAE, VQ)", _AROUND, (r"(^|\.)(post_)?quant_conv\.|(^|\.)quantize\.embedding",)),
    Kind(
        "a generative adversarial network",
        _NO_IMAGES,
        (r"(^|\.)(generator|discriminator|netG|netD|g_ema|synthesis|to_?rgb\d*)\.|\.style\.\d+\.weight ",),
    ),
    Kind(
        "the generator of a generative adversarial network: transposed convolutions from a vector",
        _NO_IMAGES,
        (r"^(main|gen|model)\.0\.weight \d+x\d+x4x4$", r"^(main|gen|model)\.3\.weight \d+x\d+x4x4$"),
    ),
    Kind(
        "a radiance field (NeRF) of one scene",
        _NO_IMAGES,
        (r"(^|\.)(pts_linears|views_linears|(nerf_\w+\.)?xyz_encoding_\d+)\.",),
    ),
    Kind("a scene of Gaussians (Gaussian splatting)", _NO_IMAGES, (r"^_xyz ", r"^_opacity ")),
    # sound, videos, volumes, points
    Kind(
        "AST, a transformer of spectrograms (audio)",
        _NO_IMAGES,
        (r"patch_embed\w*\.proj\w*\.weight \d+x1x\d+x\d+$", r"(^|\.)(dist_token|distillation_token) "),
    ),
    Kind(
        "a network of spectrograms (audio), as BEATs and PANNs are",
        _NO_IMAGES,
        (r"(^|\.)grep_a |(spectrogram|logmel)_extractor\.|fc_audioset",),
    ),
    Kind("a network of sound (wav2vec 2.0, HuBERT, ...)", _NO_IMAGES, (r"feature_extractor\.conv_layers\.0\.",)),
    Kind("a network of sound (Whisper, ...)", _NO_IMAGES, (r"(^|\.)encoder\.conv1\.weight \d+x\d+x\d+$",)),
    Kind("TimeSformer, a transformer of videos", _AROUND, (r"(^|\.)temporal_(attention|dense|layernorm|embed)",)),
    Kind(
        "a transformer that takes several images at once (a video, a time series or a volume): its patches are 3-D",
        _AROUND,
        (rf"(patch_embed\w*|tubelet_embeddings|conv_proj|projection)\.?[\w.]*{_3D}",),
    ),
    Kind("a network of videos or volumes: its convolutions are 3-D", _AROUND, (rf"{_3D}",)),
    Kind("a network of point clouds", _NO_IMAGES, (r"(^|\.)(stn|fstn|sa1|mlp_convs)\.",)),
    # parts of a vision network
    Kind(
        "I-JEPA's predictor alone, which is for pretraining",
        _BACKBONE,
        every=r"(module\.|predictor\.)*(predictor_|mask_token)",
    ),
    Kind(
        "the decoder of a masked pretraining (MAE) alone, without its encoder",
        _BACKBONE,
        every=r"(module\.|decoder\.)*(decoder_(embed|pos|blocks|norm|pred)|mask_token)",
    ),
    Kind(
        "DINO's projection head alone, without its backbone",
        _BACKBONE,
        (r"(^|\.)last_layer\.",),
        every=r"(module\.|head\.|dino_head\.)*(mlp|last_layer)\.",
    ),
    Kind(
        "the decoder or head of a segmentation network alone, without its backbone",
        _BACKBONE,
        every=r"(module\.|model\.)*(decode_head|auxiliary_head|decoder|segmentation_head|aux_classifier|seg_head)\.",
    ),
    Kind(
        "the heads of a detector alone, without its backbone",
        _BACKBONE,
        every=r"(module\.|model\.)*(proposal_generator|roi_heads?|rpn(_head)?|bbox_head|pixel_(mean|std))(\.| )",
    ),
    # texts
    Kind(
        "the text tower of CLIP, SigLIP or the like alone, without its encoder of images",
        "give the whole model, or its visual tower",
        (r"(^|\.)(token_embedding|embeddings\.token_embedding)\.weight |(^|\.)text_projection( |\.)",),
        every=r"(?!.*(visual|vision))",
    ),
    Kind(
        "T5 or another encoder and decoder of texts",
        _NO_IMAGES,
        (r"\.(SelfAttention|EncDecAttention)\.",),
    ),
    Kind("a language model (BERT, GPT, Llama, ...), which takes text", _NO_IMAGES, (_TOKEN,)),
    # detectors, segmenters whole, of networks that are not built here
    Kind("a YOLO detector", _WRAP, (r"(^|\.)model\.0\.(conv|bn)\.", r"(^|\.)model\.\d+\.(cv1|m|dfl|conv)\.")),
    Kind(
        "Segment Anything (SAM) or its encoder, whose blocks have relative positions", _WRAP, (r"\.attn\.rel_pos_h ",)
    ),
    Kind("a U-Net for segmentation", _WRAP, (r"double_conv\.0\.|(^|\.)outc\.", r"(^|\.)(inc|up1|down1)\.")),
    Kind("a detector (SSD)", _WRAP, (r"(^|\.)head\.(classification|regression)_head\.",)),
    # networks of images
    Kind("MViT, a multiscale transformer", _WRAP, (r"\.attn\.(pool_[qkv]|norm_[qkv])\.",)),
    Kind("a state-space network (Mamba, VMamba)", _WRAP, (r"(^|[._])A_logs? ",)),
    Kind(
        "a transformer with several patch embeddings, one for each group of bands (SatMAE)",
        _WRAP,
        (r"(^|\.)patch_embed\.1\.proj\.",),
    ),
    Kind(
        "DeiT's distilled transformer, which averages a class token and a distillation token",
        "timm has it (deit_base_distilled_patch16_224, ...): give it to moco_eval.wrap with the weights in it",
        (r"(^|\.)(dist_token|distillation_token) ",),
    ),
    Kind("Swin V2 under Hugging Face's names", _WRAP, (r"\.continuous_position_bias_mlp\.",)),
    Kind(
        "MobileNet-V2 or V3 under torchvision's names",
        f"timm has networks of these names with other tensors; {_WRAP}",
        (r"(^|\.)features\.0\.0\.(0\.)?weight ", r"(^|\.)features(\.\d+)+\.(conv|block)\.\d"),
    ),
    Kind("SqueezeNet", _WRAP, (r"\.squeeze\.weight ", r"\.expand1x1\.weight ")),
    Kind(
        "AlexNet, VGG or another plain sequence of convolutions under torchvision's names",
        _WRAP,
        (r"(^|\.)features\.0\.weight ", r"(^|\.)features\.3\.weight "),
    ),
    Kind("GoogLeNet or Inception", _WRAP, (r"(^|\.)(inception3a|Mixed_5b)\.",)),
    Kind("ShuffleNet", _WRAP, (r"(^|\.)stage2\.0\.branch\d\.",)),
    Kind("a graph network", _NO_IMAGES, (r"(^|\.)(gnn|conv\d)\.(\w+\.)*lin\.weight ",)),
    Kind("a policy of reinforcement learning", _NO_IMAGES, (r"(^|\.)(action_net|policy_net)\.",)),
    Kind(
        "a projection head or classifier alone, and no backbone",
        _BACKBONE,
        every=r"(module\.)*((projector|projection_head|head|fc|neck|linear|classifier|predictor|prototypes)\.|"
        r"(weight|bias) |\d\.(weight|bias|running_\w+|num_batches_tracked) (\d+(x\d+)?)?$)",
    ),
)


def kind_of(tensors: Mapping[str, Any]) -> Kind | None:
    """The family of files that these tensors, or entries of a file, are of; None where no name tells.

    Args:
        tensors: by their names in the file; what is no tensor counts by its name alone.
    """
    names = [f"{name} {_size(value)}" if isinstance(value, Tensor) else str(name) for name, value in tensors.items()]
    return next((kind for kind in KINDS if names and _fits(kind, names)), None)


def entries(values: Mapping[str, Any], levels: int = 3) -> dict[str, Any]:
    """Everything in a file by its place, a few levels down: 'optimizer.param_groups'."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat[str(name)] = value
        if isinstance(value, Mapping) and levels > 1:
            flat |= {f"{name}.{inner}": part for inner, part in entries(value, levels - 1).items()}
    return flat


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _fits(kind: Kind, names: Iterable[str]) -> bool:
    if kind.every is not None and not all(re.match(kind.every, name) for name in names):
        return False
    return all(any(re.search(mark, name) for name in names) for mark in kind.marks)
