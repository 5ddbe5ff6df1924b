"""The package as users meet it: what `import exgrpo_trl` costs, and which names it has."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import exgrpo_trl

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_free_of_heavy_libraries() -> None:
    heavy = "{'torch', 'trl', 'transformers', 'datasets', 'pyarrow', 'numpy'}"
    assert run(f"import sys, exgrpo_trl; print({heavy} & set(sys.modules))").strip() == "set()"


@pytest.mark.parametrize("module", ["experience", "sampling", "buffer", "storage", "cli"])
def test_the_buffer_side_is_free_of_torch(module: str) -> None:
    assert run(f"import sys, exgrpo_trl.{module}; print({{'torch', 'trl'}} & set(sys.modules))").strip() == "set()"


def test_a_trainer_name_imports_torch() -> None:
    assert run("import sys, exgrpo_trl; exgrpo_trl.ExGRPOTrainer; print('torch' in sys.modules)").strip() == "True"


def test_public_names() -> None:
    assert set(exgrpo_trl.__all__) == {
        "Candidate", "ExGRPOConfig", "ExGRPOTrainer", "Experience", "ExperienceBuffer", "ExperienceBufferError",
        "Question", "__version__",
    }  # fmt: skip
    for name in exgrpo_trl.__all__:
        assert getattr(exgrpo_trl, name) is not None
    assert set(exgrpo_trl.__all__) <= set(dir(exgrpo_trl))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        exgrpo_trl.Trainer  # noqa: B018


def test_one_version() -> None:
    assert metadata.version("exgrpo-trl") == exgrpo_trl.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", exgrpo_trl.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_py_typed_is_shipped() -> None:
    assert (Path(exgrpo_trl.__file__).parent / "py.typed").exists()


def test_imports_point_one_way() -> None:
    """Design, section 2: experience <- sampling <- buffer <- storage <- cli, and nothing imports the trainer."""
    order = ["experience", "sampling", "buffer", "storage", "cli"]
    folder = Path(exgrpo_trl.__file__).parent
    for module in folder.glob("*.py"):
        # Imports inside functions are left out: `ExperienceBuffer.save` reaches storage that way.
        imported = re.findall(r"^from \.(\w+) import", module.read_text(), flags=re.MULTILINE)
        assert "trainer" not in imported, module.name
        if module.stem in order:
            allowed = set(order[: order.index(module.stem)]) | {"indices", "invariants", "tables"}
            assert set(imported) <= allowed, module.name


def test_the_library_neither_prints_nor_pickles() -> None:
    folder = Path(exgrpo_trl.__file__).parent
    for module in folder.glob("*.py"):
        source = module.read_text()
        assert not re.search(r"\bpickle\b|\bnp\.random\.(seed|rand)|torch\.manual_seed", source), module.name
        if module.name != "cli.py":
            assert not re.search(r"(?<![\w.])print\(", source), module.name
