"""Who may import whom, and who must start without jax: the table of rooms, held against the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import emergency_ckpt
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import save, small_state

PACKAGE = Path(emergency_ckpt.__file__).parent

# Room -> the rooms it may import, besides itself and `errors`. A room is a directory, or a module at the top
# of the package. Rooms that nothing below may import have every other room in their row.
LOWER = {"core", "local", "persistent", "preemption", "telemetry", "config"}
ALL_BELOW_MANAGER = LOWER | {"agent", "jaxio", "options"}
MAY_IMPORT = {
    "errors": set(),
    "core": set(),
    "local": {"core"},
    "persistent": {"core"},
    "preemption": {"core"},
    "telemetry": {"core"},
    "config": {"core"},
    "agent": LOWER,
    "jaxio": {"core", "local"},
    "options": {"core"},
    "runtime": ALL_BELOW_MANAGER,
    "manager": ALL_BELOW_MANAGER | {"runtime", "disabled"},
    "distributed": ALL_BELOW_MANAGER | {"runtime"},
    "disabled": ALL_BELOW_MANAGER | {"runtime", "manager"},
    "deploy": ALL_BELOW_MANAGER | {"runtime", "manager"},
    "demo": ALL_BELOW_MANAGER | {"runtime", "manager", "deploy", "cli", "__init__"},
    "cli": ALL_BELOW_MANAGER | {"runtime", "manager", "deploy", "demo", "__init__"},
    "maxtext": ALL_BELOW_MANAGER | {"runtime", "manager"},
    "__init__": {"config", "manager", "options", "distributed"},
}

# Rooms whose modules must not bring jax (nor orbax, which brings jax) into the process.
WITHOUT_JAX = {"errors", "core", "local", "persistent", "config", "preemption", "telemetry", "agent", "deploy"}

# Orbax's policies, name formats and handlers are used here and nowhere else.
ORBAX_ALLOWED = {"manager", "options", "runtime", "jaxio", "demo"}


def room_of(module: str) -> str:
    """'emergency_ckpt.local.slot_file' -> 'local'; the package itself and its public names -> '__init__'."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in emergency_ckpt.__all__ else "__init__"


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of each import in a source file, those within functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; this project writes absolute ones"
            base = node.module or ""
            # `from emergency_ckpt import errors` names a room only with the imported name.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


MODULES = list(modules())


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _ in MODULES])
def test_a_module_imports_only_rooms_that_lie_below_its_own(module: str, path: Path) -> None:
    room = room_of(module)
    assert room in MAY_IMPORT, f"{module} is in a room that the table does not know"
    allowed = MAY_IMPORT[room] | {room, "errors"}
    wrong = [
        f"{path}:{line}: {room} imports {room_of(name)} ({name})"
        for line, name in imports_of(path)
        if name.split(".")[0] == "emergency_ckpt" and room_of(name) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _ in MODULES])
def test_a_module_names_jax_and_orbax_only_where_they_belong(module: str, path: Path) -> None:
    room = room_of(module)
    wrong = []
    for line, name in imports_of(path):
        library = name.split(".")[0]
        if library in {"jax", "jaxlib", "flax", "optax"} and room in WITHOUT_JAX:
            wrong.append(f"{path}:{line}: {room} imports {name}")
        if library == "orbax" and room not in ORBAX_ALLOWED:
            wrong.append(f"{path}:{line}: {room} imports {name}")
    assert not wrong, "\n".join(wrong)


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter; fails the test with its error output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Prints which of the heavy packages are loaded: an empty line is what the tests want.
HEAVY = {"jax", "jaxlib", "orbax", "flax", "boto3", "google.cloud.storage"}
REPORT_HEAVY = f"import sys; print(*sorted({HEAVY} & set(sys.modules)))"


def test_the_package_starts_without_jax() -> None:
    assert run_python(f"import emergency_ckpt; dir(emergency_ckpt); {REPORT_HEAVY}").strip() == ""


@pytest.mark.parametrize("room", sorted(WITHOUT_JAX & {room_of(module) for module, _ in MODULES}))
def test_every_module_of_a_room_for_processes_without_jax_starts_without_it(room: str) -> None:
    names = [module for module, _ in MODULES if room_of(module) == room]
    assert run_python(f"import {', '.join(names)}; {REPORT_HEAVY}").strip() == ""


COMMANDS = ("plan", "launch", "agent", "run", "doctor", "save-now", "show", "sync", "deploy")


def run_command(*arguments: str) -> list[str]:
    """The lines that the command prints, and after them which heavy packages it has loaded."""
    return run_python(
        f"import atexit, sys; atexit.register(lambda: exec({REPORT_HEAVY!r}))\n"
        f"sys.argv = ['emergency-ckpt', *{arguments!r}]\n"
        "from emergency_ckpt.cli.main import main\n"
        "sys.exit(main())\n"
    ).splitlines()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in COMMANDS)],
    ids=" ".join,
)
def test_the_command_line_shows_its_help_without_jax(arguments: list[str]) -> None:
    *shown, heavy = run_command(*arguments)
    assert shown[0].startswith("usage: emergency-ckpt")
    assert heavy == ""


def test_steps_are_shown_and_copied_without_jax(tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    store = PersistentStore(first)
    save(store, Attempt(store.mint_generation(0, None), 10, "default"), small_state())
    for arguments in (
        ["show", first, "10"],
        ["sync", first, str(tmp_path / "second"), "--json"],
    ):
        *shown, heavy = run_command(*arguments)
        assert "10" in "".join(shown)
        assert heavy == ""
