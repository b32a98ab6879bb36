"""Rules for values of the configuration."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from moco_dist.errors import ConfigError, shown


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the rule holds."""
    if not holds:
        raise ConfigError(message)


# From the first number to the second; None is no limit on that side.
Range = tuple[float | None, float | None]
# Negative numbers too; and a range that another rule of the key has.
ANY = OWN = (None, None)
# Seconds that clocks, sockets and threads can wait on any system: four months.
LONGEST = 10_000_000


def check(group: str, config: Any, **ranges: Range) -> None:
    """Raise ConfigError unless every number of a group of the configuration is allowed.

    A number is finite, a whole number fits into 64 bits, and both are at least 0, unless `ranges`
    has another range for the key. The rule holds for each item of a list.
    """
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    numbers = {
        name: [n for n in items if isinstance(n, int | float) and not isinstance(n, bool)]
        for name, value in found.items()
        for items in [value if isinstance(value, list) else [value]]
    }
    for name, items in numbers.items():
        given = shown(f"{group}{name}={found[name]}", 100)
        for number in items:
            if isinstance(number, int):
                fits = -(2**63) <= number < 2**63
                require(fits, f"{given} does not fit into 64 bits; give one from -2^63 to 2^63 - 1")
            else:
                require(math.isfinite(number), f"{given} is not a finite number; give one")
    for name in [*ranges, *(numbers.keys() - ranges)]:
        given, (low, high) = f"{group}{name}={found[name]}", ranges.get(name, (0, None))
        for number in numbers[name]:
            if low is not None and high is None:
                require(number >= low, f"{given} is too small; it must be at least {low}")
            elif low is not None and high is not None:
                rule = f"it must lie between {low} and {high}"
                require(low <= number <= high, f"{given} is out of range; {rule}")


def given(group: str, config: Any, *names: str) -> list[str]:
    """Return those of some keys of a group that don't have their defaults, KEY=VALUE."""
    usual, values = type(config)(), {name: getattr(config, name) for name in names}
    return [f"{group}{name}={v}" for name, v in values.items() if v != getattr(usual, name)]


def check_positive(group: str, config: Any, **hints: str) -> None:
    """Raise ConfigError, with the hint, unless each value is above 0."""
    for name, hint in hints.items():
        value = getattr(config, name)
        require(value > 0, f"{group}{name}={value} is not above 0; {hint}")


def check_momentum(group: str, momentum: float, usual: float, name: str = "momentum") -> None:
    """Raise ConfigError unless a momentum lies in [0, 1)."""
    rule = f"it must lie in [0, 1), {usual} is usual"
    require(0 <= momentum < 1, f"{group}{name}={momentum} is out of range; {rule}")


def of_sweep() -> str:
    """Return '-' and the id of this run of a W&B sweep, to end its name with; '' outside of one."""
    run, sweep = os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_SWEEP_ID")
    return f"-{run}" if run and sweep else ""


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can name a folder on any system."""
    plain = all(letter.isalnum() or letter in "-_.+" for letter in name)
    rule = "use letters, digits, '-', '_', '+' and '.'"
    require(plain and name[:1] not in ("", "."), f"name={name!r} is no folder name; {rule}")
    require(len(name) <= 200, f"name={name[:40]}... has {len(name)} letters; use at most 200")
