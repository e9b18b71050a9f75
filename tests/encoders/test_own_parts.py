"""Heads, losses and memories of one's own beside a backbone: left out by name, the backbone the same to the bit."""

import pytest
import torch
from checkpoints import ARCH, FILES, VIT, body, children, error, linear, mlp, under, written

from moco_eval.encoders.load import load

FEATURE = {ARCH: 128, VIT: 48}
PARTS = {
    "projector": lambda width: under("projector.", mlp(width).state_dict()),
    "queue": lambda width: {"queue": torch.zeros(16, 64), "queue_ptr": torch.zeros(1, dtype=torch.int64)},
    "temperature": lambda width: {"temperature": torch.tensor(0.07)},
    "fc_2": lambda width: under("fc_2.", linear(width).state_dict()),
    "logit_scale": lambda width: {"logit_scale": torch.tensor(2.6), "logit_bias": torch.zeros(1)},
    "center": lambda width: {"center": torch.zeros(1, 16)},
    "memory": lambda width: {"memory": torch.zeros(9, 16)},
    "criterion": lambda width: {"criterion.weight": torch.ones(10)},
    "contrast_head": lambda width: {"contrast_head.weight": torch.zeros(16, width)},
    "prototypes": lambda width: {"prototypes_30.weight": torch.zeros(30, 16)},
    "pos_weight": lambda width: {"pos_weight": torch.ones(3)},
}


def beside(prefix: str, arch: str, part: str) -> dict:
    return under(prefix, body(0, arch)) | PARTS[part](FEATURE[arch])


def arrived(encoder, seed: int, arch: str = ARCH) -> bool:
    state, expected = encoder.backbone.state_dict(), body(seed, arch)
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "base_encoder.", "encoder_q.", "model.backbone."])
def test_own_parts_are_left_out_by_name(prefix, part, tmp_path):
    tensors = beside(prefix, ARCH, part)
    encoder = load(written(tmp_path, {"state_dict": tensors}))
    assert arrived(encoder, 0) and not encoder.warnings
    left = " ".join(what for what, _ in encoder.dropped) + (" projector" if encoder.head else "")  # VICReg's, read
    assert all(name.partition(".")[0] in left for name in PARTS[part](128))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_own_parts_beside_a_vit(prefix, part, tmp_path):
    encoder = load(written(tmp_path, beside(prefix, VIT, part)), arch=VIT)
    assert arrived(encoder, 0, VIT)


@pytest.mark.parametrize("names", ["projector", "temperature", "logit_scale"])
def test_own_parts_with_heads_that_a_row_knows(names, tmp_path):
    """`backbone.` and `head.` look like OpenMMLab's; with a part it does not have, they are anybody's."""
    state = beside("backbone.", ARCH, names) | under("head.", linear(128).state_dict())
    plain = under("backbone.", body(0)) | under("head.", linear(128).state_dict())
    assert load(written(tmp_path, plain)).origin.startswith("OpenMMLab")
    encoder = load(written(tmp_path, state))
    assert arrived(encoder, 0) and encoder.origin == "a state dict under the prefix 'backbone.'"


def test_a_head_that_is_no_plain_sequence(tmp_path):
    state = under("encoder.", body(0)) | under("head.mlp.", mlp(128).state_dict())
    encoder = load(written(tmp_path, state))
    assert arrived(encoder, 0) and encoder.head is None
    assert "head (4 tensors)" in dict(encoder.dropped)


def test_two_encoders_with_own_parts_keep_their_ranks(tmp_path):
    state = under("encoder_q.", body(0)) | under("encoder_k.", body(1)) | {"logit_scale": torch.tensor(2.6)}
    path = written(tmp_path, state | PARTS["queue"](128))
    assert arrived(load(path), 0) and arrived(load(path, encoder="key"), 1)
    pair = under("student.backbone.", body(0)) | under("teacher.backbone.", body(1))
    pair |= under("student.projector.", mlp(128).state_dict()) | under("teacher.projector.", mlp(128).state_dict())
    encoder = load(written(tmp_path, pair))
    assert arrived(encoder, 1) and encoder.which == "key"
    assert {"student.projector (4 tensors)", "teacher.projector (4 tensors)"} <= dict(encoder.dropped).keys()


def test_own_parts_inside_of_the_backbone(tmp_path):
    state = under("backbone.", body(0)) | under("backbone.projector.", mlp(128).state_dict()) | {"t": torch.zeros(1)}
    encoder = load(written(tmp_path, state))
    assert arrived(encoder, 0) and "backbone.projector (4 tensors)" in dict(encoder.dropped)


def test_children_in_a_sequence_under_a_prefix_of_ones_own(tmp_path):
    """nn.Sequential(*list(resnet.children())[:-1]), the usual way to take the classifier off."""
    state = under("encoder.", body(0), children) | under("projector.", mlp(128).state_dict())
    encoder = load(written(tmp_path, state))
    assert arrived(encoder, 0) and dict(encoder.dropped).keys() == {"other tensors (4: projector)"}


def test_another_code_bases_padding_is_not_taken_with_own_parts(tmp_path):
    """solo-learn's stem pads by 2; these names are solo-learn's but for one."""
    state = under("backbone.", body(0, "resnet18_quarter_cifar")) | under("classifier.", linear(128).state_dict())
    state |= under("projector.", mlp(128).state_dict()) | {"logit_scale": torch.tensor(2.6)}
    encoder = load(written(tmp_path, state))
    assert encoder.arch == "resnet18_quarter_cifar" and encoder.preprocessing is None


@pytest.mark.parametrize(
    "name", ["norm_pre.weight", "reg_token", "attn_pool.kv.weight", "fc_norm.weight", "conv2.weight"]
)
@pytest.mark.parametrize("arch", [ARCH, VIT])
def test_what_may_belong_to_the_forward_pass_is_not_left_out(name, arch, tmp_path):
    assert "unexpected" in error(written(tmp_path, body(0, arch) | {name: torch.zeros(96, FEATURE[arch])}))


def test_a_part_without_a_word_is_refused_with_a_way_out(tmp_path):
    state = under("encoder_q.", body(0)) | {"surprise": torch.zeros(3)}
    path = written(tmp_path, state)
    message = error(path)
    assert "tensor surprise belongs to no part" in message and message.endswith("without it: --key encoder_q")
    encoder = load(path, key="encoder_q")
    assert arrived(encoder, 0) and dict(encoder.dropped).keys() == {"other tensors (1: surprise)"}


@pytest.mark.parametrize("name", ["register_tokens", "distillation_token", "extra_embedding.weight"])
def test_parts_of_the_networks_own_modules_are_not_left_out(name, tmp_path):
    """Hugging Face's `embeddings` hold the class token too: what else is in them is no head."""
    state = FILES["Hugging Face ViT"]().values | {f"embeddings.{name}": torch.zeros(1, 4, 48)}
    assert "unexpected" in error(written(tmp_path, state))


def test_a_wrapped_backbone_beside_a_head_that_a_row_knows(tmp_path):
    """DataParallel around the backbone alone."""
    state = under("backbone.module.", body(0)) | under("head.", linear(128).state_dict())
    encoder = load(written(tmp_path, state))
    assert arrived(encoder, 0) and encoder.origin == "a state dict under the prefix 'backbone.module.'"


@pytest.mark.parametrize("name", ["channel_embed", "time_embedding", "Embed_of_bands"])
def test_what_is_added_to_the_tokens_is_no_head(name, tmp_path):
    """SatMAE's and its like: without it the network computes something else."""
    state = body(0, VIT) | {name: torch.ones(1, 3, 48)}
    assert f"{name}" in error(written(tmp_path, state))
    assert "embedding" in dict(load(written(tmp_path, body(0, VIT) | {"embedding.weight": torch.ones(16, 48)})).dropped)
