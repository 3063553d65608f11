"""Weights from files of Hugging Face's format into shards, and back out of a checkpoint; the example that does both."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from sharded_models import Net, loader, same_bits, weights

import raytrainer as rt

safetensors = pytest.importorskip("safetensors.torch")


class Still(Net):
    """Trains nothing."""

    def reset_parameters(self):
        self.scale.fill_(1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class SplitStill(Still):
    def configure_model(self):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.device_mesh is not None:
            for block in self.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)


def there(name):
    return name if name.startswith("head") else f"model.{name}"


@pytest.fixture
def files(tmp_path):
    """A module whose weights are in two files of a folder, under other names."""
    torch.manual_seed(3)
    module = Still()
    state = {there(name): value for name, value in weights(module).items() if name != "scale"}
    names = sorted(state)
    (tmp_path / "files").mkdir()
    for number, part in enumerate((names[:7], names[7:])):
        safetensors.save_file({name: state[name] for name in part}, tmp_path / "files" / f"{number}.safetensors")
    return module, tmp_path / "files"


def fitted(forked, folder, module, **options):
    saver = rt.ModelCheckpoint(folder, save_last=True)
    trainer = forked(max_epochs=1, enable_checkpointing=True, callbacks=[saver], **options)
    trainer.fit(module, loader(16, 4, torch.float32), ckpt_path=options.pop("ckpt_path", None))
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    "make, options",
    [
        (Still, {}),
        (Still, {"num_processes": 4, "strategy": rt.FSDP(replicate=2)}),
        (SplitStill, {"num_processes": 4, "strategy": rt.ModelParallel(tensor=2, data=2)}),
    ],
    ids=["fsdp", "hsdp", "split"],
)
def test_begins_with_files(make, options, files, forked, tmp_path):
    module, folder = files
    path = fitted(forked, tmp_path / "run", rt.on_meta(make, weights=folder, names=there), **options)
    assert same_bits(module, Still.load_from_checkpoint(path))


def test_a_worker_reads_what_it_holds(files, forked, tmp_path, monkeypatch):
    from raytrainer.checkpointing.safetensors_files import SafetensorsFiles

    module, folder = files
    found = SafetensorsFiles(folder)
    name, whole = "model.blocks.0.up.weight", module.blocks[0].up.weight
    assert torch.equal(found.read(name, (3, 1), (4, 2)), whole[3:7, 1:3])
    assert torch.equal(found.read(name), whole) and found.read(name, (10, 0), (0, 5)).shape == (0, 5)
    read = []
    monkeypatch.setattr(
        "raytrainer.checkpointing.safetensors_files._fill", lambda file, data, shown: read.append(len(data))
    )
    found.read(name, (3, 0), (2, 5))
    assert read == [2 * 5 * 4]


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", r"lacks parameters of Still: 'head\.bias' \(there 'head\.bias'\); it has"),
        ("shape", r"shapes do not fit Still: 'head\.bias': \(2,\) there, \(1,\) here"),
        ("truncated", r"0\.safetensors: the file ends before"),
        ("none", r"there is no safetensors file"),
    ],
)
def test_files_that_do_not_fit(damage, message, files, forked):
    _, folder = files
    file = folder / "0.safetensors"
    state = safetensors.load_file(file)
    if damage == "missing":
        del state["head.bias"]
    if damage == "shape":
        state["head.bias"] = torch.zeros(2)
    if damage in ("missing", "shape"):
        safetensors.save_file(state, file)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        for each in folder.iterdir():
            each.unlink()
    with pytest.raises(rt.CheckpointError, match=message):
        forked(max_epochs=1).fit(rt.on_meta(Still, weights=folder, names=there), loader(16, 4, torch.float32))


@pytest.mark.parametrize("said", ["by names", "by strict"])
def test_what_files_lack_begins_as_without(said, files, forked, tmp_path):
    module, folder = files
    state = safetensors.load_file(folder / "0.safetensors")
    del state["head.bias"]
    safetensors.save_file(state, folder / "0.safetensors")
    options = {"names": there, "strict": False}
    if said == "by names":
        options = {"names": lambda name: None if name == "head.bias" else there(name)}
    path = fitted(forked, tmp_path / "run", rt.on_meta(Still, weights=folder, **options))
    found = Still.load_from_checkpoint(path)
    assert torch.equal(found.head.weight, module.head.weight) and found.head.bias.isfinite().all()
    # a checkpoint takes the files' place, which need not be there any more
    for each in folder.iterdir():
        each.unlink()
    forked(max_epochs=2).fit(
        rt.on_meta(Still, weights=folder, names=there), loader(16, 4, torch.float32), ckpt_path=path
    )


@pytest.mark.parametrize("size", ["5GB", 300])
def test_export(size, files, forked, tmp_path):
    module, folder = files
    options = {"num_processes": 4, "strategy": rt.ModelParallel(tensor=2, data=2)}
    path = fitted(forked, tmp_path / "run", rt.on_meta(SplitStill, weights=folder, names=there), **options)
    out = tmp_path / "out"
    for _ in range(2):  # over an earlier one
        rt.export_weights(path, out, names=lambda name: None if name == "scale" else there(name), max_file_size=size)
    written = sorted(file.name for file in out.iterdir())
    state = {}
    for file in out.glob("*.safetensors"):
        state |= safetensors.load_file(file)
    assert {there(name) for name in weights(module)} - {"model.scale"} == set(state)
    assert all(torch.equal(state[there(n)], v) for n, v in weights(module).items() if n != "scale")
    if size == 300:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(written) - {"model.safetensors.index.json"}
        assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in state.values())
        again = rt.on_meta(Still, weights=out, names=there)
        assert same_bits(module, Still.load_from_checkpoint(fitted(forked, tmp_path / "again", again)))
    else:
        assert written == ["model.safetensors"]


def test_a_module_on_meta_has_nothing_to_export(tmp_path):
    with pytest.raises(rt.CheckpointError, match=r"on the meta device .* raytrainer\.export_weights"):
        rt.on_meta(Still).export_weights(tmp_path / "weights.pt")


def test_export_of_a_whole_checkpoint_in_another_type(forked, tmp_path):
    module = Still()
    path = fitted(forked, tmp_path / "run", module, strategy="local")
    rt.export_weights(path, tmp_path / "out", dtype=torch.bfloat16)
    state = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["inp.weight"], module.inp.weight.bfloat16())
    with pytest.raises(rt.CheckpointError, match="to another tensor"):
        rt.export_weights(path, tmp_path / "out", names=lambda name: "one")
    with pytest.raises(rt.CheckpointError, match="max_file_size='5 elephants'"):
        rt.export_weights(path, tmp_path / "out", max_file_size="5 elephants")


@pytest.mark.sample(0)
def test_the_example(forked, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("llama", Path(__file__).parents[2] / "examples" / "llama.py")
    llama = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "llama", llama)
    spec.loader.exec_module(llama)
    cloudpickle.register_pickle_by_value(llama)
    monkeypatch.setattr(llama.rt, "Trainer", lambda **options: forked(enable_checkpointing=True, **options))
    few = ["--max-steps", "30", "--megabytes", "0.05", "--sample", "8", "--length", "32"]
    first = llama.main([*few, "--root", str(tmp_path / "one")])
    assert 2.0 < first < 6.0 and "bits per byte" in capsys.readouterr().out  # a uniform guess costs 8
    exported = tmp_path / "one" / "exported"
    assert "model.layers.0.self_attn.q_proj.weight" in safetensors.load_file(exported / "model.safetensors")
    again = ["--weights", str(exported), "--tensor", "2", "--num-processes", "4", "--lr", "0"]
    same = llama.main([*few, *again, "--root", str(tmp_path / "two")])
    assert same == pytest.approx(first, rel=1e-3)
