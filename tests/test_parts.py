"""Which names stand for the parts of a data set, and which are those of classes."""

from __future__ import annotations

import pytest

from moco_dist.data.parts import part_of

FOLDERS = {
    "train": "train Train TRAIN training Training trainset train_set training-set train2017 "
    "train_images",
    "validation": "val Val valid VALID validation validation_set val2017",
    "test": "test Test TEST testing testset test_set eval Evaluation test-images",
    None: "tests latest trains express_train test_tube seg_train invalid value images set 2017 été "
    "testé train_masks unlabelled",
}
TARS = {
    "train": "train-0000.tar imagenet-train-000000.tar TRAIN_00.tar training.1.tar",
    "validation": "valid-0000.tar Val-0.tar imagenet1k-validation-00.tar x.val.tar train_val-0.tar",
    "test": "test-000.tar eval_0.tar set-TEST-01.tar",
    None: "000000.tar latest-0.tar shard-0.tar",
}


@pytest.mark.parametrize("part", FOLDERS)
def test_a_folder_is_a_part_by_its_whole_name(part: str | None) -> None:
    assert {name: part_of(name) for name in str(FOLDERS[part]).split()} == dict.fromkeys(
        str(FOLDERS[part]).split(), part
    )


@pytest.mark.parametrize("part", TARS)
def test_a_tar_is_of_a_part_by_any_word_of_its_name(part: str | None) -> None:
    names = TARS[part].split()
    assert {name: part_of(name, anywhere=True) for name in names} == dict.fromkeys(names, part)
