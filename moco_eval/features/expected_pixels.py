"""What the images of a set become for an encoder."""

from moco_eval.data.catalogue import preprocessing_on
from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.encoder import Encoder
from moco_eval.preprocessing import Preprocessing


def expected_pixels(encoder: Encoder, images: ImageSet) -> Preprocessing:
    """The encoder's own contract; where it has none, the data set's, at the only size that the network takes.

    Raises:
        InputError: the images have other channels than the network takes.
    """
    if encoder.arch == "pixels":  # takes whatever comes
        return preprocessing_on(images, encoder.preprocessing, images.channels)
    network = encoder.network
    return preprocessing_on(images, encoder.preprocessing, network.in_channels, network.size)
