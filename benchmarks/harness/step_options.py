"""Options of benchmarks that time a step of decoder blocks, and the setting they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from dak_inductor.benchmarks.harness.command_line import default_shape
from dak_inductor.benchmarks.harness.models import SHAPES, Workload
from dak_inductor.benchmarks.harness.peers.provider import Setting

_QUICK_LAYERS = 4


def add(parser: argparse.ArgumentParser) -> None:
    """--layers, --batch, --context, --shape; beside those of `command_line.parser`."""
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--shape", choices=tuple(SHAPES), default=default_shape())


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """--quick means few layers."""
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers = min(arguments.layers, _QUICK_LAYERS)
    return arguments


def setting_of(
    arguments: argparse.Namespace, device: torch.device, fraction: float, *, prefill: bool = False
) -> Setting:
    """A step with `fraction` of its weights remote."""
    workload = Workload(
        shape=SHAPES[arguments.shape],
        batch=arguments.batch,
        context=arguments.context,
        prefill=prefill,
    ).with_layers(arguments.layers)
    return Setting(workload, device, fraction, arguments.remote, arguments.host_memory)
