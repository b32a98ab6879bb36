"""Rules for values of the configuration."""

from __future__ import annotations

from typing import Any

from moco_dist.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the rule holds."""
    if not holds:
        raise ConfigError(message)


def check(group: str, config: Any, **ranges: tuple[float, float | None]) -> None:
    """Raise ConfigError unless each value lies in its range, where None is no upper limit."""
    for name, (low, high) in ranges.items():
        key, value = group + name, getattr(config, name)
        if high is None:
            require(value >= low, f"{key}={value} is too small; it must be at least {low}")
        rule = f"it must lie between {low} and {high}"
        require(high is None or low <= value <= high, f"{key}={value} is out of range; {rule}")


def check_positive(group: str, config: Any, **hints: str) -> None:
    """Raise ConfigError, with the hint, unless each value is above 0."""
    for name, hint in hints.items():
        value = getattr(config, name)
        require(value > 0, f"{group}{name}={value} is not above 0; {hint}")


def check_momentum(group: str, momentum: float, usual: float) -> None:
    """Raise ConfigError unless a momentum lies in [0, 1)."""
    rule = f"it must lie in [0, 1), {usual} is usual"
    require(0 <= momentum < 1, f"{group}momentum={momentum} is out of range; {rule}")


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can name a folder on any system."""
    plain = all(letter.isalnum() or letter in "-_.+" for letter in name)
    rule = "use letters, digits, '-', '_', '+' and '.'"
    require(plain and name[:1] not in ("", "."), f"name={name!r} is no folder name; {rule}")
    require(len(name) <= 200, f"name={name[:40]}... has {len(name)} letters; use at most 200")
