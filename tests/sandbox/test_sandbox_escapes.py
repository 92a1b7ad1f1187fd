"""Every attempt of attacks/escapes.py is held by every sandbox that this machine has."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from sandboxes import any_sandbox, each_sandbox, sandbox_named

from attacks.escapes import ESCAPES, FILES, NETWORK, PROC, Escape
from attacks.world import World
from della.sandbox.walls import NAMES, Sandbox, _Walls

ROOT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.name)
@each_sandbox
def test_held(sandbox: Sandbox, escape: Escape) -> None:
    with World() as world:
        outcome = world.attempt(escape, sandbox)
        assert world.faults(escape, outcome) == []


@pytest.mark.parametrize("escape", [e for e in ESCAPES if e.control], ids=lambda escape: escape.name)
def test_the_same_without_a_sandbox_is_seen(escape: Escape) -> None:
    with World() as world:
        assert world.faults(escape, world.unsandboxed(escape)) != []


@pytest.mark.parametrize("escape", FILES + PROC + NETWORK, ids=lambda escape: escape.name)
def test_the_outer_wall_alone(escape: Escape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bubblewrap's namespaces, with seccomp and Landlock letting all pass."""
    sandbox = sandbox_named("bubblewrap")
    everything = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    orders = _Walls._orders
    open_walls = {"filters": (everything, everything), "readable": ["/"], "writable": ["/"]}
    monkeypatch.setattr(_Walls, "_orders", lambda self, limits: orders(self, limits) | open_walls)
    with World() as world:
        outcome = world.attempt(escape, sandbox)
        assert world.harm(outcome) == []


def python_of_nobody() -> str:
    """An interpreter that an ordinary user can start, with della and the attacks at hand."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        command = [python, "-c", "import sys, attacks.world; assert sys.version_info >= (3, 10)"]
        try:
            subprocess.run(
                command, check=True, capture_output=True, cwd=ROOT, user=NOBODY, group=NOBODY, env={}
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("no interpreter here can be started by another user")


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user anyway")
@pytest.mark.parametrize("name", NAMES)
def test_held_for_an_ordinary_user(name: str) -> None:
    sandbox_named(name)
    command = [python_of_nobody(), "-B", "-m", "attacks.world", name]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={},
    )
    assert run.returncode == 0, run.stderr
    quick = sum(escape.ended not in ("timeout", "any") for escape in ESCAPES)
    assert json.loads(run.stdout) == {"attempts": quick, "uid": NOBODY, "out": {}}


def test_there_are_enough() -> None:
    assert len({escape.name for escape in ESCAPES}) == len(ESCAPES) == 73
    assert sum(escape.control for escape in ESCAPES) >= 15
    assert any_sandbox().name in NAMES
