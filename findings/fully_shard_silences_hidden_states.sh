#!/usr/bin/env bash
# torch 2.13.0 (FSDP2) with transformers 5.24.0: a body that is a unit of its own gives no hidden states any more.
#
# Guess: `fully_shard` changes where parameters are, not what a model returns; whatever a user shards, the layers, the
# body `model.model` or all of it, `output_hidden_states=True` gives the same tuple.
# Seen: with the layers and the root sharded it does. With `fully_shard(model.model)` the same call has the same loss,
# and `hidden_states` and `attentions` are None, without a word: transformers keeps what a model can record in a table by
# `str(model.__class__)`, filled in `__init__`, and `fully_shard` gives the module another class. Losses that are made of
# what is recorded go with it: a mixture of experts with `output_router_logits=True` raises an AttributeError of 'int'.
# A model that was unpickled in a process where none of its class was made records nothing either.
#
# Run: findings/fully_shard_silences_hidden_states.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
tokens = torch.arange(8)[None]


def seen(*units):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, attn_implementation="eager")
    )
    for unit in units:
        for part in unit(model):
            fully_shard(part, mesh=mesh)
    out = model(tokens, labels=tokens, output_hidden_states=True, output_attentions=True)
    recorded = [None if each is None else len(each) for each in (out.hidden_states, out.attentions)]
    return *recorded, round(float(out.loss), 5)


plain = seen()
usual = seen(lambda model: model.model.layers, lambda model: [model])
body = seen(lambda model: model.model.layers, lambda model: [model.model])
print(f"hidden states, attentions, loss: {plain}; layers and root sharded: {usual}; layers and body: {body}")
assert plain[:2] == (3, 2) and usual == plain
assert body == (None, None, plain[2])
dist.destroy_process_group()
PYTHON
