"""Whose tensors are named how: one row per code base, as data, with the files it was read from.

Reading, proof of load and export work from the row alone. A leading `module.` (DataParallel) and `_orig_mod.`
(torch.compile) are off before anything is compared. Prefixes are regular expressions, matched at a name's start.
"""

from dataclasses import replace
from typing import Any

from moco_eval.encoders.layout import Layout, Rules
from moco_eval.encoders.layouts_conv import CONVOLUTIONAL, TIMM
from moco_eval.encoders.layouts_vit import TRANSFORMERS_OF_METHODS
from moco_eval.encoders.pixel_choice import Doubt
from moco_eval.preprocessing import Preprocessing

FORMAT = "moco-eval/1"
SAFETENSORS = "moco-eval/1 safetensors"

IMAGENET = Preprocessing()
SWAV = Preprocessing(std=(0.228, 0.224, 0.225))  # its red channel is not ImageNet's 0.229
BICUBIC = Preprocessing(interpolation="bicubic")  # 224 of 256: DINO, iBOT, DINOv2, MAE, DeiT, ConvNeXt
_HALF = (0.5, 0.5, 0.5)
HALVES = Preprocessing(224, 224, _HALF, _HALF, squash=True)  # transformers' ViTImageProcessor
HALVES_BICUBIC = replace(HALVES, interpolation="bicubic")  # SigLIP; transformers' BEiT
CLIP = Preprocessing(  # openai/CLIP@d05afc4, clip/clip.py: _transform; OpenCLIP's own networks alike
    224,
    224,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    interpolation="bicubic",
)
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_DEMO = Preprocessing(32, 32, _CIFAR_MEAN, (0.2023, 0.1994, 0.2010))
CIFAR_SOLO = Preprocessing(32, 32, _CIFAR_MEAN, (0.2470, 0.2435, 0.2616))

ANYBODYS_VIT = Doubt(
    ("interpolation", "mean", "std"),
    "the names of a plain ViT do not tell its pixels; a bicubic resize and ImageNet's mean and std were taken, as "
    "DINO, MAE and DeiT have. MoCo v3's resize is bilinear, timm's own weights often want mean and std 0.5. This "
    "settles it",
    BICUBIC,
)
_HF_DOUBT = Doubt(
    ("mean", "std"),
    "no preprocessor_config.json says its pixels; mean and std 0.5 were taken, as Google's ViTs have. DINO's, MAE's, "
    "MSN's and others want ImageNet's",
    IMAGENET,
)
_TORCHVISION_DOUBT = Doubt(
    ("interpolation",),
    "torchvision's ViTs do not say whether they are of its SWAG weights, whose resize is bicubic; bilinear was taken, "
    "as the others have. This settles it",
    IMAGENET,
)
_OPENMMLAB_DOUBT = Doubt(
    ("interpolation", "mean", "std"),
    "OpenMMLab's ViT backbones do not tell their method's pixels; a bilinear resize and ImageNet's mean and std were "
    "taken, as its MoCo v3 has. MAE's resize is bicubic, its supervised ViTs want mean and std 0.5. This settles it",
    IMAGENET,
)


_QUEUE = (
    (r"queue2?$", "queue", "the negative keys of pretraining"),
    (r"queue2?_ptr$", "queue_ptr", "the queue's position"),
)
_BANK = (r"bank$", "bank", "the memory bank's slots")
_MEMORY_BANK = (r"memory_bank\.", "memory_bank", "the memory bank's slots")
_PREDICTOR = (r"(online_)?predict(or|ion_head)\.", "predictor", "the query side's predictor, for pretraining alone")
_CENTRE = (r"(dino_loss_func|criterion)\.center$", "centre", "the centre of DINO's targets")
_OTHER_HEAD = "a projection head of a kind that is not read"
_CLASSIFIER = "a classifier on the pooled feature, no part of the encoder"
_FC = (r"fc\.", "fc", "a classifier or head on the pooled feature, no part of the backbone")
_PROTOTYPES = (r"prototypes\.", "prototypes", "the clusters of pretraining")

# nn.Sequential of torchvision's children, with and without the max-pooling
_CHILDREN: Rules = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda match: f"layer{int(match[1]) - 3}."),
)
_CIFAR_CHILDREN: Rules = (
    (r"^(net\.)?0\.", "conv1."),
    (r"^(net\.)?1\.", "bn1."),
    (r"^(net\.)?([3-6])\.", lambda match: f"layer{int(match[2]) - 2}."),
)
# detectron2's names of a ResNet, and the older Caffe2 names that it translates
DETECTRON2: Rules = (
    (r"^stem\.", ""),
    (r"^res([2-5])\.", lambda match: f"layer{int(match[1]) - 1}."),
    (r"conv([1-3])\.norm\.", r"bn\1."),
    (r"shortcut\.norm\.", "downsample.1."),
    (r"shortcut\.", "downsample.0."),
)
_CAFFE2: Rules = (
    (r"_bn_s$", "_bn.weight"),
    (r"_bn_b$", "_bn.bias"),
    (r"_w$", ".weight"),
    (r"^res_conv1_bn\.", "bn1."),
    (r"^res([2-5])_(\d+)_", lambda match: f"layer{int(match[1]) - 1}.{match[2]}."),
    (r"branch1_bn\.", "downsample.1."),
    (r"branch1\.", "downsample.0."),
    (r"branch2([abc])_bn\.", lambda match: f"bn{'abc'.index(match[1]) + 1}."),
    (r"branch2([abc])\.", lambda match: f"conv{'abc'.index(match[1]) + 1}."),
)
_HF_RESNET: Rules = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda match: f".conv{int(match[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda match: f".bn{int(match[1]) + 1}."),
)
# To timm's names of a ViT. Hugging Face writes its older names to disk, and has newer ones in memory.
_HF_VIT: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_OPENMMLAB_VIT: Rules = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^ln1\.", "norm."),
)
_TORCHVISION_VIT: Rules = (
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
_TWELVE_HEADS: Rules = ((r"^vit_(narrow|tiny|small)_patch", r"vit_\1_12h_patch"),)

# Some code bases have several rows. The first row that fits is taken: the specific ones stand first.
_MOCO = Layout(
    "facebookresearch/moco",
    "facebookresearch/moco@7397dfe: main_moco.py, moco/builder.py",
    query=r"encoder_q\.",
    key=r"encoder_k\.",
    head=r"encoder_q\.fc\.",
    key_head=r"encoder_k\.fc\.",
    dropped=_QUEUE,
)
_MOCO_V3 = Layout(
    "facebookresearch/moco-v3",
    "facebookresearch/moco-v3@c349e6e: moco/builder.py, vits.py",
    query=r"base_encoder\.",
    key=r"momentum_encoder\.",
    dropped=(_PREDICTOR,),
)
_DINO = Layout(
    "facebookresearch/dino",
    "facebookresearch/dino@7c446df: main_dino.py, utils.py; pixels: eval_knn.py, eval_linear.py (iBOT@c24f870 alike)",
    query=r"student\.backbone\.",
    key=r"teacher\.backbone\.",
    usual="key",
    preprocessing=BICUBIC,
    settled=True,
)
_OPENMMLAB_AVERAGE = r"(encoder_k|target_net|momentum_encoder)"
_OPENMMLAB_MOMENTUM = rf"{_OPENMMLAB_AVERAGE}\.module"
_OPENMMLAB = Layout(
    "OpenMMLab",
    "open-mmlab/mmpretrain@ee7f2e8, mmselfsup@db861f3: models/selfsup, necks, backbones",
    query=r"backbone\.",
    key=rf"{_OPENMMLAB_MOMENTUM}\.0\.",
    head=r"neck\.(mlp|fc)\.",
    key_head=rf"{_OPENMMLAB_MOMENTUM}\.1\.(mlp|fc)\.",
    names=_OPENMMLAB_VIT,
    dropped=(
        *_QUEUE,
        _MEMORY_BANK,
        (rf"{_OPENMMLAB_AVERAGE}\.steps$", "steps", "the momentum encoder's count of updates"),
        (r"neck\.(?!(mlp|fc)\.)", "neck", _OTHER_HEAD),
        (rf"{_OPENMMLAB_MOMENTUM}\.1\.(?!(mlp|fc)\.)", "momentum neck", _OTHER_HEAD),
        (r"head\.", "head", "predictor, prototypes or classifier of its training"),
    ),
)
_OPENSELFSUP = r"(encoder_q|online_net|base_encoder)"
_SOLO = Layout(
    "solo-learn",
    "vturrisi/solo-learn@9187ea3: solo/methods, solo/backbones",
    query=r"(backbone|encoder)\.",
    key=r"momentum_(backbone|encoder)\.",
    head=r"projector\.",
    key_head=r"momentum_projector\.",
    dropped=(
        *_QUEUE,
        _PREDICTOR,
        _PROTOTYPES,
        _CENTRE,
        (r"queue_y$", "queue_y", "the labels of the queue"),
        (r"(momentum_)?classifier\.", "classifier", "an online classifier, a byproduct of pretraining"),
        (r"(momentum_)?head\.", "head", _OTHER_HEAD),
        (r"local_memory_", "local_memory", "DeepCluster's memory of features"),
        (r"whitening\.", "whitening", "the whitening of the loss"),
        (r"decoder\.", "decoder", "the decoder of masked pretraining"),
    ),
    variants=((r"_cifar$", "_cifar_pad2"),),
    cifar=CIFAR_SOLO,
)
_LIGHTLY_MOMENTUM = r"(backbone_momentum|momentum_backbone|key_backbone|teacher_backbone)"
_LIGHTLY_MOMENTUM_HEAD = r"(projection_head_momentum|(momentum|key|teacher)_projection_head)"
_LIGHTLY_DROPPED = (
    _PREDICTOR,
    _PROTOTYPES,
    _CENTRE,
    (r"criterion\.memory_bank\.", "memory bank", "the negative keys of pretraining"),
    (
        r"(online_)?classifier\.|classification_head\.",
        "classifier",
        "an online classifier, a byproduct of pretraining",
    ),
    (r"(\w+_)?backbone(_momentum)?\.fc\.", "fc", _CLASSIFIER),
    (r"(\w+_)?backbone\.mask_token$", "mask_token", "for masked pretraining"),
    (r"\w*(local|global)\w*\.", "heads of local features", _OTHER_HEAD),
)
_LIGHTLY = "lightly-ai/lightly@e8d317f: examples, benchmarks/imagenet, lightly/models/modules/heads.py"
_TRAIN_BODY = r"\.wrapped_model\.(_features|_model)\."
_LIGHTLY_TRAIN = Layout(
    "lightly-train",
    "lightly-ai/lightly-train@8f5a75c: src/lightly_train/_methods, _models",
    dropped=(
        _CENTRE,
        (r".*wrapped_model\.(_features|_model)\.(fc|head)\.", "fc", _CLASSIFIER),
        (r".*embedding_model\.embed_head\.", "embed_head", "the projection to an embedding, for pretraining"),
        (r"(\w+_)?(projection|prediction)?_?head\.", "heads", _OTHER_HEAD),
        (r".*\.mask_token$", "mask_token", "for masked pretraining"),
    ),
)

LAYOUTS: tuple[Layout, ...] = (
    replace(
        _MOCO_V3,
        origin="moco-eval, MoCo v3 ViT",
        marks=(r"^(base|momentum)_encoder\.(blocks|patch_embed|head)\.",),
        format=FORMAT,
        source="pretraining/checkpoint.py",
        head=r"base_encoder\.head\.",
        key_head=r"momentum_encoder\.head\.",
        preprocessing=None,
    ),
    replace(
        _MOCO_V3,
        origin="moco-eval, MoCo v3 ResNet",
        marks=(r"^(base_encoder|momentum_encoder\.fc)\.",),
        format=FORMAT,
        source="pretraining/checkpoint.py",
        head=r"base_encoder\.fc\.",
        key_head=r"momentum_encoder\.fc\.",
        preprocessing=None,
    ),
    replace(
        _MOCO,
        origin="moco-eval",
        format=FORMAT,
        source="pretraining/checkpoint.py",
        dropped=(*_QUEUE, _BANK),
        preprocessing=None,
    ),
    Layout(
        "moco-eval safetensors",
        "moco_eval/encoders/export/convert.py",
        format=SAFETENSORS,
        head=r"head\.",
        preprocessing=None,
        settled=True,
    ),
    *CONVOLUTIONAL,
    Layout(
        "OpenSelfSup or mmselfsup 0.x",
        "open-mmlab/OpenSelfSup@1db69ec, mmselfsup@6faad81: models, necks.py",
        marks=(rf"^({_OPENSELFSUP}|encoder_k|target_net|momentum_encoder)\.0\.(?!weight)",),
        query=rf"{_OPENSELFSUP}\.0\.",
        key=r"(encoder_k|target_net|momentum_encoder)\.0\.",
        head=rf"{_OPENSELFSUP}\.1\.(mlp\.|fc\.)",
        key_head=r"(encoder_k|target_net|momentum_encoder)\.1\.(mlp\.|fc\.)",
        names=_OPENMMLAB_VIT,
        dropped=(
            *_QUEUE,
            _MEMORY_BANK,
            (r"(backbone|neck)\.", "backbone, neck", "the query encoder under a second name"),
            (r"head\.", "head", "predictor or prototypes of its training"),
            (r"\w+\.1\.(?!(mlp|fc)\.)", "neck", _OTHER_HEAD),
        ),
    ),
    replace(_MOCO, origin="facebookresearch/moco v2", marks=(r"^encoder_[qk]\.fc\.0\.",)),
    replace(_MOCO, origin="facebookresearch/moco v1", marks=(r"^encoder_[qk]\.fc\.(weight|bias)$",)),
    replace(
        _MOCO,
        origin="facebookresearch/moco CIFAR-10 notebook",
        source="facebookresearch/moco@f736491: colab/moco_cifar10_demo.ipynb",
        marks=(r"^encoder_[qk]\.net\.\d\.",),
        head=r"encoder_q\.net\.9\.",
        key_head=r"encoder_k\.net\.9\.",
        names=_CIFAR_CHILDREN,
        cifar=CIFAR_DEMO,
    ),
    replace(_MOCO, origin="facebookresearch/moco without its head", marks=(r"^encoder_[qk]\.(conv1|bn1|layer\d)\.",)),
    replace(
        _OPENMMLAB,
        origin="OpenMMLab MoCo v3 ViT",
        marks=(r"^momentum_encoder\.module\.0\.layers\.",),
        variants=_TWELVE_HEADS,
    ),
    replace(
        _OPENMMLAB,
        origin="OpenMMLab (mmpretrain, mmselfsup 1.x)",
        marks=(rf"^(backbone\.|{_OPENMMLAB_MOMENTUM}\.0\.)", rf"^(neck\.|head\.|{_OPENMMLAB_MOMENTUM}\.)"),
    ),
    replace(
        _MOCO_V3,
        origin="facebookresearch/moco-v3 ViT",
        marks=(r"^(base|momentum)_encoder\.(blocks|patch_embed|head)\.",),
        head=r"base_encoder\.head\.",
        key_head=r"momentum_encoder\.head\.",
        variants=_TWELVE_HEADS,
    ),
    replace(
        _MOCO_V3,
        origin="facebookresearch/moco-v3 ResNet",
        marks=(r"^(base_encoder|momentum_encoder\.fc)\.",),
        head=r"base_encoder\.fc\.",
        key_head=r"momentum_encoder\.fc\.",
    ),
    Layout(
        "facebookresearch/simsiam",
        "facebookresearch/simsiam@a7bc177: simsiam/builder.py",
        marks=(r"^encoder\.fc\.[0-7]\.",),
        query=r"encoder\.",
        head=r"encoder\.fc\.",
        dropped=(_PREDICTOR,),
    ),
    Layout(
        "facebookresearch/swav or deepcluster-v2",
        "facebookresearch/swav@06b1b7c: src/resnet50.py, main_swav.py, main_deepclusterv2.py",
        marks=(r"^(projection_head\.(0|weight)|prototypes\.)", r"^(conv1|layer\d)\."),
        head=r"projection_head\.",
        dropped=(_PROTOTYPES,),
        preprocessing=SWAV,
    ),
    *TRANSFORMERS_OF_METHODS,
    replace(
        _DINO,
        origin="facebookresearch/dino",
        marks=(r"^(student|teacher)\.backbone\.",),
        dropped=((r"(student|teacher)\.head\.", "heads", _OTHER_HEAD), (r"center$", "centre", _CENTRE[2])),
    ),
    Layout(
        "VISSL",
        "facebookresearch/vissl@09270ed: models/base_ssl_model.py, models/trunks/resnext.py",
        marks=(r"^(trunk\.)?(base_model\.)?_feature_blocks\.",),
        query=r"(trunk\.)?(base_model\.)?_feature_blocks\.",
        dropped=((r"heads\.", "heads", _OTHER_HEAD),),
    ),
    Layout(
        "lucidrains/byol-pytorch",
        "lucidrains/byol-pytorch@2993126: byol_pytorch/byol_pytorch.py",
        marks=(r"^(online|target)_encoder\.net\.",),
        query=r"online_encoder\.net\.",
        key=r"target_encoder\.net\.",
        head=r"online_encoder\.projector\.(net\.)?",
        key_head=r"target_encoder\.projector\.(net\.)?",
        dropped=(
            (r"net\.", "net", "the query encoder under a second name"),
            (r"(online|target)_encoder\.net\.fc\.", "fc", "the wrapped network's own classifier, untrained"),
            _PREDICTOR,
        ),
    ),
    Layout(
        "facebookresearch/barlowtwins",
        "facebookresearch/barlowtwins@8e8d284: main.py",
        marks=(r"^backbone\.", r"^projector\.0\.", r"^bn\.running_"),
        query=r"backbone\.",
        head=r"projector\.",
        dropped=((r"bn\.", "bn", "the batch norm before the cross-correlation"),),
    ),
    replace(
        _SOLO,
        origin="solo-learn MoCo v3 or MAE ViT",
        marks=(r"^backbone\.blocks\.", r"^(predictor\.4\.running_|decoder\.)"),
        variants=_TWELVE_HEADS,
    ),
    replace(
        _SOLO,
        origin="solo-learn",
        marks=(
            r"^(momentum_)?(backbone|encoder)\.",
            r"^(classifier|momentum_projector)\.",
            r"^(momentum_|(projector|predictor|prototypes|head|decoder)\.|queue|local_memory_)",
        ),
    ),
    Layout(
        "facebookresearch/vicreg",
        "facebookresearch/vicreg@4e12602: main_vicreg.py, resnet.py",
        marks=(r"^backbone\.(conv1|layer\d)\.", r"^projector\.\d\."),
        unless=(r"^(?!backbone\.|projector\.)", r"^backbone\.fc\."),
        query=r"backbone\.",
        head=r"projector\.",
    ),
    replace(
        _LIGHTLY_TRAIN,
        origin="lightly-train, student and teacher",
        marks=(r"^(student|teacher)_embedding_model\.",),
        query=rf"student_embedding_model{_TRAIN_BODY}",
        key=rf"teacher_embedding_model{_TRAIN_BODY}",
        usual="key",
    ),
    replace(
        _LIGHTLY_TRAIN,
        origin="lightly-train",
        marks=(r"^((query|key)_encoder\.)?embedding_model\.wrapped_model\.",),
        query=rf"(query_encoder\.)?embedding_model{_TRAIN_BODY}",
        key=rf"key_encoder\.embedding_model{_TRAIN_BODY}",
    ),
    Layout(
        "lightly's own CIFAR ResNet",
        "lightly-ai/lightly@e8d317f: lightly/models/resnet.py",
        marks=(r"^(\w*backbone\w*\.)?[2-5]\.\d\.shortcut\.",),
        refused="it has no ReLU after its first batch norm, as no ResNet of torchvision's, and is not built here; "
        "build it with lightly and give it to moco_eval.wrap",
    ),
    Layout(
        "lightly DINO",
        _LIGHTLY,
        marks=(r"^student_(backbone|head|projection_head)\.",),
        query=r"student_backbone\.(vit\.)?",
        key=r"(teacher_backbone|backbone)\.(vit\.)?",
        usual="key",
        names=_CHILDREN,
        dropped=(
            (r"((student|teacher)_)?(\w+_)?head\.", "heads", _OTHER_HEAD),
            (r"\w+_criterion\.", "criteria", "the centres of the losses"),
            *_LIGHTLY_DROPPED,
        ),
    ),
    Layout(
        "lightly",
        _LIGHTLY,
        marks=(
            rf"^(backbone|{_LIGHTLY_MOMENTUM})\.",
            rf"^({_LIGHTLY_MOMENTUM}|{_LIGHTLY_MOMENTUM_HEAD}|projection_head)\.",
        ),
        query=r"backbone\.(vit\.)?",
        key=rf"{_LIGHTLY_MOMENTUM}\.(vit\.)?",
        head=r"projection_head\.layers\.",
        key_head=rf"{_LIGHTLY_MOMENTUM_HEAD}\.layers\.",
        names=_CHILDREN,
        dropped=_LIGHTLY_DROPPED,
    ),
    Layout(
        "lightly's backbone alone",
        _LIGHTLY,
        marks=(r"^0\.weight$", r"^4\.0\.conv1\.", r"^7\."),
        names=_CHILDREN,
    ),
    Layout(
        "PyContrast or SupContrast",
        "HobbitLong/PyContrast@84f94ea: networks/build_backbone.py; SupContrast@66a8fe5: networks/resnet_big.py",
        marks=(r"^(model\.)?encoder\.(module\.)?(conv1|layer\d)\.", r"^((model|model_ema)\.)?head\."),
        query=r"(model\.)?encoder\.(module\.)?",
        key=r"model_ema\.encoder\.",
        head=r"(model\.)?head\.",
        key_head=r"model_ema\.head\.",
        names=((r"\.shortcut\.", ".downsample."),),
        dropped=((r"(model\.)?head_jig\.", "head_jig", "the head of the jigsaw task"),),
        cifar=CIFAR_DEMO,
    ),
    Layout(
        "kuangliu/pytorch-cifar",
        "kuangliu/pytorch-cifar@6e59390: models/resnet.py, main.py",
        marks=(r"^conv1\.weight$", r"^layer2\.0\.shortcut\.0\."),
        names=((r"\.shortcut\.", ".downsample."),),
        dropped=((r"(linear|fc)\.", "linear", _CLASSIFIER),),
        cifar=CIFAR_DEMO,
    ),
    Layout(
        "leftthomas/MoCo",
        "leftthomas/MoCo@69b40e2: model.py",
        marks=(r"^f\.0\.weight$", r"^f\.[3-6]\."),
        query=r"f\.",
        head=r"g\.",
        names=_CIFAR_CHILDREN,
        dropped=((r".*total_(ops|params)$", "total_ops, total_params", "counts left by a profiler"),),
        cifar=CIFAR_DEMO,
    ),
    Layout(
        "detectron2 MSRA",
        "facebookresearch/detectron2@02b5c4e: checkpoint/c2_model_loading.py, layers/batch_norm.py",
        marks=(r"^res2_0_branch2a_", r"^conv1_w$|^res_conv1_bn_"),
        names=_CAFFE2,
        dropped=(
            (r"conv1_b$", "conv1_b", "a bias that batch norm takes away"),
            (r"(pred|fc1000)_[wb]$", "pred", _CLASSIFIER),
            (r".*_momentum$", "momenta", "the optimiser's"),
        ),
        variants=((r"^(resnet\d+)$", r"\1_msra"),),
        folded=True,
    ),
    Layout(
        "detectron2",
        "facebookresearch/detectron2@02b5c4e: modeling/backbone/resnet.py; tools/convert-torchvision-to-d2.py",
        marks=(r"^(backbone\.(bottom_up\.)?)?res[2-4]\.",),
        query=r"(backbone\.(bottom_up\.)?|roi_heads\.(?=res5\.\d))?",
        head=r"stem\.fc\.",
        names=DETECTRON2,
        dropped=(
            (
                r"backbone\.fpn_|roi_heads\.(?!res5\.\d)|proposal_generator\.",
                "detector",
                "the detector around the backbone",
            ),
            (r"pixel_(mean|std)$", "pixel_mean, pixel_std", "the detector's normalisation"),
        ),
    ),
    Layout(
        "Hugging Face ResNet",
        "huggingface/transformers 5.24: models/resnet/modeling_resnet.py",
        marks=(r"^(resnet\.)?embedder\.embedder\.",),
        query=r"(resnet\.)?",
        names=_HF_RESNET,
        dropped=((r"classifier\.", "classifier", _CLASSIFIER),),
    ),
    Layout(
        "Hugging Face ViT",
        "huggingface/transformers 5.24: models/vit/modeling_vit.py",
        marks=(r"^(vit\.)?embeddings\.patch_embeddings\.projection\.", r"\.layernorm_before\."),
        query=r"(vit\.)?",
        names=_HF_VIT,
        dropped=(
            (r"pooler\.|classifier\.|(vit\.)?pooler\.", "pooler, classifier", _CLASSIFIER),
            (r"decoder\.|(vit\.)?embeddings\.mask_token$", "decoder, mask_token", "for masked pretraining"),
        ),
        preprocessing=HALVES,
        pixel_doubt=_HF_DOUBT,
        norm_eps=1e-12,
    ),
    Layout(
        "torchvision ViT",
        "pytorch/vision 0.29: models/vision_transformer.py",
        marks=(r"^encoder\.layers\.encoder_layer_\d+\.", r"^conv_proj\."),
        names=_TORCHVISION_VIT,
        dropped=((r"heads\.", "heads", _CLASSIFIER),),
        pixel_doubt=_TORCHVISION_DOUBT,
    ),
    Layout(
        "OpenMMLab ViT backbone",
        "open-mmlab/mmpretrain@ee7f2e8: models/backbones/vision_transformer.py",
        marks=(r"^layers\.\d+\.ffn\.layers\.", r"^patch_embed\.projection\."),
        names=_OPENMMLAB_VIT,
        pixel_doubt=_OPENMMLAB_DOUBT,
    ),
    Layout(
        "timm ViT",
        "huggingface/pytorch-image-models 1.0.31: models/vision_transformer.py (DINO, DeiT and MAE name alike)",
        marks=(r"^blocks\.\d+\.", r"^(patch_embed|pos_embed|cls_token|norm)\b"),
        dropped=(
            (r"head(_dist)?\.(?!norm\.)", "head", _CLASSIFIER),  # Hiera's norm stands on the pooled feature
            (r"decoder_|mask_token$", "decoder, mask_token", "for masked pretraining"),
        ),
        pixel_doubt=ANYBODYS_VIT,
        preprocessing=BICUBIC,  # dino@04c0ad9 eval_linear.py, deit@012a100 datasets.py, mae@6a2ba40 main_linprobe.py
    ),
    Layout(
        "torchvision or timm ResNet",
        "pytorch/vision 0.29: models/resnet.py; huggingface/pytorch-image-models 1.0.31: models/resnet.py",
        marks=(r"^(conv1|bn1|fc)\.", r"^layer\d\."),
        dropped=(_FC,),
    ),
    TIMM,
)

# A backbone under a prefix that no row names; `recognise` puts the prefix in.
PREFIXED = Layout(
    "a state dict under the prefix",
    "nothing but the names below the prefix",
    names=_CHILDREN,
)


def completed(pixels: Any, origin: Any) -> Any:
    """What a copy says of its pixels; one of 0.1.0 says no interpolation, which is then its source's layout's."""
    if not isinstance(pixels, dict) or "interpolation" in pixels:
        return pixels
    rows = (row.preprocessing for row in LAYOUTS if row.origin == origin and row.preprocessing)
    return pixels | {"interpolation": next((own.interpolation for own in rows), "bilinear")}
