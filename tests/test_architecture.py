"""The rooms: every arrow goes one way, every name is in one place, importing loads little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import arkv_fx
from arkv_fx.models import random_model

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def rooms() -> list[str]:
    """The rooms as ARCHITECTURE.md lists them, the highest first."""
    block = re.search(r"```rooms\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert block is not None
    return block[1].split()


Tree = Mapping[str, str]
"""The text of each module."""


def our_tree() -> Tree:
    tree = {}
    for folder, package in ((ROOT / "arkv_fx", "arkv_fx"), (ROOT / "passes", "arkv_fx.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            tree[name] = path.read_text()
    return tree


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name or "") of every import, in functions too; not those for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where they lead"
            yield from ((str(child.module), alias.name) for alias in child.names)
        yield from imported(child)


def arrows(tree: Tree) -> dict[str, set[str]]:
    """Which modules of the tree each of its modules imports."""
    found: dict[str, set[str]] = {}
    for module, text in tree.items():
        asked = imported(ast.parse(text))
        targets = {next((m for m in (f"{a}.{b}", a) if m in tree), "") for a, b in asked}
        found[module] = targets - {"", "arkv_fx"}  # the package's own file imports on demand
    return found


def check_no_circle(graph: Mapping[str, Iterable[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(reversed(error.args[1]))}") from None


def check_downward(tree: Tree, order: list[str]) -> None:
    """Every import leads to the same room or to a lower one, so no walk comes back to a room."""
    graph = arrows(tree)
    check_no_circle(graph)
    found = {room(module) for module in tree} - {"arkv_fx"}
    assert found == set(order), "ARCHITECTURE.md lists other rooms than there are"
    up = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if module != "arkv_fx" and order.index(room(target)) < order.index(room(module))
    ]
    assert not up, f"upwards: {up}"


def check_names(tree: Tree, taken: set[str]) -> None:
    """No module is called as another one, or as something that is ``taken``."""
    names: dict[str, list[str]] = {}
    for module in tree:
        names.setdefault(module.rpartition(".")[2], []).append(module)
    twice = [modules for modules in names.values() if len(modules) > 1]
    assert not twice, f"one name in two places: {twice}"
    hiding = [modules[0] for name, modules in names.items() if name in taken]
    assert not hiding, f"called as something else: {hiding}"


def taken_names() -> set[str]:
    """Functions and classes of ours, modules of Python, packages that we depend on."""
    ours = {name for name in arkv_fx.__all__ if f"arkv_fx.{name}" not in our_tree()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    needed = {canonicalize_name(Requirement(line).name).replace("-", "_") for line in lines}
    return ours | (needed - {"arkv_fx"}) | set(sys.stdlib_module_names)


def test_every_import_leads_down() -> None:
    tree = our_tree()
    assert len(tree) > 100 and len(arrows(tree)["arkv_fx.ops.attend"]) > 5
    check_downward(tree, rooms())


def test_no_name_is_in_two_places() -> None:
    tree, taken = our_tree(), taken_names()
    check_names(tree, taken)


def stations() -> list[tuple[str, str]]:
    """(file, function) of each station of a key's way."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return re.findall(r"^\| \d+ \| `(\S+)` \| `(\S+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("file, function", stations())
def test_stations_are_there(file: str, function: str) -> None:
    body = ast.parse((ROOT / file).read_text()).body
    for name in function.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        ]
        assert found, f"{file} has no {function}"
        body = found[0].body


def test_the_way_is_short() -> None:
    assert 5 <= len(stations()) <= 10


SMALL = {
    "arkv_fx": "",
    "arkv_fx.high": "from arkv_fx.low import one",
    "arkv_fx.low": "",
    "arkv_fx.low.one": "import arkv_fx.low.two",
    "arkv_fx.low.two": "import torch",
}


@pytest.mark.parametrize(
    "module, text, says",
    [
        ("arkv_fx.low.two", "from arkv_fx.low import one", "a circle: .*one -> .*two"),
        ("arkv_fx.low.two", "def later():\n    import arkv_fx.high", "a circle"),
        ("arkv_fx.low.three", "from arkv_fx import high", "upwards: .*low.three imports .*high"),
        ("arkv_fx.low.three", "if True:\n    from arkv_fx.high import x", "upwards"),
        ("arkv_fx.attic", "", "other rooms"),
    ],
)
def test_wrong_arrows_are_noticed(module: str, text: str, says: str) -> None:
    """Negative controls."""
    check_downward(SMALL, ["high", "low"])
    for_types = "if TYPE_CHECKING:\n    from arkv_fx.high import x"
    check_downward({**SMALL, "arkv_fx.low.two": for_types}, ["high", "low"])
    with pytest.raises(AssertionError, match=says):
        check_downward({**SMALL, module: text}, ["high", "low"])


@pytest.mark.parametrize(
    "module, says",
    [
        ("arkv_fx.high.one", "two places"),
        ("arkv_fx.low.transform", "something else"),
        ("arkv_fx.low.statistics", "something else"),
        ("arkv_fx.low.onnx", "something else"),
    ],
)
def test_wrong_names_are_noticed(module: str, says: str) -> None:
    """Negative controls."""
    check_names(SMALL, taken_names())
    with pytest.raises(AssertionError, match=says):
        check_names({**SMALL, module: ""}, taken_names())


# What runs, not what is imported


def walk(run: object) -> set[tuple[str, ...]]:
    """The rooms of every stack of calls, from the outside in; those in a row as one."""
    stack: list[str] = []
    found: set[tuple[str, ...]] = set()

    def note(frame: object, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")  # type: ignore[attr-defined]
        if not module.startswith("arkv_fx."):
            return
        if event == "call":
            stack.append(room(module))
            rooms = [r for i, r in enumerate(stack) if i == 0 or stack[i - 1] != r]
            found.add(tuple(rooms))
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(note)
    try:
        run()  # type: ignore[operator]
    finally:
        sys.setprofile(None)
    return found


def check_walks(walks: set[tuple[str, ...]]) -> None:
    back = {walk for walk in walks if len(set(walk)) < len(walk)}
    assert not back, f"comes back to a room: {sorted(back, key=len)[:5]}"


@torch.no_grad()
def test_a_walk_to_the_first_tokens_visits_no_room_twice() -> None:
    model = random_model("llama")
    config = arkv_fx.ArkvConfig(budget=24, window=4, sinks=2)

    def run() -> None:
        arkv_fx.transform(model, config, compile="eager")
        model.generate(torch.arange(1, 41)[None], max_new_tokens=8, do_sample=False)

    walks = walk(run)
    assert ("transforming", "huggingface", "compile", "ops", "kernels", "formats") in walks
    check_walks(walks)


def test_coming_back_is_noticed() -> None:
    """Negative control."""
    check_walks({("huggingface", "compile", "ops"), ("compile", "state")})
    with pytest.raises(AssertionError, match="comes back"):
        check_walks({("huggingface", "compile", "huggingface")})


# What is installed, and what importing it loads


def test_every_folder_is_installed() -> None:
    """The list of packages is written by hand, because passes/ lies elsewhere."""
    top = [*(ROOT / "arkv_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    folders = {path.parent.relative_to(ROOT) for path in top}
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)
    names = {".".join(folder.parts) for folder in folders}
    packages = {name if name.startswith("arkv_fx") else f"arkv_fx.{name}" for name in names}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def loaded(*args: str) -> set[str]:
    """Top-level modules that a fresh interpreter loads, by its own account of imports."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *args],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = re.findall(r"^import time:.*\| +(\S+)$", run.stderr, re.MULTILINE)
    assert len(lines) > 50
    return {name.partition(".")[0] for name in lines}


HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "numpy"}


def test_importing_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded("-c", "import arkv_fx, arkv_fx.errors; arkv_fx.errors.ArkvError")


def test_the_commands_help_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded("-m", "arkv_fx.cli", "--help")


def test_a_heavy_import_is_noticed() -> None:
    """Negative control."""
    assert "torch" in loaded("-c", "import arkv_fx; arkv_fx.ArkvConfig")


def test_the_version_has_one_home() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "arkv_fx.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", arkv_fx.__version__)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(arkv_fx, name) for name in arkv_fx.__all__)
    assert issubclass(arkv_fx.errors.ConfigError, arkv_fx.errors.ArkvError)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = arkv_fx.nonsense
