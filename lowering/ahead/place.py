"""Where work is queued: streams, captures, and the CUDA graphs that Inductor makes of a graph."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from dak_inductor.cuda_runtime.current_stream import current_capture, current_stream


class Place(NamedTuple):
    """A stream and the capture that is open on it, 0 for none."""

    stream: int
    capture: int


def place_of(device: torch.device) -> Place:
    """That of torch's current stream of `device`."""
    stream = current_stream(device.index) if device.type == "cuda" else 0
    return Place(stream, current_capture(device))


def compiler_graph(device: torch.device) -> object:
    """Equal for products that Inductor runs as parts of one CUDA graph of its own, or of none.

    Inductor may cut a graph into several. When it warms them up they run on one stream outside of
    any capture, each under a node of its own in the graph tree. It is the node itself, to be kept
    as long as it is compared: one whose results are dead goes, and the next may have its address.
    Nothing is equal to the answer of a torch whose trees have no such node. Before torch 2.13 other
    threads than the one that imported its trees have none, which it asserts.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.type != "cuda":
        return None
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
        return None if manager is None else manager.current_node
    except AssertionError:
        return None
    except (AttributeError, TypeError):
        return object()
