"""`python -m della`: the command."""

from della.cli.main import main

if __name__ == "__main__":
    main()
