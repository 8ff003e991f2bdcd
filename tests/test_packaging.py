"""The passes are one package, `gimli_compile.passes`, wherever they are imported from."""

import importlib
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from gimli_compile import passes

ROOT = Path(__file__).parents[1]


def build_wheel(source: Path, into: Path) -> list[str]:
    (wheel,) = WheelBuilder(str(source)).build(directory=str(into), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_passes_from_the_root_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=r"import gimli_compile\.passes"):
        importlib.import_module("passes")


def test_passes_are_the_top_level_folder():
    assert passes.__name__ == "gimli_compile.passes"
    assert Path(passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_the_link_is_relative():
    assert (ROOT / "gimli_compile" / "passes").readlink() == Path("../passes")


def test_wheel_holds_every_pass_once(tmp_path):
    names = build_wheel(ROOT, tmp_path)
    packed = sorted(name for name in names if "passes/" in name)
    assert packed == sorted(f"gimli_compile/{file.relative_to(ROOT)}" for file in (ROOT / "passes").rglob("*.py"))
    assert "gimli_compile/__init__.py" in names


def test_wheel_from_the_sdist_is_the_same(tmp_path):
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = Path(sdist.removesuffix(".tar.gz"))
    assert sorted(build_wheel(unpacked, tmp_path)) == sorted(build_wheel(ROOT, tmp_path))
