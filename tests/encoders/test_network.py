"""The contract that every network answers: pooled feature, stages, maps; and the names of architectures."""

import pytest
import torch
from torch import nn

from moco_eval.encoders.architectures import architecture, build_backbone
from moco_eval.encoders.network import Network, network_of
from moco_eval.errors import InputError

NETWORKS = {  # stages, stride and channels of the last, pooling
    "resnet18_quarter": (4, 32, 128, "mean over places"),
    "resnet18_quarter_cifar,channels=13": (4, 8, 128, "mean over places"),
    "vit_narrow_patch16_32": (2, 16, 48, "class token"),
    "vit_narrow_patch16_32,channels=4": (2, 16, 48, "class token"),
    "timm:test_resnet,in_chans=1": (5, 32, 96, "mean over places"),
    "timm:test_vit,global_pool=avg": (6, 16, 64, "mean of the patch tokens"),
    "timm:test_convnext": (4, 32, 64, "mean over places"),
    "timm:test_efficientnet": (5, 32, 64, "mean over places"),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> Network:
    return network_of(build_backbone(name).eval(), architecture(name))


def images(net: Network) -> torch.Tensor:
    return torch.randn(2, net.in_channels, net.size or 64, net.size or 64, generator=torch.Generator().manual_seed(0))


@networks
@torch.no_grad()
def test_every_network_answers_the_same_questions(name):
    net, (count, stride, channels, pooling) = network(name), NETWORKS[name]
    assert len(net.stages) == count and net.pooling == pooling
    assert (net.stages[-1].stride, net.stages[-1].channels) == (stride, channels)
    names, pixels = [stage.name for stage in net.stages], images(net)
    features = net.features(pixels, ["pooled", *names])
    assert torch.equal(features["pooled"], net.backbone(pixels))
    assert features["pooled"].shape == (2, architecture(name).feature_dim)
    for stage, maps in zip(net.stages, net.maps(pixels, names)):
        side = -(-pixels.shape[2] // stage.stride)
        assert maps.shape == (2, stage.channels, side, side)
        assert features[stage.name].shape == (2, stage.channels)
        assert torch.equal(net.features(pixels, [stage.name])[stage.name], features[stage.name])


@networks
@torch.no_grad()
def test_a_stage_is_what_its_module_gives(name):
    """The naive way: a hook on the module; a class token is normalised, a map is averaged."""
    net = network(name)
    stage, outputs = net.stages[len(net.stages) // 2].name, {}
    hook = net.backbone.get_submodule(stage).register_forward_hook(lambda *seen: outputs.update(it=seen[2]))
    net.backbone(images(net))
    hook.remove()
    raw = outputs["it"]
    if raw.ndim == 3:
        expected = net.backbone.norm(raw)[:, 0] if net.backbone.cls_token is not None else raw.mean(1)
    else:
        expected = raw.mean(dim=(2, 3))
    assert torch.allclose(net.features(images(net), [stage])[stage], expected, atol=1e-6)


def test_a_module_of_ones_own_has_no_stages():
    net = network_of(nn.Flatten(), None, 4)
    assert net.stages == () and net.in_channels == 4 and net.pooling == "the network's own"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet5", "timm has no network 'resnet5'"),
        ("resnet50,channels=0", "channels is 0; it must be a whole number of 1 to 64"),
        ("resnet50,channels=4.5", "channels is 4.5"),
        ("resnet50,chanels=4", "Did you mean 'channels'?"),
        ("resnet50,channels=4,channels=4", "not an argument"),
        ("timm:resnet50,img_size=3", "timm does not build resnet50 with img_size=3"),
        ("timm:vit_base_patch16_224,embed_dim=7", "dim should be divisible by num_heads"),
        ("timm:vit_base_patch16_224,depth=1000000", "a whole number of 1 to 256"),
        ("timm:vit_base_patch16_224,pretrained=1", "not an argument"),
    ],
)
def test_names_that_are_none_are_refused_in_one_line(name, words):
    with pytest.raises(InputError) as refusal:
        architecture(name)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
