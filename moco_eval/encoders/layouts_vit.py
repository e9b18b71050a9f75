"""Rows of `layouts.LAYOUTS` for transformers: DINOv2 and 3, iBOT, I-JEPA, MAE, BEiT, data2vec, SimMIM, CLIP, SigLIP.

Names go to timm's. Sources are cited by repository, commit and file; nothing of their code is here.
"""

from dataclasses import replace

from moco_eval.encoders import vit_tensors
from moco_eval.encoders.layout import Layout, Rules
from moco_eval.encoders.pixel_choice import Doubt
from moco_eval.preprocessing import Preprocessing

_TRANSFORMERS = "huggingface/transformers 5.24"
_LIGHTLY = "lightly-ai/lightly@e8d317f: examples/pytorch_lightning"

BICUBIC = Preprocessing(interpolation="bicubic")
BILINEAR = Preprocessing()
HALVES = Preprocessing(224, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), interpolation="bicubic", squash=True)
CLIP = Preprocessing(
    224,
    224,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    interpolation="bicubic",
)

_BEIT_DOUBT = Doubt(
    ("mean", "std"),
    "no tensor tells BEiT's pixels; ImageNet's mean and std were taken, as BEiT v2 and data2vec have. BEiT's own are "
    "0.5. This settles it",
    HALVES,
)
_HALVES_DOUBT = Doubt(
    ("mean", "std"),
    "no preprocessor_config.json says its pixels; mean and std 0.5 were taken, as SigLIP and BEiT have. For ImageNet's",
    BICUBIC,
)

_CLASSIFIER = "a classifier on the pooled feature, no part of the encoder"
_MASKED = "for masked pretraining"
_OTHER_HEAD = "a projection head of a kind that is not read"
_MASK_TOKEN = (r"(.*\.)?(mask_token|masked_embed)$", "mask_token", _MASKED)
_HEAD = (r"(head|classifier|linear_head)\.", "head", _CLASSIFIER)

# facebookresearch's names to timm's
_CHUNKS: Rules = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)  # blocks in groups, each with its own number, for FSDP
_DINOV2_NAMES: Rules = (
    *_CHUNKS,
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_DINOV3_NAMES: Rules = (
    *_CHUNKS,
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# Hugging Face writes its older names to disk, and has newer ones in memory.
TRANSFORMER_NAMES: Rules = (
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.layer|model\.layer|layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_HF_DINOV2_NAMES: Rules = (
    *TRANSFORMER_NAMES,
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
)
_HF_DINOV3_NAMES: Rules = (*_HF_DINOV2_NAMES, (r"\.ls([12])\.gamma$", r".gamma_\1"))
_HF_BEIT_NAMES: Rules = (
    *TRANSFORMER_NAMES,
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^(blocks\.\d+)\.(attention\.attention\.)?relative_position_bias\.", r"\1.attn."),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
_CLIP_NAMES: Rules = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_HF_CLIP_NAMES: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)
_HF_SIGLIP_NAMES: Rules = (
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.", "attn_pool."),
    *_HF_CLIP_NAMES,
)
_TORCHVISION_NAMES: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)

# openai's activation, which every CLIP of Hugging Face has by default; SigLIP's is the approximation by tanh
_QUICK_GELU: Rules = ((r"^(timm:[^,]*_clip_\d+)(?!.*act_layer)(.*)$", r"\1\2,act_layer=quick_gelu"),)
_GELU_TANH: Rules = ((r"^(timm:[^,]*_siglip_\d+)(?!.*act_layer)(.*)$", r"\1\2,act_layer=gelu_tanh"),)

_DINOV2 = Layout(
    "facebookresearch/dinov2",
    "facebookresearch/dinov2@b8931f7: dinov2/models/vision_transformer.py, hub/backbones.py",
    marks=(r"^blocks\.\d+(\.\d+)?\.ls1\.gamma$", r"^mask_token$"),
    unless=(r"^(register|storage)_tokens$",),
    names=_DINOV2_NAMES,
    convert=vit_tensors.dinov2,
    prefer="dinov2",
    dropped=(_MASK_TOKEN, _HEAD),
    preprocessing=BICUBIC,
    positions=(0.1, False),
    settled=True,
)
_REGISTERS = replace(
    _DINOV2,
    origin="facebookresearch/dinov2 with registers",
    marks=(r"^blocks\.\d+(\.\d+)?\.ls1\.gamma$", r"^register_tokens$"),
    unless=(),
    positions=(0.0, True),
)
_TRAINING = {
    "query": r"student\.backbone\.",
    "key": r"teacher\.backbone\.",
    "usual": "key",
    "dropped": (_MASK_TOKEN, (r"(student|teacher)\.\w*head\.", "heads", _OTHER_HEAD)),
}
_HF_DINOV2 = Layout(
    "Hugging Face DINOv2",
    f"{_TRANSFORMERS}: models/dinov2/modeling_dinov2.py",
    marks=(r"\.layer_scale1\.lambda1$", r"^(dinov2\.)?embeddings\.patch_embeddings\.projection\."),
    unless=(r"embeddings\.register_tokens$",),
    query=r"(dinov2\.)?",
    names=_HF_DINOV2_NAMES,
    convert=vit_tensors.dinov2,
    prefer="dinov2",
    dropped=(_MASK_TOKEN, _HEAD),
    preprocessing=BICUBIC,
    positions=(0.0, False),
)
_BEIT = Layout(
    "BEiT, BEiT v2 or data2vec",
    "microsoft/unilm@768a3c8: beit/modeling_finetune.py, modeling_pretrain.py, beit2; "
    "facebookresearch/data2vec_vision@af9a363: beit/modeling_cyclical.py",
    marks=(r"^((module\.)?blocks\.\d+\.attn|rel_pos_bias)\.relative_position_bias_table$", r"^blocks\.\d+\.norm1\."),
    names=(),
    convert=vit_tensors.beit,
    prefer="beit",
    dropped=(
        _MASK_TOKEN,
        _HEAD,
        (r"lm_head\.", "lm_head", "the prediction of visual tokens, for pretraining"),
        (r"cls_pt_", "cls_pt_layers", "BEiT v2's layers of pretraining alone"),
    ),
    preprocessing=BICUBIC,
    pixel_doubt=_BEIT_DOUBT,
)
_CLIP = Layout(
    "CLIP or OpenCLIP",
    "openai/CLIP@d05afc4: clip/model.py; mlfoundations/open_clip@89fb801: src/open_clip/transformer.py",
    marks=(r"^visual\.transformer\.resblocks\.", r"^visual\.class_embedding$"),
    query=r"visual\.",
    head=r"visual\.proj$",
    names=_CLIP_NAMES,
    convert=vit_tensors.clip,
    prefer="clip_(?!quickgelu)",
    dropped=((r"(?!visual\.)", "text tower", "the encoder of texts and the temperature"),),
    preprocessing=CLIP,
)
_HF_CLIP = Layout(
    "Hugging Face CLIP",
    f"{_TRANSFORMERS}: models/clip/modeling_clip.py",
    marks=(r"(^|\.)pre_layrnorm\.", r"(^|\.)embeddings\.class_embedding$"),
    query=r"(vision_model\.)?(?!text_|logit_)",
    head=r"visual_projection\.",
    names=_HF_CLIP_NAMES,
    convert=vit_tensors.clip,
    prefer="clip_quickgelu",
    dropped=(
        (r"text_|logit_scale$", "text tower", "the encoder of texts and the temperature"),
        (r".*position_ids$", "position_ids", "the places' numbers"),
        _HEAD,
    ),
    variants=_QUICK_GELU,
    preprocessing=CLIP,
    norm_eps=1e-5,
)

_LIGHTLY_TORCHVISION = Layout(
    "lightly with torchvision's ViT",
    f"{_LIGHTLY}/simmim.py, msn.py, pmsn.py",
    marks=(r"^backbone\.vit\.conv_proj\.", r"^backbone\.vit\.encoder\.layers\."),
    query=r"backbone\.vit\.",
    names=_TORCHVISION_NAMES,
    dropped=(
        (r"((anchor_)?backbone\.)?mask_token$", "mask_token", _MASKED),
        (r"(anchor_)?backbone\.vit\.heads\.", "heads", _CLASSIFIER),
        (r"(anchor_)?projection_head\.", "projection heads", _OTHER_HEAD),
        (r"prototypes(\.|$)", "prototypes", "the clusters of pretraining"),
        (r"decoder\.", "decoder", "the prediction of pixels, for pretraining"),
        (r"criterion\.", "criterion", "of the loss"),
    ),
    preprocessing=BILINEAR,
    settled=True,
)

# Methods and libraries by their own marks. Rows of a method's training stand before those of its networks.
TRANSFORMERS_OF_METHODS: tuple[Layout, ...] = (
    replace(
        _REGISTERS,
        origin="facebookresearch/dinov2 with registers, student and teacher",
        marks=(r"^(student|teacher)\.backbone\..*\.ls1\.gamma$", r"\.backbone\.register_tokens$"),
        **_TRAINING,  # type: ignore[arg-type]
    ),
    Layout(
        "facebookresearch/dinov3, student and teacher",
        "facebookresearch/dinov3@6876159: dinov3/train/ssl_meta_arch.py",
        marks=(r"^(student|teacher)\.backbone\..*\.ls1\.gamma$", r"\.backbone\.(storage_tokens|rope_embed\.)"),
        names=_DINOV3_NAMES,
        convert=vit_tensors.dinov3,
        prefer="dinov3",
        preprocessing=BICUBIC,
        settled=True,
        **_TRAINING,  # type: ignore[arg-type]
    ),
    replace(
        _DINOV2,
        origin="facebookresearch/dinov2, student and teacher",
        marks=(r"^(student|teacher)\.backbone\..*\.ls1\.gamma$", r"^(student|teacher)\.backbone\.mask_token$"),
        unless=(),
        **_TRAINING,  # type: ignore[arg-type]
    ),
    Layout(
        "bytedance/ibot",
        "bytedance/ibot@da316d8: main_ibot.py, models/vision_transformer.py",
        marks=(r"^(student|teacher)\.backbone\.", r"\.backbone\.masked_embed$"),
        preprocessing=BICUBIC,
        settled=True,
        **_TRAINING,  # type: ignore[arg-type]
    ),
    Layout(
        "facebookresearch/ijepa",
        "facebookresearch/ijepa@52c1ae9: src/train.py, src/models/vision_transformer.py",
        marks=(r"^target_encoder\.blocks\.", r"^encoder\.blocks\."),
        query=r"encoder\.",
        key=r"target_encoder\.",
        usual="key",
        preprocessing=BILINEAR,
        settled=True,
    ),
    Layout(
        "microsoft/SimMIM ViT",
        "microsoft/SimMIM@d3e29bc: models/simmim.py, models/vision_transformer.py",
        marks=(r"^encoder\.blocks\.\d+\.norm1\.", r"^encoder\.mask_token$", r"^decoder\.0\."),
        query=r"encoder\.",
        convert=vit_tensors.beit,
        prefer="beit",
        dropped=(_MASK_TOKEN, (r"decoder\.", "decoder", "the prediction of pixels, for pretraining")),
        preprocessing=BICUBIC,
    ),
    _CLIP,
    replace(
        _CLIP,
        origin="CLIP's or OpenCLIP's visual tower alone",
        marks=(r"^transformer\.resblocks\.", r"^class_embedding$", r"^conv1\."),
        query="",
        head=r"proj$",
        dropped=(),
    ),
    Layout(
        "OpenCLIP with timm's network",
        "mlfoundations/open_clip@89fb801: src/open_clip/timm_model.py",
        marks=(r"^visual\.trunk\.blocks\.",),
        query=r"visual\.trunk\.",
        prefer="siglip",
        dropped=(
            (r"visual\.head\.", "head", "the projection to the texts' space"),
            (r"visual\.trunk\.(head|fc)\.", "head", _CLASSIFIER),
            (r"(?!visual\.)", "text tower", "the encoder of texts and the temperature"),
        ),
        preprocessing=HALVES,
    ),
    Layout(
        "CLIP's ResNet",
        "openai/CLIP@d05afc4: clip/model.py, class ModifiedResNet",
        marks=(r"^(visual\.)?attnpool\.positional_embedding$", r"^(visual\.)?layer1\."),
        refused="a ResNet with three convolutions as its stem, blurred strides and pooling by attention, which is not "
        "built here; timm has the network (resnet50_clip): give it to moco_eval.wrap with the weights in it",
    ),
    Layout(
        "Hugging Face SigLIP",
        f"{_TRANSFORMERS}: models/siglip/modeling_siglip.py",
        marks=(r"(^|\.)head\.probe$", r"(^|\.)embeddings\.patch_embedding\."),
        query=r"(vision_model\.)?(?!text_|logit_)",
        names=_HF_SIGLIP_NAMES,
        convert=vit_tensors.siglip,
        prefer="siglip_(?!gap)",
        dropped=(
            (r"text_|logit_(scale|bias)$", "text tower", "the encoder of texts, temperature and bias"),
            (r".*position_ids$", "position_ids", "the places' numbers"),
            (r"classifier\.", "classifier", _CLASSIFIER),
        ),
        variants=_GELU_TANH,
        preprocessing=HALVES,
        pixel_doubt=_HALVES_DOUBT,
    ),
    _HF_CLIP,
    Layout(
        "Hugging Face DINOv3",
        f"{_TRANSFORMERS}: models/dinov3_vit/modeling_dinov3_vit.py",
        marks=(r"\.layer_scale1\.lambda1$", r"(^|\.)embeddings\.patch_embeddings\.weight$"),
        query=r"(dinov3_vit\.)?",
        names=_HF_DINOV3_NAMES,
        convert=vit_tensors.dinov3,
        prefer="dinov3",
        dropped=(_MASK_TOKEN, _HEAD),
        preprocessing=BICUBIC,
        norm_eps=1e-5,
    ),
    replace(
        _HF_DINOV2,
        origin="Hugging Face DINOv2 with registers",
        source=f"{_TRANSFORMERS}: models/dinov2_with_registers/modeling_dinov2_with_registers.py",
        marks=(r"\.layer_scale1\.lambda1$", r"embeddings\.register_tokens$"),
        unless=(),
        query=r"(dinov2_with_registers\.)?",
        positions=(0.0, True),
    ),
    _HF_DINOV2,
    Layout(
        "Hugging Face BEiT or data2vec",
        f"{_TRANSFORMERS}: models/beit/modeling_beit.py, models/data2vec/modeling_data2vec_vision.py",
        marks=(r"\.lambda_1$", r"(^|\.)embeddings\.patch_embeddings\.projection\."),
        query=r"(beit\.|data2vec_vision\.)?",
        names=_HF_BEIT_NAMES,
        convert=vit_tensors.beit,
        prefer="beit",
        dropped=(
            _MASK_TOKEN,
            _HEAD,
            (r"lm_head\.", "lm_head", "the prediction of visual tokens, for pretraining"),
            (r".*relative_position_index$", "relative_position_index", "what timm computes by itself"),
        ),
        preprocessing=HALVES,
        pixel_doubt=_HALVES_DOUBT,
        norm_eps=1e-12,
    ),
    Layout(
        "Hugging Face I-JEPA",
        f"{_TRANSFORMERS}: models/ijepa/modeling_ijepa.py",
        marks=(r"^(ijepa\.)?embeddings\.patch_embeddings\.projection\.", r"\.layernorm_before\."),
        unless=(r"cls_token$",),
        query=r"(ijepa\.)?",
        names=TRANSFORMER_NAMES,
        dropped=(_MASK_TOKEN, (r"pooler\.|classifier\.", "pooler, classifier", _CLASSIFIER)),
        preprocessing=BILINEAR,
        norm_eps=1e-12,
    ),
    replace(
        _LIGHTLY_TORCHVISION,
        origin="lightly MSN or PMSN",
        marks=(r"^anchor_backbone\.vit\.conv_proj\.",),
        query=r"anchor_backbone\.vit\.",
        key=r"backbone\.vit\.",
        usual="key",
    ),
    _LIGHTLY_TORCHVISION,
    Layout(
        "facebookresearch/dinov3",
        "facebookresearch/dinov3@6876159: dinov3/models/vision_transformer.py, hub/backbones.py",
        marks=(r"^blocks\.\d+\.ls1\.gamma$", r"^(storage_tokens$|rope_embed\.)"),
        names=_DINOV3_NAMES,
        convert=vit_tensors.dinov3,
        prefer="dinov3",
        dropped=(
            _MASK_TOKEN,
            _HEAD,
            (r"local_cls_norm\.", "local_cls_norm", "the norm of local crops, for pretraining alone"),
        ),
        preprocessing=BICUBIC,
        settled=True,
    ),
    _REGISTERS,
    _DINOV2,
    _BEIT,
)
