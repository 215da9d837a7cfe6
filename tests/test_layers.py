"""The shape of the code: imports run one way, outside dependencies have few doors, functions stay short."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for path in (ROOT / "train.py", *ROOT.glob("distrib/**/*.py"))
}
LAYERS = [  # each may import from those below it
    ["train.py", "distrib/scale/__main__.py"],
    ["distrib/loop.py", "distrib/scale/step.py"],
    ["distrib/watch.py", "distrib/memory.py", "distrib/health.py", "distrib/scale/network.py"],
    ["distrib/log.py", "distrib/folder.py", "distrib/provenance.py", "distrib/sharing.py"],
    ["distrib/state.py", "distrib/vote.py"],
    ["distrib/replay.py"],
    ["distrib/ranks.py", "distrib/metrics.py", "distrib/optim.py", "distrib/models.py", "distrib/data/loaders.py"],
    [
        "distrib/precision.py",
        "distrib/pretrained.py",
        "distrib/checkpoint.py",
        "distrib/data/sources.py",
        "distrib/data/augment.py",
    ],
    ["distrib/data/files.py"],
    ["distrib/data/steps.py"],
    ["distrib/config.py", "distrib/interrupt.py", "distrib/muon.py", "distrib/scale/cluster.py"],
]
DOORS = {
    "accelerate": {"distrib/ranks.py", "distrib/loop.py", "distrib/memory.py", "distrib/health.py"},
    "omegaconf": {"distrib/config.py"},
    "tqdm": {"distrib/log.py"},
    "torchvision": {"distrib/data/sources.py", "distrib/models.py", "distrib/pretrained.py"},
    "PIL": {"distrib/data/files.py"},
}


def imports(tree: ast.Module) -> set[str]:
    """The modules that are imported when a program runs: not those that only a type checker sees."""
    hidden = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for each in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_file_has_a_layer() -> None:
    placed = {file for layer in LAYERS for file in layer}
    assert placed == {file for file in FILES if not file.endswith("__init__.py")}


@pytest.mark.parametrize("depth", range(len(LAYERS)))
def test_imports_run_one_way(depth: int) -> None:
    below = {file.removesuffix(".py").replace("/", ".") for layer in LAYERS[depth + 1 :] for file in layer}
    all_modules = {file.removesuffix(".py").replace("/", ".") for layer in LAYERS for file in layer}
    for file in LAYERS[depth]:
        assert imports(FILES[file]) & all_modules <= below, file


@pytest.mark.parametrize("package", DOORS)
def test_a_dependency_has_few_doors(package: str) -> None:
    assert {file for file, tree in FILES.items() if package in {name.partition(".")[0] for name in imports(tree)}} == DOORS[
        package
    ]


def test_functions_are_short_and_public_ones_say_what_they_do() -> None:
    for file, tree in FILES.items():
        assert ast.get_docstring(tree), file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines < 60, f"{file}: {node.name} has {lines} lines"


def test_no_file_has_a_machines_path() -> None:
    for path in (p for p in ROOT.rglob("*") if p.suffix in {".py", ".sh", ".md", ".yaml", ".toml"} and ".venv" not in p.parts):
        assert "/".join(["", "work", ""]) not in path.read_text(), path
    assert Path(__file__).exists()
