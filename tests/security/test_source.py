"""What may not stand in the package at all, found in its syntax trees and not by searching for words."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "trainkit"
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "dill", "cloudpickle", "joblib", "shelve", "telnetlib", "ftplib"}
"""Modules that run what they read, or talk to machines in the open."""
NAMES = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
CALLS = {
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.Loader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
    "yaml.CLoader",
    "os.system",
    "os.popen",
    "os.execv",
    "os.execvp",
    "os.spawnv",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "importlib.import_module",
    "runpy.run_path",
    "runpy.run_module",
    "pandas.read_pickle",
}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code", "weights_only", "allow_all_kernels"}
"""Arguments that may be given the literal False, or nothing at all."""
AUTO_CLASSES = {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel", "AutoProcessor"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression; '' where it is none."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_by_trust(options: ast.expr) -> bool:
    """Whether ``**options`` are made by the one function that says whether code may be run, here or a line above."""
    return (isinstance(options, ast.Call) and dotted(options.func) == "code_options") or dotted(options) == "by_trust"


def faults(tree: ast.AST) -> list[str]:
    """What stands in ``tree`` and may not, each with its line."""
    found = []
    for node in ast.walk(tree):
        said: list[str] = []
        if isinstance(node, ast.Import):
            said = [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{name.name}" for name in node.names]
            said = [name for name in full if name.split(".")[0] in MODULES or name in CALLS]
        elif isinstance(node, ast.Attribute):
            said = [dotted(node)] if dotted(node) in CALLS else []
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            said = [called] if called in NAMES else []
            said += [
                f"{keyword.arg}="
                for keyword in node.keywords
                if keyword.arg in KEYWORDS
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
            owner, _, method = called.rpartition(".")
            refuses = any(
                keyword.arg == "trust_remote_code" or (keyword.arg is None and is_by_trust(keyword.value))
                for keyword in node.keywords
            )
            if owner in AUTO_CLASSES and method in ("from_pretrained", "from_config") and not refuses:
                said.append(f"{called} without trust_remote_code")
        elif isinstance(node, ast.Constant) and node.value in KEYWORDS:  # in a dict of options
            said = [f"'{node.value}'"]
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in said]
    return found


ALLOWED = {
    # the name of a key that other tools know, with the sentence that our reader answers it with
    "recipe/foreign_names.py": {"'trust_remote_code'"},
    # the one place where it may be true
    "model/trusted_code.py": {"'trust_remote_code'"},
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_runs_what_it_reads(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    found = [fault for fault in faults(ast.parse(path.read_text())) if fault.partition(": ")[2] not in allowed]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "f = torch.load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "np.load(path, allow_pickle=True)",
        "model(trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, **options)",
        "importlib.import_module(name)",
    ],
)
def test_the_search_finds(text: str) -> None:
    assert faults(ast.parse(text))


def test_what_is_harmless_is_not_found() -> None:
    text = "yaml.safe_load(text)\nAutoConfig.from_pretrained(folder, trust_remote_code=False)\nsubprocess.run(['ls'])\n"
    text += "AutoConfig.from_pretrained(folder, **code_options(code))\n"
    assert not faults(ast.parse(text))
