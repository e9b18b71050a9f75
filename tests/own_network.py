"""A small network of one's own, wrapped, and refusals as the Python API words them."""

import pytest
import torch
from torch import nn

import moco_eval as me
from moco_eval.errors import InputError

SIZE = me.Preprocessing(size=32)
SHORT = {"schedule": {"epochs": 2, "milestones": [1]}}


class Net(nn.Module):
    """A convolution and a batch norm, pooled."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 5, stride=4), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


def encoder(seed: int = 0, name: str = "network") -> me.Encoder:
    torch.manual_seed(seed)
    return me.wrap(Net(), SIZE, name=name)


def refusal(call, *args, **kwargs) -> str:
    """The message of the ValueError, one line without dashes."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert isinstance(error.value, InputError) and "\n" not in message and "--" not in message
    return message
