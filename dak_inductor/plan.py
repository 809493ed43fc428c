"""What is to be planned, and the plan: frozen records, and the plan's JSON.

Sizes are bytes, times seconds. A tensor is local in a prefix and remote in the rest; its `split` is
the length of the prefix, and `splits` of a plan maps each tensor to its REMOTE bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from dak_inductor.errors import PlanError
from dak_inductor.refusal import Refusal
from dak_inductor.tensor_names import few_of

VERSION = 1
STRATEGIES = ("direct", "staged")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor whose bytes the plan divides.

    Its split may be 0, `nbytes`, or any multiple of `granularity`. A live tensor moves by pages:
    with `page` set, the splits are 0, `nbytes` and `first_page_split` + k * `page`. Copies ahead of
    a product come in blocks of rows, of `row_block` bytes; 0 where none can be made.
    """

    name: str
    nbytes: int
    min_remote: int = 0
    max_remote: int | None = None  # None: all of it
    granularity: int = 256
    current_remote: int | None = None  # None: not placed yet
    page: int | None = None
    first_page_split: int | None = None  # None: the tensor starts on a page boundary
    row_block: int = 0


@dataclass(frozen=True, slots=True)
class OpUse:
    """One operator of one graph reading one tensor. `tensor` is "" where it reads none of ours.

    An operator that reads two tensors is two uses of the same `op`; its floor counts once. Remote
    bytes are a tensor's last ones, so those of the untouched share cost nothing.
    """

    op: str
    graph: str
    tensor: str
    kind: str
    touched_bytes: float  # of the tensor, per call; a remote share x makes x of them remote
    other_bytes: float  # activations, always local, per call
    flops: float  # per call
    calls: float  # weight of this use in the objective
    dtype: str = "bfloat16"
    module: str = ""
    source: str = ""
    m: int = 0  # rows of the activation, 0 where it has no meaning
    n: int = 0  # features of the result, 0 where it has no meaning
    strategy: str = "direct"
    untouched_share: float = 0.0  # of the tensor, at its end: a context that is still to come


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """`remote_bytes` of the `tensors` have to be remote; which bytes is the planner's to say.

    ring_bytes: device memory through which the link may copy remote rows ahead of the products that
        read them; 0: it copies none.
    """

    tensors: tuple[TensorSpec, ...]
    uses: tuple[OpUse, ...]
    remote_bytes: int
    remote: str
    refusals: tuple[Refusal, ...] = ()
    model: str = ""  # fingerprint
    ring_bytes: int = 0


@dataclass(frozen=True, slots=True)
class OpPlan:
    """One use as planned. `limit` names what bounds its time: "hbm", "link" or "compute"."""

    op: str
    graph: str
    tensor: str
    kind: str
    strategy: str
    remote_share: float  # of the tensor, 0 to 1
    local_bytes: float  # read per call from HBM, activations included
    remote_bytes: float  # read per call from the remote tier
    time: float  # predicted, one call
    calls: float
    limit: str = "hbm"
    module: str = ""
    source: str = ""
    m: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every byte goes, and what that is predicted to cost."""

    model: str
    hardware: str
    remote: str
    asked_bytes: int  # had to be remote
    splits: Mapping[str, int]  # remote bytes by tensor
    sizes: Mapping[str, int]  # all bytes by tensor
    ops: tuple[OpPlan, ...]
    refusals: tuple[Refusal, ...]
    step_times: Mapping[str, float]  # by graph, every operator called once
    bound: Mapping[str, float]  # by graph, no schedule of these bytes is faster
    objective: float  # sum over uses of calls x time
    objective_bound: float  # of the best plan that could split a tensor anywhere
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("splits", "sizes", "step_times", "bound"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Callable[[str], Plan], tuple[str]]:
        return Plan.from_json, (self.to_json(),)

    @property
    def remote_bytes(self) -> int:
        """Bytes that this plan puts into the remote tier; at least `asked_bytes`."""
        return sum(self.splits.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(self.sizes.values())

    @property
    def gap(self) -> float:
        """Cost above the bound, as a share of the bound."""
        return self.objective / self.objective_bound - 1 if self.objective_bound > 0 else 0.0

    def check_model(self, model: str, sizes: Mapping[str, int]) -> None:
        """Raise PlanError where this is not a plan for `model` with tensors of these `sizes`."""
        if self.model and model and self.model != model:
            raise PlanError(
                f"this is a plan of model {self.model!r}, the model here is {model!r}: plan again "
                "with `dak plan`, or leave the plan out"
            )
        if self.sizes == sizes:
            return
        missing = sorted(sizes.keys() - self.sizes.keys())
        unknown = sorted(self.sizes.keys() - sizes.keys())
        other = sorted(n for n in self.sizes.keys() & sizes.keys() if self.sizes[n] != sizes[n])
        raise PlanError(
            f"this plan is of another model: {few_of(missing)} not in the plan, {few_of(unknown)} "
            f"not in the model, {few_of(other)} of another size; plan again with `dak plan`"
        )

    def fitted(self, model: str, sizes: Mapping[str, int]) -> Plan:
        """The plan for the same model where a tier of other pages divides it into these tensors:
        what one of them leaves whole is local. Raises as `check_model`.
        """
        dropped = {name for name, remote in self.splits.items() if name not in sizes and not remote}
        fitted = self
        if model and model == self.model and self.sizes.keys() != sizes.keys():
            kept = {name: size for name, size in self.sizes.items() if name not in dropped}
            fitted = replace(
                self,
                splits={n: self.splits.get(n, 0) for n in {**kept, **sizes}},
                sizes={**sizes, **kept},
                ops=tuple(replace(o, tensor="") if o.tensor in dropped else o for o in self.ops),
            )
        fitted.check_model(model, sizes)
        return fitted

    def to_json(self) -> str:
        """Versioned JSON, one operator a line, which `from_json` reads back to an equal plan."""
        head: dict[str, Any] = {"version": self.version}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("version", "ops", "refusals"):
                head[field.name] = dict(value) if isinstance(value, Mapping) else value
        text = json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
        for name in ("ops", "refusals"):
            rows = ",\n".join(
                "    " + json.dumps(asdict(row), allow_nan=False) for row in getattr(self, name)
            )
            text += f',\n  "{name}": [\n{rows}\n  ]' if rows else f',\n  "{name}": []'
        return text + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in `text`. Raises PlanError where it is damaged or of another version."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise PlanError(f"the plan is a JSON {type(record).__name__}, not an object")
        if record.get("version") != VERSION or isinstance(record.get("version"), bool):
            raise PlanError(
                f"a plan of version {record.get('version')!r}; this release reads version "
                f"{VERSION}: plan again with `dak plan`"
            )
        _check_types("the plan", cls, record)
        plan = cls(
            **{
                **record,
                "ops": tuple(_rows("ops", OpPlan, record["ops"])),
                "refusals": tuple(_rows("refusals", Refusal, record["refusals"])),
            }
        )
        _check_values(plan)
        return plan


def _rows(where: str, kind: type, rows: list[Any]) -> list[Any]:
    read = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PlanError(f"{where}[{number}] must be an object")
        _check_types(f"{where}[{number}]", kind, row)
        read.append(kind(**row))
    return read


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= sys.float_info.max  # a whole number may be larger


def _maps_to(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


# by the annotation of the field: what a value from disk must be
_CHECKS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "int": ("a whole number of zero or more", _is_whole),
    "float": ("a finite number of zero or more", _is_number),
    "Mapping[str, int]": ("an object of whole numbers of zero or more", _maps_to(_is_whole)),
    "Mapping[str, float]": ("an object of finite numbers", _maps_to(_is_number)),
    "tuple[OpPlan, ...]": ("a list", lambda value: isinstance(value, list)),
    "tuple[Refusal, ...]": ("a list", lambda value: isinstance(value, list)),
}


def _check_types(where: str, record_type: type, record: Mapping[str, Any]) -> None:
    annotations = {f.name: str(f.type) for f in fields(record_type)}
    missing = sorted(annotations.keys() - record.keys())
    unknown = sorted(record.keys() - annotations.keys())
    if missing or unknown:
        raise PlanError(f"{where}: missing {few_of(missing)}; unknown {few_of(unknown)}")
    for name, annotation in annotations.items():
        wanted, check = _CHECKS[annotation]
        if not check(record[name]):
            raise PlanError(f"{where}: {name} is {record[name]!r:.60}; {wanted} is needed")


def _check_values(plan: Plan) -> None:
    if plan.splits.keys() != plan.sizes.keys():
        differing = sorted(plan.splits.keys() ^ plan.sizes.keys())
        raise PlanError(f"the plan has a split or a size but not both for {few_of(differing)}")
    for name, remote in plan.splits.items():
        if remote > plan.sizes[name]:
            raise PlanError(
                f"the plan makes {remote} bytes of {name} remote, which has {plan.sizes[name]}: "
                "lower its split to that or less"
            )
    if plan.remote_bytes < plan.asked_bytes:
        raise PlanError(
            f"the splits make {plan.remote_bytes} bytes remote, {plan.asked_bytes} are needed: "
            "make more of them remote, or lower asked_bytes, for which the GPU must have room"
        )
    for op in plan.ops:
        if op.tensor and op.tensor not in plan.sizes:
            raise PlanError(f"operator {op.op} reads {op.tensor!r}, which the plan does not hold")
        if op.strategy not in STRATEGIES:
            raise PlanError(
                f"operator {op.op}: strategy {op.strategy!r} is none of {', '.join(STRATEGIES)}"
            )
        if op.remote_share > 1:
            raise PlanError(f"operator {op.op}: a remote share of {op.remote_share} is above 1")
