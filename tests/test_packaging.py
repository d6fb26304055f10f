"""What is shipped, what an import costs, and what may stand in the files that travel to the Hub."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_longnet"
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # as Transformers looks for them
OPTIONAL = ["triton", "flash_attn", "peft", "accelerate", "datasets", "matplotlib", "trl", "xformers", "gguf"]


def travelling_files() -> list[Path]:
    """The model and configuration files and whatever they import, directly or through each other."""
    pending = ["modeling_longnet", "configuration_longnet", "modeling_longnet_slide_encoder", "modeling_longvit",
               "dilated_attention"]  # fmt: skip
    names = set()
    while pending:
        name = pending.pop()
        if name not in names and (PACKAGE / f"{name}.py").is_file():
            names.add(name)
            pending += RELATIVE_IMPORT.findall((PACKAGE / f"{name}.py").read_text())
    return [PACKAGE / f"{name}.py" for name in sorted(names)]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_exactly_the_package(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *(f"modeling_longnet/{p.name}" for p in
                 PACKAGE.glob("*.py"))):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    run_python(f"import os; os.chdir({str(source)!r}); {build}")
    (wheel,) = wheels.glob("longnet_transformers-*.whl")
    files = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(files) == sorted(f"modeling_longnet/{path.name}" for path in PACKAGE.glob("*.py"))


def test_the_package_is_flat_and_the_only_one():
    found = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    made = {path for path in found if path.parts[0] in ("build", "runs") or path.parts[0].startswith(".venv")}
    assert found - made == {PACKAGE.relative_to(ROOT)}
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_importing_the_package_loads_no_optional_library():
    """Beyond those that Transformers' own base modules load where they are installed."""
    loaded = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    base = "import sys, torch, transformers.modeling_utils, transformers.generation; "
    before = run_python(base + loaded).split()
    after = run_python(base + "import modeling_longnet; from modeling_longnet import *; " + loaded).split()
    assert not (set(after) - set(before)) & set(OPTIONAL)


def test_the_package_imports_where_no_optional_library_exists():
    absent = [name for name in OPTIONAL if name != "triton"]  # torch itself asks for triton in its own ways
    without = f"import sys; sys.modules.update(dict.fromkeys({absent})); "
    run_python(without + "import modeling_longnet; from modeling_longnet import *")


@pytest.mark.parametrize("script", ["lora_finetune", "train_causal_lm"])
def test_scripts_start_in_a_checkout_that_is_not_installed(script):
    """By the folder that they are called in alone, not by an editable install."""
    run_python(
        f"import os, runpy, sys; root = {str(ROOT.resolve())!r}; sys.argv = ['script', '--help']\n"
        "sys.path = [path for path in sys.path if path and os.path.realpath(path) != root]\n"
        "os.chdir(root); sys.path.insert(0, '')\n"
        f"try: runpy.run_module('examples.{script}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code"
    )


def module_level_imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Imports that run with the module, except those inside `try`, which may fail."""
    found, pending = [], list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif not isinstance(node, (ast.Try, ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", travelling_files(), ids=lambda path: path.stem)
def test_travelling_files_import_only_what_every_user_has(path):
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for node in module_level_imports(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert (PACKAGE / f"{node.module}.py").is_file(), ast.unparse(node)
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= allowed, ast.unparse(node)


@pytest.mark.parametrize("path", travelling_files(), ids=lambda path: path.stem)
def test_no_text_of_travelling_files_looks_like_a_relative_import(path):
    """Transformers finds relative imports with a regular expression, in docstrings too."""
    source = path.read_text()
    tree = ast.walk(ast.parse(source))
    real = {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.level}
    assert set(RELATIVE_IMPORT.findall(source)) == real


def test_contributing_stays_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def test_readme_shows_a_result_early():
    head = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any(re.search(r"\d", line) for line in head if line.startswith("|")), "no table with numbers before line 40"


def test_first_readme_example_runs_and_reads_its_context(tmp_path):
    """What it generates depends on all of the text before, so that a cache that went lost would show."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    check = """
found = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
assert len(set(found[-20:].tolist())) > 10, found
assert found.equal(model.generate(**prompt, max_new_tokens=20, do_sample=False, use_cache=False)[0])
"""
    before = f"import os, sys; sys.path.insert(0, os.getcwd()); os.chdir({str(tmp_path)!r})\n"
    assert run_python(before + "import torch; torch.manual_seed(0)\n" + code + check).strip()
