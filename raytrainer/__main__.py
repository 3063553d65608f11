"""`python -m raytrainer`: see `raytrainer.cli`, and `raytrainer.doctor`."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or examine this machine, which needs no more than the package itself."""
    if sys.argv[1:] == ["doctor"]:
        from raytrainer.doctor import main as examine

        sys.exit(min(examine(), 1))
    from raytrainer.cli import main as run

    run()


if __name__ == "__main__":
    main()
