"""Pictures of any size become images like the data set's; a folder without a run is refused."""

import numpy as np
import pytest
from PIL import Image

from mfm_jax import predict
from mfm_jax.errors import UserError


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3)])
def test_an_image_that_fits_stays_as_it_is(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(predict.fit(Image.fromarray(image.squeeze()), shape), image)


def test_the_middle_square_is_averaged():
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    wide = np.pad(image.repeat(3, axis=0).repeat(3, axis=1), [(0, 0), (5, 5), (0, 0)])
    np.testing.assert_array_equal(predict.fit(Image.fromarray(wide), (4, 4, 3)), image)


def test_colours_become_what_the_classifier_takes():
    grey = Image.fromarray(np.full((2, 2), 7, np.uint8))
    assert predict.fit(grey, (2, 2, 3)).tolist() == [[[7, 7, 7]] * 2] * 2
    assert predict.fit(grey.convert("RGBA"), (2, 2, 1)).tolist() == [[[7]] * 2] * 2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        predict.load(tmp_path)
