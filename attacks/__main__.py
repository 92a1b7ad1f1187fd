"""Write every attack into a folder: ``python -m attacks FOLDER``."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from attacks import ROWS, Attack, all_attacks
from attacks.files import good


def write(attack: Attack, folder: Path) -> None:
    """One attack, in its own folder: the models, recipe.yml, and what spoils them."""
    folder.mkdir(parents=True)
    good(folder)
    attack.make(folder)


def describe(attack: Attack) -> dict[str, object]:
    """What to run in the attack's folder, and what della answers."""
    command = ["della", "merge", "recipe.yml", attack.out, *["--overwrite"] * attack.overwrite]
    return {
        "about": ROWS[attack.row],
        "name": attack.name,
        "command": shlex.join(command),
        "exit_code": attack.exit_code,
        "message_holds": list(attack.says),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that is new or empty")
    folder = parser.parse_args().folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty; name another folder")
    table = {}
    for attack in all_attacks():
        write(attack, folder / attack.title)
        table[attack.title] = describe(attack)
    (folder / "attacks.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(table)} attacks in {folder}; attacks.json says what should happen to each")


if __name__ == "__main__":
    main()
