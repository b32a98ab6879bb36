"""The weighted nearest-neighbour classifier, against a loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.encoders import features
from moco_dist.errors import ConfigError
from moco_dist.method import views
from tests.test_init_from import started


def by_hand(
    query: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, temperature: float
) -> int:
    def cosine(a: list[float], b: list[float]) -> float:
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(y * y for y in b))

    similar = sorted(
        ((cosine(query.tolist(), row.tolist()), i) for i, row in enumerate(bank)), reverse=True
    )
    votes: dict[int, float] = dict.fromkeys(labels.tolist(), 0.0)
    for similarity, i in similar[:k]:
        votes[int(labels[i])] += math.exp(similarity / temperature)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (20, 0.05), (500, 1.0)])
def test_prediction_is_that_of_a_brute_force_loop(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    bank = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (60,), generator=generator)
    queries = 3 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    predicted = features.predict(queries, bank, labels, 5, k, temperature)
    expected = [by_hand(query, bank, labels, min(k, 60), temperature) for query in queries]
    assert predicted.tolist() == expected


def test_a_low_temperature_does_not_overflow_float32() -> None:
    bank = torch.eye(4)
    predicted = features.predict(bank, bank, torch.tensor([3, 1, 0, 2]), 4, k=4, temperature=0.001)
    assert predicted.tolist() == [3, 1, 0, 2]


def test_knn_of_the_head_is_that_of_the_vectors_behind_it(tmp_path: Path) -> None:
    """The oracle: the brute-force loop on what the encoder returns, as the authors' notebook."""
    trainer = started(tmp_path, "", "knn.features=head", "data.validation=0.5", "knn.k=5")
    for _ in range(2):
        trainer.train_step()
    found, encoder = trainer.knn_top1(), trainer.moco.query_encoder
    train, validation = trainer.splits.train, trainer.splits.validation
    assert isinstance(train, datasets.Images)
    assert isinstance(validation, datasets.Images)
    with torch.no_grad():
        bank, queries = (
            encoder(views.center(part.pixels, trainer.config.views)) for part in (train, validation)
        )
    assert bank.shape[1] == trainer.config.encoder.dim
    guessed = [by_hand(query, bank, train.labels, 5, 0.1) for query in queries]
    right = int((torch.tensor(guessed) == validation.labels).sum())
    assert found == pytest.approx(right / len(queries))
    with pytest.raises(ConfigError, match=r"knn\.features=head is for pretraining only"):
        load(ProbeConfig, ["knn.features=head"])
