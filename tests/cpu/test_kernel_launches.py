"""What launches hand to the driver, field by field as the kernels' headers have it; no GPU."""

from __future__ import annotations

import ctypes
import itertools
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.cuda_runtime import kept_memory, launch_words, read_count, streaming
from dak_inductor.cuda_runtime import kernel as kernels
from dak_inductor.errors import UnsupportedDriverError
from dak_inductor.lowering.attention import configuration as attention_configuration
from dak_inductor.lowering.attention import launch as attention_launch
from dak_inductor.lowering.attention import tensor_maps as attention_maps
from dak_inductor.lowering.attention.problem import AttentionMasking, AttentionProblem
from dak_inductor.lowering.linear import launch as linear_launch
from dak_inductor.lowering.linear import tensor_maps
from dak_inductor.lowering.linear.configuration import LinearConfiguration, configurations
from dak_inductor.lowering.linear.launch import CopiedRows, LinearLaunch, Operand
from dak_inductor.lowering.linear.problem import Activation, LinearProblem

from .host_library import PRELUDE, compile_for_host

CARD = torch.device("cpu", 0)  # has an index, and its tensors can be made here
H200 = hardware.load("h200")
SMS = 132
LINEAR = struct.Struct("<" + 2 * "4Q" + "4Q2Q3Q7I4fI4I2I")
ATTENTION = struct.Struct("<" + 2 * "5Q2I" + "8Q3Q8I2f2I2f2I4I")


@dataclass
class FakeKernel:
    """Writes launches down."""

    launches: list[dict[str, Any]] = field(default_factory=list)
    clusters: int = 61

    def launch(self, **asked: Any) -> None:
        self.launches.append(asked)

    def prepared(self, *, patches: list[tuple[int, int, int]], **asked: Any) -> Any:
        def launch(stream: int, values: bytes) -> None:
            arguments = [bytearray(each) for each in asked["arguments"]]
            for argument, offset, size in patches:
                arguments[argument][offset : offset + size] = values[:size]
                values = values[size:]
            assert not values
            self.launches.append(
                {**asked, "arguments": list(map(bytes, arguments)), "stream": stream}
            )

        return SimpleNamespace(launch=launch)

    def maximum_active_clusters(self, **asked: Any) -> int:
        return self.clusters


@dataclass
class FakeExtension:
    """Words, captures and maps of a driver."""

    capture: int = 0
    maps: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    written: dict[int, bytes] = field(default_factory=dict)  # by address

    def capture_id(self, stream: int) -> int:
        return self.capture

    def encode_tensor_map(self, **asked: Any) -> bytes:
        self.maps.append(asked)
        return bytes([len(self.maps) % 256]) * 128

    def RecordChunk(self, device: int, nbytes: int) -> Any:  # noqa: N802 - the extension's name
        self.chunks.append(nbytes)
        address = len(self.chunks) << 32

        def write(content: bytes, offset: int) -> None:
            assert offset + len(content) <= nbytes
            self.written[address + offset] = content

        return SimpleNamespace(nbytes=nbytes, address=address, write=write)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeExtension]:
    found = FakeExtension()
    for module in (kept_memory, launch_words, tensor_maps, attention_maps):
        monkeypatch.setattr(module, "extension", lambda: found)
    read_count._captured_counts.cache_clear()
    read_count.load_counter.cache_clear()
    for name in ("_words", "_memory"):
        monkeypatch.setattr(launch_words, name, {})
    tensor_maps.matrix_map.cache_clear()
    attention_maps._encoded.cache_clear()
    yield found
    read_count._captured_counts.cache_clear()
    read_count.load_counter.cache_clear()
    tensor_maps.matrix_map.cache_clear()  # maps of no driver must not reach another test
    attention_maps._encoded.cache_clear()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    found = FakeKernel()
    for module in (linear_launch, attention_launch, streaming, read_count):
        monkeypatch.setattr(module, "load", lambda kernel, index: found)
    monkeypatch.setattr(linear_launch, "current_stream", lambda index: 7)
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    properties = SimpleNamespace(multi_processor_count=SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    caches: list[Any] = [linear_launch.worker_count, attention_launch._sm_count]
    for cached in caches:
        cached.cache_clear()
    yield found
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Any:
    link = H200.link("cpu")
    found = SimpleNamespace(link=link, most=1 << 20, automatic=False, number=3, address=0xABC0)
    for module in (linear_launch, attention_launch):
        monkeypatch.setattr(module, "window_of", lambda device, tier: found)
        monkeypatch.setattr(module, "profile_of", lambda index: H200)
    return found


def operand(rows: int, columns: int, record: int, *, bias: bool) -> Operand:
    """A weight that begins 256 bytes into its buffer."""
    tensor = torch.zeros(rows, columns, dtype=torch.bfloat16)
    buffer: Any = SimpleNamespace(device_record=record, address=tensor.data_ptr() - 256, tier="cpu")
    return Operand(tensor, torch.zeros(rows) if bias else None, buffer)


def linear(m: int = 16, **changes: Any) -> tuple[LinearProblem, LinearConfiguration]:
    problem = LinearProblem(m, 256, 128, torch.bfloat16, **changes)
    return problem, next(c for c in configurations(problem) if not c.paired and c.cluster == 1)


def test_a_product_is_packed_as_its_header_has_it(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    problem, configuration = linear(gated=True)
    gate, up = operand(256, 128, 0x100, bias=True), operand(256, 128, 0x200, bias=False)
    launch = LinearLaunch(problem, configuration, (gate, up), Activation.SILU, CARD)
    x, out = torch.zeros(16, 128), torch.zeros(16, 256)
    launch(x.bfloat16(), None, out)
    (asked,) = kernel.launches
    assert asked["grid"] == (SMS, 1, 1) and asked["cluster"] == (1, 1, 1)
    assert asked["stream"] == 7 and asked["overlap"] is True
    *maps, packed = asked["arguments"]
    assert len(maps) == 5, "of each weight, of its rows in the ring, and of the tokens"
    assert [len(each) for each in maps] == [5 * 128] * 2 + [128] * 3
    words = LINEAR.unpack(packed)
    assert words[:4] == (0x100, 256, 128 * 2, gate.bias.data_ptr() if gate.bias is not None else 0)
    assert words[4:8] == (0x200, 256, 128 * 2, 0)
    link, agreed, result, residual, pitch, residual_pitch, partials, flags, claims = words[8:17]
    assert (link, agreed, result, residual) == (window.address, 0, out.data_ptr(), 0)
    assert (pitch, residual_pitch) == (256, 0) and partials > 0
    assert flags - claims == 4 * 32, "claims have a line of L2 to themselves"
    assert words[17:22] == (16, 16, 256, 128, int(Activation.SILU))
    assert 1 <= words[22] <= SMS


def test_a_call_like_an_earlier_one_is_packed_alike(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    """Of dimensions of one element a stride says nothing."""
    problem, configuration = linear(m=2)
    weights = (operand(256, 128, 0x100, bias=True),)
    launch = LinearLaunch(problem, configuration, weights, Activation.NONE, CARD)
    x = torch.zeros(2, 1, 128, dtype=torch.bfloat16)
    memory = torch.zeros(2, 256, dtype=torch.bfloat16)
    residual = memory.as_strided((2, 1, 256), (256, 7 * 256, 1))
    assert residual.is_contiguous()
    out = launch.run(x, residual, torch.Size((2, 1, 256)))
    assert out is not None and out.shape == (2, 1, 256) and out.dtype == torch.bfloat16
    launch(x.view(2, 128), memory, out.view(2, 256))
    first, second = kernel.launches
    assert first["arguments"][:-1] == second["arguments"][:-1]
    words, others = (LINEAR.unpack(each["arguments"][-1]) for each in (first, second))
    assert words[:14] == others[:14] and words[15:] == others[15:], "all but where the sums go"
    assert words[10:14] == (out.data_ptr(), memory.data_ptr(), 256, 256)
    apart = torch.zeros(2, 1, 136, dtype=torch.bfloat16)[..., :128]
    assert not launch.takes(apart, residual) and launch.takes(x, residual)
    unaligned = torch.zeros(2 * 256 + 1, dtype=torch.bfloat16)[1:].view(2, 1, 256)
    assert not launch.takes(x, unaligned) and launch.takes(x, None)
    assert len(kernel.launches) == 2


HEADER = (
    PRELUDE
    + """
#include "linear/arguments.cuh"
using dak::linear::Arguments;

extern "C" void numbers(const Arguments* of, unsigned* found) {
  const unsigned all[] = {of->tokens, of->cta_tokens, of->features, of->depth,
                          static_cast<unsigned>(of->activation), of->maximum_remote_workers,
                          of->worker_bytes, of->late_steps, of->tail.share, of->tail.pieces,
                          of->tail.least, of->tail.spared, of->copied[0], of->copied[1]};
  for (unsigned i = 0; i < sizeof(all) / sizeof(*all); ++i) found[i] = all[i];
}

extern "C" void rates(const Arguments* of, float* found) {
  const float all[] = {of->link_steps, of->reader_steps, of->piece_steps, of->few_steps};
  for (unsigned i = 0; i < sizeof(all) / sizeof(*all); ++i) found[i] = all[i];
}
"""
)


@pytest.mark.parametrize("rows", [None, 96])
def test_the_header_finds_each_number_where_it_was_packed(
    driver: FakeExtension, kernel: FakeKernel, window: Any, tmp_path: Path, rows: int | None
) -> None:
    problem, configuration = linear(gated=True)
    gate, up = operand(256, 128, 0x100, bias=True), operand(256, 128, 0x200, bias=False)
    launch = LinearLaunch(problem, configuration, (gate, up), Activation.SILU, CARD)
    ring = None if rows is None else torch.zeros(rows, 128, dtype=torch.bfloat16)
    copied = () if ring is None else (None, CopiedRows(256 - 96, ring))
    launch(torch.zeros(16, 128).bfloat16(), None, torch.zeros(16, 256), copied)
    (asked,) = kernel.launches
    assert asked["overlap"] is (rows is None), "nothing is asked for before the copies are there"
    *maps, packed = asked["arguments"]
    assert (maps[3] == maps[2]) is (rows is None) and maps[2] == maps[0][:128]
    if ring is not None:
        (made,) = [made for made in driver.maps if made["address"] == ring.data_ptr()]
        assert made["shape"] == [128, 96] and made["box"][1] == configuration.features
    found, rates = (ctypes.c_uint * 14)(), (ctypes.c_float * 4)()
    header = compile_for_host(HEADER, tmp_path)
    header.numbers(packed, found)
    header.rates(packed, rates)
    words = LINEAR.unpack(packed)
    assert list(found) == [*words[17:24], *words[28:35]]
    assert tuple(rates) == words[24:28] and min(rates) > 0
    assert words[-2:] == (256, 256 if rows is None else 160)


def test_a_residual_has_its_own_pitch_and_words_are_used_again(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    problem, configuration = linear()
    launch = LinearLaunch(
        problem, configuration, (operand(256, 128, 0x100, bias=False),), Activation.NONE, CARD
    )
    residual = torch.zeros(16, 512)[:, :256]
    for _ in range(2):
        launch(torch.zeros(16, 128).bfloat16(), residual, torch.zeros(16, 256))
    first, second = (LINEAR.unpack(asked["arguments"][-1]) for asked in kernel.launches)
    assert (first[11], first[13]) == (residual.data_ptr(), 512)
    assert first[15:17] == second[15:17], "launches on one stream follow each other"
    assert first[:8] == 2 * first[:4], "a weight that is alone stands for both"
    driver.capture = 5
    launch(torch.zeros(16, 128).bfloat16(), None, torch.zeros(16, 256))
    third = LINEAR.unpack(kernel.launches[-1]["arguments"][-1])
    assert third[15] != first[15], "replays may run beside launches of that stream"


def test_a_bias_that_was_copied_for_a_launch_lives_as_long(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    """Else its memory would be the next that is asked for: the launch's own partial sums."""
    problem, configuration = linear()
    for owns_bias in (True, False):
        made = replace(operand(256, 128, 1, bias=True), owns_bias=owns_bias)
        assert made.bias is not None
        bias, tensor = weakref.ref(made.bias), made.tensor
        launch = LinearLaunch(problem, configuration, (made,), Activation.NONE, CARD)
        del made
        assert (bias() is not None) is owns_bias and tensor is not None
        del launch
        assert bias() is None


def test_launches_agree_on_a_window_that_kernels_change(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    def agreed(configuration: LinearConfiguration) -> tuple[int, int]:
        launch = LinearLaunch(
            problem, configuration, (operand(256, 128, 1, bias=False),), Activation.NONE, CARD
        )
        launch(torch.zeros(16, 128).bfloat16(), None, torch.zeros(16, 256))
        assert launch.holds
        words = LINEAR.unpack(kernel.launches[-1]["arguments"][-1])
        return words[9], words[16]

    problem, configuration = linear()
    window.automatic = True
    word, claims = agreed(configuration)
    assert word == launch_words.launch_window(claims, window.number)
    assert claims - word == 4 * (64 - 2 * window.number), "in front, a pair of words for each link"
    paired = next(c for c in configurations(problem) if c.paired)
    assert agreed(paired)[0] == 0, "the next launch starts before two CTAs of an SM could agree"


def test_workers_are_counted_anew_where_more_may_be_in_flight(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    problem, configuration = linear()
    weights = (operand(256, 128, 1, bias=False),)
    launch = LinearLaunch(problem, configuration, weights, Activation.NONE, CARD)
    window.most *= 2
    assert not launch.holds
    assert LinearLaunch(problem, configuration, weights, Activation.NONE, CARD).holds


def test_a_cluster_shares_weights_and_divides_the_tokens(
    driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    problem = LinearProblem(512, 256, 128, torch.bfloat16, in_out=True)
    configuration = next(c for c in configurations(problem) if c.cluster > 1)
    weight = operand(128, 256, 1, bias=False)
    launch = LinearLaunch(problem, configuration, (weight,), Activation.NONE, CARD)
    launch(torch.zeros(512, 128).bfloat16(), None, torch.zeros(512, 256))
    asked = kernel.launches[-1]
    assert asked["grid"] == (kernel.clusters * configuration.cluster, 1, 1)
    words = LINEAR.unpack(asked["arguments"][-1])
    assert words[18] == -(-512 // configuration.cluster)
    boxes = {tuple(each["box"]) for each in driver.maps}
    assert (64, linear_launch.DEPTH) in boxes, "stored [K, N], tiles are cut along K"


def test_words_of_a_gpu_are_never_given_twice(driver: FakeExtension) -> None:
    given: list[range] = []
    for stream in range(12):
        for count in (100, 5000, 40_000):
            address = launch_words.words_for(0, count, stream)
            given.append(range(address, address + 4 * max(count, 4096)))
    given.sort(key=lambda each: each.start)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(given) if one != other)
    assert len(driver.chunks) > 1
    launch_words.words_for(0, 1 << 20, 99)
    assert driver.chunks[-1] >= 4 << 20, "more than a chunk has one of its own"


@pytest.mark.parametrize("divided", [False, True])
def test_attention_is_packed_as_its_header_has_it(
    divided: bool, driver: FakeExtension, kernel: FakeKernel, window: Any
) -> None:
    key, value = torch.zeros(2, 2, 4, 128, 64, dtype=torch.bfloat16)  # one memory, in this order
    buffer: Any = SimpleNamespace(device_record=0x900, address=key.data_ptr() - 512, tier="cpu")
    caches = tuple(
        attention_launch.CachedTensor(each, buffer if divided else None) for each in (key, value)
    )
    query = torch.zeros(2, 8, 1, 64, dtype=torch.bfloat16)
    lengths = torch.zeros(2, dtype=torch.int32)
    problem = AttentionProblem(2, 4, 2, 1, 128, 64, torch.bfloat16)
    configuration = attention_configuration.choose(problem)
    out = torch.empty(2, 1, 8, 64, dtype=torch.bfloat16)
    for automatic in (False, True):
        window.automatic = automatic
        attention_launch.launch(
            problem, configuration, query=query, caches=(caches[0], caches[1]), lengths=lengths,
            starts=None, masking=AttentionMasking(0.5, True, 9, 0.0), out=out,
        )  # fmt: skip
    fixed, asked = kernel.launches
    assert asked["grid"] == (SMS, 1, 1) and asked["shared_bytes"] == configuration.shared_bytes
    words = ATTENTION.unpack(asked["arguments"][1])
    token, head = 64 * 2, 128 * 64 * 2
    assert words[:5] == (0x900 if divided else 0, 512 if divided else 0, 4 * head, head, token)
    assert words[14:16] == (lengths.data_ptr(), 0)
    link, agreed, asked_query, asked_out, _, counters = words[16:22]
    assert (asked_query, asked_out) == (query.data_ptr(), out.data_ptr())
    assert link == (window.address if divided else 0)
    assert ATTENTION.unpack(fixed["arguments"][1])[16:18] == (link, 0), "the host fixes it"
    assert agreed == (launch_words.launch_window(counters, 3) if divided else 0)
    assert words[25:30] == (2, 4, 2, 1, 128) and words[31:33] == (1, 9)
    assert words[33] == pytest.approx(0.5 * 1.4426950) and words[34] == 0.0
    costs = words[37:39]
    assert all(cost > 0 for cost in costs) if divided else costs == (0.0, 0.0)
    no_sweep = attention_configuration.NO_SWEEP
    assert words[41] == no_sweep or divided


def test_division_by_multiplication_is_exact() -> None:
    for number in (1, 2, 3, 7, 96, 1000, 65_537):
        multiplier, shift = attention_launch.divisor(number)
        for value in (0, 1, number - 1, number, 12 * number + 5, 2**31 - 1):
            high = (value * multiplier) >> 32
            assert (high + value) >> shift == value // number, (number, value)


def test_streams_of_a_link_and_of_local_memory_share_a_wave(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, local = (streaming.Part(1 << 20, 1 << 16, ctas, 4, 4096) for ctas in (2, 3))
    counters = torch.tensor(
        [[100, 0, 10, 7]] * 2 + [[300, 5, 15, 2**32 - 1]] * 3, dtype=torch.int64
    )
    monkeypatch.setattr(streaming, "_counters", lambda device, ctas: counters[:ctas])
    found = streaming.stream_rates(CARD, remote, local, seconds=0.5)
    assert (found.remote, found.local) == (2 * 100 / 10 * 1e9, 3 * 300 / 10 * 1e9)
    sums = streaming.stream_checksum(CARD, remote, local)
    assert (sums.remote_bytes, sums.local_bytes) == (200, 900)
    assert sums.checksum == (14 + 3 * (2**32 - 1)) % 2**32
    both = kernel.launches[0]
    assert both["grid"] == (5, 1, 1) and both["shared_bytes"] == local.shared_bytes
    assert both["arguments"][0].startswith(remote.pack() + local.pack())
    for ctas in (SMS, SMS + 1):
        wide = streaming.Part(0, 1 << 30, ctas, 4, 4096)
        with pytest.raises(ValueError, match=f"a single wave of 1 to {SMS}"):
            streaming.stream_async(CARD, wide, local, seconds=1.0)
    alone = streaming.stream_rates(CARD, None, local, seconds=0.5)
    assert alone.remote == 0.0


def test_writes_and_round_trips_are_rates_and_seconds(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = streaming.Part(1 << 20, 1 << 16, 2, 4, 4096)
    counters = torch.tensor([[100, 0, 10, 0]] * 2, dtype=torch.int64)
    monkeypatch.setattr(streaming, "_counters", lambda device, ctas: counters)
    assert streaming.write_rate(CARD, part, seconds=1.0) == 2 * 100 / 10 * 1e9
    assert kernel.launches[-1]["shared_bytes"] == part.piece_bytes
    assert streaming.round_trip(CARD, 4096, stride=128, loads=10) == 0.0, "no kernel has counted"
    address, stride, loads = struct.unpack_from("<QII", kernel.launches[-1]["arguments"][0])
    assert (address, stride, loads) == (4096, 128, 10)
    for wrong in ({"address": 8}, {"stages": 33}, {"ctas": 17}):
        asked = {"address": 0, "nbytes": 1 << 16, "ctas": 1, "stages": 1, "piece_bytes": 4096}
        with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s") + "|CTAs"):
            streaming.Part(**{**asked, **wrong})


def test_a_capture_counts_in_a_launch_for_many_reads(
    driver: FakeExtension, kernel: FakeKernel
) -> None:
    """Tables are filled one after the other; another capture has its own."""

    def entries(table: int) -> list[tuple[int, ...]]:
        ours = {a: b for a, b in driver.written.items() if table <= a < table + 64 * 32}
        content = b"".join(ours[address] for address in sorted(ours))
        assert sorted(ours) == list(accumulate([table, *map(len, ours.values())]))[:-1]
        return list(struct.iter_unpack("<4Q", content))

    for record in range(1, 41):
        reads = [(8 * record, 16), (4096, record)]
        read_count.queue_count(record, reads, capture=5, device_index=0)
    read_count.queue_count(99, [(0, 1)], capture=6, device_index=0)
    read_count.queue_count(41, [(1, 2)], capture=5, device_index=0)
    tables = [struct.unpack("<Q", each["arguments"][0])[0] for each in kernel.launches]
    assert all(each["block"] == (64, 1, 1) for each in kernel.launches)
    first, second, other = tables
    wanted = [
        entry
        for record in range(1, 41)
        for entry in ((record, 8 * record, 16, 1), (record, 4096, record, 0))
    ]
    assert entries(first) == wanted[:64]
    assert entries(second) == [*wanted[64:], (41, 1, 2, 1)]
    assert entries(other) == [(99, 0, 1, 1)]


def test_tables_of_captures_that_are_long_over_are_forgotten(
    driver: FakeExtension, kernel: FakeKernel
) -> None:
    for capture in range(1, 300):
        read_count.queue_count(1, [(0, 1)], capture=capture, device_index=0)
    counts = read_count._captured_counts(0)
    assert len(kernel.launches) == 299 and len(counts._open) == read_count._MOST_OPEN
    addresses = {each["arguments"][0] for each in kernel.launches}
    assert len(addresses) == 299, "a graph may still be replayed"
    assert len(driver.chunks) == 3


def test_a_kernel_is_compiled_and_loaded_once_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[Any, int]] = []
    compiled: list[str] = []

    def cubin(kernel: Any, *, architecture: str) -> str:
        compiled.append(architecture)
        return "cubin"

    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "compiler", lambda: SimpleNamespace(cubin=cubin))
    monkeypatch.setattr(
        kernels, "LoadedKernel", lambda cubin, index: made.append((cubin, index)) or len(made)
    )
    capabilities = {0: (9, 0), 1: (10, 0), 2: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A6000")
    kernels.architecture.cache_clear()
    asked = streaming.STREAM_READ
    assert [kernels.load(asked, index) for index in (0, 0, 1, 0)] == [1, 1, 2, 1]
    assert made == [("cubin", 0), ("cubin", 1)] and compiled == ["sm_90a", "sm_100a"]
    with pytest.raises(UnsupportedDriverError, match=r"GPU 2 \(A6000\) has 8.6"):
        kernels.load(asked, 2)
    kernels.architecture.cache_clear()
