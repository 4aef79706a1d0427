"""`python -m vramplan`."""

from vramplan.cli.main import run

if __name__ == "__main__":
    run()
