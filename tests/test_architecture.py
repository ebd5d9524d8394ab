"""The shape of LATENTWIRE.py where ruff does not see it: sections, one-way order, sizes, help texts, pins, start-up.

What ruff sees is set in pyproject.toml, for instance that code which runs on import uses only names above it (F821).
Every `check_*` is a pure function from text (or plain values) to a list of readable violations. Each runs three
times: on a bad sample it must catch, on a good sample it must pass, and on the file itself.
"""

from __future__ import annotations

import ast
import bisect
import dis
import importlib
import inspect
import itertools
import os
import re
import shutil
import statistics
import subprocess
import symtable
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "LATENTWIRE.py"
FELLOWS = ("slurm/README.md", "latex/README.md", "latex/results/README.md", "tests/README.md")
SHIPPED = ("LATENTWIRE.py", "README.md", "CHANGELOG.md", "LOG.md", *FELLOWS)

MAX_LINES = 17_500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_MEDIAN_LINES = 7
MAX_HELP_LINE = 100
MAX_CALLS = 14  # from a command to the receiver's first forward pass
MAX_HELP_SECONDS, MAX_HELP_RATIO = 0.4, 3.4  # of processor time; or so many times what its libraries take alone
MAX_IMPORT_SECONDS, MAX_IMPORT_RATIO = 1.5, 1.2
HEAVY_MODULES = {"torch", "transformers", "datasets", "scipy", "matplotlib", "sklearn"}
FORBIDDEN = (r"TODO", r"FIXME", r"XXX", r"(?i:mock\s+mode)")

BANNER = re.compile(r"^# §(\d+) ([A-Z][A-Z &]+): (.+)$")
ALMOST_BANNER = re.compile(r"^#[\s#=*-]*§")
MAIN_GUARD = re.compile(r'^\s*if __name__ == "__main__":$')
SCRIPT_BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # the regex of PEP 723
PIN = re.compile(r"(?m)^([\w.-]+)==([\w.+!-]+)(?=\s|$)")
IMPORT_TIME = re.compile(r"(?m)^import time:\s*\d+\s*\|\s*\d+\s*\|\s*(\S+)\s*$")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DefinitionNode = FunctionNode | ast.ClassDef


# ---- reading the source ------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A banner: its number, its name and its line."""

    number: int
    name: str
    line: int


parse = cache(ast.parse)


@cache
def sections(source: str) -> tuple[Section, ...]:
    found = ((line, BANNER.match(text)) for line, text in enumerate(source.splitlines(), 1))
    return tuple(Section(int(m[1]), m[2], line) for line, m in found if m)


def section_at(source: str, line: int) -> Section:
    """The section a line belongs to; what stands above the first banner belongs to the first section."""
    known = sections(source) or (Section(0, "", 0),)
    return known[max(0, bisect.bisect_right([s.line for s in known], line) - 1)]


def stores(*body: ast.stmt) -> list[tuple[str, int]]:
    """(name, line) of all that statements bind at their own level, by their bytecode."""
    code = compile(ast.Module([*body], []), FILE.name, "exec")
    found = ((i.argval, i.positions) for i in dis.get_instructions(code) if i.opname == "STORE_NAME")
    return sorted({(name, at.lineno) for name, at in found if name != "__doc__"}, key=lambda one: one[1])


@cache
def top_level(source: str) -> dict[str, int]:
    """Every name bound at top level, with the line that binds it first."""
    return dict(reversed(stores(*parse(source).body)))


def scopes(table: symtable.SymbolTable, prefix: str = "") -> Iterator[tuple[str, symtable.SymbolTable]]:
    """Every scope below the module with its dotted name."""
    for child in table.get_children():
        yield prefix + child.get_name(), child
        yield from scopes(child, f"{prefix}{child.get_name()}.")


def names_read(source: str) -> Iterator[tuple[str, int, str]]:
    """(where, line, name): names of the module that functions, classes and annotations read."""
    for where, scope in scopes(symtable.symtable(source, FILE.name, "exec")):
        found = sorted(s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced())
        yield from ((f"{scope.get_type()} {where}", scope.get_lineno(), name) for name in found)
    for node in ast.walk(parse(source)):
        for note in filter(None, (getattr(node, "annotation", None), getattr(node, "returns", None))):
            yield from (("annotation", n.lineno, n.id) for n in ast.walk(note) if isinstance(n, ast.Name))


def outer(node: ast.AST) -> Iterator[ast.AST]:
    """What stands outside all functions and classes, and these themselves."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, DefinitionNode):
            yield from outer(child)


# ---- checks of the source ----------------------------------------------------------------------------------------


def check_banners(source: str) -> list[str]:
    """Banners read `# §N NAME: one line`, are numbered from 0 without gaps and stand between statements."""
    found = sections(source)
    wrong = [
        f"line {line}: not `# §N NAME: one line`: {text}"
        for line, text in enumerate(source.splitlines(), 1)
        if ALMOST_BANNER.match(text) and not BANNER.match(text)
    ]
    wrong += [f"line {s.line}: §{s.number} {s.name} should be §{i}" for i, s in enumerate(found) if s.number != i]
    names = [s.name for s in found]
    wrong += [f"line {s.line}: second section named {s.name}" for i, s in enumerate(found) if s.name in names[:i]]
    for node in parse(source).body:
        inside = (s for s in found if node.lineno <= s.line <= (node.end_lineno or 0))
        wrong += [f"line {s.line}: banner of §{s.number} inside the statement of line {node.lineno}" for s in inside]
    return wrong if found else [*wrong, "no section banner `# §N NAME: one line`"]


def check_section_list(source: str) -> list[str]:
    """The list of sections in the module docstring is the list of banners, word for word."""
    docs = (ast.get_docstring(parse(source)) or "").splitlines()
    listed = [line.strip() for line in docs if line.lstrip().startswith("§")]
    banners = [line[2:] for line in source.splitlines() if BANNER.match(line)]
    pairs = itertools.zip_longest(listed, banners, fillvalue="nothing")
    return [f"the docstring lists {one}; the banner is {other}" for one, other in pairs if one != other]


def check_section_order(source: str) -> list[str]:
    """A section uses, at every depth, only names that it or an earlier section defines."""
    wrong = []
    for where, line, name in names_read(source):
        here, there = section_at(source, line), section_at(source, top_level(source).get(name, 0))
        if there.line > here.line:
            wrong.append(f"{where} (§{here.number}, line {line}) uses {name} of §{there.number}")
    return wrong


def duplicates(body: Sequence[ast.stmt]) -> Iterator[str]:
    first: dict[str, tuple[int, bool]] = {}
    for node in body:
        found = stores(node)
        if isinstance(node, ast.If):
            yield from (*duplicates(node.body), *duplicates(node.orelse))
            found = [*dict(reversed(found)).items()]
        root = isinstance(node, ast.Import) and not any(a.asname for a in node.names)  # `import a.b` beside `import a`
        for name, line in found:
            if name in first and not (root and first[name][1]):
                yield f"line {line}: {name} is already bound on line {first[name][0]}"
            first.setdefault(name, (line, root))


def check_duplicates(source: str) -> list[str]:
    """No name is bound twice at top level, but once in each arm of an `if`."""
    return [*duplicates(parse(source).body)]


def check_main_guard(source: str) -> list[str]:
    """Exactly one `if __name__ == "__main__":`, as the last top-level statement."""
    lines = [i for i, line in enumerate(source.splitlines(), 1) if MAIN_GUARD.match(line)]
    wrong = [] if len(lines) == 1 else [f"{len(lines)} `__main__` guards (lines {lines}), expected exactly one"]
    if parse(source).body[-1].lineno not in lines:
        wrong.append("the last top-level statement is not the `__main__` guard")
    return wrong


def parameters(node: FunctionNode) -> int:
    """How many, with *args and **kwargs, which PLR0913 does not count, and without self and cls."""
    names = [n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def check_function_size(source: str) -> list[str]:
    """No function over MAX_FUNCTION_LINES or MAX_PARAMETERS, the median at most MAX_MEDIAN_LINES."""
    every = [n for n in ast.walk(parse(source)) if isinstance(n, FunctionNode)]
    lengths = [(f, (f.end_lineno or 0) - f.lineno + 1, "lines", MAX_FUNCTION_LINES) for f in every]
    sizes = [*lengths, *((f, parameters(f), "parameters", MAX_PARAMETERS) for f in every)]
    large = (one for one in sizes if one[1] > one[3])
    wrong = [f"function {f.name} (line {f.lineno}) has {n} {what}, at most {most}" for f, n, what, most in large]
    median = statistics.median([one[1] for one in lengths] or [0])
    return wrong + ([f"the median function has {median:g} lines"] if median > MAX_MEDIAN_LINES else [])


def is_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def check_statements(source: str) -> list[str]:
    """No `global`, no handler that does nothing; only §CLI prints and catches everything.

    Ruff's rules for these pass what re-raises (BLE001), `...` (S110) and loop targets (PLW0603), and know no sections.
    """
    wrong = []
    for node in ast.walk(parse(source)):
        faults = []
        if isinstance(node, ast.Global):
            faults.append(f"global {', '.join(node.names)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            faults.append("print( outside §CLI")
        if isinstance(node, ast.ExceptHandler):
            kinds = set(re.findall(r"\w+", ast.unparse(node.type))) if node.type else {""}
            faults += [f"except {kind} outside §CLI" for kind in kinds & {"", "Exception", "BaseException"}]
            faults += ["the handler does nothing"] if all(map(is_nothing, node.body)) else []
        outside = bool(faults) and section_at(source, getattr(node, "lineno", 0)).name != "CLI"
        wrong += [f"line {node.lineno}: {fault}" for fault in faults if outside or not fault.endswith("§CLI")]
    return wrong


def check_docstrings(source: str) -> list[str]:
    """Every public top-level function and class has a docstring; D103 asks it of what `__all__` names only."""
    public = (n for n in outer(parse(source)) if isinstance(n, DefinitionNode) and not n.name.startswith("_"))
    return [f"line {n.lineno}: {n.name} has no docstring" for n in public if not (ast.get_docstring(n) or "").strip()]


def check_length(source: str) -> list[str]:
    """The file stays under the limit."""
    lines = len(source.splitlines())
    return [f"{lines} lines, must be under {MAX_LINES}"] if lines >= MAX_LINES else []


def check_words(source: str) -> list[str]:
    """Shipped text has no leftovers."""
    found = ((i, re.search("|".join(FORBIDDEN), line)) for i, line in enumerate(source.splitlines(), 1))
    return [f"line {i}: {m[0]!r}" for i, m in found if m]


# ---- checks of pins, registries and start-up ---------------------------------------------------------------------


def check_pins(source: str, requirements: str) -> list[str]:
    """A PEP 723 header names Python and the dependencies, and requirements.txt pins each of them."""
    block = SCRIPT_BLOCK.search(source)
    header = tomllib.loads(re.sub(r"(?m)^# ?", "", block["content"])) if block else {}
    wrong = [f"PEP 723 header has no {key}" for key in ("requires-python", "dependencies") if not header.get(key)]
    pins = {canonicalize_name(name): version for name, version in PIN.findall(requirements)}
    for package in map(Requirement, header.get("dependencies", [])):
        version = pins.get(canonicalize_name(package.name))
        if not version:
            wrong.append(f"{package.name} is not pinned with == in requirements.txt")
        elif not package.specifier.contains(version, prereleases=True):
            wrong.append(f"requirements.txt pins {package.name}=={version}, the PEP 723 header asks {package}")
    return wrong


def check_help_text(part: Any) -> list[str]:
    """What is wrong with a registered part: it is a class or function, its docstring's first line its help text."""
    if not (inspect.isclass(part) or inspect.isroutine(part)):
        return [f"is an instance of {type(part).__name__}, not a class or function"]
    line = (part.__doc__ or "").split("\n")[0].strip()
    if not line:
        return ["has no first docstring line"]
    wrong = [] if line.endswith(".") else [f"help text does not end in '.': {line}"]
    return wrong if len(line) <= MAX_HELP_LINE else [*wrong, f"help text has {len(line)} characters: {line}"]


def check_registries(registries: Mapping[str, Any]) -> list[str]:
    """Registries and their parts have unique lower-case names, and every part has help text."""
    wrong = [] if registries else ["REGISTRIES is empty"]
    seen: set[tuple[str, str]] = set()
    for kind, registry in registries.items():
        wrong += [] if kind == kind.lower() else [f"registry {kind} is not lower-case"]
        wrong += [f"registry {k} is {kind} again" for k, r in registries.items() if r is registry and k < kind]
        for name, part in registry.items():
            wrong += [] if name == name.lower() else [f"{kind} {name}: name is not lower-case"]
            wrong += [f"{kind} {name}: name is registered twice"] if (kind, name) in seen else []
            wrong += [f"{kind} {name}: {fault}" for fault in check_help_text(part)]
            seen.add((kind, name))
    return wrong


# ---- samples: each check catches the bad and passes the good -----------------------------------------------------

GOOD = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "Safe_Tensors[all]==0.5.0; python_version > '3'"]
# ///
"""Sample in one sentence.

  §0 PRELUDE: imports
  §1 FIGURES & TABLES: drawing
  §2 CLI: commands
"""
# §0 PRELUDE: imports
from __future__ import annotations

import os
import os.path

if os.sep == "/":
    SEP = "slash"
elif os.sep == ":":
    SEP = "colon"
else:
    SEP = "other"

# §1 FIGURES & TABLES: drawing
NAMES = [os for os in ("a", "b")]  # §3 is where it is used


class Later:
    """Refers to itself in an annotation, and to a name of its own section inside a function."""

    main = 1
    alias = main

    def twin(self, other: Later) -> Later:
        return below(other.main)


def below(main):
    """A parameter, a comprehension and an attribute may share the name of a later definition."""
    command = [run for run in range(main)]
    return command, (lambda run: run), main.run


def numbers(self, a, b, c, d, /, e, f, *args, **kwargs):
    """Eight parameters besides self.

    A §9 mentioned here is text.
    """


# §2 CLI: commands
def run(console=None, later=Later):
    """Prints."""
    try:
        print(below(1))
    except Exception as error:
        print(error)


def _private(): ...


if __name__ == "__main__":
    run()
'''


def sample(*blocks: str) -> str:
    """A module of sections §0 §1 …, one per block."""
    return "".join(f"# §{i} PART{chr(65 + i)}: text\n{block}\n" for i, block in enumerate(blocks))


FUTURE = "from __future__ import annotations\n"
TRY = "try:\n    x = 1\nexcept"
BAD: dict[Any, list[tuple[str, str]]] = {
    check_banners: [
        ("x = 1\n", "no section banner"),
        ("# §0 ONE: a\n# §2 THREE: b\n", "§2 THREE should be §1"),
        ("# §1 ONE: a\n", "§1 ONE should be §0"),
        ("# §0 ONE: a\n# §1 ONE: b\n", "second section named ONE"),
        ("# §0 ONE: a\n# §1 Two: b\n", "line 2: not `# §N NAME: one line`"),
        ("# §0 ONE: a\n# ---- §1 TWO ----\n", "line 2: not `# §N NAME: one line`"),
        ("# §0 ONE: a\n#§1 TWO: b\n", "line 2: not `# §N NAME: one line`"),
        ("# §0 ONE: a\n# §1 TWO:\n", "line 2: not `# §N NAME: one line`"),
        ("# §0 ONE: a\ndef f():\n    x = 1\n# §1 TWO: b\n    return x\n", "inside the statement of line 2"),
    ],
    check_section_list: [
        ('"""D.\n\n  §0 ONE: a\n"""\n# §0 ONE: a\n# §1 TWO: b\n', "lists nothing; the banner is §1 TWO: b"),
        ('"""D.\n\n§0 ONE: a\n§1 TWO: b\n"""\n# §0 ONE: a\n', "lists §1 TWO: b; the banner is nothing"),
        ('"""D.\n\n§1 TWO: b\n§0 ONE: a\n"""\n# §0 ONE: a\n# §1 TWO: b\n', "lists §1 TWO: b; the banner is §0 ONE: a"),
        ('"""D.\n\n§0 One\n"""\n# §0 ONE: a\n', "lists §0 One; the banner is §0 ONE: a"),
        ("# §0 ONE: a\n", "lists nothing; the banner is §0 ONE: a"),
    ],
    check_section_order: [
        (sample("def foo():\n    return bar()", "def bar(): ..."), "function foo (§0, line 2) uses bar of"),
        (
            sample("class A:\n    def m(self):\n        return [lambda: B for _ in ()]", "B = 1"),
            "lambda (§0, line 4) uses B",
        ),
        (sample("class A:\n    x = B", "B = 1"), "class A (§0, line 2) uses B of §1"),
        (sample("def f(x: B): ...", "class B: ..."), "annotation (§0, line 2) uses B of §1"),
        (sample(f"{FUTURE}def f(x: B): ...", "class B: ..."), "annotation (§0, line 3) uses B of §1"),
        (sample(f"{FUTURE}class A:\n    def m(self) -> B: ...", "class B: ..."), "(§0, line 4) uses B of §1"),
        (sample(f"{FUTURE}x: list[B] = []", "class B: ..."), "annotation (§0, line 3) uses B of §1"),
        (sample("def f():\n    return np", "import numpy as np"), "uses np of §1"),
        (sample("def f():\n    return a", "try:\n    import a.b\nexcept ImportError:\n    a = 0"), "uses a"),
        (sample("def f():\n    return B", "if 1:\n    B, C = 1, 2"), "uses B of §1"),
        (sample("def f():\n    B.x = 1", "B = 1"), "uses B of §1"),
    ],
    check_duplicates: [
        ("def f(): ...\ndef f(): ...\n", "line 2: f is already bound on line 1"),
        ("F = 1\nclass F: ...\n", "line 2: F is already bound on line 1"),
        ("A, B = 1, 2\nif A:\n    B = 3\n", "line 3: B is already bound on line 1"),
        ("A = 1\nA += 1\n", "line 2: A is already bound on line 1"),
        ("import os\nos = 1\n", "line 2: os is already bound on line 1"),
        ("if 1:\n    A = 1\n    A = 2\nelse:\n    A = 3\n", "line 3: A is already bound on line 2"),
        ("if 1:\n    A = 1\nif 2:\n    A = 2\n", "line 4: A is already bound on line 2"),
        ("try:\n    A = 1\nexcept ValueError:\n    A = 2\n", "line 4: A is already bound on line 2"),
        ("try:\n    A = 1\nfinally:\n    A = 2\n", "line 4: A is already bound on line 2"),
    ],
    check_main_guard: [
        ("x = 1\n", "0 `__main__` guards"),
        ('if __name__ == "__main__":\n    pass\nx = 1\n', "last top-level statement is not"),
        ('if __name__ == "__main__":\n    pass\n' * 2, "2 `__main__` guards (lines [1, 3])"),
    ],
    check_function_size: [
        ("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, f"function f (line 1) has {MAX_FUNCTION_LINES + 1} lines"),
        ("def f():\n" + "    x = 1\n" * MAX_MEDIAN_LINES, f"the median function has {MAX_MEDIAN_LINES + 1} lines"),
        ("def f(a, b, /, c, d, e, *g, h, **k): ...\ndef z(a, b, c, d, e, f, g, h, i): ...", "function z "),
        ("class A:\n    async def f(self, a, b, c, d, e, f, g, *h, **i): ...\n", "has 9 parameters"),
    ],
    check_statements: [
        ("def f():\n    global x\n    x = 1\n", "line 2: global x"),
        ("# §0 ONE: a\ndef f():\n    print(1)\n# §1 CLI: b\n", "line 3: print( outside §CLI"),
        ("print(1)\n", "line 1: print( outside §CLI"),
        (f"{TRY}:\n    raise\n", "line 3: except  outside §CLI"),
        (f"{TRY} Exception:\n    raise\n", "line 3: except Exception outside §CLI"),
        (f"{TRY} (OSError, BaseException):\n    raise\n", "line 3: except BaseException"),
        (f"{TRY} OSError:\n    pass\n", "line 3: the handler does nothing"),
        (f"{TRY} OSError:\n    ...\n", "line 3: the handler does nothing"),
        (f"# §0 CLI: a\n{TRY} OSError:\n    ...\n", "line 4: the handler does nothing"),
    ],
    check_docstrings: [
        ("def f(): ...\n", "line 1: f has no docstring"),
        ("if 1:\n    class A:\n        x = 1\n", "line 2: A has no docstring"),
        ('def f():\n    """ """\n', "line 1: f has no docstring"),
    ],
    check_length: [("x = 1\n" * MAX_LINES, f"{MAX_LINES} lines, must be under {MAX_LINES}")],
    check_words: [
        ("# TODO: x\n# FIXME\n# XXX\n", "line 1: 'TODO'\nline 2: 'FIXME'\nline 3: 'XXX'"),
        ("Mock mode is on\n", "line 1: 'Mock mode'"),
    ],
}

MORE_GOOD: list[tuple[Any, str]] = [
    (check_section_order, sample("def f(bar):\n    return bar", "bar = 1")),
    (check_section_order, sample("def f():\n    bar = 1\n    return lambda: bar", "bar = 1")),
    (check_section_order, sample("def f():\n    from x import bar\n    return bar", "bar = 1")),
    (check_section_order, sample("def f(x):\n    return x.bar, dict(bar=1)", "bar = 1")),
    (check_section_order, sample("class A:\n    bar = 1\n    both = bar", "bar = 1")),
    (check_section_order, sample("x = [bar for bar in (1,)]", "bar = 1")),
    (check_section_order, sample("def bar(): ...", "def f():\n    return bar()")),
    (check_section_order, sample("def f():\n    return bar()\ndef bar(): ...", "")),
    (check_section_order, sample(f"{FUTURE}class A:\n    left: A\ndef f(x: B): ...\nB = 1", "")),
    (check_duplicates, "def f():\n    x = 1\n    x = 2\nx: int\nx = 1\n"),
    (check_function_size, "@deco\n" * 90 + "def f():\n" + "    x = 1\n" * (MAX_MEDIAN_LINES - 1)),
    (check_function_size, "def a(): ...\ndef b(): ...\ndef f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    (check_statements, "console.print(1)\ntry:\n    x = 1\nexcept OSError:\n    x = 2\n"),
    (check_length, "x = 1\n" * (MAX_LINES - 1)),
]


TRIED = [(check, GOOD, "") for check in BAD] + [(check, good, "") for check, good in MORE_GOOD]
TRIED += [(check, source, message) for check, own in BAD.items() for source, message in own]


@pytest.mark.parametrize(("check", "source", "message"), TRIED, ids=lambda case: getattr(case, "__name__", ""))
def test_check_passes_the_good_and_catches_the_bad(check: Any, source: str, message: str) -> None:
    found = "\n".join(check(source))
    assert message in found if message else not found


def test_every_check_is_tried_and_applied() -> None:
    checks = {f for name, f in globals().items() if name.startswith("check_")}
    assert checks == {check_pins, check_help_text, check_registries, *BAD}


BAD_FOR_RUFF = '''\
@later  # F821
class A(B):  # F821
    x = [B for _ in (1,)]  # F821
    y = A  # F821
def f(x=B): ...  # F821
def g(*, x=B): ...  # F821
def h(x: B): ...  # F821
k = lambda x=B: x  # F821
X = X + 1  # F821
B = later = 1
def z(a, b, c, d, e, f, g, h, i):  # PLR0913
    global X  # PLW0603
    X = 1
    try: k()
    except Exception: X = 2  # BLE001
    try: k()
    except: X = 3  # E722
    try: k(); k()
    except OSError: pass  # S110
def h():  # F811
    """ """  # D419
'''


def test_ruff_catches_what_is_left_to_it() -> None:
    found = ruff("--stdin-filename", FILE.name, "-", text=BAD_FOR_RUFF)
    told = {(int(line), rule) for line, rule in re.findall(r":(\d+):\d+: (\w+)", found)}
    expected = {(i, line.split("# ")[1]) for i, line in enumerate(BAD_FOR_RUFF.splitlines(), 1) if "# " in line}
    assert expected <= told


def test_no_comment_silences_ruff_on_the_shape() -> None:
    rules = ",".join(sorted(set(re.findall(r"# ([A-Z]+\d+)", BAD_FOR_RUFF))))
    report(ruff("--ignore-noqa", "--select", rules, FILE.name).splitlines())


REQUIREMENTS = "# pins\n--index-url x\ntorch==2.5.1  # cpu\nsafe-tensors==0.5.0 \\\n    --hash=sha256:0\nextra>1\n"


def test_check_pins() -> None:
    def pinned(*change: str) -> str:
        return "; ".join(check_pins(GOOD, REQUIREMENTS.replace(*change)))

    assert check_pins("x = 1\n", "") == ["PEP 723 header has no requires-python", "PEP 723 header has no dependencies"]
    assert pinned("", "") == ""
    assert pinned("torch==", "torch>=") == "torch is not pinned with == in requirements.txt"
    assert pinned("torch==2.5.1", "torch==2.*") == "torch is not pinned with == in requirements.txt"
    assert pinned("safe-tensors", "other") == "Safe_Tensors is not pinned with == in requirements.txt"
    assert pinned("2.5.1", "2.3.0") == "requirements.txt pins torch==2.3.0, the PEP 723 header asks torch>=2.4"


def part(doc: str | None) -> type:
    return type("Part", (), {"__doc__": doc})


def test_check_registries() -> None:
    assert check_registries({"codecs": {"fp16": part("Half precision.\n\nMore"), "len": len}, "tasks": {}}) == []
    assert check_registries({"c": {"f": test_check_pins}}) == ["c f: has no first docstring line"]
    assert check_registries({}) == ["REGISTRIES is empty"]
    assert check_registries({"Codecs": {}}) == ["registry Codecs is not lower-case"]
    assert check_registries({"c": {"FP": part("A.")}}) == ["c FP: name is not lower-case"]
    assert check_registries({"c": {"fp": part("No stop")}}) == ["c fp: help text does not end in '.': No stop"]
    assert check_registries({"c": {"fp": part("x" * 100 + ".")}})[0].startswith("c fp: help text has 101 characters")
    assert check_registries({"c": {"fp": part("x" * 99 + ".")}}) == []
    assert check_registries({"c": {"fp": part("\nSecond line.")}}) == ["c fp: has no first docstring line"]
    assert check_registries({"c": {"fp": part(None)()}}) == ["c fp: is an instance of Part, not a class or function"]
    twice = SimpleNamespace(items=lambda: [("fp", part("A.")), ("fp", part("B."))])
    assert check_registries({"c": twice, "d": twice})[:2] == ["c fp: name is registered twice", "registry c is d again"]


# ---- the file itself ---------------------------------------------------------------------------------------------


def python(*args: str, cwd: Path = ROOT, text: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONVERBOSE", "PYTHONPROFILEIMPORTTIME"}}
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=cwd, env=env, input=text, capture_output=True, text=True, timeout=120, check=False
    )


def answers(process: subprocess.CompletedProcess[str]) -> bool:
    """Whether a process ended well and printed something."""
    return process.returncode == 0 and bool(process.stdout.strip())


def report(violations: list[str]) -> None:
    """Fail with the violations, one per line."""
    assert not violations, "\n  ".join([f"{len(violations)} violation(s)", *violations])


def ruff(*args: str, text: str = "") -> str:
    """What ruff finds by the rules of pyproject.toml, a line each; nothing where all is well."""
    done = python("-m", "ruff", "check", "--quiet", "--output-format", "concise", *args, text=text)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.parametrize("check", BAD, ids=lambda check: check.__name__)
def test_source(check: Any) -> None:
    report(check(FILE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_words(name: str) -> None:
    report(check_words((ROOT / name).read_text(encoding="utf-8")))


def test_dependencies_are_pinned() -> None:
    report(check_pins(FILE.read_text(encoding="utf-8"), (ROOT / "requirements.txt").read_text(encoding="utf-8")))


def test_import_is_silent() -> None:
    process = python("-c", f"import {FILE.stem}")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_registered_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    report(check_registries(importlib.import_module(FILE.stem).REGISTRIES))


@pytest.mark.parametrize("words", ["--help", "train --help", "train --help-all", "list", "show sst2", "--version"])
def test_text_imports_nothing_heavy(words: str) -> None:
    process = python("-X", "importtime", FILE.name, *words.split())
    names = set(IMPORT_TIME.findall(process.stderr))
    assert answers(process) and "typer" in names and not names & HEAVY_MODULES


HELP = ((FILE.name, "--help"), "typer.rich_utils, pydantic, rich.table", MAX_HELP_SECONDS, MAX_HELP_RATIO)
IMPORT = (("-c", f"import {FILE.stem}; print()"), "torch", MAX_IMPORT_SECONDS, MAX_IMPORT_RATIO)


@pytest.mark.parametrize(("words", "libraries", "seconds", "ratio"), [HELP, IMPORT], ids=["help", "import"])
def test_start_is_quick(words: tuple[str, ...], libraries: str, seconds: float, ratio: float) -> None:
    """Processor time, which other processes lengthen less than they lengthen the waiting, of the best of five."""

    def work(*args: str) -> tuple[float, subprocess.CompletedProcess[str]]:
        before = os.times()
        process = python(*args)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system, process

    best = alone = float("inf")
    for _ in range(5):
        took, process = work(*words)
        best = min(best, took)
        assert process.returncode == 0 and process.stdout
        alone = min(alone, work("-c", f"import {libraries}")[0])
        limit = max(seconds, ratio * alone)  # a slower machine is slower with the libraries alone
        if best < limit:
            return
    pytest.fail(f"{words} took {best:.2f} s of work at best of 5, must be under {limit:.2f} s", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_way_to_the_receiver_is_short(command: str) -> None:
    """What tests/README.md lists is the way today, and no longer than MAX_CALLS."""
    process = python("tests/calls.py", command)
    assert answers(process)
    *path, _ = process.stdout.splitlines()
    assert len(path) <= MAX_CALLS
    listed = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(["```text", command, *path, "```"]) in listed, "write down what 'python tests/calls.py' prints"


@pytest.mark.parametrize("command", ["--help", "list"])
def test_alone_in_an_empty_folder(command: str, tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    assert answers(python(FILE.name, command, cwd=tmp_path))
