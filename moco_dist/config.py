"""The configuration of both runs as frozen dataclasses, and `load`, which fills them from YAML files and `a.b=c`.

Nothing else knows that YAML exists. Nothing edits a configuration after `load`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from moco_dist.errors import ConfigError

Schema = TypeVar("Schema")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _at_least(key: str, value: float, least: float) -> None:
    _require(value >= least, f"{key}={value} is too small; it must be at least {least}")


def _within(key: str, value: float, low: float, high: float) -> None:
    inside = low <= value <= high
    _require(inside, f"{key}={value} is out of range; it must lie between {low} and {high}")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are split."""

    name: Literal["cifar10", "cifar100", "stl10", "folder", "shapes"] = "shapes"
    # Folder of the data set; cifar10, cifar100 and stl10 are downloaded into it on the first use.
    root: str = "data"
    # Images are held in memory as squares of this many pixels a side (shorter side resized, centre cut).
    size: int = 32
    # Class of an image in `folder`: the name of its first-level folder, or none (unlabelled).
    labels: Literal["folders", "none"] = "folders"
    # Share of the training images that is held out for validation, drawn by split_seed.
    validation: float = 0.1
    split_seed: int = 0
    # Use only so many training images (drawn by split_seed, after validation is held out); 0 means all.
    limit: int = 0
    # Folder for decoded images; empty means moco_dist under the user's cache folder.
    cache: str = ""
    # Images that `shapes` draws for training and for testing.
    shapes_train: int = 10000
    shapes_test: int = 2000

    def __post_init__(self) -> None:
        _at_least("data.size", self.size, 8)
        _within("data.validation", self.validation, 0.0, 0.9)
        _at_least("data.limit", self.limit, 0)
        _at_least("data.shapes_train", self.shapes_train, 10)
        _at_least("data.shapes_test", self.shapes_test, 10)


@dataclass(frozen=True)
class ViewsConfig:
    """The random views of an image: crop, flip, colour jitter, grayscale, blur."""

    # Pixels of a view's side.
    size: int = 32
    # Share of the image's area that a crop covers, and its width to height ratio.
    scale_min: float = 0.2
    scale_max: float = 1.0
    ratio_min: float = 0.75
    ratio_max: float = 1.3333333333333333
    # Probabilities of flip, colour jitter, grayscale and blur.
    flip: float = 0.5
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0
    # Strength of the jitter: factors from [1 - x, 1 + x]; hue in turns from [-x, x].
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    # MoCo v1 turns to gray before it jitters, MoCo v2 after.
    grayscale_before_jitter: bool = False
    # Standard deviation of the blur, in pixels.
    blur_sigma_min: float = 0.1
    blur_sigma_max: float = 2.0
    # Mean and standard deviation of the channels, with pixels in [0, 1] (CIFAR-10's).
    mean: list[float] = field(default_factory=lambda: [0.4914, 0.4822, 0.4465])
    std: list[float] = field(default_factory=lambda: [0.2023, 0.1994, 0.2010])

    def __post_init__(self) -> None:
        _at_least("views.size", self.size, 8)
        for key in ("flip", "jitter", "grayscale", "blur"):
            _within(f"views.{key}", getattr(self, key), 0.0, 1.0)
        _within("views.scale_max", self.scale_max, 1e-3, 1.0)
        _within("views.scale_min", self.scale_min, 1e-3, self.scale_max)
        _within("views.ratio_max", self.ratio_max, 0.1, 10.0)
        _within("views.ratio_min", self.ratio_min, 0.1, self.ratio_max)
        for key in ("brightness", "contrast", "saturation"):
            _at_least(f"views.{key}", getattr(self, key), 0.0)
        _within("views.hue", self.hue, 0.0, 0.5)
        _at_least("views.blur_sigma_max", self.blur_sigma_max, 1e-3)
        _within("views.blur_sigma_min", self.blur_sigma_min, 1e-3, self.blur_sigma_max)
        for key in ("mean", "std"):
            values = getattr(self, key)
            _require(len(values) == 3, f"views.{key}={values} is not one number for each channel; give three")
        _require(min(self.std) > 0, f"views.std={self.std} is not positive; give three numbers above 0")


@dataclass(frozen=True)
class EncoderConfig:
    """A torchvision ResNet with a projection head."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    # Channels of the first stage; 64 is the published width.
    width: int = 64
    # cifar: 3x3 convolution, no pooling; imagenet: 7x7 with stride 2, then pooling.
    stem: Literal["cifar", "imagenet"] = "cifar"
    # linear: MoCo v1; mlp: MoCo v2, one hidden layer as wide as the features.
    head: Literal["linear", "mlp"] = "linear"
    # Length of a key.
    dim: int = 128

    def __post_init__(self) -> None:
        _at_least("encoder.width", self.width, 1)
        _at_least("encoder.dim", self.dim, 2)


@dataclass(frozen=True)
class MocoConfig:
    """Momentum Contrast: queue, momentum and loss."""

    # Keys in the queue, the newest ones, whatever the batch size.
    queue_size: int = 4096
    temperature: float = 0.1
    # Share of the key encoder that stays at each step.
    momentum: float = 0.99
    # cosine raises the momentum to 1 at the end of the run.
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    # Each view is query once and key once; the two losses are added.
    symmetric: bool = False
    # An image's own older keys don't count as its negatives.
    mask_own_keys: bool = True

    def __post_init__(self) -> None:
        _at_least("moco.queue_size", self.queue_size, 1)
        _require(self.temperature > 0, f"moco.temperature={self.temperature} is not above 0; 0.1 or 0.2 is usual")
        valid = 0 <= self.momentum < 1
        _require(valid, f"moco.momentum={self.momentum} is out of range; it must lie in [0, 1), 0.99 is usual")


@dataclass(frozen=True)
class OptimConfig:
    """SGD and the schedule of its learning rate."""

    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # step multiplies the rate by gamma at each of the milestones (epochs).
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    # The rate climbs from 0 in a straight line over so many epochs.
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr} is not above 0; give a positive learning rate")
        valid = 0 <= self.momentum < 1
        _require(valid, f"optim.momentum={self.momentum} is out of range; it must lie in [0, 1), 0.9 is usual")
        _at_least("optim.weight_decay", self.weight_decay, 0.0)
        _at_least("optim.warmup_epochs", self.warmup_epochs, 0.0)
        _within("optim.gamma", self.gamma, 0.0, 1.0)
        stepped = self.schedule != "step" or self.milestones
        _require(bool(stepped), "optim.schedule=step has no milestones; give epochs, as optim.milestones=[120,160]")


@dataclass(frozen=True)
class KnnConfig:
    """The weighted nearest-neighbour classifier on backbone features (Wu et al. 2018, section 3.4)."""

    # Epochs from one evaluation to the next; 0 is never. The last epoch is always evaluated otherwise.
    every_epochs: int = 10
    # Also evaluate the encoder before its first step, as a control.
    at_start: bool = False
    k: int = 200
    temperature: float = 0.1

    def __post_init__(self) -> None:
        _at_least("knn.every_epochs", self.every_epochs, 0)
        _at_least("knn.k", self.k, 1)
        _require(self.temperature > 0, f"knn.temperature={self.temperature} is not above 0; 0.1 is usual")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    # Epochs, and steps, from one checkpoint to the next; 0 is never. The end of the run always writes one.
    every_epochs: int = 1
    every_steps: int = 0
    # Newest checkpoints that stay.
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_epochs", self.every_epochs, 0)
        _at_least("checkpoint.every_steps", self.every_steps, 0)
        _at_least("checkpoint.keep", self.keep, 2)


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl and the console."""

    # Steps from one line of metrics to the next.
    every_steps: int = 10
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "moco_dist"

    def __post_init__(self) -> None:
        _at_least("tracking.every_steps", self.every_steps, 1)


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: nothing here changes the result beyond the order of floating-point sums."""

    device: Literal["auto", "cpu"] = "auto"
    # Pieces that each process cuts its share of the batch into, to save memory.
    micro_batches: int = 1
    # Processes that must take part; 0 accepts any number.
    processes: int = 0
    # Choose deterministic kernels, so that the same machine gives the same bits.
    deterministic: bool = True

    def __post_init__(self) -> None:
        _at_least("runtime.micro_batches", self.micro_batches, 1)
        _at_least("runtime.processes", self.processes, 0)


Precision = Literal["fp32", "bf16", "fp64"]


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that defines a pretraining run."""

    name: str = "pretrain"
    # Folder that holds the run directories.
    output: str = "runs"
    seed: int = 0
    epochs: int = 200
    # Images of a step over all processes.
    batch_size: int = 512
    # Consecutive blocks of the global batch that BatchNorm sees apart, on any number of processes.
    bn_groups: int = 8
    # bf16 is mixed precision; the queue, the loss and the weights stay fp32.
    precision: Precision = "fp32"
    # End after this step, to be resumed later; 0 means the end of the last epoch. Schedules don't change.
    stop_at_step: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _check_run(self.name, self.epochs, self.stop_at_step)
        _at_least("batch_size", self.batch_size, 2)
        _at_least("bn_groups", self.bn_groups, 1)
        b, g = self.batch_size, self.bn_groups
        lower = max(g, b // g * g)
        _require(
            b % g == 0,
            f"batch_size={b} can't be cut into bn_groups={g} equal groups; use batch_size={lower} or {lower + g}",
        )
        _require(
            b // g >= 2,
            f"bn_groups={g} leaves {b // g} image of batch_size={b} in a group; BatchNorm needs two or more, "
            f"use bn_groups={max(1, b // 2)} or fewer",
        )
        keys = b * (2 if self.moco.symmetric else 1)
        _require(
            self.moco.queue_size >= keys,
            f"moco.queue_size={self.moco.queue_size} can't hold the {keys} keys of one step; use {keys} or more",
        )


@dataclass(frozen=True)
class ProbeConfig:
    """Everything that defines a linear probe of a frozen encoder."""

    # Empty means the name of the encoder's run with "-probe" behind it.
    name: str = ""
    output: str = "runs"
    # A run directory (its newest checkpoint) or one checkpoint folder.
    encoder: str = ""
    seed: int = 0
    epochs: int = 100
    batch_size: int = 256
    precision: Precision = "fp32"
    stop_at_step: int = 0
    # true: new random views and an encoder pass in each epoch; false: features are computed once.
    augment: bool = True
    # Probe a randomly initialised encoder beside the trained one.
    control: bool = True
    # probe/topK counts an image as right if its class is among the K most likely.
    top_k: int = 5
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(
        default_factory=lambda: ViewsConfig(scale_min=0.08, jitter=0.0, grayscale=0.0)
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=30.0, weight_decay=0.0))
    knn: KnnConfig = field(default_factory=KnnConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _check_run(self.name or "probe", self.epochs, self.stop_at_step)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("top_k", self.top_k, 1)


def _check_run(name: str, epochs: int, stop_at_step: int) -> None:
    plain = bool(name) and all(letter.isalnum() or letter in "-_.+" for letter in name) and name[0] != "."
    _require(plain, f"name={name!r} is no folder name; use letters, digits, '-', '_', '+' and '.'")
    _at_least("epochs", epochs, 1)
    _at_least("stop_at_step", stop_at_step, 0)


# Keys that may differ when a run is resumed: its length, what is logged, and the machine.
FREE_ON_RESUME = (
    *("name", "output", "encoder", "epochs", "stop_at_step", "data.root", "data.cache"),
    *("knn", "checkpoint", "tracking", "runtime"),
)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as nested plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return the whole configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def from_dict(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Return the configuration that `to_dict` made `values` of; unknown keys are errors."""
    return _to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts under their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return 'key: old -> new' for each dotted key that a resumed run must not change and that differs."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]


def load(schema: type[Schema], arguments: list[str]) -> Schema:
    """Return the configuration that the arguments give, applied left to right onto the defaults.

    An argument is a YAML file or an override `a.b=c`. Raises ConfigError, with one sentence, for an
    unknown key, a wrong type, a value out of range or a missing file.
    """
    config = OmegaConf.structured(schema)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        try:
            if equals and not Path(argument).is_file():
                layer = OmegaConf.from_dotlist([argument])
            else:
                layer = OmegaConf.load(_yaml_file(argument, schema))
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ConfigError(f"{argument}: not valid YAML ({_one_line(error)}); mend its syntax") from error
        if not OmegaConf.is_dict(layer):
            raise ConfigError(f"{argument}: holds no 'key: value' lines; see --help for the keys")
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{argument}: {_explain(error, schema, layer, key)}") from error
    return _to_object(config)


def _to_object(config: Any) -> Any:
    return OmegaConf.to_object(config)


def _yaml_file(argument: str, schema: type[Any]) -> Path:
    path = Path(argument)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise ConfigError(f"{argument}: no such file; the project's own are in configs/pretrain and configs/probe")
        return path
    near = _nearest(argument, _keys(schema))
    hint = f"did you mean '{near}=...'?" if near else "see --help for the keys"
    raise ConfigError(f"{argument}: neither a YAML file nor a key=value; {hint}")


def _keys(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the type of each dotted key of a schema."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        inner = _keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {}
        keys |= inner or {prefix + name: kind}
    return keys


def _nearest(key: str, keys: dict[str, Any]) -> str | None:
    last = key.rpartition(".")[2]
    by_last = {known.rpartition(".")[2]: known for known in reversed(keys)}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    close_last = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return close[0] if close else by_last[close_last[0]] if close_last else None


def _explain(error: OmegaConfBaseException, schema: type[Any], layer: Any, key: str) -> str:
    key = error.full_key or key
    keys = _keys(schema)
    if isinstance(error, ConfigKeyError):
        near = _nearest(key, keys)
        siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
        way_out = f"did you mean '{near}'?" if near else f"known there: {', '.join(siblings or keys)}"
        return f"there is no key '{key}'; {way_out}"
    name = key.partition("[")[0]
    value = OmegaConf.select(layer, key) if "[" not in key else OmegaConf.select(layer, name)
    if name not in keys:
        inside = ", ".join(k for k in keys if k.startswith(name + "."))
        return f"'{name}' is a group and takes no value; set one of {inside or ', '.join(keys)}"
    return f"{name}={value} is not {_kind(keys[name])}"


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        (item,) = typing.get_args(annotation)
        return f"a list of {'whole numbers' if item is int else 'numbers'}, as [1,2,3]"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return kinds[annotation]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
