"""Loads and runs the example scripts."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script(name: str) -> ModuleType:
    """Loads a script without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script: ModuleType, path: Path, *arguments: str) -> Any:
    """Runs a script at its smallest, checks its picture, and returns its results."""
    results = script.main(["--smoke", "--output", str(path), *arguments])
    picture = imread(path)
    height, width, _ = picture.shape
    assert min(height, width) > 400
    quarters = [picture[y : y + height // 2, x : x + width // 2] for y in (0, height // 2) for x in (0, width // 2)]
    assert all(0.05 < quarter[..., :3].std() < 0.5 for quarter in quarters)
    return results
