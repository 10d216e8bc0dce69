import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.config import Augmentation, Preprocessing, apply_operation


@pytest.mark.parametrize("size", [16, 96])
@pytest.mark.parametrize("image_size", [(61, 37), (300, 50), (96, 96), (1, 1)])
def test_preprocessing_equals_transformers(size, image_size):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    values = np.random.default_rng(1).integers(0, 256, (image_size[1], image_size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    processor = BlipImageProcessorPil(size={"height": size, "width": size})
    resized = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    preprocessing = Preprocessing(image_size=size)
    pixels = preprocessing(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    assert np.array_equal(pixels, resized)
    normalised = torch.from_numpy(processor(image, return_tensors="np")["pixel_values"])
    torch.testing.assert_close(preprocessing.normalize(torch.from_numpy(pixels)[None]), normalised, atol=1e-6, rtol=0)


def test_augmentation_is_a_function_of_the_generator(random_image):
    augmentation = Augmentation()
    views = [augmentation(random_image, np.random.default_rng(seed), 32) for seed in (1, 1, 2)]
    assert views[0].shape == (3, 32, 32)
    assert views[0].dtype == np.uint8
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_without_crop_flip_and_operations_it_is_the_plain_resize():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    augmentation = Augmentation(crop_scale=(1.0, 1.0), horizontal_flip=False, num_ops=0)
    for seed in range(5):  # no other ratio of the whole area fits, which leaves the whole image
        view = augmentation(image, np.random.default_rng(seed), 32)
        assert np.array_equal(view, Preprocessing(image_size=32)(image))


def test_flip_is_as_frequent_as_a_coin(random_image):
    augmentation = Augmentation(crop_scale=(1.0, 1.0), num_ops=0)
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    views = [augmentation(ramp, np.random.default_rng(seed), 16) for seed in range(200)]
    flipped = sum(int(view[0, 0, 0]) > int(view[0, 0, -1]) for view in views)
    assert 70 < flipped < 130


def test_crops_stay_within_scale_and_image():
    ys, xs = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = Image.fromarray(np.stack([xs, ys, np.zeros_like(xs)], axis=-1))
    augmentation = Augmentation(crop_scale=(0.5, 1.0), horizontal_flip=False, num_ops=0)
    areas = []
    for seed in range(100):
        view = augmentation(image, np.random.default_rng(seed), 64).astype(int)
        areas.append(np.ptp(view[0]) * np.ptp(view[1]) / 200**2)
    assert min(areas) > 0.42
    assert max(areas) <= 1.0
    assert np.std(areas) > 0.05


def test_brightness_and_sharpness_change_nothing_at_magnitude_5(random_image):
    rng = np.random.default_rng(0)
    for name in ("brightness", "sharpness", "identity"):
        same = apply_operation(name, random_image, 0.5, rng)
        assert np.array_equal(np.asarray(same), np.asarray(random_image))
    brighter = apply_operation("brightness", random_image, 1.0, rng)
    assert not np.array_equal(np.asarray(brighter), np.asarray(random_image))


def test_geometric_operations_move_by_the_levels_of_the_released_code():
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (32, 0, 33, 64))  # a white column
    moved = np.asarray(apply_operation("translate_x", image, 0.5, np.random.default_rng(0)))[32, :, 0]
    assert abs(int(np.argmax(moved == 255)) - 32) == 5  # 10 pixels * 5 / 10
    sheared = np.asarray(apply_operation("shear_x", image, 0.5, np.random.default_rng(0)))[:, :, 0]
    top, bottom = (int(np.argmax(np.where(row == 128, 0, row))) for row in (sheared[2], sheared[61]))
    assert abs(abs(top - bottom) - 59 * 0.15) <= 1


def test_rand_augment_applies_each_operation_half_of_the_time():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    augmentation = Augmentation(crop_scale=(1.0, 1.0), horizontal_flip=False, num_ops=1)
    views = [augmentation(image, np.random.default_rng(seed), 48) for seed in range(300)]
    same = sum(np.array_equal(view.transpose(1, 2, 0), np.asarray(image)) for view in views)
    # not applied (1/2), or one of identity, brightness, sharpness (3/10 of the other half); a full-range
    # image is its own autocontrast
    assert abs(same / 300 - (0.5 + 0.5 * 0.4)) < 0.08
