"""`python -m della`: the command."""

from della.cli.main import process

if __name__ == "__main__":
    process()
