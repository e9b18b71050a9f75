"""Encoders of photographs: what tasks that read whole images in RGB ask of them."""

from typing import Any

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.pixel_choice import OF_RESIZING
from moco_eval.errors import InputError
from moco_eval.preprocessing import BANDS, Preprocessing


def require_photographs(encoder: Encoder, command: str) -> None:
    """Raises InputError where the encoder takes other images than photographs in RGB."""
    of_bands = encoder.preprocessing and encoder.preprocessing.channels == BANDS
    channels = encoder.network.in_channels
    if channels != 3 or of_bands:
        kind = f"images of {channels} channels" if channels != 3 else "three bands in units of their own"
        raise InputError(
            f"{command} trains on photographs of 3 channels, RGB of 8 bits, and {encoder.source} takes {kind}; judge "
            "it with the classification protocols, or take an encoder of RGB images"
        )


def require_no_resizing(encoder: Encoder, network: str) -> None:
    """Raises InputError where pixels were chosen that a task of sizes of its own does not give.

    Args:
        network: that would take them, such as 'a detector'.
    """
    if unused := [key for key in encoder.pixels or {} if key in OF_RESIZING]:
        raise InputError(
            f"--pixels {unused[0]}: {network} resizes whole images, bilinearly and as its recipe says, as its original "
            "does; leave it out"
        )


def pixels(encoder: Encoder) -> dict[str, Any]:
    """What the encoder is given: colours, mean and standard deviation; and whether its checkpoint says so."""
    given = (encoder.preprocessing or Preprocessing()).to_dict()
    return {name: given[name] for name in ("channels", "mean", "std", "range")} | {
        "from": "encoder" if encoder.preprocessing else "default: the encoder does not say"
    }
