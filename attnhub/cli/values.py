"""Values of options: lists joined by commas, and sizes."""

from __future__ import annotations

import argparse


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(name) for name in names(text))


def size(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value
