"""Which parts of a module are sharded as one: its blocks, found or named, and what cannot be sharded apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from raytrainer.errors import ConfigurationError

__all__ = ["find_blocks", "refuse_tied"]


def find_blocks(module: nn.Module, wanted: Sequence[str | type] | None) -> dict[str, nn.Module]:
    """The blocks of a module, by name: what is gathered together. None lies within another.

    Args:
        module: The whole.
        wanted: Classes, names of classes, or patterns of names of modules; None: find them.

    Raises:
        ConfigurationError: Something wanted is not there.
    """
    candidates = (
        _matching(module, wanted) if wanted is not None else _named_by_transformers(module) or _repeated(module)
    )
    outermost: dict[str, nn.Module] = {}
    for name, part in candidates.items():
        inside = any(name.startswith(f"{other}.") for other in outermost)
        if not inside and any(True for _ in part.parameters()):
            outermost[name] = part
    return outermost


def _matching(module: nn.Module, wanted: Sequence[str | type]) -> dict[str, nn.Module]:
    named = {name: part for name, part in module.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for what in wanted:
        matches = {name for name, part in named.items() if _is(part, name, what)}
        if not matches:
            classes = sorted({type(part).__name__ for part in named.values()})
            shown = what if isinstance(what, str) else what.__name__
            raise ConfigurationError(
                f"FSDP: blocks: there is no {shown!r} in {type(module).__name__}; its parts are of "
                f"{', '.join(classes)}."
            )
        for name in matches:
            if isinstance(named[name], (nn.ModuleList, nn.ModuleDict)):
                raise ConfigurationError(
                    f"FSDP: blocks: {name!r} is a {type(named[name]).__name__}, which is never called; name what is in "
                    f'it: "{name}.*".'
                )
        found |= {name: part for name, part in named.items() if name in matches}
    return {name: part for name, part in named.items() if name in found}


def _is(part: nn.Module, name: str, what: str | type) -> bool:
    if isinstance(what, str):
        return type(part).__name__ == what or (fnmatchcase(name, what) and name.count(".") == what.count("."))
    return isinstance(part, what)


def _named_by_transformers(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks that models of transformers say must not be split, but for embeddings that the last layer shares."""
    classes: set[str] = set()
    for part in module.modules():
        classes |= set(getattr(part, "_no_split_modules", None) or ())
    found = {name: part for name, part in module.named_modules() if name and type(part).__name__ in classes}
    shared: set[str] = set()
    for tied in _tied(module, found):
        within = {block for block, _ in tied}
        shared |= within if "" in within else set()
    return {name: part for name, part in found.items() if name not in shared}


def _repeated(module: nn.Module) -> dict[str, nn.Module]:
    """Members of containers whose members with parameters are of one class."""
    found: dict[str, nn.Module] = {}
    for name, container in module.named_modules():
        if type(container) not in (nn.ModuleList, nn.Sequential):
            continue
        members = {n: part for n, part in container.named_children() if any(True for _ in part.parameters())}
        composed = all(any(True for _ in part.children()) for part in members.values())
        of_one_class = len({type(part) for part in members.values()}) == 1
        never_called = any(isinstance(part, (nn.ModuleList, nn.ModuleDict)) for part in members.values())
        if len(members) > 1 and of_one_class and not never_called and (type(container) is nn.ModuleList or composed):
            found |= {f"{name}.{n}" if name else n: part for n, part in members.items()}
    return {name: part for name, part in module.named_modules() if name in found}


def refuse_tied(module: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Refuse parameters that two blocks share, or a block and the rest: each would train a copy of its own.

    Raises:
        ConfigurationError: Names them.
    """
    for tied in _tied(module, blocks):
        shown = " and ".join(repr(name) for _, name in tied)
        raise ConfigurationError(
            f"FSDP: {shown} are one parameter, but in different blocks, which are gathered apart. Name blocks so "
            f"that none of them, or one that has both, is a block: FSDP(blocks=[...]); what is in no block is "
            f"gathered together. Now there are: {', '.join(blocks)}."
        )


def _tied(module: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[list[tuple[str, str]]]:
    """Parameters that two blocks share, or a block and the rest: for each its blocks ("": none) and names."""
    parts = dict(module.named_modules(remove_duplicate=False))
    names = {id(block): name for name, block in blocks.items()}  # one block may have several places, as it is

    def block_of(path: str) -> str:
        steps = path.split(".")
        above = [".".join(steps[: index + 1]) for index in range(len(steps))]
        return next((names[id(parts[name])] for name in above if id(parts[name]) in names), "")

    places: dict[int, list[tuple[str, str]]] = {}
    for path, part in parts.items():
        for attribute, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{attribute}" if path else attribute
            places.setdefault(id(parameter), []).append((block_of(path), full))
    yield from (tied for tied in places.values() if len({block for block, _ in tied}) > 1)
