"""``python -m pyeff``: the command line app."""

from pyeff.cli import main

if __name__ == "__main__":
    main()
