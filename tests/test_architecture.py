"""The shape of LATENTWIRE.py, enforced: sections, one-way order, sizes, docstrings, silence, pins and start-up.

Every `check_*` is a pure function from text (or plain values) to a list of readable violations. Each runs three
times: on a bad sample it must catch, on a good sample it must pass, and on the file itself.
"""

from __future__ import annotations

import ast
import bisect
import importlib
import inspect
import io
import os
import re
import shutil
import statistics
import subprocess
import symtable
import sys
import time
import tokenize
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MODULE = "LATENTWIRE"
FILE = ROOT / f"{MODULE}.py"
SHIPPED = ("LATENTWIRE.py", "README.md", "CHANGELOG.md", "LOG.md")

MAX_LINES = 12_000  # exclusive; CHANGELOG.md says why
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8
MAX_MEDIAN_LINES = 14
MAX_HELP_LINE = 100
MAX_HELP_SECONDS = 0.5
MAX_HELP_RATIO = 4.0
HEAVY_MODULES = frozenset({"torch", "transformers", "datasets", "scipy", "matplotlib", "sklearn"})
FORBIDDEN = (r"TODO", r"FIXME", r"XXX", r"(?i:mock\s+mode)")
ALONE_COMMANDS = (("--help",), ("list",))  # run on a copy of the file alone in an empty folder

BANNER = re.compile(r"^# §(\d+) ([A-Z][A-Z &]+): (.+)$")
ALMOST_BANNER = re.compile(r"^#[\s#=*-]*§")
LISTED = re.compile(r"^\s*§(\d+)\s+([A-Z][A-Z &]*[A-Z])(?:: .+)?\s*$")
SCRIPT_BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # the regex of PEP 723
IMPORT_TIME = re.compile(r"^import time:\s*\d+\s*\|\s*\d+\s*\|\s*(\S+)\s*$")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DefinitionNode = FunctionNode | ast.ClassDef
Position = tuple[int, int]


# ---- reading the source ------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A banner: its number, its name and its line."""

    number: int
    name: str
    line: int


class Binding(NamedTuple):
    """A name bound at top level; `ready` is where it can first be used, `branch` the if/try arms it sits in."""

    name: str
    kind: str  # def | class | assign | import | import-root | loop
    line: int
    ready: Position
    branch: tuple[tuple[int, str], ...]


class Use(NamedTuple):
    """A name read by code that runs on import; `deferred` marks an annotation that is never evaluated."""

    name: str
    at: Position
    at_module_scope: bool
    deferred: bool


@cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def border_comments(source: str) -> tuple[tuple[int, str], ...]:
    """Comments at column 0 as (line, text); text that merely looks so inside a string is not a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return tuple((t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT and t.start[1] == 0)


@cache
def sections(source: str) -> tuple[Section, ...]:
    found = ((line, BANNER.match(text)) for line, text in border_comments(source))
    return tuple(Section(int(m[1]), m[2], line) for line, m in found if m)


def section_at(source: str, line: int) -> Section:
    """The section a line belongs to; what stands above the first banner belongs to the first section."""
    known = sections(source) or (Section(0, "", 0),)
    return known[max(0, bisect.bisect_right([s.line for s in known], line) - 1)]


def functions(source: str) -> list[FunctionNode]:
    return [n for n in ast.walk(parse(source)) if isinstance(n, FunctionNode)]


def end(node: ast.stmt | ast.expr) -> Position:
    return node.end_lineno or node.lineno, node.end_col_offset or 0


def has_future_annotations(tree: ast.Module) -> bool:
    return any(
        isinstance(n, ast.ImportFrom) and n.module == "__future__" and any(a.name == "annotations" for a in n.names)
        for n in tree.body
    )


# ---- what the top level binds ------------------------------------------------------------------------------------


def names_in(target: ast.AST) -> Iterator[ast.Name]:
    return (n for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def arms(node: ast.stmt) -> list[tuple[str, list[ast.stmt]]]:
    """The statement lists inside a compound statement, each with a label; equal labels can run together."""
    if isinstance(node, ast.If):
        return [("body", node.body), ("orelse", node.orelse)]
    if isinstance(node, ast.Try | ast.TryStar):
        handlers = [(f"except {i}" if catches_import(h) else "", h.body) for i, h in enumerate(node.handlers)]
        return [("body", node.body + node.orelse), *handlers, ("", node.finalbody)]
    if isinstance(node, ast.Match):
        return [(f"case {i}", case.body) for i, case in enumerate(node.cases)]
    if isinstance(node, ast.With | ast.AsyncWith):
        return [("", node.body)]
    if isinstance(node, ast.For | ast.AsyncFor | ast.While):
        return [("", node.body), ("", node.orelse)]
    return []


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names of the exceptions a handler catches; a bare `except:` catches ``""``."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {"" if k is None else ast.unparse(k).rpartition(".")[2] for k in kinds}


def catches_import(handler: ast.ExceptHandler) -> bool:
    return bool(caught(handler) & {"ImportError", "ModuleNotFoundError"})


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    for alias in node.names:
        whole = isinstance(node, ast.Import) and not alias.asname
        yield alias.asname or alias.name.partition(".")[0], "import-root" if whole else "import"


def bound_by(node: ast.stmt) -> Iterator[tuple[str, str, Position]]:
    """(name, kind, ready) for what one statement itself binds, leaving out the statements inside it."""
    if isinstance(node, DefinitionNode):
        yield node.name, "class" if isinstance(node, ast.ClassDef) else "def", end(node)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((name, kind, end(node)) for name, kind in imported(node))
    elif isinstance(node, ast.Assign):
        yield from ((n.id, "assign", end(node)) for target in node.targets for n in names_in(target))
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        bare = isinstance(node, ast.AnnAssign) and node.value is None
        yield from ((n.id, "assign", end(node)) for n in names_in(node.target) if not bare)
    elif isinstance(node, ast.For | ast.AsyncFor):
        yield from ((n.id, "loop", end(n)) for n in names_in(node.target))
    elif isinstance(node, ast.With | ast.AsyncWith):
        targets = (item.optional_vars for item in node.items if item.optional_vars)
        yield from ((n.id, "loop", end(n)) for target in targets for n in names_in(target))
    elif type(node).__name__ == "TypeAlias":  # Python 3.12's `type X = …`
        yield node.name.id, "assign", end(node)


def bindings_of(body: Iterable[ast.stmt], branch: tuple[tuple[int, str], ...] = ()) -> Iterator[Binding]:
    for node in body:
        yield from (Binding(name, kind, node.lineno, ready, branch) for name, kind, ready in bound_by(node))
        for label, inner in arms(node):
            yield from bindings_of(inner, (*branch, (id(node), label)) if label else branch)


@cache
def top_level(source: str) -> dict[str, list[Binding]]:
    """Every name bound at top level, with its bindings in the order of the file."""
    table: dict[str, list[Binding]] = {}
    for binding in sorted(bindings_of(parse(source).body), key=lambda b: b.ready):
        table.setdefault(binding.name, []).append(binding)
    return table


def home(source: str, name: str) -> Section:
    """The section that first defines a top-level name."""
    return section_at(source, min(b.line for b in top_level(source)[name]))


def definitions(body: Iterable[ast.stmt]) -> Iterator[DefinitionNode]:
    """Functions and classes of the top level, those inside its if/try blocks too."""
    for node in body:
        if isinstance(node, DefinitionNode):
            yield node
        for _, inner in arms(node):
            yield from definitions(inner)


# ---- what runs on import -----------------------------------------------------------------------------------------


class ImportTime(ast.NodeVisitor):
    """Collects the names read when the module is imported: no function or lambda body, but all around them."""

    def __init__(self, future_annotations: bool) -> None:
        self.uses: list[Use] = []
        self.future_annotations = future_annotations
        self.shadows: list[set[str]] = []
        self.deferred = False

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in self.shadows):
            self.uses.append(Use(node.id, (node.lineno, node.col_offset), not self.shadows, self.deferred))

    def visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def visit_annotation(self, *nodes: ast.expr | None) -> None:
        before, self.deferred = self.deferred, self.future_annotations
        self.visit_all(nodes)
        self.deferred = before

    def visit_FunctionDef(self, node: FunctionNode) -> None:
        a = node.args
        self.visit_all([*node.decorator_list, *a.defaults, *a.kw_defaults])
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
        self.visit_annotation(*(x.annotation for x in every), node.returns)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit_all([*node.args.defaults, *node.args.kw_defaults])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_annotation(node.annotation)
        self.visit_all([node.value, node.target])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_all([*node.decorator_list, *node.bases, *(k.value for k in node.keywords)])
        self.visit_under({b.name for b in bindings_of(node.body)}, node.body)

    def visit_ListComp(self, node: Any) -> None:
        """A comprehension: its first iterable is read outside its scope, all else inside."""
        first, *rest = node.generators
        self.visit(first.iter)
        inside = [*first.ifs, *(part for g in rest for part in (g.iter, *g.ifs))]
        outcome = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.visit_under({n.id for g in node.generators for n in names_in(g.target)}, [*inside, *outcome])

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_under(self, shadowed: set[str], nodes: Iterable[ast.AST]) -> None:
        self.shadows.append(shadowed)
        self.visit_all(nodes)
        self.shadows.pop()


@cache
def import_time_uses(source: str) -> tuple[Use, ...]:
    """Reads, on import, of names that the module itself defines."""
    visitor = ImportTime(has_future_annotations(parse(source)))
    visitor.visit(parse(source))
    return tuple(u for u in visitor.uses if u.name in top_level(source))


def evaluated_annotations(source: str) -> str:
    """The source without `from __future__` imports: with them, symtable does not show the names in annotations."""
    lines = source.splitlines()
    for node in parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            lines[node.lineno - 1 : node.end_lineno] = ["pass"] + [""] * (end(node)[0] - node.lineno)
    return "\n".join(lines) + "\n"


def scopes(table: symtable.SymbolTable, prefix: str = "") -> Iterator[tuple[str, symtable.SymbolTable]]:
    """Every scope below the module with its dotted name."""
    for child in table.get_children():
        yield prefix + child.get_name(), child
        yield from scopes(child, f"{prefix}{child.get_name()}.")


# ---- checks of the source ----------------------------------------------------------------------------------------


def check_banners(source: str) -> list[str]:
    """Banners read `# §N NAME: one line`, are numbered from 0 without gaps and stand between statements."""
    found = sections(source)
    wrong = [
        f"line {line}: not `# §N NAME: one line`: {text}"
        for line, text in border_comments(source)
        if ALMOST_BANNER.match(text) and not BANNER.match(text)
    ]
    wrong += [f"line {s.line}: §{s.number} {s.name} should be §{i}" for i, s in enumerate(found) if s.number != i]
    names = [s.name for s in found]
    wrong += [f"line {s.line}: second section named {s.name}" for i, s in enumerate(found) if s.name in names[:i]]
    for node in parse(source).body:
        inside = (s for s in found if node.lineno <= s.line <= end(node)[0])
        wrong += [f"line {s.line}: banner of §{s.number} inside the statement of line {node.lineno}" for s in inside]
    return wrong if found else [*wrong, "no section banner `# §N NAME: one line`"]


def check_section_list(source: str) -> list[str]:
    """The list of sections in the module docstring is the list of banners."""
    lines = [line for line in (ast.get_docstring(parse(source)) or "").splitlines() if line.lstrip().startswith("§")]
    matches = [(line, LISTED.match(line)) for line in lines]
    wrong = [f"docstring line is not `§N NAME: one line`: {line.strip()}" for line, m in matches if not m]
    listed = [f"§{m[1]} {m[2]}" for _, m in matches if m]
    banners = [f"§{s.number} {s.name}" for s in sections(source)]
    wrong += [f"{x} is listed in the docstring but has no banner" for x in listed if x not in banners]
    wrong += [f"{x} has a banner but is not listed in the docstring" for x in banners if x not in listed]
    if not wrong and listed != banners:
        wrong.append(f"docstring lists {', '.join(listed)}; the banners are {', '.join(banners)}")
    return wrong


def check_section_order(source: str) -> list[str]:
    """A section uses, at every depth, only names that it or an earlier section defines."""
    wrong = []
    for name, scope in scopes(symtable.symtable(evaluated_annotations(source), FILE.name, "exec")):
        here = section_at(source, scope.get_lineno())
        used = sorted(s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced())
        later = ((n, home(source, n)) for n in used if n in top_level(source))
        where = f"{scope.get_type()} {name} (§{here.number}, line {scope.get_lineno()})"
        wrong += [f"{where} uses {n} of §{there.number}" for n, there in later if there.line > here.line]
    for use in import_time_uses(source):
        here, there = section_at(source, use.at[0]), home(source, use.name)
        if use.at_module_scope and there.line > here.line:
            wrong.append(f"module code (§{here.number}, line {use.at[0]}) uses {use.name} of §{there.number}")
    return wrong


def check_import_order(source: str) -> list[str]:
    """Code that runs on import (decorators, bases, defaults, constants, class bodies) uses only names above it."""
    wrong = []
    for use in import_time_uses(source):
        first = top_level(source)[use.name][0]
        same = section_at(source, use.at[0]) == home(source, use.name)  # other sections: see check_section_order
        if same and not use.deferred and first.ready > use.at:
            wrong.append(f"line {use.at[0]} uses {use.name}, which line {first.line} defines, before it is there")
    return wrong


def exclusive(a: Binding, b: Binding) -> bool:
    """Whether two bindings sit in different arms of one if/else, match, or try/except ImportError."""
    arm = dict(a.branch)
    return any(arm.get(node, label) != label for node, label in b.branch)


def check_duplicates(source: str) -> list[str]:
    """No name is bound twice at top level, but for either/or branches."""
    wrong = []
    for name, every in top_level(source).items():
        firm = sorted((b for b in every if b.kind != "loop"), key=lambda b: b.line)
        for i, late in enumerate(firm):
            for early in firm[:i]:
                submodules = early.kind == late.kind == "import-root"  # `import a.b` beside `import a.c`
                if not submodules and not exclusive(early, late):
                    wrong.append(f"line {late.line}: {name} is already bound on line {early.line}")
                    break
    return wrong


def is_main_guard(node: ast.AST) -> bool:
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and len(node.test.ops) == 1):
        return False
    sides = {ast.unparse(node.test.left), ast.unparse(node.test.comparators[0])}
    return isinstance(node.test.ops[0], ast.Eq) and sides == {"__name__", "'__main__'"}


def check_main_guard(source: str) -> list[str]:
    """Exactly one `if __name__ == "__main__":`, as the last top-level statement."""
    tree = parse(source)
    lines = [n.lineno for n in ast.walk(tree) if is_main_guard(n)]
    wrong = [] if len(lines) == 1 else [f"{len(lines)} `__main__` guards (lines {lines}), expected exactly one"]
    if not (tree.body and is_main_guard(tree.body[-1])):
        wrong.append("the last top-level statement is not the `__main__` guard")
    return wrong


def check_no_global(source: str) -> list[str]:
    """No `global` statement."""
    found = (n for n in ast.walk(parse(source)) if isinstance(n, ast.Global))
    return [f"line {n.lineno}: global {', '.join(n.names)}" for n in found]


def length(node: FunctionNode) -> int:
    return end(node)[0] - node.lineno + 1


def parameters(node: FunctionNode) -> int:
    a = node.args
    named = [x.arg for x in (*a.posonlyargs, *a.args)]
    bound = named[:1] in (["self"], ["cls"])
    return len(named) - bound + len(a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)


def check_function_size(source: str) -> list[str]:
    """No function over 80 lines or 8 parameters; the median function at most 14 lines."""
    every = functions(source)
    wrong = [
        f"function {f.name} (line {f.lineno}) has {length(f)} lines, at most {MAX_FUNCTION_LINES}"
        for f in every
        if length(f) > MAX_FUNCTION_LINES
    ]
    wrong += [
        f"function {f.name} (line {f.lineno}) has {parameters(f)} parameters, at most {MAX_PARAMETERS}"
        for f in every
        if parameters(f) > MAX_PARAMETERS
    ]
    median = statistics.median(map(length, every)) if every else 0
    if median > MAX_MEDIAN_LINES:
        wrong.append(f"the median function has {median:g} lines, at most {MAX_MEDIAN_LINES}")
    return wrong


def outside_cli(source: str, node: ast.AST) -> bool:
    return section_at(source, node.lineno).name != "CLI"


def check_print(source: str) -> list[str]:
    """`print(` is called only in §CLI."""
    calls = (n for n in ast.walk(parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return [f"line {n.lineno}: print( outside §CLI" for n in calls if n.func.id == "print" and outside_cli(source, n)]


def check_broad_except(source: str) -> list[str]:
    """`except:`, `except Exception` and `except BaseException` stand only in §CLI."""
    broad = {"", "Exception", "BaseException"}
    handlers = (n for n in ast.walk(parse(source)) if isinstance(n, ast.ExceptHandler))
    found = ((n, sorted(caught(n) & broad)) for n in handlers if outside_cli(source, n))
    return [f"line {n.lineno}: {f'except {kinds[0]}'.strip()} outside §CLI" for n, kinds in found if kinds]


def is_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def check_swallowed(source: str) -> list[str]:
    """No `except …: pass`."""
    handlers = (n for n in ast.walk(parse(source)) if isinstance(n, ast.ExceptHandler))
    return [f"line {n.lineno}: the handler does nothing" for n in handlers if all(map(is_nothing, n.body))]


def check_docstrings(source: str) -> list[str]:
    """Every public top-level function and class has a docstring."""
    public = (n for n in definitions(parse(source).body) if not n.name.startswith("_"))
    return [f"line {n.lineno}: {n.name} has no docstring" for n in public if not (ast.get_docstring(n) or "").strip()]


def check_length(source: str) -> list[str]:
    """The file stays under 7,000 lines."""
    lines = source.count("\n") + (not source.endswith("\n"))
    return [f"{lines} lines, must be under {MAX_LINES}"] if lines >= MAX_LINES else []


def check_words(source: str) -> list[str]:
    """Shipped text has no leftovers."""
    found = ((i, re.search("|".join(FORBIDDEN), line)) for i, line in enumerate(source.splitlines(), 1))
    return [f"line {i}: {m[0]!r}" for i, m in found if m]


SOURCE_CHECKS = (
    check_banners,
    check_section_list,
    check_section_order,
    check_import_order,
    check_duplicates,
    check_main_guard,
    check_no_global,
    check_function_size,
    check_print,
    check_broad_except,
    check_swallowed,
    check_docstrings,
    check_length,
    check_words,
)


# ---- checks of pins, registries and start-up ---------------------------------------------------------------------


def script_header(source: str) -> dict[str, Any]:
    """The PEP 723 table of a source; empty without a header."""
    block = SCRIPT_BLOCK.search(source)
    if not block:
        return {}
    return tomllib.loads("\n".join(line[2:] for line in block["content"].splitlines()))


def requirement(line: str) -> Requirement | None:
    """One line of requirements.txt; None for an option, a comment, a hash or nothing."""
    text = re.split(r"\s#|\s--|\s*\\$", line.strip())[0].strip()
    if not text or text.startswith(("#", "-")):
        return None
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise AssertionError(f"requirements.txt: cannot read {line!r}: {error}") from error


def pin(package: Requirement) -> str:
    """The exact version a requirement is pinned to, or an empty string."""
    exact = [s.version for s in package.specifier if s.operator == "==" and not s.version.endswith("*")]
    return exact[0] if len(exact) == 1 else ""


def check_pins(source: str, requirements: str) -> list[str]:
    """A PEP 723 header names Python and the dependencies, and requirements.txt pins each of them."""
    header = script_header(source)
    wrong = [f"PEP 723 header has no {key}" for key in ("requires-python", "dependencies") if not header.get(key)]
    pins = {canonicalize_name(r.name): pin(r) for r in map(requirement, requirements.splitlines()) if r}
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


def check_light(importtime: str) -> list[str]:
    """The output of `python -X importtime` names no heavy module; and it is such an output."""
    names = [m[1] for m in map(IMPORT_TIME.match, importtime.splitlines()) if m]
    wrong = [] if names else ["no `import time:` lines"]
    return wrong + [f"imports {name}" for name in names if name in HEAVY_MODULES]


def check_answers(process: subprocess.CompletedProcess[str]) -> list[str]:
    """A process ended well and printed something."""
    wrong = [] if process.returncode == 0 else [f"exit status {process.returncode}: {process.stderr[-2000:]}"]
    return wrong if process.stdout.strip() else [*wrong, "stdout is empty"]


def check_silent(process: subprocess.CompletedProcess[str]) -> list[str]:
    """A process ended well and printed nothing."""
    wrong = [] if process.returncode == 0 else [f"exit status {process.returncode}"]
    return wrong + [f"{n}: {text}" for n in ("stdout", "stderr") if (text := getattr(process, n))]


# ---- samples: each check catches the bad and passes the good -----------------------------------------------------

GOOD = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "Safe_Tensors[all]==0.5.0; python_version > '3'"]
# ///
"""Sample in one sentence.

Sections:
  §0 PRELUDE: imports
  §1 FIGURES & TABLES
  §2 CLI: commands
"""
# §0 PRELUDE: imports
from __future__ import annotations

import os
import os.path

try:
    import json
    LOADS = json.loads
except ImportError:
    json = None
    LOADS = None

if os.sep == "/":
    SEP = "slash"
elif os.sep == ":":
    SEP = "colon"
else:
    SEP = "other"

# §1 FIGURES & TABLES: drawing
NAMES = [os for os in ("a", "b")]
TEXT = """
# §9 NOT A BANNER: inside a string
"""


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
    try:
        return int(a)
    except ValueError:
        return SEP


# §2 CLI: commands
def run(console=None, later=Later):
    """Prints."""
    try:
        print(below(1))
    except Exception as error:
        print(error)


def main():
    """Runs."""
    return run()


def _private():
    return 0


if __name__ == "__main__":
    main()
'''


def sample(*blocks: str) -> str:
    """A module of sections §0 §1 …, one per block."""
    return "".join(f"# §{i} PART{chr(65 + i)}: text\n{block}\n" for i, block in enumerate(blocks))


BAD: list[tuple[Any, str, str]] = [
    (check_banners, "x = 1\n", "no section banner"),
    (check_banners, "# §0 ONE: a\n# §2 THREE: b\n", "§2 THREE should be §1"),
    (check_banners, "# §1 ONE: a\n", "§1 ONE should be §0"),
    (check_banners, "# §0 ONE: a\n# §1 ONE: b\n", "second section named ONE"),
    (check_banners, "# §0 ONE: a\n# §1 Two: b\n", "line 2: not `# §N NAME: one line`"),
    (check_banners, "# §0 ONE: a\n# ---- §1 TWO ----\n", "line 2: not `# §N NAME: one line`"),
    (check_banners, "# §0 ONE: a\n#§1 TWO: b\n", "line 2: not `# §N NAME: one line`"),
    (check_banners, "# §0 ONE: a\n# §1 TWO:\n", "line 2: not `# §N NAME: one line`"),
    (check_banners, "# §0 ONE: a\ndef f():\n    x = 1\n# §1 TWO: b\n    return x\n", "inside the statement of line 2"),
    (check_section_list, '"""D.\n\n  §0 ONE: a\n"""\n# §0 ONE: a\n# §1 TWO: b\n', "§1 TWO has a banner but"),
    (check_section_list, '"""D.\n\n§0 ONE\n§1 TWO\n"""\n# §0 ONE: a\n', "§1 TWO is listed"),
    (check_section_list, '"""D.\n\n§1 TWO\n§0 ONE\n"""\n# §0 ONE: a\n# §1 TWO: b\n', "docstring lists §1 TWO, §0 ONE"),
    (check_section_list, '"""D.\n\n§0 ONE\n§0 ONE\n"""\n# §0 ONE: a\n', "docstring lists §0 ONE, §0 ONE"),
    (check_section_list, '"""D.\n\n§0 One\n"""\n# §0 ONE: a\n', "docstring line is not"),
    (check_section_list, "# §0 ONE: a\n", "§0 ONE has a banner but"),
    (
        check_section_order,
        sample("def foo():\n    return bar()", "def bar(): ..."),
        "function foo (§0, line 2) uses bar of",
    ),
    (
        check_section_order,
        sample("class A:\n    def m(self):\n        return [lambda: B for _ in ()]", "B = 1"),
        "function A.m.listcomp.lambda (§0, line 4) uses B of §1" if sys.version_info < (3, 12) else "uses B of §1",
    ),
    (check_section_order, sample("class A:\n    x = B", "B = 1"), "class A (§0, line 2) uses B of §1"),
    (check_section_order, sample("class A(B): ...", "class B: ..."), "module code (§0, line 2) uses B of §1"),
    (
        check_section_order,
        sample("@deco\ndef f(): ...", "def deco(f): ..."),
        "module code (§0, line 2) uses deco of §1",
    ),
    (check_section_order, sample("def f(x=B): ...", "B: int = 1"), "module code (§0, line 2) uses B of §1"),
    (check_section_order, sample("def f(x: B): ...", "class B: ..."), "module code (§0, line 2) uses B of §1"),
    (
        check_section_order,
        sample("from __future__ import annotations\ndef f(x: B): ...", "class B: ..."),
        "module code (§0, line 3) uses B of §1",
    ),
    (
        check_section_order,
        sample("from __future__ import (\n    annotations,\n)\nclass A:\n    def m(self) -> B: ...", "class B: ..."),
        "class A (§0, line 5) uses B of §1",
    ),
    (check_section_order, sample("def f():\n    return np", "import numpy as np"), "uses np of §1"),
    (
        check_section_order,
        sample("def f():\n    return a", "try:\n    import a.b\nexcept ImportError:\n    a = 0"),
        "uses a",
    ),
    (check_section_order, sample("def f():\n    return B", "if 1:\n    B, C = 1, 2"), "uses B of §1"),
    (check_section_order, sample("def f():\n    B.x = 1", "B = 1"), "uses B of §1"),
    (check_import_order, "@deco\ndef f(): ...\ndef deco(f): ...\n", "line 1 uses deco, which line 3 defines"),
    (check_import_order, "class A(B): ...\nclass B: ...\n", "line 1 uses B, which line 2 defines"),
    (check_import_order, "def f(x=B): ...\nB = 1\n", "line 1 uses B, which line 2 defines"),
    (check_import_order, "def f(*, x=B): ...\nB = 1\n", "line 1 uses B, which line 2 defines"),
    (check_import_order, "f = lambda x=B: x\nB = 1\n", "line 1 uses B, which line 2 defines"),
    (check_import_order, "def f(x: B): ...\nB = 1\n", "line 1 uses B, which line 2 defines"),
    (check_import_order, "class A:\n    x = [B for _ in (1,)]\nB = 1\n", "line 2 uses B, which line 3 defines"),
    (check_import_order, "class A:\n    x = A\n", "line 2 uses A, which line 1 defines"),
    (check_import_order, "X = X + 1\n", "line 1 uses X, which line 1 defines"),
    (check_duplicates, "def f(): ...\ndef f(): ...\n", "line 2: f is already bound on line 1"),
    (check_duplicates, "F = 1\nclass F: ...\n", "line 2: F is already bound on line 1"),
    (check_duplicates, "A, B = 1, 2\nif A:\n    B = 3\n", "line 3: B is already bound on line 1"),
    (check_duplicates, "A = 1\nA += 1\n", "line 2: A is already bound on line 1"),
    (check_duplicates, "import os\nos = 1\n", "line 2: os is already bound on line 1"),
    (check_duplicates, "if 1:\n    A = 1\n    A = 2\nelse:\n    A = 3\n", "line 3: A is already bound on line 2"),
    (check_duplicates, "if 1:\n    A = 1\nif 2:\n    A = 2\n", "line 4: A is already bound on line 2"),
    (check_duplicates, "try:\n    A = 1\nexcept ValueError:\n    A = 2\n", "line 4: A is already bound on line 2"),
    (check_duplicates, "try:\n    A = 1\nfinally:\n    A = 2\n", "line 4: A is already bound on line 2"),
    (check_main_guard, "x = 1\n", "0 `__main__` guards"),
    (check_main_guard, "if __name__ == '__main__':\n    pass\nx = 1\n", "last top-level statement is not"),
    (check_main_guard, "if __name__ == '__main__':\n    pass\n" * 2, "2 `__main__` guards (lines [1, 3])"),
    (check_no_global, "def f():\n    global x\n    x = 1\n", "line 2: global x"),
    (check_function_size, "def f():\n" + "    x = 1\n" * 80, "function f (line 1) has 81 lines"),
    (check_function_size, "def f():\n" + "    x = 1\n" * 14, "the median function has 15 lines"),
    (
        check_function_size,
        "def f(a, b, /, c, d, e, *g, h, **k): ...\ndef z(a, b, c, d, e, f, g, h, i): ...",
        "function z ",
    ),
    (check_function_size, "class A:\n    async def f(self, a, b, c, d, e, f, g, *h, **i): ...\n", "has 9 parameters"),
    (check_print, "# §0 ONE: a\ndef f():\n    print(1)\n# §1 CLI: b\n", "line 3: print( outside §CLI"),
    (check_print, "print(1)\n", "line 1: print( outside §CLI"),
    (check_broad_except, "try:\n    x = 1\nexcept:\n    raise\n", "line 3: except outside §CLI"),
    (check_broad_except, "try:\n    x = 1\nexcept Exception:\n    raise\n", "line 3: except Exception outside §CLI"),
    (
        check_broad_except,
        "try:\n    x = 1\nexcept (OSError, BaseException):\n    raise\n",
        "line 3: except BaseException",
    ),
    (check_swallowed, "try:\n    x = 1\nexcept OSError:\n    pass\n", "line 3: the handler does nothing"),
    (check_swallowed, "try:\n    x = 1\nexcept OSError:\n    ...\n", "line 3: the handler does nothing"),
    (check_docstrings, "def f(): ...\n", "line 1: f has no docstring"),
    (check_docstrings, "if 1:\n    class A:\n        x = 1\n", "line 2: A has no docstring"),
    (check_docstrings, 'def f():\n    """ """\n', "line 1: f has no docstring"),
    (check_length, "x = 1\n" * 12_000, "12000 lines, must be under 12000"),
    (check_words, "x = 1\n# TODO: later\n", "line 2: 'TODO'"),
    (check_words, "# FIXME\n", "line 1: 'FIXME'"),
    (check_words, "# XXX\n", "line 1: 'XXX'"),
    (check_words, "Mock mode is on\n", "line 1: 'Mock mode'"),
]

MORE_GOOD: list[tuple[Any, str]] = [
    (check_banners, "# §0 ONE: a\nx = 1  # §3 is where it is used\n"),
    (check_section_order, sample("def f(bar):\n    return bar", "bar = 1")),
    (check_section_order, sample("def f():\n    bar = 1\n    return lambda: bar", "bar = 1")),
    (check_section_order, sample("def f():\n    from x import bar\n    return bar", "bar = 1")),
    (check_section_order, sample("def f(x):\n    return x.bar, dict(bar=1)", "bar = 1")),
    (check_section_order, sample("class A:\n    bar = 1\n    both = bar", "bar = 1")),
    (check_section_order, sample("x = [bar for bar in (1,)]", "bar = 1")),
    (check_section_order, sample("def bar(): ...", "def f():\n    return bar()")),
    (check_section_order, sample("def f():\n    return bar()\ndef bar(): ...", "")),
    (check_import_order, "def f():\n    return B\ng = lambda: B\nB = 1\n"),
    (check_import_order, "from __future__ import annotations\nclass A:\n    left: A\ndef f(x: B): ...\nB = 1\n"),
    (check_import_order, "class A:\n    B = 1\n    C = B\nB = 1\n"),
    (check_import_order, "try:\n    import a\nexcept ImportError:\n    a = None\nclass B(a.C): ...\n"),
    (check_duplicates, "for i in ():\n    x = i\nfor i in ():\n    y = i\n"),
    (check_duplicates, "try:\n    import a\nexcept (ImportError, OSError):\n    a = None\n"),
    (check_duplicates, "def f():\n    x = 1\n    x = 2\nx: int\nx = 1\n"),
    (check_main_guard, "if __name__ == '__main__' and 1:\n    x = 1\nif '__main__' == __name__:\n    x = 2\n"),
    (check_function_size, "@deco\n" * 90 + "def f():\n" + "    x = 1\n" * 13),
    (check_function_size, "def a(): ...\ndef b(): ...\ndef f():\n" + "    x = 1\n" * 79),
    (check_print, "console.print(1)\n"),
    (check_swallowed, "try:\n    x = 1\nexcept OSError:\n    x = 2\n"),
    (check_length, "x = 1\n" * 6999),
]


def label(case: Any) -> str:
    return getattr(case, "__name__", "")


@pytest.mark.parametrize("check", SOURCE_CHECKS, ids=label)
def test_check_passes_the_good_sample(check: Any) -> None:
    assert check(GOOD) == []


@pytest.mark.parametrize(("check", "source"), MORE_GOOD, ids=label)
def test_check_passes_good_source(check: Any, source: str) -> None:
    assert check(source) == []


@pytest.mark.parametrize(("check", "source", "message"), BAD, ids=label)
def test_check_catches_bad_source(check: Any, source: str, message: str) -> None:
    assert message in "\n".join(check(source))


def test_every_check_is_tried_and_applied() -> None:
    checks = {f for name, f in globals().items() if name.startswith("check_")}
    others = {check_pins, check_help_text, check_registries, check_light, check_answers, check_silent}
    assert checks == others | set(SOURCE_CHECKS)
    assert {check for check, _, _ in BAD} == set(SOURCE_CHECKS)


REQUIREMENTS = """\
# pinned
--extra-index-url https://x
torch==2.5.1  # cpu
safe-tensors==0.5.0 \\
    --hash=sha256:0
extra>1
"""


def test_check_pins() -> None:
    assert check_pins(GOOD, REQUIREMENTS) == []
    assert check_pins("x = 1\n", "") == ["PEP 723 header has no requires-python", "PEP 723 header has no dependencies"]
    assert check_pins(GOOD, REQUIREMENTS.replace("torch==", "torch>=")) == [
        "torch is not pinned with == in requirements.txt"
    ]
    assert check_pins(GOOD, REQUIREMENTS.replace("torch==2.5.1", "torch==2.*"))
    assert check_pins(GOOD, REQUIREMENTS.replace("safe-tensors", "other")) == [
        "Safe_Tensors is not pinned with == in requirements.txt"
    ]
    assert "pins torch==2.3.0, the PEP 723 header asks torch>=2.4" in "".join(
        check_pins(GOOD, REQUIREMENTS.replace("2.5.1", "2.3.0"))
    )


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


def test_check_light() -> None:
    head = "import time: self [us] | cumulative | imported package\n"
    assert check_light(head + "import time:   1 |   2 |     torchlike\nimport time:   1 |  2 | my.torch\n") == []
    assert check_light(head + "import time:   1 |   2 |     torch\n") == ["imports torch"]
    assert check_light("Usage:\n") == ["no `import time:` lines"]


def test_check_answers() -> None:
    run = subprocess.CompletedProcess
    assert check_answers(run([], 0, "Usage", "")) == []
    assert check_answers(run([], 2, " ", "No such command")) == ["exit status 2: No such command", "stdout is empty"]


def test_check_silent() -> None:
    run = subprocess.CompletedProcess
    assert check_silent(run([], 0, "", "")) == []
    assert check_silent(run([], 1, "a", "b")) == ["exit status 1", "stdout: a", "stderr: b"]


# ---- the file itself ---------------------------------------------------------------------------------------------


def python(*args: str, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONVERBOSE", "PYTHONPROFILEIMPORTTIME"}}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def report(violations: list[str]) -> None:
    """Fail with the violations, one per line."""
    if violations:
        pytest.fail(f"{len(violations)} violation(s)\n  " + "\n  ".join(violations), pytrace=False)


@pytest.fixture(scope="module")
def source() -> str:
    if not FILE.is_file():
        pytest.fail(f"{FILE} does not exist", pytrace=False)
    return FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("check", SOURCE_CHECKS, ids=label)
def test_source(check: Any, source: str) -> None:
    report(check(source))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_words(name: str) -> None:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} does not exist")
    report(check_words(path.read_text(encoding="utf-8")))


def test_dependencies_are_pinned(source: str) -> None:
    report(check_pins(source, (ROOT / "requirements.txt").read_text(encoding="utf-8")))


@pytest.mark.usefixtures("source")
def test_import_is_silent() -> None:
    report(check_silent(python("-c", f"import {MODULE}")))


@pytest.mark.usefixtures("source")
def test_registered_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    report(check_registries(importlib.import_module(MODULE).REGISTRIES))


@pytest.mark.usefixtures("source")
def test_help_imports_nothing_heavy() -> None:
    process = python("-X", "importtime", FILE.name, "--help")
    report(check_answers(process) + check_light(process.stderr))


@pytest.mark.usefixtures("source")
def test_help_is_quick() -> None:
    best = alone = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        process = python(FILE.name, "--help")
        best = min(best, time.perf_counter() - start)
        report(check_answers(process))
        start = time.perf_counter()
        python("-c", "import typer.rich_utils, pydantic, rich.table")
        alone = min(alone, time.perf_counter() - start)
        limit = max(MAX_HELP_SECONDS, MAX_HELP_RATIO * alone)  # a slower machine is slower with the libraries alone
        if best < limit:
            return
    pytest.fail(f"--help took {best:.2f} s at best of 5, must be under {limit:.2f} s", pytrace=False)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("command", ALONE_COMMANDS, ids=" ".join)
def test_alone_in_an_empty_folder(command: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    process = python(FILE.name, *command, cwd=tmp_path)
    report(check_answers(process))
