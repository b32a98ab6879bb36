"""The configuration of pretraining as frozen dataclasses: every key, its default and its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.moco import MocoConfig
from moco_dist.config.optim import OptimConfig
from moco_dist.config.rules import (
    ANY,
    OWN,
    check,
    check_name,
    given,
    require,
)
from moco_dist.config.running import (
    CheckpointConfig,
    KnnConfig,
    MonitorConfig,
    RuntimeConfig,
    TrackingConfig,
)
from moco_dist.errors import counted, shown


@dataclass(frozen=True)
class DataConfig:
    """The source of the images, and their split."""

    name: Literal[
        "cifar10", "cifar100", "stl10", "folder", "shards", "huggingface", "arrays", "shapes"
    ] = "shapes"
    # Folder of the data set; cifar10, cifar100 and stl10 are downloaded to it on first use.
    # folder: also a tar or zip file of a folder, which each machine unpacks into the cache.
    # shards: a folder of tar files in WebDataset's layout, KEY.jpg and KEY.cls or KEY.json.
    # huggingface: a NAME or NAME:CONFIG on the hub, a folder saved by save_to_disk, or parquet or
    # arrow files. arrays: an .npz file, a folder of .npy files, or one .npy file.
    root: str = "data"
    # huggingface: the split to train on; empty: the one called train.
    split: str = ""
    # huggingface and tables of labels: columns of images (or files) and classes; arrays: arrays.
    # Empty: found by type and name.
    image_column: str = ""
    label_column: str = ""
    # Side in pixels of squares (shorter side resized, centre cropped), which are held in memory and
    # used for features. Training views of streamed images are cut from the whole image.
    size: int = 32
    # The filter that resizes to these squares; torchvision's Resize, and so the published protocols
    # of evaluation on ImageNet, are bilinear.
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    # Images from files whose squares need more than this many GB (10^9 bytes) are streamed, i.e.
    # decoded whenever they are needed; 0 always streams. Streaming changes the views.
    memory_gb: float = 16.0
    # Go on without unreadable images, with a warning, instead of stopping.
    skip_unreadable: bool = False
    # Colour behind transparent pixels: red, green and blue from 0 to 255.
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    # Workers that decode streamed images, per process of the run; 0 means one per core.
    workers: int = 0
    # exchange: processes send each other the crops of streamed keys; plan: each decodes its own.
    keys_by: Literal["exchange", "plan"] = "exchange"
    # folders: an image's class is its first-level folder (in shards its .cls or .json; in tables
    # and arrays what they say). Or none, or FILE.csv, which has the file and label of each image.
    labels: str = "folders"
    # Share of the training images held out for validation, drawn by split_seed.
    validation: float = 0.1
    split_seed: int = 0
    # Number of training images to use, drawn by split_seed after the validation; 0 means all.
    limit: int = 0
    # Folder for decoded and unpacked images and lists of files; empty means moco_dist in the user's
    # cache folder.
    cache: str = ""
    # Images that `shapes` draws for training and testing.
    shapes_train: int = 10000
    shapes_test: int = 2000

    def __post_init__(self) -> None:
        check(
            "data.",
            self,
            size=(8, None),
            split_seed=ANY,
            validation=(0, 0.9),
            shapes_train=(10, None),
            shapes_test=(10, None),
        )
        is_table = self._labels_are_a_table
        require(
            self.labels in ("folders", "none") or is_table,
            f"data.labels={shown(self.labels)} is unknown; use folders, none, or a FILE.csv",
        )
        require(
            not is_table or self.name == "folder",
            f"data.labels={shown(self.labels)} is a table for data.name=folder, and "
            f"data.name={self.name} has labels of its own; use data.labels=folders or none",
        )
        colour = len(self.background) == 3 and all(0 <= part <= 255 for part in self.background)
        rule = "it must be three numbers from 0 to 255"
        require(colour, f"data.background={self.background} is no colour; {rule}")

    @property
    def unused(self) -> list[str]:
        """Those given keys that have no effect with this kind of data set, KEY=VALUE."""
        files, shapes = self.name in ("folder", "shards", "huggingface"), self.name == "shapes"
        columns = self.name in ("huggingface", "arrays") or self._labels_are_a_table
        found = [] if shapes else ["shapes_train", "shapes_test"]
        found += ["root", "resize"] if shapes else []
        found += [] if files else ["background"]
        found += [] if files or self.name == "arrays" else ["labels", "skip_unreadable"]
        found += [] if self.name == "huggingface" else ["split"]
        return given("data.", self, *found, *([] if columns else ["image_column", "label_column"]))

    @property
    def _labels_are_a_table(self) -> bool:
        return self.labels.lower().endswith((".csv", ".tsv"))

    @property
    def described(self) -> str:
        """What the images are, and the table that their labels come from."""
        return self.name + f" with labels of {shown(self.labels)}" * self._labels_are_a_table


@dataclass(frozen=True)
class ViewsConfig:
    """The random views of an image: crop, flip, colour jitter, grayscale, blur, solarisation."""

    # Side in pixels.
    size: int = 32
    # A crop's share of the image's area, and its ratio of width to height.
    scale_min: float = 0.2
    scale_max: float = 1.0
    ratio_min: float = 0.75
    ratio_max: float = 1.3333333333333333
    # Probabilities of flip, colour jitter, grayscale, blur and solarisation (the bright half of the
    # values inverted).
    flip: float = 0.5
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0
    solarize: float = 0.0
    # Strength of the jitter: factors in [1 - x, 1 + x]; hue in turns in [-x, x].
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    # true: MoCo v1; false: MoCo v2.
    grayscale_before_jitter: bool = False
    # Standard deviation of the blur, in pixels.
    blur_sigma_min: float = 0.1
    blur_sigma_max: float = 2.0
    # Mean and standard deviation of the channels for pixels in [0, 1] (CIFAR-10's; in gray [0.4807]
    # and [0.2392]).
    mean: list[float] = field(default_factory=lambda: [0.4914, 0.4822, 0.4465])
    std: list[float] = field(default_factory=lambda: [0.2023, 0.1994, 0.2010])

    def __post_init__(self) -> None:
        check(
            "views.",
            self,
            size=(8, None),
            hue=(0, 0.5),
            flip=(0, 1),
            jitter=(0, 1),
            grayscale=(0, 1),
            blur=(0, 1),
            solarize=(0, 1),
            scale_max=(0.001, 1),
            scale_min=(0.001, self.scale_max),
            ratio_max=(0.1, 10),
            ratio_min=(0.1, self.ratio_max),
            blur_sigma_max=(0.001, None),
            blur_sigma_min=(0.001, self.blur_sigma_max),
            mean=ANY,
            std=OWN,
        )
        require(
            0 < len(self.mean) == len(self.std),
            f"views.mean={self.mean} and views.std={self.std} are not one number per channel; give "
            "both equally many",
        )
        require(min(self.std) > 0, f"views.std={self.std} is not positive; give numbers above 0")

    def check_channels(self, channels: int) -> None:
        """Raise ConfigError unless mean and standard deviation have so many channels."""
        example = "; for gray images try views.mean=[0.48] views.std=[0.24]"
        require(
            len(self.mean) == channels,
            f"views.mean={self.mean} and views.std={self.std} are for "
            f"{counted(len(self.mean), 'channel')} and the encoder needs {channels}; "
            f"give {counted(channels, 'number')} each"
            f"{example if channels == 1 else ''}",
        )


Precision = Literal["fp32", "tf32", "bf16", "fp64"]


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that defines a pretraining run."""

    name: str = "pretrain"
    # Folder that holds the run directories.
    output: str = "runs"
    seed: int = 0
    epochs: int = 200
    # Images per step over all processes.
    batch_size: int = 512
    # Blocks of the global batch that BatchNorm normalises separately, on any number of processes
    # that divides it or is a multiple of it.
    bn_groups: int = 8
    # bf16 is mixed precision: queue, loss and weights stay fp32. tf32 is fp32 whose products and
    # convolutions a GPU rounds to 10 bits, many times as fast; a CPU takes it as fp32.
    precision: Precision = "fp32"
    # Stop after this step, to be resumed later, with the same schedules; 0 means at the end.
    stop_at_step: int = 0
    # Start from the backbone of this run, checkpoint, export or state dict; empty: from a new one.
    init_from: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    # Keys in which an image's second view differs from `views`, such as {blur: 0.1, solarize: 0.2}
    # in BYOL and MoCo v3. Both views share size, ratio, mean and std.
    views_2: ViewsConfig | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        check(
            "",
            self,
            seed=ANY,
            epochs=(1, None),
            batch_size=(2, None),
            bn_groups=(1, None),
        )
        channels = self.encoder.channels
        require(
            channels in (1, 3),
            f"encoder.channels={channels} can't be read from images; use 3 (RGB) or 1 (gray)",
        )
        self.views.check_channels(channels)
        for key in ("size", "ratio_min", "ratio_max", "mean", "std"):
            ours, theirs = (getattr(each, key) for each in (self.views, self.view_recipes[-1]))
            require(
                ours == theirs,
                f"views_2.{key}={theirs} is not views.{key}={ours}, which both views share; leave "
                "it out",
            )
        require(
            self.views_2 is None or self.moco.negatives != "bank",
            "views_2 is for the second view of an image, and moco.negatives=bank has one; leave it "
            "out",
        )
        b, g = self.batch_size, self.bn_groups
        lower = max(g, b // g * g)
        require(
            b % g == 0,
            f"batch_size={b} can't be cut into bn_groups={g} equal groups; "
            f"use batch_size={lower} or {lower + g}",
        )
        require(
            b // g >= 2,
            f"bn_groups={g} leaves {b // g} image of batch_size={b} in a group; "
            f"BatchNorm needs two or more, use bn_groups={max(1, b // 2)} or fewer",
        )
        require(
            not self.encoder.predictor or self.moco.keys == "momentum",
            "encoder.predictor=true needs keys that have none, which moco.keys=gradient doesn't "
            "make; use moco.keys=momentum with moco.negatives=batch, as MoCo v3",
        )
        halves = f"encoder.halves={self.encoder.halves}"
        require(
            self.encoder.vectors == 1 or self.moco.negatives == "bank",
            f"{halves} has each half meet the other one's bank, which moco.negatives="
            f"{self.moco.negatives} has not; use moco.negatives=bank moco.keys=gradient",
        )
        require(
            self.encoder.vectors == 1 or self.views.grayscale == 0,
            f"{halves} contrasts lightness with colours, which views.grayscale="
            f"{self.views.grayscale} takes from a view; use views.grayscale=0 (and, as published, "
            "views.jitter=0)",
        )
        self.moco.check_batch(b)
        require(
            self.knn.every_epochs > 0 or not self.monitor.linear,
            "monitor.linear=true is measured with each kNN evaluation, and knn.every_epochs=0 is "
            "never; use knn.every_epochs=1 or more",
        )

    @property
    def unused(self) -> list[str]:
        """Those given keys that have no effect with the others, KEY=VALUE."""
        return [*self.moco.unused, *self.data.unused, *self.optim.unused(self.epochs)]

    def negatives(self, images: int) -> str:
        """Return what the negatives of a query are, in words."""
        crossed = "; two banks, crossed between the halves" if self.encoder.vectors > 1 else ""
        return self.moco.described(self.batch_size, images) + crossed

    @property
    def drifts(self) -> str:
        """The sentence about heads with which two halves learn little, or nothing."""
        if self.encoder.vectors == 1 or self.encoder.head == "mlp_bn":
            return ""
        return (
            f"encoder.head={self.encoder.head} has no BatchNorm: the mean vectors of two halves "
            "then drift, the loss falls in each epoch and rises after it, and little is learned; "
            "use encoder.head=mlp_bn"
        )

    @property
    def view_recipes(self) -> list[ViewsConfig]:
        """The recipe of all views, or those of the first and of the second one."""
        return [self.views, self.views_2] if self.views_2 else [self.views]


# Keys, and groups (with a dot), that may change when a run is resumed: the run's length, its
# logging, the machine, and the probe's path to its encoder. All others affect the numbers.
FREE_ON_RESUME = (
    *("name", "output", "encoder", "epochs", "stop_at_step", "data.root", "data.cache"),
    *("data.memory_gb", "data.workers", "data.keys_by", "data.skip_unreadable"),
    *("knn.", "monitor.", "checkpoint.", "tracking.", "runtime."),
)
