"""What is said of files that hold no encoder we read: what they are, and the way out; and every word is true."""

import pytest
import torch
from checkpoints import ARCH, VIT, body, error, under, written
from torch import Tensor

from moco_eval.encoders.foreign import KINDS, kind_of
from moco_eval.encoders.inspect import describe, format_description
from moco_eval.encoders.load import load
from moco_eval.errors import InputError

FALSE = (
    "incomplete",
    "altered",
    "save it again where",
    "holds no tensors",
    "save the whole network",
    "nearest is resnet",
)


def named(*names: str, size: tuple[int, ...] = (8, 8)) -> dict[str, Tensor]:
    return {name: torch.ones(size) for name in names}


def of(**kernels: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.ones(size) for name, size in kernels.items()}


def block(prefix: str) -> dict[str, Tensor]:
    """A transformer's, under timm's names."""
    parts = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    return named(*(f"{prefix}0.{part}" for part in parts))


def optimiser() -> dict:
    layer = torch.nn.Linear(3, 3)
    layer(torch.ones(1, 3)).sum().backward()
    trained = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    trained.step()
    return trained.state_dict()


# What is in the file, and what must be said of it.
FILES: dict[str, tuple[dict, str]] = {
    "an optimiser": (optimiser(), "the state of an optimiser alone"),
    "an optimiser's entry": ({"optimizer": optimiser(), "epoch": 3}, "the state of an optimiser alone"),
    "a schedule": ({"base_lrs": [0.1], "last_epoch": 3}, "a learning-rate schedule alone"),
    "a scaler": ({"scale": 65536.0, "growth_factor": 2.0}, "a loss scaler alone"),
    "torch_ema": ({"decay": 0.9, "shadow_params": [torch.ones(3)]}, "moving average of weights in a list"),
    "a list": ({"weights": [torch.ones(3), torch.ones(2)]}, "holds 2 tensors in lists, without names"),
    "features": (named("features") | {"labels": torch.arange(8)}, "features or labels, not weights"),
    "whole numbers": ({"rows": torch.arange(9)}, "hold whole numbers, no weights"),
    "CLIP's text tower": (named("token_embedding.weight", "transformer.resblocks.0.ln_1.weight"), "text tower"),
    "Hugging Face's text tower": (named("text_model.embeddings.token_embedding.weight"), "the text tower of CLIP"),
    "BERT": (named("bert.embeddings.word_embeddings.weight", "cls.bias"), "a language model"),
    "GPT-2": (named("wte.weight", "wpe.weight", "h.0.ln_1.weight"), "a language model"),
    "Llama": (named("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"), "a language model"),
    "diffusers": (named("time_embedding.linear_1.weight", "conv_in.weight"), "a diffusion model's network"),
    "DiT": (
        block("blocks.") | named("blocks.0.adaLN_modulation.1.weight") | of(patch_embed__proj__weight=(8, 4, 2, 2)),
        "diffusion",
    ),
    "a VAE": (named("encoder.conv_in.weight", "quant_conv.weight"), "an autoencoder of images"),
    "a pair": ({"generator": named("fc.weight"), "discriminator": named("fc.weight")}, "generative adversarial"),
    "StyleGAN": (named("mapping.fc0.weight", "synthesis.b4.const"), "a generative adversarial network"),
    "NeRF": ({"network_fn_state_dict": named("pts_linears.0.weight")}, "a radiance field"),
    "a YOLO": (named("model.0.conv.weight", "model.1.conv.weight", "model.22.dfl.conv.weight"), "a YOLO detector"),
    "BEATs": ({"model": named("post_extract_proj.weight", "encoder.layers.0.grep_a")}, "spectrograms"),
    "AST": (
        under("", block("blocks.")) | of(patch_embed__proj__weight=(8, 1, 16, 16)) | named("dist_token"),
        "AST, a transformer of spectrograms",
    ),
    "VideoMAE": (
        block("blocks.") | of(patch_embed__proj__weight=(8, 3, 2, 16, 16)),
        "its patches are 3-D",
    ),
    "a 3-D ResNet": (body(0) | of(conv1__weight=(16, 3, 3, 7, 7)), "its convolutions are 3-D"),
    "DINO's head": (named("mlp.0.weight", "last_layer.weight_g"), "DINO's projection head alone"),
    "I-JEPA's predictor": (
        {"predictor": named("module.predictor_embed.weight", "module.mask_token")},
        "I-JEPA's predictor alone",
    ),
    "MAE's decoder": (
        block("decoder_blocks.") | named("decoder_embed.weight", "mask_token"),
        "the decoder of a masked",
    ),
    "a segmenter's head": (named("decode_head.conv_seg.weight"), "head of a segmentation network alone"),
    "a detector's heads": (named("roi_heads.box_head.fc1.weight", "pixel_mean"), "the heads of a detector alone"),
    "a projection head": (named("projector.0.weight"), "a projection head or classifier alone"),
    "a classifier": (named("weight", "bias"), "a projection head or classifier alone"),
    "SAM": (under("image_encoder.", block("blocks.")) | named("image_encoder.blocks.0.attn.rel_pos_h"), "Segment"),
    "VGG": (of(features__0__weight=(8, 3, 3, 3), features__3__weight=(8, 8, 3, 3)), "AlexNet, VGG"),
    "somebody's own": (named("a.weight", "b.weight"), "its 2 tensors: a.weight, b.weight); if it is a network of"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(kind, tmp_path):
    values, sentence = FILES[kind]
    message = error(written(tmp_path, values))
    assert sentence in message
    assert not any(words in message for words in FALSE), message
    assert any(way in message for way in ("give", "copy it", "have the network's state_dict() saved")), message


def test_no_two_kinds_say_the_same():
    assert len({kind.sentence for kind in KINDS}) == len(KINDS)


def test_networks_that_are_built_here_are_of_no_other_kind():
    for arch in (ARCH, VIT):
        assert kind_of(body(0, arch)) is None


# The four defects that close section 7 of the specification of transfer


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize(
    "prefix, arch, kernel", [("", ARCH, "conv1.weight"), ("backbone.", VIT, "patch_embed.proj.weight")]
)
def test_images_of_other_channels_are_no_damage(prefix, arch, kernel, channels, tmp_path):
    tensors = body(0, arch)
    width, _, *sides = tensors[kernel].shape
    path = written(tmp_path, under(prefix, tensors | {kernel: torch.ones(width, channels, *sides)}))
    encoder = load(path)
    assert encoder.network.in_channels == channels
    assert f"  images         {channels} channel{'s' if channels > 1 else ''}, " in format_description(describe(path))


def test_ibots_student_loads_and_has_its_pixels(tmp_path):
    students = under("module.backbone.", body(0, VIT)) | {"module.backbone.masked_embed": torch.ones(1, 48)}
    teacher = under("backbone.", body(1, VIT))
    path = written(tmp_path, {"student": students, "teacher": teacher})
    for encoder in ("query", "key"):
        loaded = load(path, encoder=encoder)
        assert (loaded.origin, loaded.taken, loaded.warnings) == ("bytedance/ibot", encoder, [])
        assert loaded.preprocessing.interpolation == "bicubic"


def test_a_resnet_d_is_timms(tmp_path):
    from moco_eval.encoders.architectures import build_backbone

    encoder = load(written(tmp_path, build_backbone("timm:resnet18d").state_dict()))
    assert encoder.arch == "timm:resnet18d"
    assert [stage.stride for stage in encoder.network.stages][-1] == 32


def test_a_resnet_d_that_timm_lacks_is_called_one(tmp_path):
    tensors = body(0)
    stem = tensors.pop("conv1.weight")
    tensors |= {"conv1.0.weight": stem[..., :3, :3].clone(), "conv1.3.weight": torch.ones(16, 16, 3, 3)}
    message = error(written(tmp_path, tensors))
    assert "as a ResNet-C or -D has" in message and "no ResNet" not in message


# What is missing, and what is only otherwise


def test_a_tensor_that_is_missing_is_called_missing(tmp_path):
    tensors = body(0)
    del tensors["layer2.0.conv1.weight"]
    assert "The rest is a resnet18_quarter: the file is incomplete" in error(written(tmp_path, tensors))


def test_other_norm_layers_are_not_called_missing(tmp_path):
    tensors = {name: tensor for name, tensor in body(0).items() if "running" not in name and "batches" not in name}
    message = error(written(tmp_path, tensors))
    assert "norm layers without running statistics" in message and "incomplete" not in message


# The page of inspect


def test_inspect_shows_pooling_images_and_stages(tmp_path):
    lines = format_description(describe(written(tmp_path, body(0)))).splitlines()
    assert "  pooled feature mean over places" in lines
    assert "  images         3 channels, any size" in lines
    assert next(line for line in lines if "stages" in line).endswith("layer4 (stride 32, 128 channels)")
    lines = format_description(describe(written(tmp_path, body(0, VIT), "vit.pth"))).splitlines()
    assert "  pooled feature class token" in lines
    assert "  images         3 channels, 32x32 pixels" in lines
    assert "  stages         blocks.0 to blocks.1 (stride 16, 48 channels)" in lines
    lines = format_description(describe("pixels")).splitlines()
    assert "  images         of any channels and size" in lines


# Other files


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"version": "1.0", "truncation": null, "model": {"type": "BPE"}}', "is a tokenizer of texts"),
        ('{"architectures": ["ViTModel"], "hidden_size": 8}', "is a file of settings"),
        ('{"error": "rate limit"}', "is JSON, such as a server's error"),
        ("\x1c\0\0\0TFL3\0", "is a TensorFlow Lite model"),
        ("\x08\x07\x12\x07pytorch\x1a", "is an ONNX or TensorFlow graph"),
    ],
)
def test_what_is_no_checkpoint_is_named(text, sentence, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load(str(path))
    assert sentence in str(refused.value)


def test_an_absent_shard_is_not_replaced_by_another_file(tmp_path):
    written(tmp_path, body(0), "another.pth")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone-00001-of-00002.safetensors"}}')
    message = error(str(index))
    assert "does not exist: bring it into the same folder" in message and "another" not in message


def test_an_optimisers_state_is_called_so_whatever_its_entry(tmp_path):
    tensors = {f"module.encoder_q.{name}": tensor for name, tensor in body(0, "resnet18_quarter").items()}
    values = {"state_dict": tensors, "opt": {"state": {}, "param_groups": []}, "args": {"lr": 0.1}}
    torch.save(values, tmp_path / "x.pth")
    dropped = dict(load(str(tmp_path / "x.pth")).dropped)
    assert dropped["opt"] == "the optimiser's state, for resuming"
    assert dropped["args"] == "settings of the run that wrote it"
