"""Golden records: what the code gave before a change, so that a refactor is seen to change nothing.

    python -m pytest tests/test_golden.py tests/flows/test_whole_chain.py --write-golden

writes them anew, after a change that is meant to change them.
"""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WRITE = "UNDERSTUDY_WRITE_GOLDEN"  # set by the option --write-golden


def compare(name: str, found: Any) -> None:
    """Assert that `found`, plain JSON values, is what the record NAME.json says."""
    expected = record(name, found)
    assert found == expected, f"{name} differs from tests/golden/{name}.json; --write-golden writes it anew"


def record(name: str, found: Any) -> Any:
    """What the record NAME.json says; with --write-golden `found`, which it says from then on."""
    path = FOLDER / f"{name}.json"
    if os.environ.get(WRITE):
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return json.loads(path.read_text())


def machine() -> str:
    """What decides the last bits of floating point results: the processor's vector instructions, and the BLAS kernels
    that the environment chooses. Bytes are compared only between machines that are alike in this."""
    import torch
    from numpy._core._multiarray_umath import __cpu_features__

    features = sorted(name for name, there in __cpu_features__.items() if there)
    return " ".join([*features, torch.backends.cpu.get_cpu_capability(), os.environ.get("OPENBLAS_CORETYPE", "")])
