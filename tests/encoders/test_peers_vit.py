"""Transformers against the libraries themselves: small networks on random weights, saved as each library saves them.

The pooled feature, the stages and the patch tokens agree within 1e-5 of the largest value.
"""

from pathlib import Path

import pytest
import torch
from checkpoints import used
from torch import Tensor, nn

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load

SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 16}


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def require_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def random(net: nn.Module) -> nn.Module:
    """Every parameter drawn, LayerScale, positions and tokens too."""
    torch.manual_seed(0)
    for parameter in used(net, 0).parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def patches(tokens: Tensor) -> Tensor:
    """(N, L, C) as (N, C, H, W)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


@torch.no_grad()
def require_last_tokens(encoder: Encoder, tokens: Tensor, size: int, prefix: int) -> None:
    """The last stage's patch tokens, and class token, against the library's normalised ones."""
    outputs = encoder.network.outputs(images(size), ["blocks.1"])
    require_close(outputs.maps["blocks.1"], patches(tokens[:, prefix:]))
    if prefix:
        require_close(outputs.tokens["blocks.1"], tokens[:, 0])


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[peers]')")


def both_ways(net: nn.Module, folder: Path) -> list[Path]:
    """As save_pretrained writes it, and as torch.save of what is in memory does."""
    net.save_pretrained(folder / "hub")
    (folder / "hub" / "config.json").rename(folder / "config.aside")
    torch.save(net.state_dict(), folder / "memory.bin")
    return [folder / "hub" / "model.safetensors", folder / "memory.bin"]


@pytest.mark.peers
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [518, 224])
@torch.no_grad()
def test_hugging_faces_dinov2(transformers, swiglu, registers, size, tmp_path):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    shape = SHAPE | {"image_size": size, "patch_size": 14}
    net = random(
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(use_swiglu_ffn=swiglu, **shape))
    )
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        tokens = net(images(224)).last_hidden_state
        require_close(encoder.backbone(images(224)), tokens[:, 0])
        require_last_tokens(encoder, tokens, 224, 5 if registers else 1)
        assert encoder.origin == "Hugging Face DINOv2" + (" with registers" if registers else "")
        assert any("positions" in warning for warning in encoder.warnings) == (size == 518)


@pytest.mark.peers
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_hugging_faces_dinov3(transformers, gated, tmp_path):
    mlp = {"intermediate_size": 192, "use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    config = transformers.DINOv3ViTConfig(num_register_tokens=4, **mlp, **SHAPE)
    net = random(transformers.DINOv3ViTModel(config))
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        tokens = net(images(64)).last_hidden_state
        require_close(encoder.backbone(images(64)), tokens[:, 0])
        require_last_tokens(encoder, tokens, 64, 5)
        assert encoder.origin == "Hugging Face DINOv3" and encoder.network.pooling == "class token"


@pytest.mark.peers
@torch.no_grad()
def test_hugging_faces_ijepa(transformers, tmp_path):
    net = random(transformers.IJepaModel(transformers.IJepaConfig(intermediate_size=192, **SHAPE)))
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        tokens = net(images(32)).last_hidden_state
        require_close(encoder.backbone(images(32)), tokens.mean(dim=1))
        require_last_tokens(encoder, tokens, 32, 0)
        assert encoder.origin == "Hugging Face I-JEPA" and encoder.network.pooling == "mean of the patch tokens"


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
@torch.no_grad()
def test_hugging_faces_clip(transformers, kind, tmp_path):
    vision = transformers.CLIPVisionConfig(intermediate_size=192, projection_dim=16, **SHAPE)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    whole = kind == "CLIPModel"
    config = (
        transformers.CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=16)
        if whole
        else vision
    )
    net = random(getattr(transformers, kind)(config))
    inner = net if kind == "CLIPVisionModel" else net.vision_model
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        outputs = inner(images(32))
        require_close(encoder.backbone(images(32)), outputs.pooler_output)
        assert encoder.origin == "Hugging Face CLIP" and "quick" in encoder.arch
        if kind != "CLIPVisionModel":
            require_close(encoder.head(outputs.pooler_output), net.visual_projection(outputs.pooler_output))


@pytest.mark.peers
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_hugging_faces_siglip(transformers, whole, tmp_path):
    vision = transformers.SiglipVisionConfig(intermediate_size=192, **SHAPE)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    if whole:
        net = random(
            transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision.to_dict()))
        )
        inner = net.vision_model
    else:
        net = inner = random(transformers.SiglipVisionModel(vision))
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        outputs = inner(images(32))
        require_close(encoder.backbone(images(32)), outputs.pooler_output)
        require_last_tokens(encoder, outputs.last_hidden_state, 32, 0)
        assert encoder.origin == "Hugging Face SigLIP"
        assert encoder.network.pooling == "attention over the patch tokens"


@pytest.mark.peers
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["BeitModel", "BeitForImageClassification", "Data2VecVisionForImageClassification"])
@torch.no_grad()
def test_hugging_faces_beit(transformers, kind, shared, tmp_path):
    config = f"{'Beit' if kind.startswith('Beit') else 'Data2VecVision'}Config"
    positions = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    net = random(
        getattr(transformers, kind)(getattr(transformers, config)(intermediate_size=192, **positions, **SHAPE))
    )
    inner = net if kind == "BeitModel" else net.beit if kind.startswith("Beit") else net.data2vec_vision
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        require_close(encoder.backbone(images(32)), inner(images(32)).pooler_output)
        assert encoder.origin == "Hugging Face BEiT or data2vec"


@pytest.mark.peers
@torch.no_grad()
def test_hugging_faces_beit_of_pretraining(transformers, tmp_path):
    config = transformers.BeitConfig(
        intermediate_size=192, use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=9, **SHAPE
    )
    net = random(transformers.BeitForMaskedImageModeling(config))
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        tokens = net.layernorm(net.beit(images(32)).last_hidden_state)
        require_close(encoder.backbone(images(32)), tokens[:, 1:].mean(dim=1))


@pytest.mark.peers
@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_open_clip(quick, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (pip install '.[peers]')")
    vision = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    net = random(open_clip.model.CLIP(16, vision, text, quick_gelu=quick))
    torch.save(net.state_dict(), tmp_path / "whole.pt")
    torch.save(net.visual.state_dict(), tmp_path / "tower.pt")
    for path in (tmp_path / "whole.pt", tmp_path / "tower.pt"):
        encoder = load(str(path))
        assert any("QuickGELU" in warning for warning in encoder.warnings)
        if quick:
            encoder = load(str(path), arch=f"{encoder.arch},act_layer=quick_gelu")
            assert not any("QuickGELU" in warning for warning in encoder.warnings)
        require_close(encoder.head(encoder.backbone(images(32))), net.encode_image(images(32)))


# lightly's examples, which are scripts: their modules under the same names, small


def module(**parts: nn.Module) -> nn.Module:
    whole = nn.Module()
    for name, part in parts.items():
        setattr(whole, name, part)
    return whole


def lightlys(method: str) -> tuple[nn.Module, str]:
    """A method's modules under its example's names, and the one whose class token is evaluated."""
    modules = pytest.importorskip("lightly.models.modules", reason="lightly is not installed (pip install '.[peers]')")
    from lightly.loss import DINOLoss
    from lightly.models.modules import heads
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import VisionTransformer as TorchvisionTransformer

    def timms(**given) -> nn.Module:
        net = VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, **given)
        return modules.MaskedVisionTransformerTIMM(vit=net, pos_embed_initialization="skip")

    def torchvisions() -> nn.Module:
        net = TorchvisionTransformer(32, 16, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192)
        return modules.MaskedVisionTransformerTorchvision(vit=net)

    def dino() -> nn.Module:
        return heads.DINOProjectionHead(48, 16, 8, 9)

    if method in ("ibot", "dinov2", "capi"):
        given = {"reg_tokens": 7} if method == "capi" else {"init_values": 1e-5}
        whole = module(teacher_backbone=timms(**given), student_backbone=timms(**given))
        whole.student_head, whole.teacher_head = dino(), dino()
        if method == "ibot":
            whole.student_cls_head, whole.teacher_patch_head = whole.student_head, whole.teacher_head
            whole.cls_criterion = DINOLoss(output_dim=9)
        if method == "dinov2":
            whole.student_head = module(dino_head=dino(), ibot_head=dino())
        return whole, "teacher_backbone"
    if method == "pixio":
        decoder = {
            "decoder_embed": nn.Linear(48, 32),
            "decoder": nn.Linear(32, 32),
            "prediction_head": nn.Linear(32, 9),
        }
        return module(backbone=timms(reg_tokens=7), **decoder), "backbone"
    whole = module(backbone=torchvisions())
    if method == "msn":
        whole.anchor_backbone = torchvisions()
        whole.projection_head, whole.anchor_projection_head = (heads.MSNProjectionHead(48, 16, 8) for _ in range(2))
        whole.prototypes = nn.Linear(8, 9, bias=False).weight
    else:
        whole.decoder, whole.mask_token = nn.Linear(48, 9), nn.Parameter(torch.zeros(1, 1, 48))
    return whole, "backbone"


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("method", ["ibot", "dinov2", "capi", "pixio", "msn", "simmim"])
@torch.no_grad()
def test_lightlys_examples(method, tmp_path):
    whole, name = lightlys(method)
    random(whole)
    beside = {"epoch": 3, "pytorch-lightning_version": "2.6", "loops": {}, "global_step": 9}
    torch.save({"state_dict": whole.state_dict(), **beside}, tmp_path / "x.ckpt")
    encoder = load(str(tmp_path / "x.ckpt"))
    require_close(encoder.backbone(images(32)), getattr(whole, name).encode(images(32))[:, 0])
    assert encoder.which == ("query" if method in ("pixio", "simmim") else "key")


@pytest.mark.peers
@torch.no_grad()
def test_lightlys_aim(tmp_path):
    """Its causal network evaluated with attention to all patches is timm's."""
    modules = pytest.importorskip("lightly.models.modules", reason="lightly is not installed (pip install '.[peers]')")
    import timm
    from lightly.models.modules.masked_causal_vision_transformer import MaskedCausalVisionTransformer

    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    shape |= {"class_token": False, "no_embed_class": True, "global_pool": "avg"}
    net = MaskedCausalVisionTransformer(**shape)
    whole = random(module(backbone=net, projection_head=modules.AIMPredictionHead(48, 9, num_blocks=1)))
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "x.ckpt")
    encoder = load(str(tmp_path / "x.ckpt"))
    theirs = timm.models.VisionTransformer(**shape).eval()
    theirs.load_state_dict(net.state_dict())
    require_close(encoder.backbone(images(32)), theirs(images(32)))


# Settings beside the weights


@pytest.mark.peers
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_hugging_faces_settings_say_the_activation(transformers, activation, tmp_path):
    """And the heads, which another library's default would have wrong."""
    shape = SHAPE | {"num_attention_heads": 6}
    net = random(
        transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(intermediate_size=192, hidden_act=activation, **shape)
        )
    )
    net.save_pretrained(tmp_path)
    encoder = load(str(tmp_path / "model.safetensors"))
    require_close(encoder.backbone(images(32)), net(images(32)).pooler_output)
    assert not any("activation" in warning or "heads" in warning for warning in encoder.warnings)


@pytest.mark.peers
@torch.no_grad()
def test_hugging_faces_dinov2_beside_its_settings(transformers, tmp_path):
    shape = SHAPE | {"num_attention_heads": 6, "layer_norm_eps": 0.1}
    net = random(transformers.Dinov2Model(transformers.Dinov2Config(**shape)))
    net.save_pretrained(tmp_path)
    encoder = load(str(tmp_path / "model.safetensors"))
    require_close(encoder.backbone(images(32)), net(images(32)).pooler_output)
    assert encoder.norm_eps == 0.1 and not any("heads" in warning for warning in encoder.warnings)
