"""The drawn data set: a function of its numbers, and only the shape tells the class."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from moco_dist.data import shapes


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    return shapes.draw(2000, 32, seed=0)


def test_images_are_bytes_of_ten_classes_in_equal_numbers(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, labels = drawn
    assert (images.dtype, images.shape) == (torch.uint8, (2000, 3, 32, 32))
    assert labels.dtype == torch.int64
    assert len(shapes.CLASSES) == len(set(shapes.CLASSES)) == 10
    assert torch.bincount(labels).tolist() == [200] * 10


@pytest.mark.parametrize(("count", "first"), [(10, 0), (1, 0), (7, 3), (130, 95), (3, 1996)])
def test_an_image_depends_on_its_number_alone(
    drawn: tuple[torch.Tensor, torch.Tensor], count: int, first: int
) -> None:
    images, labels = shapes.draw(count, 32, seed=0, first=first)
    expected_images, expected_labels = drawn
    inside = min(count, 2000 - first)
    assert images[:inside].equal(expected_images[first : first + inside])
    assert labels[:inside].equal(expected_labels[first : first + inside])
    assert len(images) == len(labels) == count


def test_no_two_images_are_equal_and_seeds_differ(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, _ = drawn
    assert len(images.flatten(1).unique(dim=0)) == 2000
    other, _ = shapes.draw(20, 32, seed=1)
    assert not (other == images[:20]).flatten(1).all(1).any()


def test_colour_and_brightness_say_nothing_of_the_class(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, labels = drawn
    colours = images.double().mean((2, 3))
    for channel in range(3):
        groups = [colours[labels == c, channel].numpy() for c in range(10)]
        assert stats.f_oneway(*groups).pvalue > 1e-3
    means = torch.stack([colours[:1000][labels[:1000] == c].mean(0) for c in range(10)])
    nearest = torch.cdist(colours[1000:], means).argmin(1)
    right = int((nearest == labels[1000:]).sum())
    assert stats.binomtest(right, 1000, 0.1, alternative="greater").pvalue > 1e-3


def test_a_person_or_a_template_can_tell_the_shapes_apart() -> None:
    # Distances at the same points differ in sign between any two shapes over much of their area.
    axis = torch.linspace(-1.4, 1.4, 1401)
    x, y = axis[None, :].expand(1401, 1401), axis[:, None].expand(1401, 1401)
    inside = {}
    for name, (shape, area) in shapes._SHAPES.items():
        unit = area**0.5
        inside[name] = shape(x * unit, y * unit) < 0
        covered = float(inside[name].double().mean()) * 2.8**2
        assert covered == pytest.approx(1, abs=0.02), f"{name} covers {covered}"
    for a in shapes.CLASSES:
        for b in shapes.CLASSES:
            shared = float((inside[a] & inside[b]).double().mean()) * 2.8**2
            assert a == b or shared < 0.93, (a, b, shared)
