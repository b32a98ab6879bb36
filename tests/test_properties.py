"""What holds for any input: configurations, the queue, the plan, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
import typing
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import flat, from_dict, load, to_dict, to_yaml
from moco_dist.errors import ConfigError
from moco_dist.method.key_queue import KeyQueue
from moco_dist.method.plan import Plan
from moco_dist.runs import checkpoint, saving

Config = TypeVar("Config")

# The same examples each time: a failure is found again by running the test again.
many = settings(max_examples=500, deadline=None, derandomize=True, database=None)
# Two schemas, and what other tests cover in part.
some = settings(many, max_examples=250)

# What YAML may misread, in addition to any text that a file can hold.
PLAIN = st.text(st.characters(codec="utf-8"), max_size=20)
TRAPS = st.sampled_from(
    [
        *("", " ", "1e5", "0o17", "0x1F", "1_000", "12:30:45", "2020-01-01", "null", "~", "yes"),
        *("-.5e-3", "nan", ".inf", "#", "a: b", "- a", "'", '"', "\\", "\n", "\r\n", "a\n\nb "),
        *("\x00", "\x85", "\u2028", "\ufeff", "\U0001f600", "<<", "=", "!x", "&a", "*a", "%"),
        *("@", "`", "|", ">", "{}"),
    ]
)


def values_of(schema: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return values of the right types for some keys of a schema, under their dotted names."""

    def value(kind: Any) -> st.SearchStrategy[Any]:
        if typing.get_origin(kind) is Literal:
            return st.sampled_from(typing.get_args(kind))
        if typing.get_origin(kind) is list:
            return st.lists(value(typing.get_args(kind)[0]), min_size=3, max_size=3)
        numbers = st.floats(allow_nan=False, allow_infinity=False)
        shares = st.floats(0, 1)
        kinds: dict[Any, st.SearchStrategy[Any]] = {
            int: st.integers(0, 10) | st.integers(0, 2**63 - 1),
            float: shares | shares | numbers,
            bool: st.booleans(),
            str: PLAIN | TRAPS,
            ViewsConfig | None: st.sampled_from([None, ViewsConfig(blur=0.25)]),
        }
        return kinds[kind]

    def leaves(kind: type[Any], prefix: str = "") -> dict[str, st.SearchStrategy[Any]]:
        found: dict[str, st.SearchStrategy[Any]] = {}
        for name, hint in typing.get_type_hints(kind).items():
            group = isinstance(hint, type) and dataclasses.is_dataclass(hint)
            found |= leaves(hint, f"{prefix}{name}.") if group else {prefix + name: value(hint)}
        return found

    keys = leaves(schema)
    return st.lists(st.sampled_from(sorted(keys)), max_size=6, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: keys[name] for name in names})
    )


def changed(config: Config, key: str, value: Any) -> Config:
    """Return `config` with the value of one dotted key, as its constructors accept it."""
    head, _, rest = key.partition(".")
    inner = changed(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})  # type: ignore[type-var]


def built(schema: type[Config], values: dict[str, Any]) -> Config:
    """Return the defaults with those of `values` that are allowed."""
    config = schema()
    for key, value in values.items():
        if isinstance(value, str) and ("${" in value or value == "???"):
            continue
        try:
            config = changed(config, key, value)
        except ConfigError:
            continue
    return config


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configurations") / "config.yaml"


@pytest.mark.parametrize("schema", [PretrainConfig, ProbeConfig])
def test_a_configuration_survives_its_file_and_its_dictionary(schema: Any, file: Path) -> None:
    kept = 0

    @some
    @given(values_of(schema))
    @example({"data.cache": "a\x85b\u2028"})
    def check(values: dict[str, Any]) -> None:
        nonlocal kept
        config = built(schema, values)
        leaves = flat(to_dict(config))
        kept += sum(values[key] == leaves.get(key) for key in values)  # a group is no leaf
        file.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load(schema, [str(file)]) == config
        assert from_dict(schema, to_dict(config)) == config

    check()
    assert kept > 250


def numbers_of(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the types of the keys of a schema that hold numbers."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            found |= numbers_of(typing.cast(type[Any], kind), f"{prefix}{name}.")
        elif kind in (int, float, list[int], list[float]):
            found[prefix + name] = kind
    return found


NUMBERS = [
    pytest.param(schema, key, kind, id=f"{schema.__name__}-{key}")
    for schema in (PretrainConfig, ProbeConfig)
    for key, kind in numbers_of(schema).items()
]


@pytest.mark.parametrize(("schema", "key", "kind"), NUMBERS)
def test_no_number_is_infinite_or_beyond_64_bits(
    schema: type[Any], key: str, kind: Any, file: Path
) -> None:
    whole = kind in (int, list[int])
    held = [] if kind in (int, float) else [1, 1]
    spelled: dict[float, list[str]] = {
        math.inf: [".inf", "inf", "Infinity", "1e999", "9" * 400],
        -math.inf: ["-.inf", "-inf"],
        math.nan: [".nan", "nan", "NaN"],
    }
    if whole:
        spelled = {sign * big: [str(sign * big)] for big in (2**63, 10**20) for sign in (1, -1)}
        spelled.pop(-(2**63))
    for number, texts in spelled.items():
        with pytest.raises(ConfigError, match=rf"^{key}=.*(finite|64 bits|above 0|of range)"):
            changed(schema(), key, [*held, number] if held else number)
        for text in texts:
            said = f"[1, 1, {text}]" if held else text
            file.write_text(f"{key}: {said}\n")
            for argument in (f"{key}={said}", str(file)):
                with pytest.raises(ConfigError, match=f"{key}=") as error:
                    load(schema, [argument])
                assert str(error.value).isprintable()
    # What is allowed has no surprise: it is finite, and what waits can wait.
    for number in (0, 1, 1e-300, 1e300, 10**9, 2**62, -1):
        value = int(number) if whole else float(number)
        try:
            config = changed(schema(), key, [*held, value] if held else value)
        except ConfigError:
            continue
        for found in flat(to_dict(config)).values():
            for each in found if isinstance(found, list) else [found]:
                assert (
                    each is None
                    or isinstance(each, str)
                    or (math.isfinite(each) and abs(each) <= 1e300)
                )
                torch.tensor(0, dtype=torch.int64).add(each if isinstance(each, int) else 0)
        waits = config.runtime
        for seconds in (waits.timeout_seconds, waits.grace_seconds):
            assert timedelta(seconds=seconds) < timedelta(days=365)
            assert seconds < threading.TIMEOUT_MAX


KEYS = sorted(flat(to_dict(PretrainConfig())))
YAML_LIKE = st.recursive(
    PLAIN | TRAPS | st.sampled_from([*KEYS, "optim", "data", "views", "1", "[", "]", "{", "}"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([": ", ":\n  ", "=", ", ", "\n", "\n- "]), inner).map(
            "".join
        ),
        inner.map(lambda text: f"[{text}]"),
        inner.map(lambda text: f"{{{text}}}"),
    ),
    max_leaves=8,
)
ANY_TEXT = YAML_LIKE | PLAIN | st.text(max_size=30)


@pytest.mark.parametrize("key", ["data.root", "output", "init_from"])
def test_any_text_is_taken_as_it_stands(key: str) -> None:
    @many
    @given(TRAPS | PLAIN | ANY_TEXT)
    def check(text: str) -> None:
        assume("${" not in text and text != "???" and text[:1] not in ("'", '"'))
        assert flat(to_dict(load(PretrainConfig, [f"{key}={text}"])))[key] == text

    check()


def loads_or_refuses(arguments: list[str]) -> bool:
    try:
        load(PretrainConfig, arguments)
    except ConfigError as error:
        sentence = str(error)
    else:
        return True
    assert sentence.isprintable()
    assert sentence
    return False


def test_any_file_loads_or_is_refused_in_one_line(file: Path) -> None:
    @many
    @given(ANY_TEXT.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=30))
    @example(b"5")
    @example(b"hello")
    @example(b"name: 1\nname: 2")
    @example(b"? [a]\n: 1")
    @example(b"1: 2")
    @example(b"optim: 3")
    @example(b"optim: null")
    @example(b"optim: [1]")
    @example(b"views: {mean: {a: 1}}")
    @example(b"epochs: " + b"9" * 5000)
    @example(b'name: "\\ud800"')
    @example(b"a: 1\n---\nb: 2")
    @example(b"\xff\xfea")
    def check(content: bytes) -> None:
        file.write_bytes(content)
        loads_or_refuses([str(file)])

    check()


def test_any_override_loads_or_is_refused_in_one_line() -> None:
    loaded = []

    @many
    @given(st.sampled_from([*KEYS, "optim"]) | ANY_TEXT, ANY_TEXT | st.integers().map(str))
    @example("optim", "")
    @example("optim", "null")
    @example("views.mean", "[1,2]")
    @example("views.mean", "[[1],2,3]")
    @example("views.mean[0]", "1")
    @example("name", "???")
    @example("epochs", "9" * 5000)
    @example("a." * 5000, "1")
    @example("optim", "{lr: 1, lr: 2}")
    def check(key: str, value: str) -> None:
        loaded.append(loads_or_refuses([f"{key}={value}"]))

    check()
    assert any(loaded)


@many
@given(ANY_TEXT)
def test_any_argument_loads_or_is_refused_in_one_line(text: str) -> None:
    assume("/" not in text)
    loads_or_refuses([text])


@many
@given(st.integers(1, 20), st.integers(1, 3), st.lists(st.integers(0, 20), max_size=12))
def test_the_queue_holds_what_a_deque_holds(size: int, dim: int, batches: list[int]) -> None:
    queue, reference = KeyQueue(size, dim), deque[tuple[list[float], int]](maxlen=size)
    ring: list[int | None] = [None] * size
    number = 0
    for batch in batches:
        numbers = torch.arange(number, number + min(batch, size))
        keys = numbers[:, None] * 3.0 + torch.arange(dim)
        queue.enqueue(keys, numbers * 10)
        for n in numbers.tolist():
            reference.append(([n * 3.0 + d for d in range(dim)], n * 10))
            ring[n % size] = n * 10
        number += len(numbers)
        kept, samples = queue.negatives()
        assert kept.shape == (len(reference), dim)
        found = list(zip(kept.tolist(), samples.tolist(), strict=True))
        assert sorted(found) == sorted(reference)
        assert samples.tolist() == [sample for sample in ring if sample is not None]


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int]:
    world_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    batch_size = world_size * draw(st.integers(1, 6))
    num_samples = draw(st.integers(batch_size, batch_size * 5))
    return num_samples, batch_size, world_size, draw(st.integers(0, 2**31))


@many
@given(plans(), st.integers(0, 3), st.sampled_from([1, 2]))
def test_an_epoch_is_shared_out_once_and_keys_come_back_in_order(
    sizes: tuple[int, int, int, int], epoch: int, key_views: int
) -> None:
    num_samples, batch_size, world_size, seed = sizes
    ranks = [Plan(num_samples, batch_size, seed, rank, world_size) for rank in range(world_size)]
    steps_per_epoch = num_samples // batch_size
    everything = list(range(batch_size))
    taken: list[int] = []
    for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
        rows = [plan.step(step, key_views) for plan in ranks]
        # A new object has no history: it is what a resumed run begins with.
        resumed = Plan(num_samples, batch_size, seed, world_size - 1, world_size)
        again = resumed.step(step, key_views)
        assert {row.epoch for row in rows} == {epoch}
        assert all(row.samples.equal(again.samples) for row in rows)
        assert again.query_rows.equal(rows[-1].query_rows)
        queries = [row.samples[row.query_rows].tolist() for row in rows]
        assert {len(part) for part in queries} == {batch_size // world_size}
        taken += [sample for part in queries for sample in part]
        for view in range(key_views):
            assert again.key_rows[view].equal(rows[-1].key_rows[view])
            gathered = torch.cat([row.key_rows[view] for row in rows])
            assert sorted(gathered.tolist()) == everything
            for row in rows:
                assert gathered[row.unshuffle[view]].tolist() == everything
    assert len(taken) == len(set(taken)) == steps_per_epoch * batch_size
    assert set(taken) <= set(range(num_samples))
    if num_samples >= 20:  # 1 in 20! that two are equal by chance
        assert not ranks[0].order(epoch).equal(ranks[0].order(epoch + 1))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([1.0, -0.0, 1e-40, 1e38]))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return torch.randint(-(2**62), 2**62, shape, generator=generator).to(dtype)


NAMED = st.dictionaries(PLAIN.filter(lambda name: name != "__metadata__"), tensors(), max_size=4)


@many
@given(NAMED, NAMED, st.integers(0, 10**9))
def test_a_checkpoint_gives_every_bit_back(
    model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], step: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saving.write(Path(folder), step, model, optimizer, {"note": "x"})
        found = checkpoint.newest(Path(folder))
    assert found is not None
    assert (found.step, found.state["note"]) == (step, "x")
    for saved, kept in ((model, found.model), (optimizer, found.optimizer)):
        assert saved.keys() == kept.keys()
        for name, tensor in saved.items():
            assert (tensor.dtype, tensor.shape) == (kept[name].dtype, kept[name].shape)
            before, after = (
                t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, kept[name])
            )
            assert before.equal(after)
