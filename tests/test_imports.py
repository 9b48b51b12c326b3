"""Which room may import which, as docs/architecture.md draws it; and that the command line starts fast."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_manifests", "tasks", "training", "flows")
# From the ground up. A module imports from its own room, its own floor's room alone, and from floors below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("data_manifests",),
    ("tasks.media",),
    ("tasks.weights",),
    ("tasks.networks",),
    ("tasks.stages",),
    ("tasks.cutting", "tasks.policy"),
    ("tasks.shards",),
    ("tasks.recipe",),
    ("tasks.execution", "tasks.synthetic"),
    ("tasks.review",),
    ("training.models",),
    ("training.config",),
    ("training.data", "training.evaluate"),
    ("training.loop",),
    ("training.generate",),
    ("training.learners",),
    ("flows",),
)
# The same inside the room `flows`.
FLOW_FLOORS = (
    ("progress", "curves", "server_guard", "parameters", "summary"),
    ("report",),
    ("curate", "train"),
    ("cli",),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports, wherever in it: also in functions, and for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} imports by a relative name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in modules else node.module)
    return names


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
IMPORTS = {name: imported(path, set(FILES)) for name, path in FILES.items()}


def room_of(module: str) -> str | None:
    """The room that a module stands in; None for a package that only holds rooms."""
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), None)


def test_every_module_stands_in_a_room() -> None:
    homeless = [name for name in FILES if room_of(name) is None]
    assert homeless == ["tasks", "training"]


def test_no_import_runs_upward_or_across() -> None:
    for module, names in IMPORTS.items():
        ours = room_of(module)
        for name in sorted(names):
            theirs = room_of(name)
            if ours is None or theirs is None or ours == theirs:
                continue
            assert ROOMS[theirs] < ROOMS[ours], f"{module} imports {name}: {theirs} does not lie below {ours}"


def test_no_import_of_the_flows_runs_upward() -> None:
    floors = {name: floor for floor, names in enumerate(FLOW_FLOORS) for name in names}
    for module, names in IMPORTS.items():
        for name in sorted(names):
            if module.startswith("flows.") and name.startswith("flows."):
                ours, theirs = module.split(".")[1], name.split(".")[1]
                assert ours == theirs or floors[theirs] < floors[ours], f"{module} imports {name}"


def test_no_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for name in sorted(IMPORTS[module] & set(FILES) - {module}):
                visit(name, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_product_imports_neither_tests_nor_benchmarks() -> None:
    for module, names in IMPORTS.items():
        assert not {name.split(".")[0] for name in names} & {"tests", "benchmarks"}, module


def test_prefect_is_imported_by_flows_alone() -> None:
    for module, names in IMPORTS.items():
        assert module.startswith("flows") or not {name.split(".")[0] for name in names} & {"prefect"}, module


def test_mediapipe_stays_behind_one_module() -> None:
    assert not [name for name, names in IMPORTS.items() if {n.split(".")[0] for n in names} & {"mediapipe"}]
    asks_by_name = [name for name, path in FILES.items() if "mediapipe.python" in path.read_text()]
    assert asks_by_name == ["tasks.stages.mediapipe"]


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("av", "cv2", "mediapipe", "numpy", "pandas", "prefect", "pyarrow", "ray", "torch", "transformers")
    code = f"import sys, flows.cli.main; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


def test_what_breaks_only_at_import_is_imported() -> None:
    """Wrong pins of these pass every other check and fail at the first real use."""
    code = "import ray.data, ray.train, pyarrow.dataset"
    code += "; from tasks.stages.mediapipe import solution; solution('holistic')"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is in the wheel that users install."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # from a copy, since a build leaves files beside the sources that a later build would pick up
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), str(source)], check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_product_and_no_tests(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel if not name.split("/")[0].endswith(".dist-info")}
    assert tops == set(PACKAGES)
    modules = {name for name in wheel if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for path in FILES.values()}
    for name in (
        "data_manifests/demo.yaml",
        "flows/report/templates/report.html",
        "tasks/synthetic/assets/portrait.jpg",
    ):
        assert name in wheel
