"""The backend of torch.compile: operators -> costs -> plan -> placement -> rewrite -> Inductor."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from dak_inductor import options as option_parser
from dak_inductor.attention_masks import mend_masks
from dak_inductor.compiled_graph import CompiledGraph
from dak_inductor.cuda_runtime import address_table
from dak_inductor.epilogues import fuse_epilogues
from dak_inductor.errors import DakError, TieredTensorError
from dak_inductor.kv_cache_steps import CacheStep, take_steps
from dak_inductor.normalise import normalise
from dak_inductor.op_table import OpTable, build_op_table, with_local_ops
from dak_inductor.options import BackendOptions
from dak_inductor.refusal import Refusal
from dak_inductor.resident_copies import has_memory
from dak_inductor.rewrite import rewrite
from dak_inductor.session import SESSION
from dak_inductor.templates import with_templates
from dak_inductor.torch_versions import warn_of_newer_torch
from dak_inductor.untraced_graph import untraced_table
from dak_inductor.written_inputs import written_inputs

log = logging.getLogger(__name__)

Executor = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def dak(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph whose weights may live partly in a remote tier.

    Args:
        mode: a mode of Inductor, as in `torch.compile`.
        options: `strategy`, `window`, `strict`, `plan`, `trials`, `nvtx`, `mode`; all other keys
            are Inductor's.

    Raises, when what is returned is called (Dynamo wraps what a backend raises):
        OptionError: an option that does not exist.
        NothingOffloadedError, ResidentCopyError: under `strict`.
    """
    warn_of_newer_torch()
    try:
        parsed = option_parser.parse(mode, options)
        executor = _inductor(parsed.inductor)
        return compile_graph(graph_module, example_inputs, parsed.backend, executor)
    except DakError as error:
        return _raiser(error)


def _raiser(error: DakError) -> Callable[..., Any]:
    """Raises `error` when called: Dynamo wraps what a backend raises, not what its code raises.

    A fresh one each time, and no traceback is kept: its frames hold the model's weights.
    """
    kept = copy.copy(error)

    def raise_error(*_: Any) -> Any:
        raise copy.copy(kept)

    return raise_error


def compile_graph(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    settings: BackendOptions,
    executor: Executor,
) -> Callable[..., Any]:
    """The pipeline. `executor` compiles the rewritten graph: Inductor, or a plain interpreter in
    tests."""
    if _wants_grad(example_inputs):
        return executor(graph_module, example_inputs)
    if torch.compiler.is_exporting():
        raise TieredTensorError(
            "the dak backend cannot be exported: a plan belongs to this process's memory. "
            "Export the model after dak.restore(model)."
        )
    graph, table, steps = _read_operators(graph_module, example_inputs)
    written = written_inputs(graph)
    if table.ops and graph is not graph_module:
        graph = rewrite(graph, table)
        table = with_templates(graph, fuse_epilogues(graph, table))
        table = with_local_ops(graph, table)
    compiled = CompiledGraph(table, settings, SESSION, steps, written)
    compiled.log_placement(example_inputs)
    compiled.run = executor(graph, example_inputs)
    return compiled


def _read_operators(
    graph_module: GraphModule, example_inputs: Sequence[Any]
) -> tuple[GraphModule, OpTable, tuple[CacheStep, ...]]:
    whole = {
        index
        for index, value in enumerate(example_inputs)
        if has_memory(value) and address_table.lookup(value.data_ptr()) is None
    }
    graph = normalise(graph_module, whole=whole)
    if isinstance(graph, Refusal):
        log.warning("graph left as it is, its stock kernels read tiered weights: %s", graph.reason)
        return graph_module, untraced_table(graph_module, graph), ()
    mend_masks(graph)
    steps = take_steps(graph)
    return graph, build_op_table(graph), steps


def _wants_grad(example_inputs: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs):
        return False
    warnings.warn(
        "an input requires grad, so this graph goes to Inductor untouched: the dak backend "
        "serves inference (dak.offload freezes parameters; use torch.no_grad() otherwise)",
        stacklevel=3,
    )
    return True


def _inductor(patches: Mapping[str, Any]) -> Executor:
    def executor(graph: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        from dak_inductor.lowering import inductor
        from dak_inductor.lowering.early_start import early_start

        inductor.register()
        # Padding a weight would read all of it to write a copy, and the benchmark that decides on
        # padding takes HBM for a full-size copy of each weight.
        chosen = {"shape_padding": False, **patches}
        config: Any = torch.compiler.config
        with (
            config.patch(cache_key_tag=f"{config.cache_key_tag}{cache_key()}"),
            early_start(patches, example_inputs, written_inputs(graph)) as early,
        ):
            compiled: Any = compile_fx(graph, example_inputs, config_patches={**chosen, **early})
        return compiled

    return executor


def cache_key() -> str:
    """What decides the lowerings and is not part of Inductor's own cache key: this package's
    sources, and what the registry asks of the installation."""
    from dak_inductor.lowering.op_facts import extension_importable, triton_importable

    has = f"extension={extension_importable()},triton={triton_importable()}"
    return f"dak:{source_hash()},{has};"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash of this package's sources."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in (root, root / "lowering", root / "cuda_runtime"):
        for path in sorted(folder.glob("**/*")):
            if path.suffix in {".py", ".cu", ".cuh"} and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
