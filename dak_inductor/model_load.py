"""One model on its way from meta into the tiers, parameter by parameter."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import nn

from dak_inductor.budget import DeviceBudget
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.errors import CheckpointError
from dak_inductor.first_plan import make_first_plan
from dak_inductor.inventory import Entry, Inventory, take_inventory
from dak_inductor.make_room import make_room
from dak_inductor.model_checks import check_modules
from dak_inductor.offload import enter_record
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded_model import OffloadedModel, OffloadedWeight
from dak_inductor.parts import like_parameter, part_of, parts_on
from dak_inductor.plan import TensorSpec
from dak_inductor.quantity_text import count_text
from dak_inductor.tensor_names import few_of
from dak_inductor.transfer import Transfer


class ModelLoad:
    """Plans from the model on meta; then takes each parameter as it arrives.

    Raises what planning raises, and HostMemoryError where the remote part would not fit.
    """

    def __init__(
        self, root: nn.Module, request: OffloadRequest, tier: Tier, budget: DeviceBudget
    ) -> None:
        self._request = request
        self._tier = tier
        self._budget = budget
        self._transfer = Transfer(tier, budget.device)
        self._inventory = take_inventory(root, minimum_bytes=request.minimum_bytes(tier))
        # transformers ties after loading, and says beforehand what: {target name: source name}.
        _merge_ties(self._inventory, getattr(root, "all_tied_weights_keys", None) or {})
        make_room(self._inventory, request, budget)
        self._first = make_first_plan(root, self._inventory, request, tier, budget)
        tier.reserve(self._first.held.remote)
        budget.claims[self] = self._first.held.local + self._inventory.resident_bytes
        self._required_grad = {
            name: member.requires_grad
            for entry in self._inventory
            for member in entry.members
            for name in member.names
        }
        self._entry_at: dict[tuple[int, str], Entry] = {
            (id(place.module), place.attribute): entry
            for entry in self._inventory.entries
            if len(entry.members) == 1
            for place in entry.members[0].occurrences
        }
        self._arrived: dict[str, tuple[OffloadedWeight, weakref.ref[nn.Parameter]]] = {}
        self._replaced: list[tuple[weakref.ref[nn.Module], str, nn.Parameter]] = []

    def arrive(self, module: nn.Module, name: str, value: nn.Parameter) -> nn.Parameter | None:
        """The parameter to register instead of `value`; None leaves it for `finish`."""
        if address_table.lookup(value.data_ptr()) is not None:
            self._note(module, name)
            return None  # tied to one that has arrived
        entry = self._entry_at.get((id(module), name))
        before = module._parameters.get(name)
        if entry is None or before is None or not _is_plain(value, before):
            return None
        known = self._arrived.get(entry.name)
        parameter = known[1]() if known is not None else None
        if parameter is None:
            weight = self._transfer.adopt(
                entry, self._first.specs[entry.name], self._first.remote_bytes(entry.name), value
            )
            parameter = like_parameter(value, part_of(weight.buffer, weight.parts[0]))
            self._arrived[entry.name] = weight, weakref.ref(parameter)
        elif parameter is not value and not torch.equal(parameter.data.cpu(), value.data.cpu()):
            return None  # tied in the config, two different tensors in the checkpoint
        self._note(module, name)
        return parameter

    def is_complete(self, root: nn.Module) -> bool:
        """True once nothing of the model is on meta any more."""
        return all(t.device.type != "meta" for t in [*root.parameters(), *root.buffers()])

    def finish(self, root: nn.Module) -> OffloadedModel:
        """Move what is left (buffers, small tensors, late ones) and enter the record."""
        check_modules(root)
        inventory = take_inventory(root, minimum_bytes=self._request.minimum_bytes(self._tier))
        left = [name for entry in inventory if entry.device.type == "meta" for name in entry.names]
        if left:
            raise CheckpointError(
                f"{inventory.label} has {count_text(len(left), 'tensor')} still on meta after "
                f"loading: {few_of(left)}. The checkpoint lacks them, or the load was not complete."
            )
        before = self._transfer.freeze(inventory) | self._required_grad
        self._budget.claims.pop(self, None)
        held = [self._held(entry) for entry in inventory.entries]
        if not any(held):  # every tensor came in another form than announced: quantised on the way
            self._first = make_first_plan(root, inventory, self._request, self._tier, self._budget)
        weights = [
            weight or self._late(entry)
            for weight, entry in zip(held, inventory.entries, strict=True)
        ]
        for entry in inventory.resident:
            self._transfer.keep_whole(entry)
        for wrapper in inventory.wrappers:
            self._transfer.rewrap(wrapper)
        return enter_record(
            root,
            inventory,
            self._first,
            self._request,
            self._tier,
            weights,
            before,
            self._budget,
        )

    def undo(self) -> None:
        """The meta parameters come back; what had moved at the end goes back where it was."""
        self._budget.claims.pop(self, None)
        self._transfer.undo()
        while self._replaced:
            reference, name, parameter = self._replaced.pop()
            module = reference()
            if module is not None:
                module._parameters[name] = parameter
        self._arrived.clear()

    def _note(self, module: nn.Module, name: str) -> None:
        """Remember the meta parameter that is about to be replaced."""
        before = module._parameters.get(name)
        if before is not None:
            self._replaced.append((weakref.ref(module), name, before))

    def _held(self, entry: Entry) -> OffloadedWeight | None:
        """The weight of an entry that lies in a buffer already."""
        buffer = address_table.lookup(entry.members[0].tensor.data_ptr())
        if buffer is None:
            return None
        return OffloadedWeight(
            entry.names, buffer, self._spec(entry), parts_on(entry, buffer.address)
        )

    def _late(self, entry: Entry) -> OffloadedWeight:
        """An entry that is still an ordinary tensor; one that was not planned goes all remote."""
        spec = self._spec(entry)
        remote = self._first.plan.splits.get(spec.name, spec.nbytes)
        buffer = self._transfer.tier.allocate(entry.nbytes, split=entry.nbytes - remote)
        return self._transfer.divide(entry, spec, buffer)

    def _spec(self, entry: Entry) -> TensorSpec:
        spec = self._first.specs.get(entry.name)
        if spec is not None and spec.nbytes == entry.nbytes:
            return spec
        return TensorSpec(entry.name, entry.nbytes)


def _merge_ties(inventory: Inventory, ties: Mapping[str, str]) -> None:
    """Make one entry of two that will be tied, so that the bytes are planned once."""
    by_name = {name: entry for entry in inventory.entries for name in entry.names}
    for target_name, source_name in ties.items():
        target, source = by_name.get(target_name), by_name.get(source_name)
        if target is None or source is None or target is source:
            continue
        if len(target.members) > 1 or len(source.members) > 1:
            continue
        (one,), (two,) = source.members, target.members
        if one.tensor.shape != two.tensor.shape or one.tensor.dtype != two.tensor.dtype:
            continue
        one.names += two.names
        one.occurrences += two.occurrences
        one.readers += two.readers
        inventory.entries.remove(target)
        by_name.update(dict.fromkeys(two.names, source))


def _is_plain(value: nn.Parameter, before: nn.Parameter) -> bool:
    """True if `value` is the dense tensor that `before` announced."""
    return (
        type(value) is nn.Parameter
        and type(value.data) is torch.Tensor
        and value.layout == torch.strided
        and value.shape == before.shape
        and value.dtype == before.dtype
    )
