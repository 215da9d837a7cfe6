"""The shape of the code: rooms one above the other, outside dependencies with few doors, functions that stay short."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in ROOT.glob("distrib/**/*.py")}
FILES = PACKAGE | {"train.py": ast.parse((ROOT / "train.py").read_text())}
ROOMS = [  # from the top down: each imports only from those below it
    ["train.py", "distrib/__main__.py"],
    ["distrib/cli.py"],
    ["distrib/run.py", "distrib/inference", "distrib/scale"],
    ["distrib/training"],
    ["distrib/reporting"],
    ["distrib/data", "distrib/models"],
    ["distrib/runtime"],
    ["distrib/registry.py", "distrib/command_line.py"],
    ["distrib/keys.py"],
    ["distrib/config.py"],
    ["distrib/schema.py"],
    ["distrib/errors.py"],
]
WITHIN = {  # the same inside a room
    "distrib/training": [
        ["loop"],
        ["health", "evaluation", "identity", "format1", "freezing"],
        ["context", "memory", "parallel"],
        ["state", "replay", "precision", "optim"],
        ["records", "objective", "groups", "muon"],
        ["meters"],
    ],
    "distrib/data": [
        ["loaders", "sharing", "scan"],
        ["workers"],
        ["files", "augment", "datasets", "shared_memory"],
        ["source", "steps", "listing", "resize"],
        ["pixels"],
    ],
    "distrib/models": [
        ["build"],
        ["weights", "cnn", "airbench"],
        ["depth"],
        ["of_torchvision", "of_timm", "weight_files"],
        ["layers"],
    ],
    "distrib/reporting": [["log", "runs"]],
    "distrib/runtime": [
        ["run_folder", "watchdog", "exits", "attempts", "saver"],
        ["checkpoint", "status", "lease", "stop_vote", "stopwatch"],
        ["disk", "ranks", "signals"],
        ["control_channel"],
        ["connection"],
        ["environment", "stacks"],
    ],
    "distrib/inference": [["export"], ["graph", "card", "evaluate", "predict"], ["classifier"]],
    "distrib/scale": [["prediction"], ["step"], ["network"], ["cluster"]],
}
DOORS = {
    "accelerate": {
        f"distrib/{name}.py"
        for name in (
            "run",
            "runtime/ranks",
            "training/context",
            "training/evaluation",
            "training/freezing",
            "training/health",
            "training/memory",
            "training/parallel",
        )
    },
    "omegaconf": {"distrib/command_line.py"},
    "yaml": {"distrib/command_line.py"},
    "tensorboard": set(),
    "tqdm": {"distrib/reporting/log.py", "distrib/data/scan.py", "distrib/inference/export.py"},
    "torchvision": {
        "distrib/data/datasets.py",
        "distrib/models/build.py",
        "distrib/models/of_torchvision.py",
        "distrib/models/weights.py",
    },
    "onnx": {"distrib/inference/graph.py"},
    "onnxruntime": {"distrib/inference/graph.py"},
    "timm": {"distrib/models/of_timm.py"},
    "PIL": {"distrib/data/pixels.py", "distrib/data/scan.py"},
}
NO_TORCH = [  # what is imported before a mistake in the command line is answered
    "cli", "command_line", "keys", "config", "schema", "errors", "registry",
    "__init__", "data/__init__", "models/__init__", "training/__init__",
    "reporting/runs", "runtime/__init__", "runtime/exits", "runtime/signals", "runtime/stacks", "runtime/environment",
    "runtime/status", "runtime/disk",
]  # fmt: skip


def imports(tree: ast.AST) -> set[str]:
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


def modules(file: str) -> set[str]:
    """The files of the package that a file imports."""
    paths = {f"{name.replace('.', '/')}.py" for name in imports(FILES[file])}
    packages = {f"{name.replace('.', '/')}/__init__.py" for name in imports(FILES[file])}
    return (paths | packages) & FILES.keys() - {"distrib/__init__.py"}


def room(file: str) -> int:
    """How far from the top a file's room is."""
    return next(
        depth for depth, rooms in enumerate(ROOMS) if any(file == each or file.startswith(f"{each}/") for each in rooms)
    )


@pytest.mark.parametrize("file", sorted(FILES.keys() - {"distrib/__init__.py"}))
def test_a_file_imports_only_from_the_rooms_below_it(file: str) -> None:
    own = str(Path(file).parent)
    for other in modules(file):
        if str(Path(other).parent) != own or own == "distrib":
            assert room(other) > room(file), f"{file} imports {other}"


@pytest.mark.parametrize("place", WITHIN)
def test_imports_inside_a_room_run_one_way(place: str) -> None:
    layers = [[f"{place}/{name}.py" for name in names] for names in WITHIN[place]]
    placed = {file for layer in layers for file in layer}
    assert placed == {file for file in FILES if file.startswith(f"{place}/") and not file.endswith("__init__.py")}
    for depth, layer in enumerate(layers):
        below = {file for lower in layers[depth + 1 :] for file in lower}
        for file in layer:
            assert modules(file) & placed <= below, file


@pytest.mark.parametrize("package", DOORS)
def test_a_dependency_has_few_doors(package: str) -> None:
    found = {file for file, tree in FILES.items() if package in {name.partition(".")[0] for name in imports(tree)}}
    assert found == DOORS[package]


@pytest.mark.parametrize("name", NO_TORCH)
def test_what_answers_a_mistake_imports_no_torch_at_once(name: str) -> None:
    at_once = ast.Module([node for node in FILES[f"distrib/{name}.py"].body if not isinstance(node, ast.FunctionDef)], [])
    assert not {"torch", "accelerate", "torchvision", "numpy"} & {each.partition(".")[0] for each in imports(at_once)}


def test_the_whole_can_be_read_in_an_afternoon() -> None:
    lengths = []
    for file, tree in PACKAGE.items():
        assert ast.get_docstring(tree), file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lengths.append((node.end_lineno or 0) - node.lineno + 1)
                assert lengths[-1] <= 45, f"{file}: {node.name} has {lengths[-1]} lines"
        assert (ROOT / file).read_text().count("\n") <= 300, file
    assert sorted(lengths)[len(lengths) * 9 // 10] <= 18
    lines = sum((ROOT / file).read_text().count("\n") for file in PACKAGE if not file.startswith("distrib/scale/"))
    assert lines <= 8_900, lines


def test_the_loop_waits_for_nothing_and_calls_back_nobody() -> None:
    text = (ROOT / "distrib/training/loop.py").read_text()
    assert ".item()" not in text
    assert "callback" not in text


def test_no_file_has_a_machines_path() -> None:
    checked = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".sh", ".md", ".yaml", ".toml"} and ".venv" not in p.parts]
    assert len(checked) > 100
    for path in checked:
        assert "/".join(["", "work", ""]) not in path.read_text(), path
