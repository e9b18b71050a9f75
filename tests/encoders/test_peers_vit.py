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
