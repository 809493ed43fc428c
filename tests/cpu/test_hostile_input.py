"""Everything that is parsed, fed with what nobody meant: a named error, or a value that works."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from dak_inductor import hardware, options
from dak_inductor.byte_size import parse_budget
from dak_inductor.checkpoint import Checkpoint
from dak_inductor.checkpoint_files import INDEX_NAME
from dak_inductor.cuda_runtime.nvrtc import Cubin, decode, encode
from dak_inductor.errors import DakError
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.inventory import take_inventory
from dak_inductor.offload import offload
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded import record_of
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan

from .profiles import examples

PROBLEM = PlanProblem(
    (TensorSpec("w", 1 << 20), TensorSpec("v", 1 << 16)),
    (OpUse("linear", "decode", "w", "linear", 1 << 20, 4096.0, 1e8, 1.0),),
    1 << 19,
    "cpu",
)
PLAN = json.loads(make_plan(PROBLEM, hardware.load("h200")).to_json())
PROFILE = json.loads(hardware.load("h200").to_json())
DEEP = "[" * 100_000

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from((0, -1, 5e-324, 1e308, 10**400, -(10**400), 2**63, float("nan"))),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def damaged(draw: Any, whole: Any) -> str:
    """The JSON of `whole` with one to three places replaced, left out or added."""
    record = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.integers(0, 3))
            if action == 0:
                del place[key]
            elif action == 1 and isinstance(place, dict):
                place[draw(st.text(max_size=5))] = draw(values)
            else:
                place[key] = draw(values)
            break
    return json.dumps(record)


@given(damaged(PLAN))
@example(DEEP)
@example("9" * 5000)
@examples(150)
def test_a_plan_is_refused_by_name_or_can_be_used(text: str) -> None:
    try:
        plan = Plan.from_json(text)
    except DakError:
        return
    assert 0 <= plan.asked_bytes <= plan.remote_bytes <= plan.total_bytes and plan.gap > -2
    assert Plan.from_json(plan.to_json()) == plan


@given(damaged(PROFILE))
@example(DEEP)
@example(json.dumps({**PROFILE, "hbm_bandwidth": 10**400}))
@example(json.dumps({**PROFILE, "hbm_bandwidth": 5e-324}))
@example(json.dumps({**PROFILE, "operator_floor": 1e308}))
@examples(150)
def test_a_profile_is_refused_by_name_or_can_be_planned_with(text: str) -> None:
    try:
        profile = HardwareProfile.from_json(text)
        plan = make_plan(PROBLEM, profile)
    except DakError:
        return
    assert plan.remote_bytes >= PROBLEM.remote_bytes
    assert HardwareProfile.from_json(profile.to_json()) == profile


sizes = st.one_of(
    values,
    st.binary(max_size=4),
    st.from_regex(r"\s*[0-9.]{0,400}\s*([KMGT]i?B|%|B|)\s*", fullmatch=True),
)


@given(sizes, st.sampled_from((None, 80 * 10**9)))
@example("9" * 400 + "GB", None)
@example(10**400, 80 * 10**9)
@example(-(10**5000), None)
@examples(200)
def test_a_budget_is_refused_by_name_or_is_bytes(value: Any, card: int | None) -> None:
    try:
        budget = parse_budget(value, card)
    except DakError:
        return
    assert type(budget) is int and 0 < budget < 2**63 and (card is None or budget <= card)


keys = st.one_of(
    st.sampled_from(
        ("strategy", "window", "strict", "plan", "trials", "nvtx", "mode", "max_autotune")
    ),
    scalars,
)


def _is_window(value: object) -> bool:
    return value in (None, "auto") or (isinstance(value, int) and 0 < value < 2**31)


@given(st.dictionaries(keys, values, max_size=3))
@example({"window": "auto"})
@example({1: 2})
@example({"mode": []})
@example({"window": 10**5000})
@examples(150)
def test_options_are_refused_by_name_or_known(given_options: dict[Any, Any]) -> None:
    try:
        parsed = options.parse(None, given_options)
    except DakError:
        return
    assert _is_window(parsed.backend.window)


@given(
    st.sampled_from(("WINDOW", "STRICT", "TRIALS", "STRATEGY")),
    st.one_of(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12),
        st.sampled_from(("²", "٣", "9" * 5000, "-1", "1_000", " 1")),
    ),
)
@examples(100)
def test_variables_are_refused_by_name_or_known(name: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"DAK_{name}", value)
        try:
            parsed = options.parse(None, None)
        except DakError:
            return
    assert _is_window(parsed.backend.window)


@given(
    st.one_of(values, st.dictionaries(st.text("01.*?[]!-w", max_size=6), values, max_size=3)),
    st.one_of(st.none(), values),
    st.one_of(st.just("simulated"), values),
    st.one_of(st.none(), values),
)
@example({"[": "cpu"}, None, "simulated", None)
@example({"*": "cpu", "0": "gpu"}, None, "simulated", None)
@example(None, float("nan"), "simulated", None)
@example(None, None, "cuda:99999999999999999999", None)
@example(None, None, "simulated", 10**30)
@examples(120)
def test_requests_are_refused_by_name_or_served(
    placement: Any, host_memory: Any, remote: Any, device: Any
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = copy.deepcopy(model.state_dict())
    try:
        request = OffloadRequest(
            None, 0.5, remote, placement, host_memory=host_memory, device=device
        )
        request.resolved_device()
        offload(
            model, offload_ratio=0.5, remote=remote, placement=placement,
            host_memory=host_memory, device=device,
        )  # fmt: skip
    except DakError:
        assert record_of(model) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


STATE = {"weight": torch.randn(64, 64), "bias": torch.randn(64)}
FILE = save(STATE)
(LENGTH,) = struct.unpack("<Q", FILE[:8])
HEADER = json.loads(FILE[8 : 8 + LENGTH])


def read_all(path: Path) -> None:
    """Every tensor of a checkpoint through every way there is, as a model would read it."""
    checkpoint = Checkpoint(path)
    try:
        checkpoint.check(take_inventory(nn.Linear(64, 64, device="meta"), minimum_bytes=256))
        for name in checkpoint.names:
            for dtype in (torch.float32, torch.bfloat16):
                list(checkpoint.pieces(name, dtype))
    finally:
        checkpoint.close()


@given(st.one_of(damaged(HEADER).map(str.encode), st.binary(max_size=40)), st.integers(-300, 300))
@example(DEEP.encode(), 0)
@examples(100)
def test_a_checkpoint_is_refused_by_name_or_read(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, more: int
) -> None:
    body = FILE[8 + LENGTH :]
    body = body[:more] if more < 0 else body + bytes(more)
    path = tmp_path_factory.mktemp("hostile") / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    try:
        read_all(path)
    except DakError:
        return


@given(st.binary(max_size=24))
@example(b"")
@example(b"\xff" * 8)
@examples(40)
def test_a_file_of_anything_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("hostile") / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(DakError):
        read_all(path)


indices: st.SearchStrategy[Any] = st.one_of(
    values,
    st.dictionaries(
        st.just("weight_map"),
        st.dictionaries(
            st.sampled_from(("weight", "bias", "")),
            st.sampled_from(
                ("m.safetensors", "../m.safetensors", "/etc/passwd", "", ".", "\0", 3, None,
                 "a\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors")
            ),
        ),
        min_size=1,
    ),
)  # fmt: skip


@given(indices)
@example(DEEP)
@examples(80)
def test_an_index_is_refused_by_name_or_stays_in_its_folder(
    tmp_path_factory: pytest.TempPathFactory, index: Any
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "m.safetensors").write_bytes(FILE)
    text = index if index is DEEP else json.dumps(index)
    (folder / INDEX_NAME).write_text(text)
    try:
        checkpoint = Checkpoint(folder)
    except DakError:
        return
    assert set(checkpoint._file_of.values()) <= {folder / "m.safetensors"}
    checkpoint.close()


CUBIN = Cubin("kernel", "k" * 64, "symbol", "log", b"\x7fELF")


@given(
    st.one_of(
        st.binary(max_size=40),
        damaged({"name": "kernel", "key": "k" * 64, "symbol": "s", "log": ""}).map(str.encode),
    )
)
@example(DEEP.encode())
@examples(100)
def test_a_foreign_cache_entry_is_a_miss_even_with_a_right_hash(body: bytes) -> None:
    content = hashlib.sha256(body).digest() + body
    found = decode(content, CUBIN.name, CUBIN.key)
    assert found is None or (found.name, found.key) == (CUBIN.name, CUBIN.key)
    assert found is None or all(isinstance(text, str) for text in (found.symbol, found.log))
    assert decode(encode(CUBIN), CUBIN.name, CUBIN.key) == CUBIN
