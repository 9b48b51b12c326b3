"""Which package may import which, as docs/architecture.md draws it; and that the command line starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_manifests", "tasks", "training", "flows")
MAY_IMPORT = {
    "data_manifests": {"data_manifests"},
    "tasks": {"data_manifests", "tasks"},
    "training": {"data_manifests", "tasks", "training"},
    "flows": {"data_manifests", "tasks", "training", "flows", "tests"},
}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_those_below_them(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        imported = imported_packages(path)
        ours = imported & {*PACKAGES, "tests", "benchmarks"}
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {sorted(ours - MAY_IMPORT[package])}"
        if package != "flows":
            assert "prefect" not in imported, f"{path.relative_to(ROOT)} imports prefect"


def test_mediapipe_stays_behind_one_module() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not [path.name for path in files if "mediapipe" in imported_packages(path)]  # landmarks.py asks by name
    assert [path.name for path in files if "mediapipe.python" in path.read_text()] == ["landmarks.py"]


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("av", "cv2", "mediapipe", "numpy", "pandas", "prefect", "pyarrow", "ray", "torch", "transformers")
    code = f"import sys, flows.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


def test_what_breaks_only_at_import_is_imported() -> None:
    """Wrong pins of these pass every other check and fail at the first real use."""
    code = "import prefect.server.api.server, ray.data, ray.train, pyarrow.dataset"
    code += "; from tasks.landmarks import solution; solution('holistic')"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
