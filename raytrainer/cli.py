"""The command line: `python -m raytrainer fit --config run.yaml --trainer.max_epochs=3`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from raytrainer.config import find
from raytrainer.datamodule import DataModule
from raytrainer.errors import ConfigurationError
from raytrainer.extras import not_installed
from raytrainer.module import Module
from raytrainer.plan.argument_names import unknown_argument
from raytrainer.plan.nearest_names import nearest
from raytrainer.seeding import seed_everything
from raytrainer.trainer import Trainer

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

_VERBS = {
    "fit": "Train a model.",
    "validate": "Run one validation epoch and print its metrics.",
    "test": "Run one test epoch and print its metrics.",
    "predict": "Predict every batch.",
}
#: With what an option may begin; what follows a dot is checked by jsonargparse.
_ROOTS = ("config", "model", "data", "trainer", "ckpt_path", "seed_everything", "output", "print_config", "help")
_TITLES = {
    "model": "the model: a Module (its own options: --model.help=my_project.Classifier)",
    "data": "the data: a DataModule (its own options: --data.help=my_project.Digits)",
    "trainer": "the Trainer",
}
_EPILOG = """python -m raytrainer doctor says what this machine has for training, and what is wrong with it.

example of a file for --config:

  seed_everything: 1
  model: {class_path: my_project.Classifier, init_args: {lr: 0.01}}
  data: {class_path: my_project.Digits}
  trainer: {max_epochs: 5, callbacks: [{class_path: raytrainer.EarlyStopping, init_args: {monitor: val_loss}}]}

Options on the command line win over files, and later files over earlier ones."""


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run a command; returns what the Trainer's verb returned.

    Args:
        arguments: Words of the command line; None: those of this process.

    Raises:
        SystemExit: Arguments are wrong, or help or a configuration was asked for.
    """
    try:
        parser = _parser()
    except ConfigurationError as error:
        sys.exit(f"error: {error}")
    for unknown in _unknown_options(sys.argv[1:] if arguments is None else arguments):
        parser.error(unknown)
    config = parser.parse_args(arguments)
    verb = config.command
    chosen = config[verb]
    if chosen.seed_everything is not None:
        seed_everything(chosen.seed_everything)  # before the module draws its weights
    try:
        made = parser.instantiate(config)[verb]
    except ConfigurationError as error:
        parser.error(str(error))
    trainer, data = made.trainer, made.get("data")
    if verb == "fit":
        return trainer.fit(made.model, datamodule=data, ckpt_path=made.ckpt_path)
    result = getattr(trainer, verb)(made.model, datamodule=data, ckpt_path=made.ckpt_path)
    if verb == "predict" and made.output is not None:
        import torch

        torch.save(result, made.output)
        print(f"predictions are in {made.output}", file=sys.stderr)
    return result


def _unknown_options(arguments: Iterable[str]) -> Iterator[str]:
    """What to say of options that there are not; of `--trainer.<name>`, as the Trainer itself says it."""
    known = inspect.signature(Trainer).parameters
    for word in arguments:
        option = word.partition("=")[0].rstrip("+")
        if not re.match(r"--\w", option):
            continue
        root, _, rest = option.removeprefix("--").partition(".")
        name = rest.partition(".")[0]
        if root == "trainer" and name and name not in (*known, "help"):
            yield f"{option}: {unknown_argument('Trainer', name, known)}"
        if root not in _ROOTS:
            yield f"{option}: {_unknown_root(root, known)}"


def _unknown_root(root: str, of_trainer: Iterable[str]) -> str:
    if root in of_trainer:
        return f"did you mean --trainer.{root}?"
    near = nearest(root, _ROOTS)
    if near:
        return f"there is no {root!r}; did you mean {near[0]!r}?"
    there = ", ".join(f"--{name}" for name in _ROOTS)
    return f"no such option. There are {there}. A model's own are --model.NAME, a Trainer's --trainer.NAME."


def _parser() -> ArgumentParser:
    try:
        from jsonargparse import ArgumentParser
    except ModuleNotFoundError as error:
        raise not_installed("the command line", "jsonargparse", "cli") from error
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import DefaultHelpFormatter

    class Parser(ArgumentParser):  # type: ignore[misc]
        """Says what is wrong with a class's options in a line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            super().error(_in_a_line(message), ex)
            raise SystemExit(2)  # it has ended already: its types do not say so here

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):  # type: ignore[misc]
        """Keeps the lines of the example."""

    parser = Parser(
        prog="python -m raytrainer",
        description="Train, validate, test and predict with raytrainer.",
        epilog=_EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command", metavar="{" + ",".join(_VERBS) + "}")
    for verb, text in _VERBS.items():
        commands.add_subcommand(verb, _verb_parser(verb, text, Parser, Formatter), help=text)
    return parser


def _in_a_line(message: str) -> str:
    """jsonargparse's account of all that it has tried with a class, cut to what went wrong with this one."""
    key = re.search(r'Parser key "(\w+)"', message)
    problem = re.search(r"Problem with given class_path '([\w.]+)':\s*(.+)", message)
    given = re.search(r"Given value: ([\w.]+)$", message)
    if key and problem:
        option = re.search(r"Option '(\w+)' is not accepted", problem[2])
        if option is None:
            return f"--{key[1]}={problem[1]}: {problem[2]}"
        takes = inspect.signature(find(problem[1])).parameters
        return f"--{key[1]}.{option[1]}: {unknown_argument(problem[1], option[1], takes)}"
    if key and given and "does not correspond to a subclass of" in message:
        base = {"model": Module, "data": DataModule}.get(key[1])
        if base is not None:
            return f"--{key[1]}={given[1]}: give the path of a class that derives from raytrainer.{base.__name__}."
    return message


def _verb_parser(verb: str, text: str, parser_class: Any, formatter: Any) -> ArgumentParser:
    usage = f"python -m raytrainer {verb} [--config FILE] [--option=value ...]"
    parser: ArgumentParser = parser_class(
        usage=usage, description=text, epilog=_EPILOG, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these options; may be repeated.")
    parser.add_argument("--seed_everything", type=int | None, default=None, help="Seeds everything first.")
    parser.add_argument(
        "--ckpt_path", type=str | None, default=None,
        help='A checkpoint: its path or URI, or (fit) "last": the newest, if there is one.',
    )  # fmt: skip
    if verb == "predict":
        parser.add_argument("--output", type=str | None, default=None, help="Save predictions here, by torch.save.")
    parser.add_subclass_arguments(Module, "model", required=True, fail_untyped=False, help="The model")
    parser.add_subclass_arguments(DataModule, "data", required=False, fail_untyped=False, help="The data")
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    for name, title in _TITLES.items():
        parser.groups[name].title = title
    return parser
