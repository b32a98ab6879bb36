"""Compare the speed of streaming with that of decoding alone, and measure memory.

  python -m tests.streaming_speed folder|shards DIR [key=value ...]
  python -m tests.streaming_speed tar FOLDER DIR    make shards of a folder of class folders

Each turn measures decoding alone, in equally many processes without requests, and then the whole
pipeline over the same images. Prints medians and their ratio, by the clock and by the workers' CPU
time, which other work on the machine disturbs less. With epochs=3 the pipeline then runs over all
images, and the memory of all processes is printed.
"""

from __future__ import annotations

import json
import mmap
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from moco_dist.config.recipe import DataConfig, ViewsConfig
from moco_dist.data import datasets, image_worker, worker_pool
from moco_dist.data.image_file import Recipe
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.data.view_source import StreamedSource
from moco_dist.method import views
from moco_dist.method.plan import Plan
from tests import image_sets


def main(kind: str, place: str, *settings: str) -> None:
    """Measure, or make shards."""
    if kind == "tar":
        return image_sets.write_tars(Path(place), Path(settings[0]), 5000)
    given = {"size": 32, "batch": 256, "images": 4096, "workers": 1, "turns": 7, "epochs": 0}
    given |= {key: int(value) for key, value in (each.split("=") for each in settings)}
    config = DataConfig(
        name=kind,  # type: ignore[arg-type]
        root=place,
        size=given["size"],
        memory_gb=0,
        validation=0.0,
        workers=given["workers"],
        cache=str(Path(place).parent / "cache"),
    )
    began = time.monotonic()
    images = datasets.load(config).train
    assert isinstance(images, StreamedImages)
    print(f"{len(images):,} images listed in {time.monotonic() - began:.1f} s", flush=True)
    cut = ViewsConfig(size=given["size"])
    plan = Plan(len(images), given["batch"], 0)
    source = StreamedSource(images, [cut], torch.float32, plan, [(0, 1)], "exchange")
    steps, step = given["images"] // given["batch"], 0
    rates: dict[str, list[tuple[float, float]]] = {"decoder alone": [], "pipeline": []}
    for turn in range(given["turns"] + 1):
        samples = torch.cat([plan.step(step + n).samples for n in range(steps)])
        alone = decoder_alone(images, cut, samples, given["workers"])
        source.begin(step)  # what is ahead is decoded before the clock starts, as after it
        began, busy = time.monotonic(), cpu_seconds(images)
        for number in range(step + 1, step + steps):
            source.begin(number)
        count = (steps - 1) * given["batch"]
        rate = count / (time.monotonic() - began)
        cpu_rate = given["workers"] * count / (cpu_seconds(images) - busy)
        source.forget()
        step += steps
        if turn:  # the first one has read the files for the first time
            rates["decoder alone"].append(alone)
            rates["pipeline"].append((rate, cpu_rate))
    for place_of, what in enumerate(("by the clock", "by the workers' CPU time")):
        alone_rates, whole_rates = ([each[place_of] for each in found] for found in rates.values())
        ratios = sorted(a / b for a, b in zip(whole_rates, alone_rates, strict=True))
        print(
            f"{what}: decoder alone {statistics.median(alone_rates):,.0f} images/s, pipeline "
            f"{statistics.median(whole_rates):,.0f}, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} turns)",
            flush=True,
        )
    for epoch in range(given["epochs"]):
        for number in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            source.begin(number)
        resident = [psutil.Process(pid).memory_info().rss >> 20 for pid in images.pool.pids()]
        own = psutil.Process().memory_info().rss >> 20
        print(f"epoch {epoch + 1}: {own} MB resident, workers {resident} MB", flush=True)
    images.pool.close()


def cpu_seconds(images: StreamedImages) -> float:
    """Return the CPU time that the workers have taken."""
    times = [psutil.Process(pid).cpu_times() for pid in images.pool.pids()]
    return sum(each.user + each.system for each in times)


def decoder_alone(
    images: StreamedImages, config: ViewsConfig, samples: torch.Tensor, workers: int
) -> tuple[float, float]:
    """Return images per second, and per CPU second, of processes that do the workers' work."""
    drawn = torch.stack([views.crop_numbers(config, 0, 0, samples, v) for v in (0, 1)], dim=1)
    numbers = drawn.tolist()
    recipe = Recipe(config.size, (0, 1), config.ratio_min, config.ratio_max)
    each = worker_pool.images_of_request(recipe)
    places = images.catalogue.places(images.rows[samples].tolist())
    parts = [slice(n, n + each) for n in range(0, len(places), each)]
    requests = [{"recipe": recipe, "places": places[p], "numbers": numbers[p]} for p in parts]
    command = [sys.executable, "-m", "tests.streaming_speed", "alone"]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    for number, process in enumerate(started):
        assert process.stdin
        process.stdin.write(json.dumps(requests[number::workers]) + "\n")
        process.stdin.flush()
    for process in started:
        assert process.stdout
        process.stdout.readline()  # all are ready
    for process in started:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    rates = [process.communicate()[0].split() for process in started]
    return sum(float(clock) for clock, _ in rates), sum(float(cpu) for _, cpu in rates)


def alone() -> None:
    """Decode the requests from standard input; print images per second and per CPU second."""
    requests = json.loads(sys.stdin.readline())
    work = [(each, torch.tensor(each["numbers"], dtype=torch.float64)) for each in requests]
    content = [(each, numbers.numpy().tobytes()) for each, numbers in work]
    memory = mmap.mmap(-1, worker_pool.SLOT_BYTES)
    print(flush=True)
    sys.stdin.readline()
    began, busy = time.monotonic(), time.process_time()
    for each, numbers in content:
        assert image_worker.answer(each, numbers, memory) == ([], "")
    count = sum(len(each["places"]) for each in requests)
    print(count / (time.monotonic() - began), count / (time.process_time() - busy))


if __name__ == "__main__":
    alone() if sys.argv[1:] == ["alone"] else main(*sys.argv[1:])
