"""`python -m vmcore` is the command `vmcore`."""

from vmcore.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
