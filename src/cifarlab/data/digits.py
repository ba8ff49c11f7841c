"""scikit-learn's handwritten digits: a small real data set that is always there, offline."""

import numpy as np

from cifarlab.config import InputError
from cifarlab.data.dataset import Decoded, check_size

NUM_TRAIN = 1437


def read_digits(image_size: int) -> Decoded:
    """The 1,797 digits as RGB: 1,437 to train, 360 to test, K = 10.

    8×8 grey levels 0…16 become 0…255, are enlarged with Pillow's bilinear filter and repeated in three channels.
    The split is the data set's own order: its last images were written by people not seen before, so the test is an honest
    one, and some points harder than a random split.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits" (its test part), as in scikit-learn.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    check_size(1797, image_size, "the digits")
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    if grey.shape != (1797, 8, 8) or grey.max() != 255:
        raise InputError("scikit-learn's digits are not the 1,797 known ones: reinstall scikit-learn")
    size = (image_size, image_size)
    large = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in grey])
    images = np.repeat(large[:, None], 3, axis=1)
    labels = digits.target.astype(np.int64)
    return Decoded(
        images[:NUM_TRAIN],
        images[NUM_TRAIN:],
        {"fine": labels[:NUM_TRAIN]},
        {"fine": labels[NUM_TRAIN:]},
        {"fine": tuple("0123456789")},
        f"scikit-learn's 1,797 handwritten digits, 8×8 enlarged to {image_size}×{image_size} (bilinear)",
    )
