"""The house rules that a machine can check, checked over the source. Style is not discussed in review; it fails here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_DIRS = ("keepwarm", "scripts", "tests", "bench", "docs", "examples", ".ci")
SOURCE_SUFFIXES = {".py", ".md", ".toml", ".html", ".css", ".js", ".mako", ".ini", ""}

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 80
LONG_FILES: dict[str, str] = {}  # path: why it is one story and not two
LONG_FUNCTIONS: dict[str, str] = {}  # path:function: why it is one story and not two

JUNK_DRAWERS = {"base", "common", "helper", "helpers", "misc", "tools_misc", "util", "utils"}
VAGUE_CLASS = re.compile(r"(Manager|Handler|Processor|Helper|Wrapper|Factory)$")
# Split, so that this file does not find itself.
LEFTOVER = re.compile("|".join((r"\bTO" + "DO", r"\bFIX" + "ME", r"\bXX" + r"X\b")))
MACHINE_PATH = re.compile("|".join(("/wo" + "rk/", "/tmp/" + r"w\b", "/ro" + "ot/", "/ho" + r"me/\w")))

MUTABLE_CALLS = {
    "list",
    "dict",
    "set",
    "bytearray",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "WeakValueDictionary",
}
MUTATING_METHODS = {
    "append", "extend", "insert", "pop", "remove", "clear", "add", "discard", "update", "setdefault", "popitem", "sort",
}  # fmt: skip


def source_files() -> list[Path]:
    """Every text file of the project. Walked, not asked of git: a checkout may have no git beside it."""
    found = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    for name in SOURCE_DIRS:
        found += [path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted(path for path in found if path.suffix in SOURCE_SUFFIXES)


def python_files(*names: str) -> list[Path]:
    return [path for path in source_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in names]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PACKAGE = python_files("keepwarm")
PYTHON = python_files("keepwarm", "scripts", "tests", "bench")
package = pytest.mark.parametrize("path", PACKAGE, ids=shown)
python = pytest.mark.parametrize("path", PYTHON, ids=shown)
text = pytest.mark.parametrize("path", source_files(), ids=shown)


def test_the_walk_finds_the_project() -> None:
    names = {shown(path) for path in source_files()}
    assert {"keepwarm/config.py", "Makefile", "pyproject.toml", "README.md", "tests/test_tidy.py", ".ci/run"} <= names


@python
def test_no_junk_drawers(path: Path) -> None:
    vague = [part for part in (*path.relative_to(ROOT).parts[:-1], path.stem) if part in JUNK_DRAWERS]
    assert not vague, f"{shown(path)}: name a file after its concept, not {vague[0]!r}"


@python
def test_class_names_say_what_it_is(path: Path) -> None:
    vague = [
        node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef) and VAGUE_CLASS.search(node.name)
    ]
    assert not vague, f"{shown(path)}: {vague}: use the domain's noun"


@pytest.mark.parametrize("path", python_files("keepwarm", "scripts", "bench"), ids=shown)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), f"{shown(path)} has no module docstring"


@text
def test_nothing_is_left_over(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not LEFTOVER.search(line), f"{shown(path)}:{number}: file an issue instead: {line.strip()}"
        assert not MACHINE_PATH.search(line), f"{shown(path)}:{number}: a path of one machine: {line.strip()}"


@package
def test_files_are_short(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= FILE_LINES_MAX or shown(path) in LONG_FILES, f"{shown(path)} has {n_lines} lines"


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{shown(path)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


@package
def test_functions_are_short(path: Path) -> None:
    long = {name: n for name, n in functions(path) if n > FUNCTION_LINES_MAX and name not in LONG_FUNCTIONS}
    assert not long, f"more than {FUNCTION_LINES_MAX} lines: {long}"


def test_allow_lists_hold_only_what_needs_them() -> None:
    lengths = {name: n for path in PACKAGE for name, n in functions(path)}
    assert all(lengths.get(name, 0) > FUNCTION_LINES_MAX for name in LONG_FUNCTIONS)
    assert all(len((ROOT / name).read_text(encoding="utf-8").splitlines()) > FILE_LINES_MAX for name in LONG_FILES)


def called_name(node: ast.expr) -> str:
    """`deque` of `deque()`, `collections.deque()` and `deque[int]()`."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
        case ast.Subscript():
            return called_name(node.value)
        case _:
            return ""


def is_mutable(value: ast.expr | None) -> bool:
    match value:
        case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call(func=func):
            return called_name(func) in MUTABLE_CALLS
        case _:
            return False


def module_level(tree: ast.Module) -> dict[str, ast.expr | None]:
    """Names assigned at module level, with what they are assigned."""
    found: dict[str, ast.expr | None] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=targets, value=value):
                found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                found[name] = value
    return found


def mutated_names(tree: ast.Module) -> set[str]:
    """Names that are written through somewhere in the module: NAME[k] = v, del NAME[k], NAME |= v, NAME.append(v)."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                found.add(name)
            case ast.AugAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if attr in MUTATING_METHODS:
                found.add(name)
    return found


def mutable_state(tree: ast.Module) -> list[str]:
    """Module-level state that can change: a mutable value that is no table in capitals or is written to; a global; a memo."""
    tables = {name: value for name, value in module_level(tree).items() if is_mutable(value) and name != "__all__"}
    written = mutated_names(tree)
    found = [name for name in tables if not name.lstrip("_").isupper() or name in written]
    found += [f"global {', '.join(node.names)}" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [f"@cache {node.name}" for decorator in node.decorator_list if is_unbounded_memo(decorator)]
    return found


def is_unbounded_memo(decorator: ast.expr) -> bool:
    match decorator:
        case ast.Name(id="cache") | ast.Attribute(attr="cache"):
            return True
        case ast.Call(func=func, keywords=keywords) if called_name(func) == "lru_cache":
            return any(
                k.arg == "maxsize" and isinstance(k.value, ast.Constant) and k.value.value is None for k in keywords
            )
        case _:
            return False


@package
def test_modules_keep_no_state(path: Path) -> None:
    assert not mutable_state(parsed(path)), f"{shown(path)}: state belongs to an object that someone owns"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("seen = []", ["seen"]),
        ("seen: dict[str, int] = {}", ["seen"]),
        ("import collections\nqueue = collections.deque()", ["queue"]),
        ("TABLE = {1: 2}", []),
        ("TABLE = {1: 2}\ndef f():\n    TABLE[1] = 3", ["TABLE"]),
        ("NAMES = [1]\ndef f():\n    NAMES.append(3)", ["NAMES"]),
        ("NAMES = (1, 2)\n__all__ = ['f']", []),
        ("n = 0\ndef f():\n    global n\n    n = 1", ["global n"]),
        ("@functools.cache\ndef f(): ...", ["@cache f"]),
        ("@lru_cache(maxsize=None)\ndef f(): ...", ["@cache f"]),
        ("@lru_cache(maxsize=64)\ndef f(): ...", []),
    ],
)
def test_the_state_rule_itself(source: str, expected: list[str]) -> None:
    assert mutable_state(ast.parse(source)) == expected
