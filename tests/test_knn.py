"""The weighted nearest-neighbour classifier, against a loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.encoders import features
from moco_dist.errors import ConfigError
from moco_dist.method import views
from tests.test_init_from import started
from tests.test_trainer import build


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
@pytest.mark.parametrize("pieces", [False, True])
def test_prediction_is_that_of_a_brute_force_loop(
    k: int, temperature: float, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:  # the last ones are shorter
        monkeypatch.setattr(features, "QUERIES", 7)
        monkeypatch.setattr(features, "BANK", 16)
    generator = torch.Generator().manual_seed(k)
    bank = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (60,), generator=generator)
    queries = 3 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    predicted = features.predict(queries, bank, labels, 5, k, temperature)
    expected = [by_hand(query, bank, labels, min(k, 60), temperature) for query in queries]
    assert predicted.tolist() == expected
    closest = features.nearest(queries, bank, k)
    angles = F.normalize(queries) @ F.normalize(bank).T
    assert closest.equal(angles.argsort(dim=1, descending=True)[:, :k])


def test_a_low_temperature_does_not_overflow_float32() -> None:
    bank = torch.eye(4)
    predicted = features.predict(bank, bank, torch.tensor([3, 1, 0, 2]), 4, k=4, temperature=0.001)
    assert predicted.tolist() == [3, 1, 0, 2]


@pytest.fixture
def other_precision() -> Iterator[None]:
    """Accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("other_precision")
def test_similarities_of_a_bf16_run_are_not_rounded_to_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = build("precision=bf16", "data.shapes_train=600", "data.shapes_test=200")
    seen: list[tuple[torch.Tensor, ...]] = []
    predict = features.predict

    def watched(queries: torch.Tensor, bank: torch.Tensor, *others: Any) -> torch.Tensor:
        found = predict(queries, bank, *others)
        seen.append((queries, bank, *others[:1], found))
        return found

    monkeypatch.setattr(features, "predict", watched)
    trainer.accuracies()
    ((queries, bank, labels, found),) = seen
    assert queries.dtype == bank.dtype == torch.float32
    # Of the same features, which autocast computed in bf16.
    assert bank.equal(bank.bfloat16().float())
    fine, coarse = (
        F.normalize(each(queries)) @ F.normalize(each(bank)).T
        for each in (torch.Tensor.float, torch.Tensor.bfloat16)
    )
    assert len(coarse.unique()) < 300 < fine.numel() / 2 < len(fine.unique())
    settings = trainer.config.knn
    for row in range(0, len(queries), 17):
        expected = by_hand(queries[row], bank, labels, settings.k, settings.temperature)
        assert int(found[row]) == expected


class Sizes(TorchDispatchMode):
    """Collects the memory of every new tensor, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        made = function(*arguments, **(named or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                memory = each.untyped_storage()
                self.found[memory.data_ptr()] = memory, memory.nbytes()
        return made

    def above(self, size: int) -> int:
        return sum(nbytes >= size for _, nbytes in self.found.values())


def test_features_of_many_images_are_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("data.shapes_train=4000", "data.shapes_test=50")
    monkeypatch.setattr(features, "BANK", 500)
    encoder, images = trainer.moco.query_encoder.backbone.eval(), trainer.splits.train
    with Sizes() as made:
        bank = features.extract(encoder, images, trainer.config.views, 10)
    assert made.above(bank.nbytes) == 1
    known = (bank, torch.zeros(len(bank), dtype=torch.int64), 10, 20, 0.1)
    with Sizes() as made:
        features.predict(bank[:20], *known)
    made.found.pop(bank.untyped_storage().data_ptr())  # seen by its pieces, which are no copies
    assert made.above(bank.nbytes // 2) == 0


def test_knn_of_the_head_is_that_of_the_vectors_behind_it(tmp_path: Path) -> None:
    """The oracle: the brute-force loop on what the encoder returns, as the authors' notebook."""
    trainer = started(tmp_path, "", "knn.features=head", "data.validation=0.5", "knn.k=5")
    for _ in range(2):
        trainer.train_step()
    found, encoder = trainer.accuracies()["knn/top1"], trainer.moco.query_encoder
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
