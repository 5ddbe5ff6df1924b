"""The package as users meet it: what `import exgrpo_trl` costs, and which names it has."""

import re
import subprocess
import sys
import tomllib
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


@pytest.mark.parametrize(
    "module",
    [
        "records",
        "values",
        "examples",
        "buffer",
        "buffer.files",
        "strategies",
        "replay_log",
        "replay_log_writer",
        "cli",
        "report",
        "html",
    ],
)
def test_the_buffer_side_is_free_of_torch(module: str) -> None:
    heavy = "{'torch', 'trl', 'transformers', 'datasets', 'matplotlib'}"
    assert run(f"import sys, exgrpo_trl.{module}; print({heavy} & set(sys.modules))").strip() == "set()"


def test_a_weighting_imports_torch() -> None:
    """The exception among the strategies; and the test above can fail."""
    code = "import sys; from exgrpo_trl.strategies import ReplayWeighting; print('torch' in sys.modules)"
    assert run(code).strip() == "True"


def test_a_trainer_name_imports_torch() -> None:
    assert run("import sys, exgrpo_trl; exgrpo_trl.ExGRPOTrainer; print('torch' in sys.modules)").strip() == "True"


def test_public_names() -> None:
    assert set(exgrpo_trl.__all__) == {
        "Admission", "AdmissionRule", "Candidate", "CompletionSelector", "EvictionRule", "ExGRPOConfig",
        "ExGRPOTrainer", "Experience", "ExperienceBuffer", "ExperienceBufferError", "GroupSelector",
        "ImportanceWeight", "Question", "QuestionSampler", "ReplayWeighting", "Reuse", "RolloutDetails",
        "StoredImage", "Strategy", "__version__", "question_id_of",
    }  # fmt: skip
    for name in exgrpo_trl.__all__:
        assert getattr(exgrpo_trl, name) is not None
    assert set(exgrpo_trl.__all__) <= set(dir(exgrpo_trl))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        exgrpo_trl.Trainer  # noqa: B018


def test_one_version() -> None:
    assert metadata.version("exgrpo-trl") == exgrpo_trl.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", exgrpo_trl.__version__)
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_py_typed_is_shipped() -> None:
    assert (Path(exgrpo_trl.__file__).parent / "py.typed").exists()


# What a module may import of the package, besides what its own folder holds: what stands before it.
ORDER = [
    "errors", "saved_state", "images", "value_codecs", "values", "rollout_details", "records", "examples",
    "strategies", "buffer", "replay_log", "inspection", "html", "notebook", "report", "cli",
    "plan", "fresh", "rows", "processes", "scoring", "batch", "rollouts", "prompts", "rewards", "success", "metrics",
    "config", "pacing", "coverage", "pools", "questions", "dataset", "checkpoints", "selection", "notices", "reuse",
    "log_rows", "replay_log_writer", "compatibility", "asking", "replayer", "model_card", "filling",
    "generation", "own_experience", "trainer", "grpo_script",
]  # fmt: skip


def imports_of(module: Path, folder: Path) -> set[str]:
    """Modules and folders of the package that a module imports, but for those of its own folder."""
    # Imports inside functions and for type checkers are left out: `ExperienceBuffer.save` reaches its files that way.
    is_nested = module.parent != folder
    pattern = r"^from \.\.(\w+)" if is_nested else r"^from \.(\w+)"
    return set(re.findall(pattern, module.read_text(), flags=re.MULTILINE))


def test_imports_point_one_way() -> None:
    folder = Path(exgrpo_trl.__file__).parent
    modules = [module for module in folder.rglob("*.py") if module != folder / "__init__.py"]
    assert len(modules) > 30
    for module in modules:
        part = module.relative_to(folder).parts[0].removesuffix(".py")
        assert imports_of(module, folder) <= set(ORDER[: ORDER.index(part)]), module


def test_a_folder_is_imported_one_way_too() -> None:
    folder = Path(exgrpo_trl.__file__).parent
    for part in ("buffer", "strategies", "rollouts", "inspection", "report", "cli"):
        imported = {
            module.stem: set(re.findall(r"^from \.(\w+) import", module.read_text(), flags=re.MULTILINE))
            for module in (folder / part).glob("*.py")
        }
        done: set[str] = set()
        while remaining := imported.keys() - done:
            ready = {name for name in remaining if imported[name] <= done}
            assert ready, f"modules of {part} import each other in a circle: {sorted(remaining)}"
            done |= ready


def test_the_library_neither_prints_nor_pickles() -> None:
    folder = Path(exgrpo_trl.__file__).parent
    modules = list(folder.rglob("*.py"))
    assert len(modules) > 30
    for module in modules:
        source = module.read_text()
        assert not re.search(r"\bpickle\b|\bnp\.random\.(seed|rand)|torch\.manual_seed", source), module.name
        if module.parent.name != "cli":
            assert not re.search(r"(?<![\w.])print\(", source), module.name
