"""The portable kernel in Triton's interpreter, with plain arguments in the template's holes.

bfloat16 is not tested here: the interpreter's dot is wrong for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dak_inductor.lowering.residency import ALL_LOCAL
from dak_inductor.lowering.triton_linear.configuration import TileConfiguration
from dak_inductor.lowering.triton_linear.inductor import constants
from dak_inductor.lowering.triton_linear.template import kernel_source

SMALL = TileConfiguration(m=16, n=32, k=32, stages=3, warps=4)
ARGUMENTS = "X, W, RESIDENCY, OUT, M_, N_, K_, x_pitch_, pitch_"
ROWS = 5  # second dimension of a result that has three

Loader = Callable[[str, str], Any]
layouts = pytest.mark.parametrize("out_in", [True, False], ids=["out_in", "in_out"])


def rendered(meta: dict[str, Any]) -> str:
    """The template's text; a store stands where Inductor puts the epilogue."""
    import jinja2

    weight_sizes = ("N_", "K_") if meta["OUT_IN"] else ("K_", "N_")
    sizes = {"X": ("M_", "K_"), "W": weight_sizes, None: (None, str(ROWS))}
    strides = {"X": ("x_pitch_", "1"), "W": ("pitch_", "1")}
    defines = {**meta, "INDEX_DTYPE": "tl.int32"}

    def def_kernel(*_: str) -> str:
        lines = [f"    {name}: tl.constexpr = {value}" for name, value in defines.items()]
        return "\n".join([f"@triton.jit\ndef kernel({ARGUMENTS}):", *lines])

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        *outer, n = indices
        m = outer[0] if len(outer) == 1 else f"({outer[0]} * {ROWS} + {outer[1]})"
        return f"tl.store(OUT + {m} * N_ + {n}, {value}.to(OUT.dtype.element_ty), mask={mask})"

    text = jinja2.Template(kernel_source()).render(
        def_kernel=def_kernel,
        size=lambda name, index: sizes[name][index],
        stride=lambda name, index: strides[name][index],
        store_output=store_output,
        **meta,
    )
    return f"import triton\nimport triton.language as tl\n\n{text}"


@pytest.fixture
def interpreter() -> Iterator[None]:
    import numpy
    import triton

    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton 3.6 needs a numpy older than 2.4")
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    yield
    triton.knobs.runtime.interpret = before


def run(
    load_kernel: Loader,
    *,
    m: int = 20,
    n: int = 96,
    k: int = 96,
    out_in: bool,
    split_rows: float | None,
    programs: int = 7,
    dtype: torch.dtype = torch.float32,
    first_row: int = 0,
    window: int = 0,
    rank: int = 2,
) -> torch.Tensor:
    """Run one product, compare it with float64, and return the record.

    The weight starts `first_row` rows into its buffer, and `split_rows` of it are local, all of
    them for None. The output is poisoned.
    """
    rows, columns = (n, k) if out_in else (k, n)
    pitch = columns + 8
    buffer = torch.randn(rows + first_row, pitch, dtype=dtype)
    weight, x = buffer[first_row:, :columns], torch.randn(m, k, dtype=dtype)
    out = torch.full((m, n), float("nan"), dtype=dtype)
    split = ALL_LOCAL
    if split_rows is not None:
        split = int((first_row + split_rows) * pitch * dtype.itemsize)
    word = torch.tensor([window], dtype=torch.int32)
    base = buffer.data_ptr() if first_row else 0
    record = torch.tensor([split, 0, 0, 0, 0, base, word.data_ptr() if window else 0, 0])
    meta = constants(SMALL, programs=programs, out_in=out_in, n=n, k=k, dtype=dtype, rank=rank)
    tiles = -(-m // SMALL.m) * -(-n // SMALL.n)
    kernel = load_kernel(rendered(meta), "kernel")
    kernel[(min(programs, tiles),)](x, weight, record, out, m, n, k, k, pitch)
    reference = x.double() @ (weight.double().t() if out_in else weight.double())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.double(), reference, rtol=tolerance, atol=tolerance)
    return record


@layouts
@pytest.mark.parametrize("split", [None, 0, 5, 32, 64.5, 95, 96])
def test_every_split_gives_the_product_and_counts_its_bytes(
    load_kernel: Loader, interpreter: None, out_in: bool, split: float | None
) -> None:
    record = run(load_kernel, out_in=out_in, split_rows=split)
    local = 96 if split is None else int(split)
    row_bytes, tile_rows = 96 * 4, 2
    assert record[1:4].tolist() == [local * row_bytes, (96 - local) * row_bytes * tile_rows, 1]
    assert (record[4].item() > 0) == (local < 96)


@layouts
@pytest.mark.parametrize("programs", [2, 3, 5, 64])
def test_every_grid_covers_all_tiles(
    load_kernel: Loader, interpreter: None, out_in: bool, programs: int
) -> None:
    run(load_kernel, out_in=out_in, split_rows=40, programs=programs)


@layouts
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 33, 31), (5, 100, 70), (33, 40, 97)])
def test_tails(
    load_kernel: Loader, interpreter: None, out_in: bool, m: int, n: int, k: int
) -> None:
    rows = n if out_in else k
    for dtype in (torch.float16, torch.float32):
        run(load_kernel, m=m, n=n, k=k, out_in=out_in, split_rows=rows // 2, dtype=dtype)


@layouts
def test_a_result_of_three_dimensions(load_kernel: Loader, interpreter: None, out_in: bool) -> None:
    run(load_kernel, m=4 * ROWS, out_in=out_in, split_rows=40, rank=3)


@layouts
def test_rows_of_a_fused_weight_count_from_the_start_of_its_buffer(
    load_kernel: Loader, interpreter: None, out_in: bool
) -> None:
    record = run(load_kernel, out_in=out_in, split_rows=24, first_row=40)
    assert record[1].item() == 24 * 96 * 4
    record = run(load_kernel, out_in=out_in, split_rows=-8, first_row=40)
    assert record[1].item() == 0


def test_the_window_bounds_the_programs_that_read_remote_tiles(
    load_kernel: Loader, interpreter: None
) -> None:
    each = SMALL.bytes_in_flight(4)
    for window, readers in ((1, 1), (2 * each, 2), (3 * each + 1, 3)):
        record = run(load_kernel, n=192, out_in=True, split_rows=0, programs=64, window=window)
        assert record[4].item() == readers * each
    # all twelve tiles are remote: no more programs can read them at once
    record = run(load_kernel, n=192, out_in=True, split_rows=0, programs=64, window=1 << 30)
    assert record[4].item() == 12 * each
