"""The reference page of a Trainer's arguments.

python -m raytrainer.reference > examples/guide/trainer-arguments.md
"""

from __future__ import annotations

from dataclasses import MISSING

from raytrainer.driver_arguments import TrainerArguments
from raytrainer.plan.declaring import meanings

__all__ = ["arguments_page"]

_HEAD = """# Arguments of `Trainer`

All are keywords. Counts of *batches* are per worker. A *step* is one optimizer step. **Steps take precedence over
epochs, and a maximum beats a minimum.** A value that cannot work is refused when the Trainer is made, with the value,
what is allowed, and what to do. Afterwards each is readable on the Trainer, in its normal form:
`trainer.limit_val_batches`.

This page is made from the declarations in `raytrainer/plan/run_arguments.py` and `raytrainer/driver_arguments.py` by
`python -m raytrainer.reference`; `help(raytrainer.Trainer)` shows the same.

| argument | default | meaning |
|---|---|---|
"""


def arguments_page() -> str:
    """The page, as Markdown."""
    rows = []
    # InitVars are declared in the same place, but are no fields
    declared = TrainerArguments.__dataclass_fields__
    for name, meaning in meanings(TrainerArguments).items():
        default = declared[name].default
        shown = "" if default is MISSING else f"`{default!r}`".replace("'", '"')
        text = meaning.replace("|", "\\|")
        rows.append(f"| `{name}` | {shown} | {text} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    print(arguments_page(), end="")
