"""A model of transformers: sharded as the guide says, from its files to its files, and with adapters."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_models import assert_equal, same_bits
from torch.utils.data import DataLoader, Dataset

import raytrainer as rt

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


class Text(Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))}


def text(batch_size):
    return DataLoader(Text(), batch_size=batch_size)


def llama(**options):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **options))


def guides_example():
    page = Path(__file__).parents[2] / "examples" / "guide" / "sharded-models.md"
    return next(code.split("```")[0] for code in page.read_text().split("```python\n") if "AutoConfig" in code)


def of_the_guide(model):
    found: dict[str, Any] = {"rt": rt, "torch": torch}
    exec(guides_example().split("def theirs")[0], found)
    return found["LanguageModel"](model)


@pytest.mark.parametrize("tied", [False, True])
def test_the_guides_example(tied, forked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rt, "Trainer", lambda **options: forked(seed=1, enable_checkpointing=True, **options))
    start = llama(tie_word_embeddings=tied)
    start.save_pretrained("path/to/model", max_shard_size="20KB")
    assert len(list(Path("path/to/model").glob("*.safetensors"))) > 1
    exec(compile(guides_example(), "sharded-models.md", "exec"), {"rt": rt, "torch": torch, "text": text(4)})
    trained = of_the_guide(copy.deepcopy(start))  # the same, with a module that is real here
    forked(seed=1, max_epochs=1).fit(trained, text(4))
    back = transformers.AutoModelForCausalLM.from_pretrained("tuned")
    assert_equal(trained.model, back, atol=1e-6)
    assert not same_bits(start, back)


def test_the_guides_adapters(forked, tmp_path, monkeypatch):
    """On meta, with the model's files as they are, and back into files that PEFT reads."""
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rt, "Trainer", lambda **options: forked(seed=1, enable_checkpointing=True, **options))
    start = llama()
    start.save_pretrained("path/to/model", max_shard_size="20KB")
    page = (Path(__file__).parents[2] / "examples" / "guide" / "sharded-models.md").read_text()
    code = next(code.split("```")[0] for code in page.split("```python\n") if "import peft" in code)
    names = {"os": os, "rt": rt, "torch": torch, "text": text(4), "LanguageModel": of_the_guide(start).__class__}
    names |= {"config": start.config, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(compile(code, "sharded-models.md", "exec"), names)
    base = transformers.AutoModelForCausalLM.from_pretrained("path/to/model")
    back = peft.PeftModel.from_pretrained(base, "adapters")
    rt.export_weights("adapted/last.ckpt", "all")
    state = safetensors.load_file("all/model.safetensors")
    for name, value in back.state_dict().items():
        assert torch.equal(state[f"model.{name}"], value)
        if name.endswith("base_layer.weight"):
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, start.state_dict()[own])
    assert any(value.any() for name, value in state.items() if "lora_B" in name)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters(options, forked):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    alone = of_the_guide(peft.get_peft_model(llama(), adapters))
    shared = copy.deepcopy(alone)
    before = {name: value.double() for name, value in alone.state_dict().items()}
    forked(strategy="local", precision=64, max_epochs=1).fit(alone, text(8))
    forked(precision=64, max_epochs=1).fit(shared, text(4))
    assert_equal(alone, shared)
    moved = [name for name, value in shared.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)


def recorder():
    return pytest.importorskip("transformers.utils.output_capturing")._CAN_RECORD_REGISTRY


class UsesWhatIsRecorded(rt.Module):
    """In a process in which no model has been made, as workers' are."""

    def __init__(self):
        super().__init__()
        self.model = llama()

    def setup(self, stage):
        recorder().clear()

    def training_step(self, batch, batch_idx):
        found = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"], output_hidden_states=True)
        assert len(found.hidden_states) == 4
        return found.loss + found.hidden_states[1].square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_what_a_model_records(strategy, forked):
    """Hidden states, router logits and the like."""
    recorder()
    alone = UsesWhatIsRecorded()
    shared = copy.deepcopy(alone)
    forked(strategy="local", precision=64, max_epochs=1).fit(alone, text(8))
    forked(strategy=strategy, num_processes=2, precision=64, max_epochs=1).fit(shared, text(4))
    assert_equal(alone, shared)


def test_a_model_that_has_recorded_is_sent():
    from raytrainer.worker.actor.module_pickling import dumps

    recorder()
    model, tokens = llama(), torch.ones(1, 4, dtype=torch.long)
    expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    found = pickle.loads(dumps(model))(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(found) == 4 and all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
