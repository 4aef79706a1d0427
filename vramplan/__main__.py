"""`python -m vramplan`."""

from vramplan.cli.main import main

if __name__ == "__main__":
    main(prog_name="vramplan")
