"""Views: each operation against torchvision's, per sample; draws against their distributions."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from PIL import ImageFilter, ImageOps
from scipy import stats
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from moco_dist.config.recipe import ViewsConfig
from moco_dist.method import view_blur, view_colors, views

DRAWN = 10_000
ORDERS = list(itertools.permutations(range(4)))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# torchvision turns hues in float32 whatever it is given, and pixels are 1/255 apart.
HUE_TOLERANCE = 2e-6


def make_images(number: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return uint8 images (n, 3, h, w): slopes, waves and noise, with black, white and one gray."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)
    a, b, c, d = torch.rand(4, number, 3, 1, 1, generator=generator)
    pixels = a * x + b * y + 0.3 * torch.sin(20 * (c * x + d * y)) - 0.2
    pixels = pixels + 0.2 * torch.randn(number, 3, height, width, generator=generator)
    pixels[0] = pixels[0, :1]
    images: Tensor = (255 * pixels.clamp(0, 1)).round().to(torch.uint8)
    return images


def make_pixels(number: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return make_images(number, size, size).to(dtype) / 255


def draw(
    config: ViewsConfig,
    number: int = DRAWN,
    height: int = 32,
    width: int = 32,
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> views.Draws:
    return views.draw(config, seed, epoch, torch.arange(number), view, height, width)


def box_draws(top: int, left: int, height: int, width: int, *, flip: bool = False) -> views.Draws:
    """Return parameters of one sample with this crop, every step drawn but its flip."""
    sides = {"top": top, "left": left, "height": height, "width": width}
    values = {name: torch.tensor([pixels]) for name, pixels in sides.items()}
    every = ViewsConfig(jitter=1.0, grayscale=1.0, blur=1.0)
    return dataclasses.replace(draw(every, 1), flip=torch.tensor([flip]), **values)


def equal(one: views.Draws, other: views.Draws) -> dict[str, bool]:
    return {
        field.name: torch.equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(views.Draws)
    }


def rows(draws: views.Draws, index: Tensor) -> views.Draws:
    fields = dataclasses.fields(views.Draws)
    return views.Draws(**{field.name: getattr(draws, field.name)[index] for field in fields})


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def torchvision_jitter(image: Tensor, draws: views.Draws, row: int) -> Tensor:
    for operation in draws.order[row].tolist():
        name = ("brightness", "contrast", "saturation", "hue")[operation]
        image = getattr(tv, f"adjust_{name}")(image, getattr(draws, name)[row].item())
    return image


# Crop, resize and flip


@DTYPES
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64), (97, 61), (300, 210)])
def test_crop_is_torchvisions_resized_crop(height: int, width: int, dtype: torch.dtype) -> None:
    images = make_images(24, height, width).to(dtype) / 255
    draws = draw(ViewsConfig(scale_min=0.01), 24, height, width)
    box = (draws.top, draws.left, draws.height, draws.width)
    cropped = views.crop_and_resize(images, draws, 32)
    assert cropped.dtype == dtype
    assert 0 < int(draws.flip.sum()) < 24
    for row, (top, left, tall, wide) in enumerate(zip(*(x.tolist() for x in box), strict=True)):
        expected = tv.resized_crop(images[row], top, left, tall, wide, [32, 32], antialias=True)
        if draws.flip[row]:
            expected = tv.horizontal_flip(expected)
        close(cropped[row], expected, 2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("size", [7, 32, 150])
def test_crop_reads_nothing_beyond_its_edge(size: int) -> None:
    images = make_pixels(1, 64)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[5:50, 11:41] = False
    draws = box_draws(5, 11, 45, 30)
    inner = views.crop_and_resize(images, draws, size)
    images[0, :, outside] = 1e6
    assert torch.equal(views.crop_and_resize(images, draws, size), inner)


def test_whole_image_at_its_own_size_is_the_identity() -> None:
    images = make_pixels(1, 32)
    assert torch.equal(views.crop_and_resize(images, box_draws(0, 0, 32, 32), 32), images)
    mirrored = views.crop_and_resize(images, box_draws(0, 0, 32, 32, flip=True), 32)
    assert torch.equal(mirrored, images.flip(-1))


# Colour


@DTYPES
def test_grayscale_is_torchvisions(dtype: torch.dtype) -> None:
    images = make_pixels(8, 16, dtype)
    close(view_colors.to_grayscale(images), tv.rgb_to_grayscale(images), 2e-7)


@DTYPES
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.37])
def test_each_tone_operation_is_torchvisions(factor: float, dtype: torch.dtype) -> None:
    images = make_pixels(9, 16, dtype)
    operation = torch.arange(9) % 3
    factors = torch.full((9,), factor, dtype=torch.float64)
    adjusted = view_colors.adjust_tone(images, *view_colors.tones(operation, factors, images))
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for row in range(9):
        expected = functions[row % 3](images[row], factor)
        close(adjusted[row], expected, 5e-7 if dtype == torch.float32 else 1e-13)


def test_tones_are_clamped_and_a_factor_of_one_changes_no_bit() -> None:
    images = make_pixels(6, 16, torch.float32)
    operation = torch.arange(6) % 3
    same = view_colors.tones(operation, torch.ones(6, dtype=torch.float64), images)
    assert torch.equal(view_colors.adjust_tone(images, *same), images)
    strong = view_colors.tones(operation, torch.full((6,), 9.0), images)
    changed = view_colors.adjust_tone(images, *strong)
    assert [float(changed.min()), float(changed.max())] == [0, 1]


@pytest.mark.parametrize("hue", [-0.5, -0.31, -0.1, 0.0, 1e-3, 0.1, 0.25, 0.5])
def test_hue_is_turned_as_in_torchvision_and_colorsys(hue: float) -> None:
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    corners = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 8, 8)
    images = torch.cat([make_pixels(2, 8), corners[None]])
    turns = torch.full((3,), hue, dtype=torch.float64)
    single = images.float()
    close(view_colors.adjust_hue_(single.clone(), turns), tv.adjust_hue(single, hue), HUE_TOLERANCE)
    adjusted = view_colors.adjust_hue_(images.clone(), turns)
    close(adjusted, tv.adjust_hue(images, hue), HUE_TOLERANCE)
    for row, place in itertools.product(range(3), range(64)):
        h, s, v = colorsys.rgb_to_hsv(*images[row].flatten(1)[:, place].tolist())
        expected = torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, s, v), dtype=torch.float64)
        close(adjusted[row].flatten(1)[:, place], expected, 1e-12)


def jitter_draws(order: Tensor, jitter: Tensor) -> views.Draws:
    drawn = draw(ViewsConfig(hue=0.3), len(order), seed=5)
    return dataclasses.replace(drawn, order=order, jitter=jitter)


@DTYPES
def test_jitter_in_each_of_the_24_orders_is_torchvisions_chain(dtype: torch.dtype) -> None:
    images = make_pixels(48, 16, dtype)
    draws = jitter_draws(torch.tensor(ORDERS).repeat(2, 1), torch.ones(48, dtype=torch.bool))
    jittered = views.color_jitter(images.clone(), draws)
    for row in range(48):
        close(jittered[row], torchvision_jitter(images[row], draws, row), 2 * HUE_TOLERANCE)


@DTYPES
def test_jitter_switched_off_changes_no_bit(dtype: torch.dtype) -> None:
    images = make_pixels(24, 16, dtype)
    switched = torch.arange(24) % 3 == 0
    jittered = views.color_jitter(images.clone(), jitter_draws(torch.tensor(ORDERS), switched))
    assert torch.equal(jittered[~switched], images[~switched])
    changed = (jittered != images).flatten(1).any(dim=1)
    assert torch.equal(changed, switched)


# Blur


@DTYPES
@pytest.mark.parametrize(("kernel_size", "size"), [(3, 32), (9, 32), (23, 40), (5, 3)])
def test_blur_is_torchvisions(kernel_size: int, size: int, dtype: torch.dtype) -> None:
    sigmas = [0.1, 0.5, 1.0, 2.0]
    images = make_images(4, size, size + 4).to(dtype) / 255
    blurred = view_blur.gaussian_blur(
        images, torch.tensor(sigmas, dtype=torch.float64), kernel_size
    )
    for row, sigma in enumerate(sigmas):
        expected = tv.gaussian_blur(images[row], [kernel_size] * 2, [sigma] * 2)
        close(blurred[row], expected, 3e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("size", [16, 24, 32, 64, 96, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_a_view_of_any_size_is_blurred_as_by_scipy(size: int, sigma: float) -> None:
    """scipy's filter reaches to four standard deviations here, and beyond it hardly matters."""
    config = ViewsConfig(size=size, jitter=0, grayscale=0, blur=1.0, mean=[0.0] * 3, std=[1.0] * 3)
    image = make_images(1, size, size)
    draws = dataclasses.replace(
        box_draws(0, 0, size, size), sigma=torch.tensor([sigma], dtype=torch.float64)
    )
    blurred = views.apply(image, draws, config, torch.float64)
    for truncate, tolerance in ((4.0, 3e-4), (20.0, 3e-4)):
        expected = gaussian_filter(
            image.double().numpy() / 255, sigma, mode="mirror", truncate=truncate, axes=(2, 3)
        )
        close(blurred, torch.from_numpy(expected), tolerance)


@pytest.mark.parametrize(("size", "taps"), [(8, 15), (32, 17), (64, 17), (192, 19), (224, 23)])
def test_blur_at_224_pixels_has_the_published_taps(size: int, taps: int) -> None:
    config = ViewsConfig(size=size, jitter=0, grayscale=0, blur=1.0, mean=[0.0] * 3, std=[1.0] * 3)
    image = make_images(1, size, size)
    draws = box_draws(0, 0, size, size)
    blurred = views.apply(image, draws, config, torch.float64)
    expected = tv.gaussian_blur(image.double() / 255, [taps] * 2, [draws.sigma.item()] * 2)
    close(blurred, expected, 1e-12)


def test_a_small_view_is_blurred_as_by_pillow() -> None:
    """Pillow approximates the Gaussian by three box filters, within two levels of 255."""
    image = make_images(1, 32, 32)
    config = ViewsConfig(jitter=0, grayscale=0, blur=1.0, mean=[0.0] * 3, std=[1.0] * 3)
    draws = dataclasses.replace(
        box_draws(0, 0, 32, 32), sigma=torch.tensor([2.0], dtype=torch.float64)
    )
    ours = views.apply(image, draws, config)[0] * 255
    theirs = tv.pil_to_tensor(tv.to_pil_image(image[0]).filter(ImageFilter.GaussianBlur(2.0)))
    inside = slice(8, 24)  # Pillow repeats the edge where others reflect it
    difference = (ours - theirs)[:, inside, inside].abs()
    assert float(difference.mean()) < 1
    assert float(difference.max()) < 5


# Solarisation


@DTYPES
def test_solarisation_is_torchvisions_and_pillows(dtype: torch.dtype) -> None:
    images = make_images(8, 24, 20)
    images[1, 0, :16, :16] = torch.arange(256, dtype=torch.uint8).reshape(16, 16)  # every level
    ours = view_colors.solarize(images.to(dtype) / 255)
    assert ours.equal(tv.solarize(images.to(dtype) / 255, 0.5))
    for image, found in zip(images, ours, strict=True):
        theirs = ImageOps.solarize(tv.to_pil_image(image))
        close(found * 255, tv.pil_to_tensor(theirs).to(dtype), 1e-4)


def test_solarisation_moves_no_other_number_of_a_view() -> None:
    without, with_it = (draw(ViewsConfig(blur=0.5, solarize=p)) for p in (0.0, 0.5))
    same = equal(without, with_it)
    assert not same.pop("solarize")
    assert all(same.values())


# The whole recipe


def torchvision_view(image: Tensor, draws: views.Draws, row: int, config: ViewsConfig) -> Tensor:
    """Return the view of one uint8 image by torchvision alone, in MoCo's own order of steps."""
    one = {
        field.name: getattr(draws, field.name)[row].tolist() for field in dataclasses.fields(draws)
    }
    view = tv.to_dtype(image, torch.float64, scale=True)
    box = (one["top"], one["left"], one["height"], one["width"])
    view = tv.resized_crop(view, *box, [config.size] * 2, antialias=True)
    if one["grayscale"] and config.grayscale_before_jitter:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    if one["jitter"]:
        view = torchvision_jitter(view, draws, row)
    if one["grayscale"] and not config.grayscale_before_jitter:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    if one["blur"]:
        view = tv.gaussian_blur(view, [17, 17], [one["sigma"]] * 2)
    if one["solarize"]:
        view = tv.solarize(view, 0.5)
    if one["flip"]:
        view = tv.horizontal_flip(view)
    normalized: Tensor = tv.normalize(view, config.mean, config.std)
    return normalized


@pytest.mark.parametrize("before", [False, True], ids=["moco_v2", "moco_v1"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64)])
def test_each_view_is_torchvisions_chain_with_the_drawn_parameters(
    height: int, width: int, before: bool
) -> None:
    config = ViewsConfig(blur=0.5, grayscale=0.4, solarize=0.3, grayscale_before_jitter=before)
    images = make_images(64, height, width)
    draws = draw(config, 64, height, width, seed=3)
    single = views.apply(images, draws, config)
    double = views.apply(images, draws, config, torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    for row in range(64):
        expected = torchvision_view(images[row], draws, row, config)
        close(double[row], expected, 2 * HUE_TOLERANCE / 0.2)
        close(single[row].double(), expected, 6 * HUE_TOLERANCE / 0.2)


def test_view_without_its_steps_is_the_normalised_crop() -> None:
    config = ViewsConfig(jitter=0.0, grayscale=0.0, blur=0.0)
    images = make_images(8, 32, 32)
    draws = draw(config, 8)
    cropped = views.crop_and_resize(images.double() / 255, draws, 32)
    expected = tv.normalize(cropped, config.mean, config.std)
    close(views.apply(images, draws, config, torch.float64), expected, 1e-12)
    # Steps that are possible but not drawn change no bit either.
    possible = dataclasses.replace(config, jitter=0.5, grayscale=0.5, blur=0.5, solarize=0.5)
    full = views.apply(images, draws, possible, torch.float64)
    assert torch.equal(full, views.apply(images, draws, config, torch.float64))


def test_views_of_a_batch_are_those_of_its_samples_alone() -> None:
    config = ViewsConfig(blur=0.5)
    images, index = make_images(7, 40, 36), torch.tensor([9, 3, 2**40, 0, 77, 5, 6])
    batch = views.make(images, config, 1, 2, index, 1, torch.float64)
    for row in torch.arange(7).split(1):
        alone = views.make(images[row], config, 1, 2, index[row], 1, torch.float64)
        close(batch[row], alone, 1e-12)


@DTYPES
@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_same_bits_in_any_batch_and_on_one_thread_or_two(
    channels: int, dtype: torch.dtype
) -> None:
    config = ViewsConfig(size=224, mean=[0.5] * channels, std=[0.5] * channels)
    images, index = make_images(12, 224, 224)[:, :channels], torch.arange(12)

    def made(rows: int) -> Tensor:
        parts = index.split(rows)
        return torch.cat([views.make(images[i], config, 0, 0, i, 0, dtype) for i in parts])

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [made(rows) for rows in (12, 5, 1)]
    finally:
        torch.set_num_threads(threads)
    assert all(each.equal(found[0]) for each in found)


def test_views_are_a_function_of_the_sample_and_not_of_its_place() -> None:
    config = ViewsConfig(blur=0.5)
    images, order = make_images(16, 32, 32), torch.randperm(16, generator=torch.manual_seed(0))
    index = torch.arange(100, 116)
    once = views.make(images, config, 1, 2, index, 1, torch.float64)
    assert torch.equal(once, views.make(images, config, 1, 2, index, 1, torch.float64))
    elsewhere = views.make(images[order], config, 1, 2, index[order], 1, torch.float64)
    close(elsewhere, once[order], 1e-12)
    one, other = (views.draw(config, 1, 2, i, 1, 32, 32) for i in (index, index[order]))
    assert all(equal(rows(one, order), other).values())


def test_epoch_may_be_a_tensor() -> None:
    one = views.draw(ViewsConfig(), 1, torch.tensor(7), torch.arange(9), 0, 32, 32)
    assert all(equal(one, draw(ViewsConfig(), 9, seed=1, epoch=7)).values())


def test_other_seeds_epochs_and_views_give_other_parameters() -> None:
    config = ViewsConfig(blur=0.5, solarize=0.5)
    keys = itertools.product((0, 1), repeat=3)
    drawn = [draw(config, seed=seed, epoch=epoch, view=view) for seed, epoch, view in keys]
    for one, other in itertools.combinations(drawn, 2):
        assert not any(equal(one, other).values())
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        correlations = torch.corrcoef(torch.stack([getattr(one, name) for one in drawn]))
        # Standard error 1 / sqrt(DRAWN) = 0.01, 28 pairs.
        assert correlations.fill_diagonal_(0).abs().max() < 0.04, name


def test_evaluation_view_is_the_centre() -> None:
    config = ViewsConfig(size=32)
    same, large, odd = (make_images(2, *size) for size in ((32, 32), (48, 64), (37, 35)))
    for images in (same, large, odd):
        expected = tv.center_crop(images, [32, 32]).double() / 255
        expected = tv.normalize(expected, config.mean, config.std)
        close(views.center(images, config, torch.float64), expected, 1e-12)
    assert views.center(same, config).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(16, 24), (63, 20), (20, 63), (31, 31)])
def test_evaluation_view_of_a_small_image_is_enlarged(height: int, width: int) -> None:
    config = ViewsConfig(size=32)
    images = make_images(2, height, width)
    enlarged = tv.resize(images.double() / 255, [32], antialias=True)
    expected = tv.normalize(tv.center_crop(enlarged, [32, 32]), config.mean, config.std)
    close(views.center(images, config, torch.float64), expected, 1e-12)


def test_autocast_does_not_lower_the_precision() -> None:
    config, images, index = ViewsConfig(blur=0.5), make_images(8, 32, 32), torch.arange(8)
    plain = views.make(images, config, 0, 0, index, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(views.make(images, config, 0, 0, index, 0), plain)


def test_nothing_is_read_back_to_the_host() -> None:
    # A fake tensor has no values: whatever asks for one (item, nonzero, a condition) raises.
    config = ViewsConfig(blur=0.5, solarize=0.5)
    with FakeTensorMode():
        images = torch.empty(5, 3, 40, 48, dtype=torch.uint8, device="cuda")
        index, epoch = (torch.empty(n, dtype=torch.int64, device="cuda") for n in ((5,), ()))
        view = views.make(images, config, 0, epoch, index, 1)
        assert (view.shape, view.device.type) == ((5, 3, 32, 32), "cuda")
        assert views.center(images, config).device.type == "cuda"
        with pytest.raises(RuntimeError):
            index.sum().item()


# The laws of the parameters


def torchvision_draws(transform: Any, height: int, width: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    drawn = [transform.make_params([image]) for _ in range(DRAWN)]
    return {key: torch.tensor([one[key] for one in drawn], dtype=torch.float64) for key in drawn[0]}


def same_law(ours: Tensor, theirs: Tensor) -> None:
    assert len(ours) == len(theirs) == DRAWN
    result = stats.ks_2samp(ours.double().numpy(), theirs.numpy())
    assert result.pvalue > 0.001, result


def has_rate(drawn: Tensor, rate: float) -> None:
    assert stats.binomtest(int(drawn.sum()), len(drawn), rate).pvalue > 0.001


@pytest.mark.parametrize(("scale_min", "scale_max"), [(0.2, 1.0), (0.08, 0.5)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64)])
def test_crops_follow_torchvisions_law(
    height: int, width: int, scale_min: float, scale_max: float
) -> None:
    config = ViewsConfig(scale_min=scale_min, scale_max=scale_max)
    ours = draw(config, DRAWN, height, width)
    transform = v2.RandomResizedCrop(32, (scale_min, scale_max))
    theirs = torchvision_draws(transform, height, width)
    same_law(ours.height * ours.width, theirs["height"] * theirs["width"])
    same_law(ours.width.double() / ours.height, theirs["width"] / theirs["height"])
    for name in ("top", "left", "height", "width"):
        same_law(getattr(ours, name), theirs[name])
    same_law(height - ours.top - ours.height, height - theirs["top"] - theirs["height"])
    same_law(width - ours.left - ours.width, width - theirs["left"] - theirs["width"])
    assert int(ours.top.min()) == int(ours.left.min()) == 0
    assert int((ours.top + ours.height).max()) == height
    assert int((ours.left + ours.width).max()) == width


@pytest.mark.parametrize(
    ("height", "width", "ratio_min", "ratio_max"),
    [
        (16, 65, 0.8, 1.3),
        (65, 16, 0.8, 1.3),
        (24, 24, 0.8, 0.81),
        (20, 23, 1.29, 1.3),
        (31, 31, 0.7, 1.4),
        (32, 33, 0.2, 5.0),
    ],
)
def test_crop_that_never_fits_is_torchvisions_central_one(
    height: int, width: int, ratio_min: float, ratio_max: float
) -> None:
    config = ViewsConfig(scale_min=1.0, scale_max=1.0, ratio_min=ratio_min, ratio_max=ratio_max)
    transform = v2.RandomResizedCrop(32, (1.0, 1.0), (ratio_min, ratio_max))
    expected = transform.make_params([torch.empty(3, height, width)])
    ours = draw(config, 50, height, width)
    for name in ("top", "left", "height", "width"):
        assert getattr(ours, name).tolist() == [expected[name]] * 50, name


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue"), [(0.4, 0.4, 0.4, 0.1), (0.8, 1.5, 0.2, 0.5)]
)
def test_jitter_factors_follow_torchvisions_law(
    brightness: float, contrast: float, saturation: float, hue: float
) -> None:
    ours = draw(
        ViewsConfig(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    )
    transform = v2.ColorJitter(brightness, contrast, saturation, hue)
    torch.manual_seed(2)
    drawn = [transform.make_params([]) for _ in range(DRAWN)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        theirs = torch.tensor([one[f"{name}_factor"] for one in drawn], dtype=torch.float64)
        same_law(getattr(ours, name), theirs)


def test_orders_of_the_jitter_are_uniform() -> None:
    orders = draw(ViewsConfig()).order.tolist()
    counts = [orders.count(list(order)) for order in ORDERS]
    assert sum(counts) == DRAWN
    assert stats.chisquare(counts).pvalue > 0.001


def test_blur_sigma_follows_torchvisions_law() -> None:
    theirs = torchvision_draws(v2.GaussianBlur(3, (0.1, 2.0)), 32, 32)["sigma"][:, 0]
    same_law(draw(ViewsConfig()).sigma, theirs)


@pytest.mark.parametrize("name", ["flip", "jitter", "grayscale", "blur", "solarize"])
def test_steps_happen_at_their_rate(name: str) -> None:
    for rate in (0.0, 0.13, 0.5, 0.8, 1.0):
        rates: dict[str, Any] = {name: rate}
        config = ViewsConfig(**rates)
        has_rate(getattr(draw(config), name), rate)


def parameters(drawn: views.Draws, height: int, width: int) -> list[Tensor]:
    """Return what should be independent: position within the room that is left, not in pixels."""
    columns = [
        drawn.top / (height - drawn.height),
        drawn.left / (width - drawn.width),
        drawn.height * drawn.width,
        drawn.width / drawn.height,
        drawn.order[:, 0],
    ]
    columns += [drawn.flip, drawn.jitter, drawn.grayscale, drawn.blur, drawn.solarize]
    columns += [drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue, drawn.sigma]
    return columns


def test_parameters_are_independent_of_each_other_of_neighbours_and_of_the_other_view() -> None:
    config = ViewsConfig(scale_max=0.3, blur=0.5, solarize=0.5)
    columns = parameters(draw(config, DRAWN, 400, 400), 400, 400)
    columns += [column.roll(1) for column in columns]
    columns += parameters(draw(config, DRAWN, 400, 400, view=1), 400, 400)
    correlations = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert len(correlations) == 3 * 15
    # Standard error 1 / sqrt(DRAWN) = 0.01, 990 pairs.
    assert correlations.fill_diagonal_(0).abs().max() < 0.045


@pytest.mark.parametrize("size", [16, 24, 32])
def test_a_cpu_and_a_gpu_jitter_to_the_same_bits(size: int) -> None:
    # Both ways are run here. White images: a crop that shrinks them may be an ulp above 1.
    pixels = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8)
    pixels[::3] = 255
    index = torch.arange(600)
    drawn = views.draw(ViewsConfig(), 0, 0, index, 0, 32, 32)
    images = views.crop_and_resize(pixels / 255, drawn, size)
    assert size == 32 or images.max() > 1
    alike = views._jitter_alike(images, drawn)
    assert views._jitter_by_place(images.clone(), drawn).equal(alike)
    assert not alike.equal(images)
