"""Small files in everybody's layout: each code base's names, restated from its code as a walk from ours to theirs."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco_eval.encoders.architectures import build_backbone, build_resnet, build_transformer
from moco_eval.encoders.load import load
from moco_eval.errors import InputError

ARCH, VIT = "resnet18_quarter", "vit_narrow_patch16_32"
DIM = {ARCH: 128, VIT: 48, "resnet18_quarter_cifar": 128, "resnet50_quarter": 512}
PREPROCESSING = {"size": 64, "resize": 64, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "channels": "RGB"}


def network(seed: int, arch: str = ARCH, head: str = "linear", dim: int = 16) -> nn.Module:
    """A ResNet whose norms look used."""
    torch.manual_seed(seed)
    net = build_resnet(arch, dim)
    if head == "mlp":
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    torch.manual_seed(seed)  # the same statistics under either head
    return used(net, seed)


def used(net: nn.Module, seed: int) -> nn.Module:
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(seed + 7)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return net


def transformer(seed: int, arch: str = VIT) -> nn.Module:
    torch.manual_seed(seed)
    return used(build_transformer(arch), seed)


def body(seed: int, arch: str = ARCH) -> dict[str, Tensor]:
    """A backbone's tensors under the names it is built with here."""
    return {name: tensor.clone() for name, tensor in _body(seed, arch).items()}


@cache
def _body(seed: int, arch: str) -> dict[str, Tensor]:
    if arch.startswith("timm:"):
        torch.manual_seed(seed)
        return dict(used(build_backbone(arch, fork=False), seed).state_dict())
    net = transformer(seed, arch) if arch.startswith("vit") else network(seed, arch)
    return {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("fc.")}


def under(prefix: str, tensors: dict[str, Tensor], rename: Callable[[str], str] = lambda name: name) -> dict:
    return {prefix + rename(name): tensor for name, tensor in tensors.items()}


def written(folder: Path, values: object, name: str = "encoder.pth") -> str:
    torch.save(values, folder / name)
    return str(folder / name)


def error(source: str, **given) -> str:
    """The one line with which a load is refused."""
    with pytest.raises(InputError) as caught:
        load(source, **given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Projection heads


def linear(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(width, 16)


def mlp(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16))


def with_norms(width: int, seed: int = 0, last: bool = True, bias: bool = False) -> nn.Sequential:
    """Three layers with batch norms, as SimSiam, Barlow Twins, VICReg and MoCo v3 have."""
    torch.manual_seed(seed)
    layers = [nn.Linear(width, 32, bias=bias), nn.BatchNorm1d(32), nn.ReLU()]
    layers += [nn.Linear(32, 32, bias=bias), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=last)]
    return used(nn.Sequential(*layers, *([nn.BatchNorm1d(16, affine=False)] if last else [])), seed)


def queue() -> dict[str, Tensor]:
    return {"queue": torch.randn(16, 32), "queue_ptr": torch.zeros(1, dtype=torch.int64)}


# Names, from ours to theirs


def children(name: str) -> str:
    """nn.Sequential(*list(resnet.children())): conv1 bn1 relu maxpool layer1 ..."""
    first, _, rest = name.partition(".")
    places = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return f"{places.index(first)}.{rest}"


def cifar_children(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{['conv1', 'bn1', 'relu', 'layer1', 'layer2', 'layer3', 'layer4'].index(first)}.{rest}"


def detectron2(name: str) -> str:
    """The official converter's rules, as a plain walk over the parts of a name."""
    parts = name.split(".")
    if not any("layer" in part for part in parts):
        parts = ["stem", *parts]
    renamed: list[str] = []
    position = 0
    while position < len(parts):
        part, after = parts[position], parts[position + 1 : position + 2]
        if part in ("layer1", "layer2", "layer3", "layer4"):
            renamed.append(f"res{int(part[-1]) + 1}")
        elif part in ("bn1", "bn2", "bn3"):
            renamed += [f"conv{part[-1]}", "norm"]
        elif part == "downsample":
            renamed += ["shortcut"] if after == ["0"] else ["shortcut", "norm"]
            position += 1
        else:
            renamed.append(part)
        position += 1
    return ".".join(renamed)


def caffe2(name: str) -> str:
    """Detectron's names: branch1 is the shortcut, branch2a to c the convolutions, s and b scale and shift."""
    parts = name.split(".")
    ending = {"weight": "w" if "conv" in name or "downsample.0" in name else "s", "bias": "b"}[parts[-1]]
    if parts[0] == "conv1":
        return "conv1_w"
    if parts[0] == "bn1":
        return f"res_conv1_bn_{ending}"
    block = f"res{int(parts[0][-1]) + 1}_{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}_branch1_{ending}" if parts[3] == "0" else f"{block}_branch1_bn_{ending}"
    letter = "abc"[int(parts[2][-1]) - 1]
    return f"{block}_branch2{letter}_{'bn_' if parts[2].startswith('bn') else ''}{ending}"


def hf_resnet(name: str) -> str:
    parts = name.split(".")
    kind = {"conv": "convolution", "bn": "normalization"}
    if not parts[0].startswith("layer"):
        return f"embedder.embedder.{kind[parts[0][:-1]]}.{parts[-1]}"
    block = f"encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}.shortcut.{'convolution' if parts[3] == '0' else 'normalization'}.{parts[-1]}"
    return f"{block}.layer.{int(parts[2][-1]) - 1}.{kind[parts[2][:-1]]}.{parts[-1]}"


def walk(table: dict[str, str], name: str) -> str:
    """A ViT's name with the first part that the table knows replaced, and its block's number kept."""
    block = re.match(r"blocks\.(\d+)\.(.*)", name)
    inner = block[2] if block else name
    for ours, theirs in table.items():
        if inner.startswith(ours):
            theirs = theirs + inner[len(ours) :]
            return theirs if not block else table["blocks"].format(block[1]) + theirs
    raise KeyError(name)


HF_VIT_FILE = {
    "blocks": "encoder.layer.{}.",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "attn.": "attention.attention.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}
HF_VIT_MEMORY = HF_VIT_FILE | {
    "blocks": "layers.{}.",
    "attn.proj": "attention.o_proj",
    "attn.query": "attention.q_proj",
    "attn.key": "attention.k_proj",
    "attn.value": "attention.v_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HF_VIT_MEMORY = {key: HF_VIT_MEMORY[key] for key in sorted(HF_VIT_MEMORY, key=len, reverse=True)}
OPENMMLAB_VIT = {
    "blocks": "layers.{}.",
    "patch_embed.proj": "patch_embed.projection",
    "attn.": "attn.",
    "norm1": "ln1",
    "norm2": "ln2",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
    "norm": "ln1",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
}
TORCHVISION_VIT = {
    "blocks": "encoder.layers.encoder_layer_{}.",
    "patch_embed.proj": "conv_proj",
    "attn.qkv.": "self_attention.in_proj_",
    "attn.proj": "self_attention.out_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
    "norm": "encoder.ln",
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
}


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as three tensors."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            parts |= {name.replace("qkv", word): part for word, part in zip(("query", "key", "value"), tensor.chunk(3))}
        else:
            parts[name] = tensor
    return parts


# The files


@dataclass
class File:
    """A checkpoint in somebody's layout.

    Attributes:
        origin: whose it must be recognised as.
        values: what the file holds.
        at: where in it the evaluated backbone's tensors are, key by key.
        prefix, names: what precedes them, and their names from ours.
        head: the projection head that must come back; None where none is read.
        other: prefix of the other encoder's backbone; None where there is none.
        arch: what it must be taken for.
        given: further arguments of its load.
    """

    origin: str
    values: dict
    at: tuple[str, ...]
    prefix: str
    names: Callable[[str], str] = lambda name: name
    head: nn.Module | None = None
    other: str | None = None
    built: str = ARCH
    arch: str = ""
    usual: str = "query"
    given: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    def tensors(self) -> dict:
        inner = self.values
        for key in self.at:
            inner = inner[key]
        return inner

    def name(self, ours: str) -> str:
        return self.prefix + self.names(ours)


def nested(at: tuple[str, ...], tensors: dict, **beside) -> dict:
    for key in reversed(at):
        tensors = {key: tensors, **beside}
        beside = {}
    return tensors


def two(first: str, second: str, names=lambda name: name, arch: str = ARCH, change=lambda tensors: tensors) -> dict:
    """Query and momentum backbone under their prefixes."""
    return {**under(first, change(body(0, arch)), names), **under(second, change(body(1, arch)), names)}


def heads(first: str, second: str, make: Callable = mlp, width: int = 128) -> dict:
    return {**under(first, make(width, 0).state_dict()), **under(second, make(width, 1).state_dict())}


def moco(head: Callable, module: str = "module.") -> dict:
    state = two("encoder_q.", "encoder_k.") | heads("encoder_q.fc.", "encoder_k.fc.", head) | queue()
    return under(module, state)


def ours() -> dict:
    return {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": moco(mlp),
        "optimizer": {"state": {}},
        "step": 30,
        "sampler": {"seed": 0},
        "unreadable": [7],
        "rng": [],
        "config": {"arch": ARCH},
        "preprocessing": PREPROCESSING,
        "pretraining": {"protocol": "pretrain/moco-v2@1", "dataset": {"name": "digits"}, "epochs": 3, "deviations": []},
        "format": "moco-eval/1",
    }


def _state(tensors: dict, **beside) -> dict:
    return nested(("state_dict",), tensors, epoch=3, **beside)


STATE = ("state_dict",)
RESNET_HEAD, VIT_HEAD = DIM[ARCH], DIM[VIT]


def _ours() -> File:
    return File("moco-eval", ours(), STATE, "module.encoder_q.", head=mlp(128), other="module.encoder_k.")


def _ours_bank() -> File:
    """One encoder and a slot for each image."""
    state = {name: tensor for name, tensor in moco(mlp).items() if "encoder_q" in name}
    values = ours() | {"state_dict": state | {"module.bank": torch.randn(40, 16)}}
    return File("moco-eval", values, STATE, "module.encoder_q.", head=mlp(128))


def _ours_end_to_end() -> File:
    """Two encoders and no dictionary: the next batch brings its own."""
    values = ours() | {"state_dict": {name: t for name, t in moco(mlp).items() if "queue" not in name}}
    return File("moco-eval", values, STATE, "module.encoder_q.", head=mlp(128), other="module.encoder_k.")


def _moco(version: str, head: Callable, module: str) -> File:
    origin = f"facebookresearch/moco {version}"
    values = _state(moco(head, module), optimizer={})
    return File(origin, values, STATE, f"{module}encoder_q.", head=head(128), other=f"{module}encoder_k.")


def _moco_released() -> File:
    state = {name: tensor for name, tensor in moco(mlp).items() if "encoder_q" in name}
    return File("facebookresearch/moco v2", _state(state), STATE, "module.encoder_q.", head=mlp(128))


def _moco_headless() -> File:
    state = two("module.encoder_q.", "module.encoder_k.")
    origin, other = "facebookresearch/moco without its head", "module.encoder_k."
    return File(origin, _state(state), STATE, "module.encoder_q.", other=other)


def _notebook() -> File:
    arch = "resnet18_quarter_cifar"
    prefix, other = "encoder_q.net.", "encoder_k.net."
    state = two(prefix, other, cifar_children, arch) | heads(f"{prefix}9.", f"{other}9.", linear) | queue()
    origin = "facebookresearch/moco CIFAR-10 notebook"
    return File(origin, _state(state), STATE, prefix, cifar_children, linear(128), other, built=arch)


def _moco_v3(arch: str, head: str) -> File:
    vit = arch == VIT
    prefix, other = "module.base_encoder.", "module.momentum_encoder."
    state = two(prefix, other, arch=arch) | heads(f"{prefix}{head}.", f"{other}{head}.", with_norms, DIM[arch])
    state |= under("module.predictor.", with_norms(16).state_dict())
    origin = f"facebookresearch/moco-v3 {'ViT' if vit else 'ResNet'}"
    taken = VIT.replace("_patch", "_12h_patch") if vit else arch
    made = with_norms(DIM[arch])
    return File(origin, _state(state, scaler={}), STATE, prefix, head=made, other=other, built=arch, arch=taken)


def _simsiam() -> File:
    state = under("module.encoder.", body(0)) | under("module.encoder.fc.", with_norms(128).state_dict())
    state |= under("module.predictor.", mlp(16).state_dict())
    return File("facebookresearch/simsiam", _state(state), STATE, "module.encoder.", head=with_norms(128))


def _swav(prototypes: str, wrapped: bool) -> File:
    made = used(nn.Sequential(nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)), 0)
    state = under("module.", body(0)) | under("module.projection_head.", made.state_dict())
    state |= {f"module.{prototypes}.weight": torch.randn(30, 16)}
    origin = "facebookresearch/swav or deepcluster-v2"
    return File(origin, _state(state) if wrapped else state, STATE if wrapped else (), "module.", head=made)


def _dino(arch: str) -> File:
    """The teacher of a ViT is not wrapped, because it has no batch norm to keep equal."""
    at = "" if arch == VIT else "module."
    students = under("module.backbone.", body(0, arch)) | under("module.head.mlp.", mlp(DIM[arch]).state_dict())
    teachers = under(f"{at}backbone.", body(1, arch)) | {f"{at}head.last_layer.weight_g": torch.ones(9, 1)}
    values = {"student": students, "teacher": teachers, "optimizer": {}, "epoch": 3, "dino_loss": {"center": 0.0}}
    origin, prefix = "facebookresearch/dino", "module.backbone."
    return File(origin, values, ("student",), prefix, other=f"{at}backbone.", built=arch, usual="key")


def _vissl() -> File:
    trunk, classifier = under("_feature_blocks.", body(0)), {"0.clf.0.weight": torch.randn(3, 128)}
    model = {"trunk": trunk, "heads": classifier}
    at = ("classy_state_dict", "base_model", "model", "trunk")
    values = {"phase_idx": 1, "classy_state_dict": {"train": True, "base_model": {"model": model, "meta": {}}}}
    return File("VISSL", values, at, "_feature_blocks.")


def _byol() -> File:
    prefix, other = "online_encoder.net.", "target_encoder.net."
    made = used(nn.Sequential(nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)), 0)
    state = two(prefix, other) | under("online_encoder.projector.", made.state_dict())
    state |= under("net.", body(0)) | under("target_encoder.projector.", made.state_dict())
    state |= under("online_predictor.", mlp(16).state_dict()) | under(f"{prefix}fc.", linear(128).state_dict())
    return File("lucidrains/byol-pytorch", state, (), prefix, head=made, other=other)


def _barlow() -> File:
    made = with_norms(128, last=False)
    state = under("module.backbone.", body(0)) | under("module.projector.", made.state_dict())
    state |= under("module.bn.", nn.BatchNorm1d(16, affine=False).state_dict())
    values = {"epoch": 3, "model": state, "optimizer": {}}
    return File("facebookresearch/barlowtwins", values, ("model",), "module.backbone.", head=made)


def _vicreg() -> File:
    made = with_norms(128, last=False, bias=True)
    state = under("module.backbone.", body(0)) | under("module.projector.", made.state_dict())
    return File("facebookresearch/vicreg", {"epoch": 3, "model": state}, ("model",), "module.backbone.", head=made)


def _solo(first: str, second: str) -> File:
    state = two(first, second) | heads("projector.", "momentum_projector.") | {"queue": torch.randn(2, 16, 32)}
    state |= {"queue_ptr": torch.zeros(1, dtype=torch.int64)} | under("classifier.", linear(128).state_dict())
    values = _state(state, callbacks={}, optimizer_states=[], lr_schedulers=[])
    return File("solo-learn", values, STATE, first, head=mlp(128), other=second)


def _solo_v3() -> File:
    state = two("backbone.", "momentum_backbone.", arch=VIT) | under("classifier.", linear(48).state_dict())
    state |= heads("projector.", "momentum_projector.", with_norms, 48)
    predictor = used(nn.Sequential(*list(with_norms(16))[:4], nn.BatchNorm1d(32, affine=False)), 0)
    state |= under("predictor.", predictor.state_dict())
    taken = VIT.replace("_patch", "_12h_patch")
    head = with_norms(48)
    origin, other = "solo-learn MoCo v3 or MAE ViT", "momentum_backbone."
    return File(origin, _state(state), STATE, "backbone.", head=head, other=other, built=VIT, arch=taken)


def _lightly(momentum: str, momentum_head: str, names: Callable = children) -> File:
    state = two("backbone.", f"{momentum}.", names)
    state |= heads("projection_head.layers.", f"{momentum_head}.layers.")
    values = _state(state, **{"pytorch-lightning_version": "2.6", "loops": {}})
    return File("lightly", values, STATE, "backbone.", names, mlp(128), f"{momentum}.")


def _lightly_dino() -> File:
    state = two("student_backbone.", "teacher_backbone.", children) | {"student_head.layers.0.weight": torch.ones(2, 2)}
    origin, other = "lightly DINO", "teacher_backbone."
    return File(origin, _state(state), STATE, "student_backbone.", children, other=other, usual="key")


def _lightly_alone() -> File:
    return File("lightly's backbone alone", under("", body(0), children), (), "", children)


def _lightly_train(body_name: str) -> File:
    prefix = f"embedding_model.wrapped_model.{body_name}."
    state = under(prefix, body(0)) | {f"{prefix}fc.weight": torch.randn(9, 128), f"{prefix}fc.bias": torch.randn(9)}
    state |= under("projection_head.layers.", mlp(128).state_dict())
    return File("lightly-train", _state(state), STATE, prefix)


def _lightly_train_pair() -> File:
    first, second = (f"{who}_embedding_model.wrapped_model._model." for who in ("student", "teacher"))
    state = two(first, second) | {"criterion.center": torch.zeros(1, 1, 9), "student_head.mlp.0.weight": torch.ones(2)}
    origin = "lightly-train, student and teacher"
    return File(origin, _state(state), STATE, first, other=second, usual="key")


def _openmmlab() -> File:
    other = "encoder_k.module.0."
    state = two("backbone.", other) | heads("neck.mlp.", "encoder_k.module.1.mlp.") | queue()
    state |= {"encoder_k.steps": torch.tensor(9)}
    origin = "OpenMMLab (mmpretrain, mmselfsup 1.x)"
    return File(origin, _state(state, meta={"epoch": 3}), STATE, "backbone.", head=mlp(128), other=other)


def _openmmlab_v3() -> File:
    names = lambda name: walk(OPENMMLAB_VIT, name)  # noqa: E731
    other = "momentum_encoder.module.0."
    state = two("backbone.", other, names, VIT) | {"neck.fc0.weight": torch.ones(2, 2), "neck.bn0.bias": torch.ones(2)}
    taken = VIT.replace("_patch", "_12h_patch")
    return File("OpenMMLab MoCo v3 ViT", _state(state), STATE, "backbone.", names, other=other, built=VIT, arch=taken)


def _openselfsup() -> File:
    state = two("encoder_q.0.", "encoder_k.0.") | heads("encoder_q.1.mlp.", "encoder_k.1.mlp.") | queue()
    state |= under("backbone.", body(0)) | under("neck.mlp.", mlp(128).state_dict())
    origin, other = "OpenSelfSup or mmselfsup 0.x", "encoder_k.0."
    return File(origin, _state(state, meta={}), STATE, "encoder_q.0.", head=mlp(128), other=other)


def _openmmlab_vit() -> File:
    names = lambda name: walk(OPENMMLAB_VIT, name)  # noqa: E731
    values = _state(under("", body(0, VIT), names), author="MMSelfSup")
    return File("OpenMMLab ViT backbone", values, STATE, "", names, built=VIT)


def _pycontrast() -> File:
    first = under("module.encoder.", body(0)) | under("module.head.", mlp(128).state_dict())
    second = under("encoder.", body(1)) | under("head.", mlp(128, 1).state_dict())
    values = {"model": first, "model_ema": second, "contrast": {"memory": torch.randn(9, 16)}, "epoch": 3}
    return File("PyContrast or SupContrast", values, ("model",), "module.encoder.", head=mlp(128), other="encoder.")


def _kuangliu() -> File:
    arch = "resnet18_quarter_cifar"
    names = lambda name: name.replace(".downsample.", ".shortcut.")  # noqa: E731
    state = under("module.", body(0, arch), names) | {
        "module.linear.weight": torch.ones(10, DIM[arch]),
        "module.linear.bias": torch.ones(10),
    }
    values = {"net": state, "acc": 91.2, "epoch": 3}
    return File("kuangliu/pytorch-cifar, in 'net'", values, ("net",), "module.", names, built=arch)


def _leftthomas() -> File:
    arch = "resnet18_quarter_cifar"
    state = under("f.", body(0, arch), cifar_children) | under("g.", with_norms(128, last=False).state_dict())
    state |= {"f.total_ops": torch.zeros(1, dtype=torch.float64)}
    return File("leftthomas/MoCo", state, (), "f.", cifar_children, with_norms(128, last=False), built=arch)


def _detectron2(prefix: str) -> File:
    """A detector around the backbone, or the backbone alone with the head that MoCo's converter leaves in."""
    res5 = "roi_heads." if prefix == "backbone." else prefix
    state = {(res5 if "layer4" in n else prefix) + detectron2(n): tensor for n, tensor in body(0).items()}
    head = None if prefix else mlp(128)
    state |= (
        under("stem.fc.", head.state_dict()) if head else {"proposal_generator.rpn_head.conv.weight": torch.ones(1)}
    )
    return File("detectron2", {"model": state, "iteration": 3}, ("model",), prefix, detectron2, head)


def _msra() -> File:
    arch = "resnet50_quarter"
    tensors = {n: t for n, t in body(0, arch).items() if n.endswith(("weight", "bias"))}
    state = {caffe2(name): tensor for name, tensor in tensors.items()}
    state |= {"pred_w": torch.ones(3, 512), "pred_b": torch.ones(3), "conv1_w_momentum": torch.ones(3)}
    return File("detectron2 MSRA", state, (), "", caffe2, built=arch)


def _hf_resnet(prefix: str) -> File:
    state = under(prefix, body(0), hf_resnet)
    state |= {"classifier.1.weight": torch.ones(3, 128), "classifier.1.bias": torch.ones(3)} if prefix else {}
    return File("Hugging Face ResNet", state, (), prefix, hf_resnet)


def _hf_vit(prefix: str, table: dict) -> File:
    names = lambda name: walk(table, name)  # noqa: E731
    state = under(prefix, apart(body(0, VIT)), names)
    state |= {"classifier.bias": torch.ones(3)} if prefix else {"pooler.dense.bias": torch.ones(3)}
    return File("Hugging Face ViT", state, (), prefix, names, built=VIT)


def _torchvision_vit() -> File:
    names = lambda name: walk(TORCHVISION_VIT, name)  # noqa: E731
    state = under("", body(0, VIT), names) | {"heads.head.bias": torch.ones(3)}
    return File("torchvision ViT", state, (), "", names, built=VIT)


def _timm_vit() -> File:
    return File("timm ViT", body(0, VIT) | {"head.bias": torch.ones(3)}, (), "", built=VIT)


def _torchvision(module: str, wrapped: bool) -> File:
    state = under(module, body(0)) | under(f"{module}fc.", linear(128).state_dict())
    values = _state(state, best_acc1=1.0) if wrapped else state
    return File("torchvision or timm ResNet", values, STATE if wrapped else (), module)


def _lightning() -> File:
    state = under("model.", body(0)) | under("model.fc.", linear(128).state_dict())
    return File("torchvision or timm ResNet, under 'model.'", _state(state), STATE, "model.")


def _prefixed() -> File:
    state = two("my.net.", "my.ema.net.") | {"my.temperature": torch.ones(1)}
    return File("a state dict under the prefix 'my.net.'", state, (), "my.net.", other="my.ema.net.")


FILES: dict[str, Callable[[], File]] = {
    "ours": _ours,
    "ours, memory bank": _ours_bank,
    "ours, end-to-end": _ours_end_to_end,
    "moco v1": lambda: _moco("v1", linear, "module."),
    "moco v2": lambda: _moco("v2", mlp, "module."),
    "moco v1 without DDP": lambda: _moco("v1", linear, ""),
    "moco v2 compiled": lambda: _moco("v2", mlp, "_orig_mod.module."),
    "moco v2 released": _moco_released,
    "moco without its head": _moco_headless,
    "moco CIFAR-10 notebook": _notebook,
    "moco-v3 ResNet": lambda: _moco_v3(ARCH, "fc"),
    "moco-v3 ViT": lambda: _moco_v3(VIT, "head"),
    "simsiam": _simsiam,
    "swav": lambda: _swav("prototypes", False),
    "deepcluster-v2": lambda: _swav("prototypes.prototypes0", True),
    "dino ResNet": lambda: _dino(ARCH),
    "dino ViT": lambda: _dino(VIT),
    "vissl": _vissl,
    "byol-pytorch": _byol,
    "barlow twins": _barlow,
    "vicreg": _vicreg,
    "solo-learn": lambda: _solo("backbone.", "momentum_backbone."),
    "solo-learn 2021": lambda: _solo("encoder.", "momentum_encoder."),
    "solo-learn MoCo v3": _solo_v3,
    "lightly example": lambda: _lightly("backbone_momentum", "projection_head_momentum"),
    "lightly benchmark": lambda: _lightly("key_backbone", "key_projection_head", lambda name: name),
    "lightly DINO": _lightly_dino,
    "lightly backbone": _lightly_alone,
    "lightly-train torchvision": lambda: _lightly_train("_features"),
    "lightly-train timm": lambda: _lightly_train("_model"),
    "lightly-train DINO": _lightly_train_pair,
    "OpenMMLab MoCo": _openmmlab,
    "OpenMMLab MoCo v3": _openmmlab_v3,
    "OpenSelfSup": _openselfsup,
    "OpenMMLab ViT": _openmmlab_vit,
    "PyContrast": _pycontrast,
    "kuangliu": _kuangliu,
    "leftthomas": _leftthomas,
    "detectron2 C4 detector": lambda: _detectron2("backbone."),
    "detectron2 FPN detector": lambda: _detectron2("backbone.bottom_up."),
    "detectron2 backbone": lambda: _detectron2(""),
    "detectron2 MSRA": _msra,
    "Hugging Face ResNet": lambda: _hf_resnet(""),
    "Hugging Face ResNet classifier": lambda: _hf_resnet("resnet."),
    "Hugging Face ViT": lambda: _hf_vit("", HF_VIT_FILE),
    "Hugging Face ViT in memory": lambda: _hf_vit("vit.", HF_VIT_MEMORY),
    "torchvision ViT": _torchvision_vit,
    "timm ViT": _timm_vit,
    "torchvision": lambda: _torchvision("", False),
    "torchvision under state_dict": lambda: _torchvision("module.", True),
    "LightningModule": _lightning,
    "unknown prefix": _prefixed,
}


def as_arrays(values: dict) -> dict:
    """Tensors as numpy arrays, as a .pkl has them."""
    return {
        name: as_arrays(value) if isinstance(value, dict) else np.asarray(value) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
