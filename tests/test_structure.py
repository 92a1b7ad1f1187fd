"""How the house is laid out: who may import whom, which library stands where, and what is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import della
from della.merging.registry import ALL_PARAMETERS, METHODS

ROOT = Path(__file__).parent.parent
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60

# The rooms of della/ in their order: a module imports only from its own room and from those above it.
ROOMS = (
    *("errors", "dtypes", "version", "merging", "options", "checkpoint", "output", "recipe", "planning"),
    *("running", "arrays", "api", "della", "report", "sandbox", "evaluate", "experiments", "cli", "__main__"),
)
# Folders beside della/ with code of their own; they import della, and nothing of della imports them.
BESIDE = ("attacks", "benchmarks", "crash", "fuzz", "training")
MOST_ROOMS, MOST_FLOORS = 25, 9
# Where a library may be imported; nowhere if it is not said.
FENCES = {
    "yaml": ["recipe.text"],
    "huggingface_hub": ["checkpoint.source"],
    "jinja2": ["planning.templates"],
    "numba": ["merging.kernels.compile"],
    "typer": ["cli.main", "cli.options"],
    "rich": ["cli.console"],
    "tqdm": ["running.bar"],
    "openai": ["evaluate.endpoint"],
    "tokenizers": ["evaluate.tokenizer", "planning.retokenized"],
    "torch": ["checkpoint.pickles", "evaluate.calibration", "evaluate.hf", "experiments.small_model"],
    "transformers": ["evaluate.hf", "experiments.small_model"],
    "datasets": ["evaluate.problems"],
    "peft": ["experiments.small_train"],
    "safetensors": [],
    "vl_convert": ["report.plots"],
}
# Where code is run that is not della's own, and other processes are started: nowhere else.
RUNS_CODE = {
    "sandbox.guard": {"exec", "compile"},  # these two run only inside the sandbox
    "sandbox.harness": {"exec", "eval", "compile", "fork"},
    "sandbox.walls": {"subprocess"},  # these two start it, and end it
    "sandbox.process": {"subprocess"},
    "evaluate.alpaca": {"subprocess"},  # programs of environments that are not ours
    "evaluate.vllm_server": {"subprocess"},
}
# What one system has and another has not: only where files are read and where they are written.  The sandbox
# is Linux's by nature, and so is the server that vLLM runs in.
OF_A_SYSTEM = {
    *("fcntl", "msvcrt", "_winapi", "ctypes", "resource", "pwd", "grp", "uname", "statvfs"),
    *("preadv", "pread", "pwritev", "pwrite", "posix_fallocate", "geteuid", "getuid", "kill", "killpg"),
    *("fork", "link", "flock", "mkfifo", "st_blocks", "sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW"),
    *("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_PATH", "SIGKILL", "SIGALRM", "setitimer", "setrlimit"),
    *("waitid", "set_blocking"),
}
KNOW_THE_SYSTEM = {
    "checkpoint.files": {"O_BINARY", "O_NONBLOCK", "preadv"},
    "output.disk": {
        *("fcntl", "msvcrt", "_winapi", "ctypes", "flock", "geteuid", "kill", "link", "O_DIRECTORY"),
        *("O_NOFOLLOW", "posix_fallocate", "pwrite", "st_blocks"),
    },
    "options": {"sched_getaffinity"},  # where there is one
    "evaluate.vllm_server": {"ctypes", "killpg", "SIGKILL"},
}
PUBLIC = [
    "CheckpointError", "DamageError", "DellaError", "OutputError", "Problem", "RecipeError", "__version__",
    "magprune", "merge", "merge_state_dicts", "merge_tensors", "plan", "verify",
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it."""
    found = {}
    for path in sorted((ROOT / "della").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "della").with_suffix("").parts)
        found["della" if name == "__init__" else name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """What a module imports, wherever in it: ``x.y`` for ``import x.y``, ``x.y`` and ``x.y.z`` for ``from x.y
    import z``.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "__import__", f"{path}: an import in disguise"


def own_imports(path: Path) -> set[str]:
    """The modules of della that a module imports; ``from della.x import name`` is an import of della.x."""
    known = modules()
    found = set()
    for name in imports(path):
        inside = name.removeprefix("della.")
        if name == "della" or (name != inside and inside in known):
            found.add(inside)
    parents = {name.rpartition(".")[0] for name in found}
    return {name for name in found if known[name].name != "__init__.py" or name not in parents}


def room(name: str) -> str:
    """The room of a module: its first folder, or the module itself where it lies flat."""
    return name.partition(".")[0]


def test_every_module_has_its_place() -> None:
    assert {room(name) for name in modules()} == set(ROOMS)
    for name, path in modules().items():
        if path.name == "__init__.py" and name not in ("della", "experiments.demo"):
            held = path.read_text().partition('"""\n')[2].strip()
            assert not held, f"{name}: a package holds a docstring and nothing else"


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_above(name: str) -> None:
    above = ROOMS[: ROOMS.index(room(name)) + 1]
    assert {room(other) for other in own_imports(modules()[name])} <= set(above)


def rooms_above() -> dict[str, set[str]]:
    """Each room of the repository, and the rooms that it imports; scripts/ is one without imports."""
    found: dict[str, set[str]] = {"scripts": set(), **{name: set() for name in (*ROOMS, *BESIDE)}}
    for name, path in modules().items():
        found[room(name)] |= {room(other) for other in own_imports(path)}
    for folder in BESIDE:
        for path in (ROOT / folder).rglob("*.py"):
            found[folder] |= {room(other) for other in own_imports(path)}
            found[folder] |= {top for name in imports(path) if (top := name.partition(".")[0]) in BESIDE}
    return {name: above - {name} for name, above in found.items()}


def test_few_rooms_on_few_floors() -> None:
    above, floors = rooms_above(), dict[str, int]()
    while len(floors) < len(above):
        ready = {n for n in above.keys() - floors.keys() if above[n] <= floors.keys()}
        assert ready, f"a circle of rooms: {sorted(above.keys() - floors.keys())}"
        floors |= {name: 1 + max((floors[other] for other in above[name]), default=0) for name in ready}
    assert len(above) <= MOST_ROOMS
    assert max(floors.values()) <= MOST_FLOORS


def test_no_module_imports_itself_through_others() -> None:
    reach = {name: own_imports(path) for name, path in modules().items()}
    for name in reach:
        seen, left = set(), set(reach[name])
        while left:
            seen |= left
            left = set().union(*(reach[other] for other in left)) - seen
        assert name not in seen


def test_imports_are_seen_wherever_they_stand() -> None:
    cli = own_imports(modules()["cli.main"])
    assert {"errors", "api", "planning.describe", "merging.kernels.compile"} <= cli, "inside functions too"
    assert own_imports(modules()["della"]) == {"errors", "version", "api", "arrays"}
    magprune = own_imports(modules()["merging.drops.magprune"])
    assert magprune >= {"merging.kernels.drop", "merging.method", "merging.random"}


def test_libraries_stay_behind_their_fences() -> None:
    homes: dict[str, list[str]] = {library: [] for library in FENCES}
    for name, path in modules().items():
        for library in {imported.partition(".")[0] for imported in imports(path)} & FENCES.keys():
            homes[library].append(name)
    assert homes == FENCES


def test_two_modules_know_the_system() -> None:
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        used = {imported.partition(".")[0] for imported in imports(path)}
        used |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        if used & OF_A_SYSTEM and room(name) != "sandbox":
            found[name] = used & OF_A_SYSTEM
    assert found == KNOW_THE_SYSTEM


def test_no_module_runs_code_that_it_did_not_bring() -> None:
    """Neither a model's nor a generated one: no eval, no exec, no other process; but for RUNS_CODE."""
    runs = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "system",
        "popen",
        "fork",
        "execv",
        "spawnv",
        "posix_spawn",
    }
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        does = {imported.partition(".")[0] for imported in imports(path)}
        does &= {"subprocess", "runpy", "multiprocessing", "code"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                owner = getattr(getattr(node.func, "value", None), "id", "")
                does |= {called} & runs if owner != "re" else set()
        if does:
            found[name] = does
    assert found == RUNS_CODE


def test_the_design_names_every_module() -> None:
    design = (ROOT / "docs/design.md").read_text()
    names = {path.name for path in modules().values()} - {"__init__.py"}
    assert [name for name in sorted(names) if name not in design] == []


def test_what_is_public() -> None:
    assert della.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(della, name) is not None
        assert name in dir(della)
    with pytest.raises(AttributeError, match=r"^module 'della' has no attribute 'nothing'$"):
        _ = della.nothing


def test_importing_any_module_does_not_replace_a_public_name() -> None:
    names = [f"della.{name}" for name in modules() if name not in ("della", "sandbox.harness")]
    program = f"import della, {', '.join(names)}; print(*(callable(getattr(della, n)) for n in {PUBLIC[7:]}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"] * 6


def test_importing_della_is_cheap() -> None:
    program = "import sys, della; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    heavy = {"numpy", "numba", "ml_dtypes", "yaml", "typer", "rich", "huggingface_hub", "xxhash", "torch"}
    assert not loaded & heavy
    assert {name for name in run.stdout.split() if name.startswith("della")} == {
        "della", "della.errors", "della.version",
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["della", "attacks", "benchmarks", "fuzz", "training"])
def test_nothing_is_too_long(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    too_long = []
    for path in paths:
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > MOST_LINES:
            too_long.append(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                length = (node.end_lineno or first) - first + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{path}: {node.name}: {length} lines")
    assert too_long == []


# Rooms in which an option is an object; and what only looks like a comparison with an option's value there.
RESOLVED = ("checkpoint", "output", "merging", "recipe", "planning", "running", "arrays", "api", "cli.main")
HOMONYMS = {"p.scope == 'model'", "scope == 'model'", "'tensor' in record"}


def compared(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Every comparison in a module, with the words that it compares with."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            words = (each.value for each in ast.walk(node) if isinstance(each, ast.Constant))
            yield ast.unparse(node), {word for word in words if isinstance(word, str)}


def test_no_method_or_option_is_compared_by_name() -> None:
    """Options become objects once (VOTES["count"]); a method says what it is (needs_base, grain, ...)."""
    names = set(METHODS) | {value for p in ALL_PARAMETERS.values() for value in p.choices}
    found = {
        (name, text)
        for name, path in modules().items()
        if name in RESOLVED or room(name) in RESOLVED
        for text, words in compared(path)
        if words & names
    }
    assert {text for _, text in found} <= HOMONYMS, found
