"""Per-layer prefetcher: remote layers are copied whole, one ahead, into two slots.

What shipped prefetching offloaders do, recorded into a CUDA graph. The remote layers are spread
evenly, each as late as its share allows. Where the fraction is no whole number of layers, the
first remote layer is remote in part: whole linears from its end, then the last rows of one
linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dak_inductor.benchmarks.harness.copy_stream import CopyStream, remote_copy
from dak_inductor.benchmarks.harness.models import DecoderBlocks, StepInputs
from dak_inductor.benchmarks.harness.peers.provider import (
    Kind,
    Prepared,
    Provider,
    ProviderUnavailable,
    Setting,
    model_bytes,
)

SLOTS = 2


@dataclass(frozen=True, slots=True)
class RemotePiece:
    """The last `rows` of linear `name` of layer `layer` are remote."""

    layer: int
    name: str
    rows: int


def remote_pieces(model: DecoderBlocks, remote_bytes: int) -> list[RemotePiece]:
    """Which rows are remote when `remote_bytes` are to be (to within half a row)."""
    shapes = model.shape.linear_shapes()
    element = next(model.parameters()).element_size()
    layer_bytes = model.shape.layer_elements * element
    layers = model.shape.layers
    whole, rest = divmod(min(remote_bytes, layers * layer_bytes), layer_bytes)
    used = whole + (rest > 0)
    spread = [((index + 1) * layers) // used - 1 for index in range(used)]
    pieces: list[RemotePiece] = []
    if rest:
        partial: list[RemotePiece] = []
        for name in reversed(shapes):
            rows, columns = shapes[name]
            count = min(rows, round(rest / (columns * element)))
            rest = max(0, rest - count * columns * element)
            if count:
                partial.append(RemotePiece(spread[0], name, count))
        pieces += reversed(partial)
        spread = spread[1:]
    pieces += [RemotePiece(layer, name, shapes[name][0]) for layer in spread for name in shapes]
    return pieces


def charged_remote_bytes(total: int, layer_bytes: int, fraction: float) -> int:
    """Remote bytes that leave room for two slots in a device budget of (1 - fraction) * total."""
    if fraction == 0:
        return 0
    needed = round(fraction * total) + SLOTS * layer_bytes
    if needed > total:
        room = (1 - fraction) * total
        raise ProviderUnavailable(
            f"two slots of {layer_bytes / 1e9:.3g} GB do not fit beside what must stay in "
            f"{room / 1e9:.3g} GB of device memory"
        )
    return needed


class LayerPrefetch(Provider):
    """`charged`: the slots come out of the same device budget, so more has to be remote."""

    def __init__(self, *, compiled: bool, charged: bool) -> None:
        self.compiled, self.charged = compiled, charged
        self.kind: Kind = "real peer" if charged else "oracle"
        words = (
            "layer prefetch",
            "charged" if charged else "",
            "inductor" if compiled else "eager",
        )
        self.name = " ".join(word for word in words if word)

    def prepare(self, model: DecoderBlocks, inputs: StepInputs, setting: Setting) -> Prepared:
        total = setting.workload.linear_bytes
        wanted = round(setting.fraction * total)
        if self.charged:
            wanted = charged_remote_bytes(total, total // model.shape.layers, setting.fraction)
        before = model_bytes(model)
        remote, device_extra, copies = _take_pieces(model, remote_pieces(model, wanted), setting)
        stream = CopyStream(setting.device, setting.remote)
        blocks: list[Callable[..., Tensor]] = list(model.layers)
        if self.compiled:
            blocks = [torch.compile(block, dynamic=False) for block in model.layers]
        order = sorted(copies)

        def fetch(turn: int, freed: torch.cuda.Event | None) -> torch.cuda.Event | None:
            stream.hold(freed)
            for destination, source in copies[order[turn]]:
                stream.copy(destination, source)
            return stream.copied()

        arrived: dict[int, torch.cuda.Event | None] = {}

        def wait_for(index: int) -> None:
            if index in copies:
                stream.wait(arrived[order.index(index)])

        def refill(index: int) -> None:
            if index in copies and (later := order.index(index) + SLOTS) < len(order):
                arrived[later] = fetch(later, stream.used())

        if not self.compiled:
            for index, layer in enumerate(model.layers):
                layer.register_forward_pre_hook(lambda *_, index=index: wait_for(index))
                layer.register_forward_hook(lambda *_, index=index: refill(index))

        def step() -> Tensor:
            stream.fork()
            arrived.update((turn, fetch(turn, None)) for turn in range(min(SLOTS, len(order))))
            if self.compiled:
                hidden = inputs.hidden
                for index, block in enumerate(blocks):
                    wait_for(index)
                    hidden = block(
                        hidden, inputs.cosine, inputs.sine,
                        inputs.keys[index], inputs.values[index], inputs.position,
                    )  # fmt: skip
                    refill(index)
            else:
                hidden = model(*inputs.arguments())
            stream.join()
            return hidden

        note = f"{len(order)} of {len(blocks)} layers, {min(SLOTS, len(order))} slots"
        note += "" if self.charged else ", slots not charged"
        device_bytes = before - remote + (device_extra if self.charged else 0)
        return Prepared(step, remote, device_bytes, note=note)


def _take_pieces(
    model: DecoderBlocks, pieces: list[RemotePiece], setting: Setting
) -> tuple[int, int, dict[int, list[tuple[Tensor, Tensor]]]]:
    """Move `pieces` out. Returns remote bytes, bytes of slots, and per layer (destination, source).

    A whole linear's parameter becomes the slot it is copied to (turns alternate between two
    slots); a linear that is remote in part keeps its full size and counts its missing rows as
    slot.
    """
    linears = {(layer, name): linear for layer, name, linear in model.linears()}
    order = sorted({piece.layer for piece in pieces})
    slots: dict[tuple[int, str], Tensor] = {}
    copies: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in order}
    remote = partial = 0
    for piece in pieces:
        linear = linears[piece.layer, piece.name]
        weight = linear.weight.detach()
        source = remote_copy(weight[weight.shape[0] - piece.rows :], setting.remote)
        if piece.rows == weight.shape[0]:
            slot = (order.index(piece.layer) % SLOTS, piece.name)
            destination = slots.setdefault(slot, torch.full_like(weight, math.nan))
            linear.weight = nn.Parameter(destination, requires_grad=False)
        else:
            destination = weight[weight.shape[0] - piece.rows :]
            destination.fill_(math.nan)
            partial += source.nbytes
        copies[piece.layer].append((destination, source))
        remote += source.nbytes
    return remote, partial + sum(slot.nbytes for slot in slots.values()), copies
