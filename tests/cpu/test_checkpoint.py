"""Models on meta filled from safetensors: files, folders, indices, and what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dak_inductor.checkpoint import Checkpoint
from dak_inductor.errors import CheckpointError
from dak_inductor.offload import offload
from dak_inductor.offloaded import record_of


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64, bias=False)
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.scale


def empty_network():
    with torch.device("meta"):
        return Network()


def filled(model, checkpoint, **arguments):
    return offload(model, remote="simulated", offload_ratio=0.5, checkpoint=checkpoint, **arguments)


@pytest.fixture
def source():
    return Network()


def in_one_file(source, folder):
    save_file(source.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def in_a_folder(source, folder):
    state = source.state_dict()
    save_file({"first.weight": state.pop("first.weight")}, folder / "a.safetensors")
    save_file(state, folder / "b.safetensors")
    return folder


def in_shards(source, folder):
    in_a_folder(source, folder)
    files = dict.fromkeys(source.state_dict(), "b.safetensors")
    files["first.weight"] = "a.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index


@pytest.mark.parametrize("save", [in_one_file, in_a_folder, in_shards])
def test_meta_models_are_filled(source, tmp_path, save):
    path, model, x = save(source, tmp_path), empty_network(), torch.randn(3, 64)
    filled(model, path)
    record = record_of(model)
    assert record.bytes_by_tier().remote == 32_768 and record.bytes_by_tier().local == 32_768
    assert torch.equal(model(x), source(x))
    assert not any(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()])


def test_dtypes_are_converted_to_the_models(source, tmp_path, monkeypatch):
    monkeypatch.setattr("dak_inductor.checkpoint._PIECE_BYTES", 1000)
    path, model = in_one_file(source, tmp_path), empty_network().to(torch.bfloat16)
    filled(model, path)
    assert torch.equal(model.first.weight, source.first.weight.bfloat16())


def test_ties_are_kept_and_either_name_will_do(tmp_path):
    def tied():
        model = nn.Module()
        model.embedding, model.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
        model.head.weight = model.embedding.weight
        return model

    weight = torch.randn(100, 64)
    save_file({"head.weight": weight}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = tied()
    filled(model, tmp_path)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, weight)
    assert len(record_of(model).weights) == 1


def test_subclasses_of_parameter_keep_class_and_attributes(tmp_path):
    class Marked(nn.Parameter):
        pass

    model = nn.Linear(64, 64, bias=False, device="meta")
    model.weight = Marked(model.weight)
    model.weight.mark = "kept"
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    filled(model, tmp_path)
    assert type(model.weight) is Marked and model.weight.mark == "kept"


def unchanged(model):
    return record_of(model) is None and all(
        p.device.type == "meta" and p.requires_grad for p in model.parameters()
    )


def test_a_missing_tensor_is_named(source, tmp_path):
    state = source.state_dict()
    del state["second.weight"]
    save_file(state, tmp_path / "m.safetensors")
    model = empty_network()
    with pytest.raises(CheckpointError, match=r"misses 1 tensor of .*second\.weight"):
        filled(model, tmp_path)
    assert unchanged(model)


def test_a_name_that_the_model_has_is_no_hint(source, tmp_path):
    state = {k: v for k, v in source.state_dict().items() if k != "second.weight"}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"second\.weight") as caught:
        filled(empty_network(), tmp_path)
    assert "where the model has" not in str(caught.value)


def test_another_prefix_is_hinted_at(source, tmp_path):
    save_file({f"model.{k}": v for k, v in source.state_dict().items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.first\.weight' where the model has"):
        filled(empty_network(), tmp_path)


def test_another_shape_is_named_with_both(source, tmp_path):
    state = source.state_dict() | {"first.weight": torch.zeros(128, 32)}
    save_file(state, tmp_path / "m.safetensors")
    model = empty_network()
    with pytest.raises(CheckpointError, match=r"first\.weight.*\(128, 64\).*\(128, 32\)"):
        filled(model, tmp_path)
    assert unchanged(model)


def test_integers_do_not_become_floats(source, tmp_path):
    state = source.state_dict() | {"first.bias": torch.zeros(128, dtype=torch.int32)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"first\.bias.*float32.*int32"):
        filled(empty_network(), tmp_path)


def test_truncated_files(source, tmp_path):
    path = in_one_file(source, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    model = empty_network()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read"):
        filled(model, path)
    assert unchanged(model)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."]
)
def test_an_index_cannot_leave_its_folder(source, tmp_path, file):
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file(source.state_dict(), tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"first.weight": file}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"weight_map": 3}'])
def test_damaged_indices(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not an index"):
        Checkpoint(tmp_path)


def test_shards_and_index_that_disagree(source, tmp_path):
    index = in_shards(source, tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
        Checkpoint(index)
    save_file({"other": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"places first\.weight in a\.safetensors"):
        Checkpoint(index)


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        Checkpoint(tmp_path / "model.bin")


def test_reading_copies_nothing(source, tmp_path):
    checkpoint = Checkpoint(in_one_file(source, tmp_path))
    first, again = checkpoint.read("first.weight"), checkpoint.read("first.weight")
    assert first.data_ptr() == again.data_ptr()
    checkpoint.close()


def test_strides_of_meta_tensors_are_kept(tmp_path):
    weight = torch.randn(64, 96)
    save_file({"turned": weight, "row": torch.ones(3)}, tmp_path / "m.safetensors")
    model = nn.Module()
    model.turned = nn.Parameter(torch.empty(96, 64, device="meta").t())
    model.row = nn.Parameter(torch.empty(3, device="meta"))
    filled(model, tmp_path)
    assert model.turned.stride() == (1, 64) and torch.equal(model.turned, weight)
