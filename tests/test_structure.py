"""How the code hangs together: no state of modules that functions change, no import that leads back, nothing long."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_longnet"
FILES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}

MUTATORS = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "move_to_end", "pop", "popitem", "popleft",
    "remove", "reverse", "setdefault", "sort", "update",
}  # fmt: skip
# What modules may keep, and why nobody sees it from outside.
ALLOWED = {
    "plan_blocks keeps results": "a pure function of numbers and a schedule",
    "plan_bands keeps results": "a pure function of numbers and a schedule",
    "_head_groups keeps results": "a pure function of numbers and a schedule",
    "plan_token keeps results": "a pure function of numbers and a schedule",
    "read_layout_name keeps results": "a pure function of a text",
    "_tables keeps results": "a pure function of numbers, a schedule and a device",
    "_from_json keeps results": "a pure function of a text",
    "from_text keeps results": "a pure function of a text",
    "eager_attention_of keeps results": "a module that is loaded stays what it is",
    "plan_launches keeps results": "a pure function of numbers and a schedule",
    "plan_exchange keeps results": "a pure function of numbers, a schedule and a device",
}  # fmt: skip


def bound_names(function: ast.AST) -> set[str]:
    """The names that a function makes its own: parameters, and what it assigns without `global`."""
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
    shared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not function:
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names - shared


def root(node: ast.AST) -> str | None:
    """The name that an attribute or an item is reached from."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed_names(node: ast.AST) -> Iterator[tuple[str | None, str]]:
    """Names whose objects this node changes, and how."""
    targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
    for target in targets:
        for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            if isinstance(part, (ast.Attribute, ast.Subscript)):
                yield root(part), "is written into"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        yield root(node.func), f"is changed by .{node.func.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        yield root(node.args[0]), f"is changed by {node.func.id}"


def module_state(source: str) -> list[str]:
    """What functions of a module change of the module's own, or keep from one call to the next."""
    tree, found = ast.parse(source), []
    own = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for statement in tree.body:
        own |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {statement.name} if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else set()

    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {alias.asname or alias.name for node in imports for alias in node.names}

    def visit(node: ast.AST, local: set[str], is_inside: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for decorator in getattr(node, "decorator_list", ()):
                if {"cache", "lru_cache"} & {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(decorator)}:
                    found.append(f"{node.name} keeps results")
            local, is_inside = local | bound_names(node), True
        if is_inside:
            if isinstance(node, ast.Global):
                found.extend(f"{name} is bound anew" for name in node.names)
            changed = [pair for pair in changed_names(node) if pair[0] in own - local]
            # A function of another module (`np.sort(x)`) may have a method's name.
            found.extend(f"{name} {how}" for name, how in changed if name not in modules or "by ." not in how)
        for child in ast.iter_child_nodes(node):
            visit(child, local, is_inside)

    visit(tree, set(), False)
    return found


def test_no_function_changes_what_its_module_holds():
    found = {(what, name) for name, path in FILES.items() for what in module_state(path.read_text())}
    assert not {(what, name) for what, name in found if what not in ALLOWED}


@pytest.mark.parametrize("planted", [
    "STATE = None\ndef f():\n    global STATE\n    STATE = 1",
    "STATE = {}\ndef f(key):\n    STATE[key] = 1",
    "STATE = {}\ndef f(key):\n    del STATE[key]",
    "STATE = {'a': []}\ndef f(key):\n    STATE['a'].append(key)",
    "STATE = set()\nclass A:\n    def f(self):\n        STATE.add(self)",
    "STATE: list = []\ndef f():\n    def g():\n        STATE.append(1)",
    "STATE = [0]\ndef f():\n    STATE[0] += 1",
    "from .other import STATE\nf = lambda: STATE.clear()",
    "class A:\n    running = None\ndef f(x):\n    A.running = x",
    "def f(x):\n    f.last = x",
    "class A: pass\ndef f(x):\n    setattr(A, 'running', x)",
    "try:\n    import a\nexcept ImportError:\n    a = None\ndef f(x):\n    a.b = x",
    "import functools\n@functools.lru_cache(maxsize=None)\ndef f(x): return x",
])  # fmt: skip
def test_planted_state_is_found(planted):
    assert len(module_state(planted)) == 1


@pytest.mark.parametrize("harmless", [
    "STATE = {}\nSTATE['a'] = 1",
    "STATE = {}\ndef f(STATE):\n    STATE['a'] = 1",
    "STATE = {}\ndef f():\n    STATE = {}\n    STATE.update(a=1)\n    return STATE",
    "try:\n    import a\nexcept ImportError:\n    a = None\ndef f(x):\n    return a.sort(x)",
    "STATE = {}\nclass A:\n    def f(self):\n        self.x = STATE['a']\n        self.y.append(STATE)",
])  # fmt: skip
def test_what_is_a_functions_own_is_not_found(harmless):
    assert module_state(harmless) == []


def imports_of(name: str) -> set[str]:
    tree = ast.parse(FILES[name].read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_no_import_leads_back():
    below: dict[str, set[str]] = {}

    def visit(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, f"a circle: {' > '.join((*path, name))}"
        if name not in below:
            below[name] = set().union(*({other} | visit(other, (*path, name)) for other in imports_of(name)))
        return below[name]

    for name in FILES:
        visit(name, ())
    upper = {n for n in FILES if n.startswith(("dilated_cache", "modeling_", "patch", "sequence_", "memory_patch"))}
    for name in ("dilated_attention", "attention_blocks", "sequence_exchange", "document_ids"):
        assert not below[name] & upper, f"{name} imports from above it"
    # Parallelism and patching act from outside, and only tests know the definition.
    assert not {n for n in below["modeling_longnet"] if n.startswith(("patch", "sequence_"))}
    assert imports_of("dilated_attention_reference") == set()
    assert {name for name in FILES if "dilated_attention_reference" in imports_of(name)} == {"__init__"}


LONGEST_FUNCTION, LONGEST_FILE = 60, 450  # lines, docstrings counted


def too_long(source: str) -> list[str]:
    """What of a file is too long without a head that says why: `# Longer than other functions: ...` directly above a
    function and its decorators, "Longer than other files: ..." in the docstring of a file."""
    tree, lines, found = ast.parse(source), source.splitlines(), []
    docstring = " ".join((ast.get_docstring(tree) or "").split())
    if len(lines) > LONGEST_FILE and "Longer than other files: " not in docstring:
        found.append("the file")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            head = lines[first - 2].strip() if first > 1 else ""
            is_long = node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
            if is_long and not head.startswith("# Longer than other functions: "):
                found.append(node.name)
    return found


@pytest.mark.parametrize("folder", ["modeling_longnet", "conversion", "examples"])
def test_what_is_long_says_why(folder):
    found = {str(path): too_long(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert found and not {path: names for path, names in found.items() if names}


LONG = "def f():\n" + "    pass\n" * 60
HEAD = "# Longer than other functions: a test.\n"


@pytest.mark.parametrize("source, found", [
    (LONG, ["f"]),
    (LONG.replace("    pass\n", "", 1), []),
    ("import a\n" + HEAD + LONG, []),
    (HEAD + "@a\n" + LONG, []),
    ("@a\n" + LONG.replace("    pass\n", "", 1), []),
    (HEAD + "\n" + LONG, ["f"]),
    ("class A:\n    async def f(self):\n" + "        pass\n" * 60, ["f"]),
    ("x = 1\n" * 451, ["the file"]),
    ("x = 1\n" * 450, []),
    ('"""Longer than other\nfiles: a test."""\n' + "x = 1\n" * 451, []),
])  # fmt: skip
def test_what_is_too_long_is_found(source, found):
    assert too_long(source) == found
