"""`python -m raytrainer`."""

from raytrainer.cli import main

if __name__ == "__main__":
    main()
