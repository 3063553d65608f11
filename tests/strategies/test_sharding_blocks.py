"""Which blocks are found in a module."""

from __future__ import annotations

import pytest
from sharded_models import Block, Net
from torch import nn

from raytrainer.errors import ConfigurationError
from raytrainer.strategies.sharding_blocks import find_blocks, refuse_tied


class LikeTransformers(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def layers(*members):
    module = nn.Module()
    module.layers = nn.ModuleList(members)
    return module


def test_members_of_a_list_of_one_class():
    assert list(find_blocks(Net(), None)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_blocks(layers(Block(), nn.Dropout(), Block()), None)) == ["layers.0", "layers.2"]
    assert list(find_blocks(layers(Block(), nn.Linear(2, 2)), None)) == []
    assert list(find_blocks(layers(Block()), None)) == []


def test_lists_in_lists():
    nested = layers(nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()]))
    assert list(find_blocks(nested, None)) == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]
    assert list(find_blocks(layers(nn.ModuleDict({"a": Block()}), nn.ModuleDict({"a": Block()})), None)) == []


def test_a_sequential_of_modules_with_parts():
    assert list(find_blocks(nn.Sequential(Block(), Block()), None)) == ["0", "1"]
    assert list(find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None)) == []


def test_the_outer_of_blocks_in_blocks():
    assert list(find_blocks(layers(Experts(), Experts()), None)) == ["layers.0", "layers.1"]


def test_what_transformers_says():
    assert list(find_blocks(LikeTransformers(), None)) == ["first", "second"]


def test_embeddings_that_the_last_layer_shares_are_no_block():
    module = LikeTransformers()
    module.heads[0].weight = module.first.up.weight
    assert list(find_blocks(module, None)) == ["second"]
    refuse_tied(module, find_blocks(module, None))
    with pytest.raises(ConfigurationError, match=r"'first\.up\.weight' and 'heads\.0\.weight' are one parameter"):
        refuse_tied(module, find_blocks(module, ["Block"]))
    module = LikeTransformers()
    module.second.up.weight = module.first.up.weight  # each block would have to be gathered for the other
    with pytest.raises(ConfigurationError, match="in different blocks"):
        refuse_tied(module, find_blocks(module, None))


@pytest.mark.parametrize(
    "wanted, found",
    [
        ([Block], ["blocks.0", "blocks.1", "blocks.2"]),
        (["Block"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.*"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.1", "head"], ["head", "blocks.1"]),
        ([nn.LayerNorm], ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]),
        (["blocks.*.up", "blocks.0"], ["blocks.0", "blocks.1.up", "blocks.2.up"]),
    ],
)
def test_named(wanted, found):
    assert list(find_blocks(Net(), wanted)) == found


@pytest.mark.parametrize(
    "wanted, message",
    [
        (["Blok"], "no 'Blok' in Net; its parts are of Block, LayerNorm, Linear"),
        ([nn.Conv2d], "no 'Conv2d' in Net"),
        (["blocks"], 'ModuleList, which is never called; name what is in it: "blocks\\.\\*"'),
    ],
)
def test_named_in_vain(wanted, message):
    with pytest.raises(ConfigurationError, match=message):
        find_blocks(Net(), wanted)


def test_tied():
    net = Net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    with pytest.raises(ConfigurationError, match=r"'blocks\.0\.up\.weight' and .* are one parameter"):
        refuse_tied(net, find_blocks(net, None))
    refuse_tied(net, find_blocks(net, ["blocks.2"]))
    net = Net()
    net.blocks[0].norm.bias = net.head.weight
    with pytest.raises(ConfigurationError, match="in different blocks"):
        refuse_tied(net, find_blocks(net, None))
    net = Net()
    net.blocks = nn.ModuleList([net.blocks[0], net.blocks[1], net.blocks[0]])
    refuse_tied(net, find_blocks(net, None))  # a block in two places is one block
