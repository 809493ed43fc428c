"""Values and counts of the portable attention kernels in Triton's interpreter.

Run by `test_triton_attention.py` in a process of its own: TRITON_INTERPRET has to be set before
triton is imported, since its own functions are either interpreted or compiled for good.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.attention import staged, staged_plan
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.partial_results import PartialResult, PartialResults
from dak_inductor.lowering.attention.stored_tokens import stored_tokens
from dak_inductor.lowering.triton_attention import forward, launch, merge
from dak_inductor.lowering.triton_attention.configuration import TileShape

NAN = float("nan")

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"


@dataclasses.dataclass(frozen=True)
class Call:
    """A query over a cache of which what no row may see is NaN, and what it must give."""

    query: Tensor
    key: Tensor
    value: Tensor
    buffers: tuple[TieredBuffer, TieredBuffer]
    masks: dict[str, Any]

    def seen(self) -> Tensor:
        """bool [B, 1, Q, S]."""
        queries, tokens, batch = self.query.shape[2], self.key.shape[2], self.key.shape[0]
        token, row = torch.arange(tokens), torch.arange(queries)[:, None]
        lengths, starts = self.masks["lengths"], self.masks["starts"]
        length = torch.full((batch,), tokens) if lengths is None else lengths.clamp(max=tokens)
        start = torch.zeros(batch) if starts is None else starts
        length, start = (each.view(-1, 1, 1, 1) for each in (length, start))
        position = length - queries + row
        seen = (token < length) & (token >= start)
        if self.masks["causal"]:
            seen = seen & (token <= position)
        if self.masks["window"]:
            seen = seen & (token > position - self.masks["window"])
        return seen.expand(batch, 1, queries, tokens)

    def exact(self) -> Tensor:
        """[B, Hq, Q, Dv] in float64."""
        group = self.query.shape[1] // self.key.shape[1]
        seen = self.seen()
        used = seen.any(2)[..., None]
        key, value = (
            tensor.masked_fill(~used, 0.0).double().repeat_interleave(group, 1)
            for tensor in (self.key, self.value)
        )
        scores = self.query.double() @ key.transpose(-1, -2) * self.masks["scale"]
        if self.masks["softcap"]:
            scores = torch.tanh(scores / self.masks["softcap"]) * self.masks["softcap"]
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ value

    def bytes_read(self, side: int) -> tuple[int, int]:
        """Local and remote bytes of keys (0) or values (1) that some row sees, byte by byte."""
        tensor, buffer = (self.key, self.value)[side], self.buffers[side]
        size, width = tensor.element_size(), tensor.shape[3] * tensor.element_size()
        base = tensor.data_ptr() - buffer.address
        local = remote = 0
        for batch, _, token in self.seen().any(2).nonzero().tolist():
            for head in range(tensor.shape[1]):
                stride = tensor.stride()
                at = base + (batch * stride[0] + head * stride[1] + token * stride[2]) * size
                read = buffer.bytes_in(at, at + width)
                local, remote = local + read.local, remote + read.remote
        return local, remote


def call_of(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    queries: int = 3,
    tokens: int = 70,
    widths: tuple[int, int] = (16, 16),
    local: tuple[float, float] = (0.4, 0.6),
    token_major: bool = True,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
    starts: tuple[int, ...] | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> Call:
    query = torch.randn(batch, queries, heads[0], widths[0], dtype=dtype).transpose(1, 2)
    masks = {
        "lengths": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        "starts": None if starts is None else torch.tensor(starts, dtype=torch.int32),
        "scale": 0.3, "causal": causal, "window": window, "softcap": softcap,
    }  # fmt: skip
    buffers, views = [], []
    for width, share in zip(widths, local, strict=True):
        nbytes = batch * heads[1] * tokens * width * dtype.itemsize
        buffer = SimulatedTier(page_bytes=256).allocate(nbytes, split=int(nbytes * share) // 4 * 4)
        if token_major:
            view = buffer.tensor(dtype, (tokens, batch, heads[1], width)).permute(1, 2, 0, 3)
        else:
            view = buffer.tensor(dtype, (batch, heads[1], tokens, width))
        views.append(view.copy_(torch.randn(view.shape, dtype=dtype)))
        buffers.append(buffer)
    call = Call(query, views[0], views[1], (buffers[0], buffers[1]), masks)
    unused = ~call.seen().any(2)[..., None]
    for view in views:
        view.masked_fill_(unused, NAN)
    return call


def shape_of(call: Call, rows: int = 16, tokens: int = 16) -> TileShape:
    widths = (max(16, 1 << (t.shape[3] - 1).bit_length()) for t in (call.key, call.value))
    return TileShape(rows, tokens, *widths, 4, 2)


def decoded(
    call: Call,
    *,
    programs: int = 5,
    chunk: int = 32,
    window: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """The result of the decode kernels, and the records of keys and values."""
    tensors = zip((call.key, call.value), call.buffers, strict=True)
    stored = [stored_tokens(tensor, buffer) for tensor, buffer in tensors]
    records = [torch.ops.dak.residency.default(tensor) for tensor in (call.key, call.value)]
    word = torch.tensor([window], dtype=torch.int32)
    for record in records:
        record[6] = word.data_ptr() if window else 0
    result = launch.launch(
        call.query, *stored, shape_of(call),
        records=records, programs=programs, chunk=chunk, **call.masks,
    )  # fmt: skip
    return result, records


def assert_close(result: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"lengths": (70, 31), "starts": (0, 8)},
    {"lengths": (5, 0), "starts": (7, 0)},
    {"lengths": (70, 50), "window": 9},
    {"lengths": (64, 90), "window": 33, "starts": (40, 0), "causal": False},
    {"softcap": 2.0, "lengths": (33, 32)},
)


@pytest.mark.parametrize("token_major", [True, False], ids=["token-major", "heads"])
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_decode_gives_attention_and_counts_what_rows_see(
    masks: dict[str, Any], token_major: bool
) -> None:
    for local in ((0.37, 0.71), (0.0, 1.0), (1.0, 0.999)):
        call = call_of(local=local, token_major=token_major, **masks)
        result, records = decoded(call)
        assert_close(result, call.exact())
        for side, record in enumerate(records):
            assert record[1:4].tolist() == [*call.bytes_read(side), 1]


@pytest.mark.parametrize("programs", [2, 3, 64])
def test_every_grid_and_chunk_covers_all_tokens(programs: int) -> None:
    for chunk in (16, 48, 128):
        for token_major in (True, False):
            call = call_of(token_major=token_major, local=(0.5, 0.5))
            result, _ = decoded(call, programs=programs, chunk=chunk)
            assert_close(result, call.exact())


def test_heads_of_odd_sizes_and_several_tiles_of_rows() -> None:
    for heads, queries, widths in (
        ((7, 1), 5, (24, 40)),
        ((16, 1), 3, (8, 8)),
        ((2, 2), 1, (1, 3)),
    ):
        call = call_of(heads=heads, queries=queries, widths=widths)
        result, records = decoded(call)
        assert_close(result, call.exact())
        tiles = -(-heads[0] // heads[1] * queries // 16)
        local, remote = call.bytes_read(0)
        assert records[0][1:3].tolist() == [local, remote * tiles]


def test_half_precision() -> None:
    call = call_of(dtype=torch.float16)
    assert_close(decoded(call)[0], call.exact(), torch.float16)


def test_the_window_bounds_the_programs_that_read_remote_tokens() -> None:
    call = call_of(local=(0.0, 0.0), tokens=96, batch=1, heads=(2, 2))
    each = shape_of(call).bytes_in_flight(4)
    units = 2 * 3
    for window, readers in ((1, 1), (2 * each, 2), (3 * each + 1, 3), (1 << 30, units)):
        result, records = decoded(call, programs=64, window=window)
        assert_close(result, call.exact())
        assert [record[4].item() for record in records] == [readers * each] * 2
    call = call_of(local=(1.0, 1.0))
    _, records = decoded(call)
    assert [record[4].item() for record in records] == [0, 0]


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_forward_over_parts_of_the_tokens_merges_to_attention(
    masks: dict[str, Any],
) -> None:
    """Parts in any rows, as staged attention has them, through the merge kernel."""
    call = call_of(queries=20, heads=(6, 2), widths=(16, 24), **masks)
    inputs = []
    for first_row, start, stop in ((0, 0, 7), (0, 7, 40), (0, 40, 41), (0, 41, 70)):
        out, lse = forward.attend(
            call.query[:, :, first_row:], call.key[:, :, start:stop], call.value[:, :, start:stop],
            first_row=first_row, queries=20, first_token=start, tokens=70, **call.masks,
        )  # fmt: skip
        assert out.isfinite().all()
        inputs.append((out, lse, first_row))
    result = torch.full_like(inputs[0][0], NAN)
    lse = torch.full_like(inputs[0][1], NAN)
    merge.launch(inputs, start=0, rows=20, out=result, lse=lse)
    assert_close(result.transpose(1, 2), call.exact())
    plain = PartialResults(20, torch.float32)
    for out, scores, first_row in inputs:
        plain.add(PartialResult(first_row, out, scores))
    torch.testing.assert_close(result.transpose(1, 2), plain.result(), rtol=1e-5, atol=1e-5)
    total = torch.logsumexp(torch.stack([scores for _, scores, _ in inputs]), 0)
    torch.testing.assert_close(lse, total, rtol=1e-5, atol=1e-5)


def test_some_rows_of_a_query() -> None:
    call = call_of(queries=20, lengths=(60, 33), window=12)
    out, _ = forward.attend(
        call.query[:, :, 5:17], call.key, call.value,
        first_row=5, queries=20, first_token=0, tokens=70, **call.masks,
    )  # fmt: skip
    assert_close(out.transpose(1, 2), call.exact()[:, :, 5:17])


@pytest.mark.parametrize("count", range(1, 9))
def test_the_merge_kernel_takes_up_to_eight_and_its_own_output(count: int) -> None:
    partials = [torch.randn(2, 9, 3, 5) for _ in range(count)]
    scores = [torch.randn(2, 3, 9) * 20 for _ in range(count)]
    if count > 1:
        scores[0][:, :, 4], partials[0][:, 4] = torch.inf, NAN
    expected = PartialResults(7, torch.float32)
    for out, lse in zip(partials, scores, strict=True):
        expected.add(PartialResult(0, out[:, 2:].contiguous(), lse[..., 2:].contiguous()))
    wanted = expected.result()
    inputs = [(out, lse, 2) for out, lse in zip(partials, scores, strict=True)]
    merge.launch(inputs, start=2, rows=7, out=partials[0], lse=scores[0])
    torch.testing.assert_close(partials[0][:, 2:].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


def test_staged_attention_under_masks_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that the host does not know, padding, window and soft cap: through the ring."""
    monkeypatch.setattr(staged, "_forwards", lambda *_: ("triton",))
    monkeypatch.setattr(staged_plan, "RING_BYTES", 12 * 1024)
    monkeypatch.setattr(staged_plan, "UNIT", 8)
    staged._plan.cache_clear()
    for masks in MASKS:
        call = call_of(queries=20, **masks)
        result = staged.run(
            AttentionOperands(call.query, call.key, call.value, mask=None, **call.masks)
        )
        assert result is not None
        assert_close(result, call.exact())
    staged._plan.cache_clear()
