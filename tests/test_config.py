"""Every configuration loads, and every mistake has its one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import changed_keys, flat, load, to_dict, to_yaml
from moco_dist.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
PRETRAIN = sorted(CONFIGS.glob("pretrain/*.yaml"))
PROBE = sorted(CONFIGS.glob("probe/*.yaml"))


def refusal(*arguments: str, schema: type = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as error:
        load(schema, list(arguments))
    assert error.value.exit_status == 78
    return str(error.value)


def test_the_promised_configurations_are_there() -> None:
    small = {"stl10", "tiny_imagenet", "imagenet100", "imagenette"}
    names = {"paper", "cifar10", "cifar10_symmetric", "imagenet_v1", "imagenet_v2", "demo"}
    names |= {"simclr_cifar10", "simclr_imagenet", "instdis_cifar10", "cmc_cifar10"}
    names |= {"aidendurrant"}
    names |= {f"mocov3_{name}" for name in ("cifar10", "imagenet", "vit_small", "vit_base")}
    assert {path.stem for path in PRETRAIN} == names | small
    assert {path.stem for path in PROBE} == {
        *("paper", "cifar10", "cifar10_grid", "cifar10_finetune", "imagenet", "demo"),
        *small,
    }


@pytest.mark.parametrize("path", [*PRETRAIN, *PROBE], ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_a_file_loads_and_its_header_has_the_command_that_runs_it(path: Path) -> None:
    if path in PRETRAIN:
        assert load(PretrainConfig, [str(path)]).name == path.stem
    else:
        assert load(ProbeConfig, [str(path), "encoder=runs/x"]).encoder == "runs/x"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = f"-m moco_dist.{path.parent.stem} configs/{path.parent.stem}/{path.name}"
    assert any(command in line for line in header)


def test_published_settings_are_in_the_imagenet_files() -> None:
    v1 = load(PretrainConfig, [str(CONFIGS / "pretrain/imagenet_v1.yaml")])
    v2 = load(PretrainConfig, [str(CONFIGS / "pretrain/imagenet_v2.yaml")])
    for config in (v1, v2):
        assert (config.batch_size, config.bn_groups, config.epochs) == (256, 8, 200)
        assert (config.moco.queue_size, config.moco.momentum) == (65536, 0.999)
        assert (config.optim.lr, config.optim.weight_decay) == (0.03, 1e-4)
        assert config.encoder.backbone == "resnet50"
    assert (v1.moco.temperature, v1.encoder.head) == (0.07, "linear")
    assert v1.optim.milestones == [120, 160]
    assert (v2.moco.temperature, v2.encoder.head, v2.views.blur) == (0.2, "mlp", 0.5)


def test_arguments_apply_from_left_to_right(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 7\noptim:\n  lr: 1e-6\n  milestones: [1, 2]\n")
    config = load(PretrainConfig, ["epochs=5", "seed=4", str(file), "optim.lr=3e-2"])
    assert (config.epochs, config.seed, config.optim.lr) == (7, 4, 0.03)
    assert config.optim.milestones == [1, 2]
    assert config.optim.momentum == PretrainConfig().optim.momentum


def test_a_configuration_cannot_be_edited() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(PretrainConfig, []).seed = 1  # type: ignore[misc]


def test_resuming_may_change_the_length_the_logging_and_the_machine_only() -> None:
    old = to_dict(load(PretrainConfig, []))
    free = ["epochs=9", "tracking.every_steps=3", "knn.k=5", "runtime.micro_batches=2"]
    free += ["data.root=x", "checkpoint.keep_last=5", "name=other"]
    assert changed_keys(old, load(PretrainConfig, free)) == []
    fixed = ["seed=1", "optim.lr=0.5", "bn_groups=4", "moco.queue_size=1000", "precision=bf16"]
    assert changed_keys(old, load(PretrainConfig, [*free, *fixed, "encoder.width=32"])) == [
        "bn_groups: 8 -> 4",
        "encoder.width: 64 -> 32",
        "moco.queue_size: 4096 -> 1000",
        "optim.lr: 0.03 -> 0.5",
        "precision: fp32 -> bf16",
        "seed: 0 -> 1",
    ]
    probe = [load(ProbeConfig, [f"encoder={path}"]) for path in ("runs/a", "runs/b")]
    assert changed_keys(to_dict(probe[0]), probe[1]) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["moco.queu_size=1"],
            "moco.queu_size=1: there is no key 'moco.queu_size'; did you mean 'moco.queue_size'?",
        ),
        (
            ["queue_size=1"],
            "queue_size=1: there is no key 'queue_size'; did you mean 'moco.queue_size'?",
        ),
        (
            ["knn.neighbours=1"],
            "knn.neighbours=1: there is no key 'knn.neighbours'; "
            "use one of knn.every_epochs, knn.at_start, knn.k, knn.temperature, knn.features",
        ),
        (["epochs=many"], "epochs=many: epochs=many is not a whole number"),
        (["epochs=2.5"], "epochs=2.5: epochs=2.5 is not a whole number"),
        (["optim.lr=high"], "optim.lr=high: optim.lr=high is not a number"),
        (["moco.symmetric=7up"], "moco.symmetric=7up: moco.symmetric=7up is not true or false"),
        (
            ["optim.schedule=cosin"],
            "optim.schedule=cosin: optim.schedule=cosin is not one of cosine, "
            "cosine_after_warmup, step, constant",
        ),
        (
            ["optim.milestones=3"],
            "optim.milestones=3: optim.milestones=3 is not a list of whole numbers such as [1,2,3]",
        ),
        (
            ["knn=3"],
            "knn=3: 'knn' is a group and takes no value; "
            "set one of knn.every_epochs, knn.at_start, knn.k, knn.temperature, knn.features",
        ),
        (
            ["moco.momentum=1.5"],
            "moco.momentum=1.5 is out of range; it must lie in [0, 1), 0.99 is usual",
        ),
        (["moco.temperature=0"], "moco.temperature=0.0 is not above 0; 0.1 or 0.2 is usual"),
        (["views.hue=0.7"], "views.hue=0.7 is out of range; it must lie between 0 and 0.5"),
        (["epochs=0"], "epochs=0 is too small; it must be at least 1"),
        (
            ["optim.schedule=step"],
            "optim.schedule=step has no milestones; give epochs, as optim.milestones=[120,160]",
        ),
        (
            ["batch_size=250"],
            "batch_size=250 can't be cut into bn_groups=8 equal groups; use batch_size=248 or 256",
        ),
        (
            ["batch_size=8"],
            "bn_groups=8 leaves 1 image of batch_size=8 in a group; BatchNorm needs two or more, "
            "use bn_groups=4 or fewer",
        ),
        (
            ["moco.queue_size=100"],
            "moco.queue_size=100 can't hold the 512 keys of one step; use 512 or more",
        ),
        (
            ["moco.symmetric=true", "moco.queue_size=1000"],
            "moco.queue_size=1000 can't hold the 1024 keys of one step; use 1024 or more",
        ),
        (
            ["name=a/b"],
            "name='a/b' is no folder name; use letters, digits, '-', '_', '+' and '.'",
        ),
        (
            ["configs/pretrain/papers.yaml"],
            "configs/pretrain/papers.yaml: no such file; "
            "list the project's own with python -m moco_dist.packaged",
        ),
        (["epoch"], "epoch: neither a YAML file nor a key=value; did you mean 'epochs=...'?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_has_its_sentence(arguments: list[str], sentence: str) -> None:
    assert refusal(*arguments) == sentence


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("optim:\n  learning_rate: 3\n")
    assert refusal(str(file)) == (
        f"{file}: there is no key 'optim.learning_rate'; use one of optim.name, optim.lr, "
        "optim.momentum, optim.nesterov, optim.weight_decay, optim.trust, optim.trust_clip, "
        "optim.schedule, optim.lr_min, optim.milestones, optim.gamma, optim.warmup_epochs"
    )
    file.write_text("optim: [}")
    assert refusal(str(file)).startswith(f"{file}: not valid YAML (")
    file.write_text("- 1\n- 2\n")
    assert refusal(str(file)) == f"{file}: holds no 'key: value' lines; see --help for the keys"


def test_a_probe_refuses_what_would_have_no_effect() -> None:
    assert refusal("top_k=0", schema=ProbeConfig) == "top_k=0 is too small; it must be at least 1"
    for key, value in (("runtime.compile", "true"), ("runtime.micro_batches", "2")):
        sentence = refusal("encoder=runs/x", f"{key}={value}", schema=ProbeConfig)
        assert f"{key}={value}" in sentence
        assert "for pretraining only" in sentence


@pytest.mark.parametrize(
    "text",
    [
        *("no", "off", "007", "1e3", "1_000", "0x10", "true", "2026-11-24", "695e0514", "null"),
        *(".inf", "1.", "0o17", "010", "+1"),
    ],
)
def test_a_text_is_taken_as_it_stands(text: str, tmp_path: Path) -> None:
    config = load(PretrainConfig, [f"name={text}", f"data.root={text}"]) if text != ".inf" else None
    assert config is None or (config.name, config.data.root) == (text, text)
    file = tmp_path / "a.yaml"
    for quote in ("", "'", '"'):
        file.write_text(f"output: {quote}{text}{quote}\ndata: {{root: {quote}{text}{quote}}}\n")
        config = load(PretrainConfig, [str(file)])
        assert (config.output, config.data.root) == (text, text)
        assert load(PretrainConfig, [f"data.root={quote}{text}{quote}"]).data.root == text


@pytest.mark.parametrize(
    "path",
    [
        *(
            "set #2",
            "#2",
            "set: 3",
            "a: b #c",
            "[a]",
            "{a: b}",
            "- a",
            "*a",
            "&a b",
            "!x",
            "%",
            "@a",
        ),
        *("'a' and 'b'", "'a", 'a"', "a, b", "a=b", " a ", "", "~", "12:30", "a\\tb", "set\udce9"),
    ],
)
def test_a_path_is_taken_as_it_stands_and_kept_by_the_file_of_the_run(
    path: str, tmp_path: Path
) -> None:
    config = load(PretrainConfig, [f"data.root={path}", f"output={path}"])
    assert (config.data.root, config.output) == (path, path)
    (tmp_path / "a.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(PretrainConfig, [str(tmp_path / "a.yaml")]) == config


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("seed=010", 10), ("seed=008", 8), ("epochs=0200", 200), ("batch_size=0128", 128)),
        *(("seed=-07", -7), ("seed=1_000", 1000), ("optim.lr=010", 10.0), ("optim.lr=1e-3", 0.001)),
        *(("optim.milestones=[010, 020]", [10, 20]), ("optim.milestones=[]", [])),
        *(("grid.lr=[01.5]", [1.5]), ("data.skip_unreadable=No", False)),
        ("data.skip_unreadable=on", True),
    ],
)
def test_a_number_is_decimal(argument: str, value: Any, tmp_path: Path) -> None:
    key, text = argument.split("=")
    schema = ProbeConfig if key.startswith("grid") else PretrainConfig
    assert flat(to_dict(load(schema, [argument])))[key] == value
    (tmp_path / "a.yaml").write_text(f"{key}: {text}\n")
    assert flat(to_dict(load(schema, [str(tmp_path / "a.yaml")])))[key] == value


def test_options_are_words_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    options = ["patch_size=4", "depth=6", "qkv_bias=False", "mlp_ratio=3.5", "x=[1,2]", "y=moco"]
    text = f"[{','.join(options[:4])},'{options[4]}',{options[5]}]"
    timm = ["encoder.backbone=timm/none", "encoder.stem=imagenet"]
    config = load(PretrainConfig, [*timm, f"encoder.options={text}"])
    assert config.encoder.options == options
    assert config.encoder.settings == {
        **{"patch_size": 4, "depth": 6, "qkv_bias": False, "mlp_ratio": 3.5},
        **{"x": [1, 2], "y": "moco"},
    }
    (tmp_path / "a.yaml").write_text(to_yaml(config))
    assert load(PretrainConfig, [str(tmp_path / "a.yaml")]) == config
    (tmp_path / "b.yaml").write_text("encoder:\n  options:\n    - patch_size=4\n")
    assert load(PretrainConfig, [*timm, str(tmp_path / "b.yaml")]).encoder.settings == {
        "patch_size": 4
    }
    assert refusal("encoder.options={patch_size: 4}").endswith(
        "encoder.options={patch_size: 4} is not a list of words such as [a=1,b=2]"
    )
    changed = changed_keys(to_dict(config), load(PretrainConfig, timm))
    assert changed == [f"encoder.options: {options} -> []"]


@pytest.mark.parametrize(
    "argument",
    [
        *("epochs=1:30", "epochs=0x10", "epochs=0o17", "epochs=1e3", "epochs=", "epochs=٣"),
        *("optim.lr=1:30", "optim.lr=0x1p-3", "optim.lr=no", "data.skip_unreadable=maybe"),
        *("optim.milestones=[1:30]", "optim.milestones=[[1]]", "optim.milestones={1: 2}"),
        *("views.mean=0.5", "views.mean=[a,0,0]", "precision=no", "optim.milestones=[010.5]"),
    ],
)
def test_what_is_no_number_is_refused(argument: str, tmp_path: Path) -> None:
    key, text = argument.split("=")
    assert refusal(argument).startswith(f"{argument}: {argument} is not ")
    (tmp_path / "a.yaml").write_text(f"{key}: {text}\n")
    said = refusal(str(tmp_path / "a.yaml"))
    assert said.startswith(f"{tmp_path / 'a.yaml'}: {argument} is not ")


def test_a_dotted_key_in_a_file_is_that_key(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim.lr: 0.5\nviews.mean: [1, 1, 1]\noptim:\n  # lr: 3\n  momentum: 0.5\n")
    config = load(PretrainConfig, [str(file)])
    assert (config.optim.lr, config.optim.momentum, config.views.mean) == (0.5, 0.5, [1, 1, 1])
    file.write_text("moco:\n  # all lines are comments\n")
    assert load(PretrainConfig, [str(file)]) == PretrainConfig()
    file.write_text("optim.lr: 0.5\noptim:\n  lr: 3\n")
    assert "found duplicate key optim.lr in line 2" in refusal(str(file))


@pytest.mark.parametrize("schema", [PretrainConfig, ProbeConfig])
def test_a_key_that_an_older_version_lacked_had_its_default(schema: type[Any]) -> None:
    older = to_dict(schema())
    assert older["views"].pop("flip") == 0.5
    assert older.pop("precision") == "fp32"
    assert changed_keys(older, schema()) == []
    now = load(schema, ["views.flip=0.25", "precision=fp64"])
    assert changed_keys(older, now) == ["precision: fp32 -> fp64", "views.flip: 0.5 -> 0.25"]
    assert changed_keys(older | {"gone": 3}, schema()) == ["gone: 3 -> None"]
