"""Check that notebooks, modules and the sidebar belong together, and that imports go one way.

A module has one owner, the notebook whose `default_exp` names it; notebooks that sort after the
owner may add to it (`#| export models.generation`). nbdev does not notice when two notebooks own
one module (the last one wins), when an addition comes before its owner (the owner wipes it out),
or when a renamed notebook leaves its old module behind. The arrows are those of `MAY_IMPORT`.
"""
import ast
import re

import yaml

from project import LIB, NBS, code_cells, default_exp, fail, notebooks, read

GENERATED = {"__init__.py", "_modidx.py"}
_export = re.compile(r"^\s*#\|\s*exports?[ \t]+([\w.]+)[ \t]*$", re.MULTILINE)

# A room, or a module, and what it may import from; what is not named here may import anything.
_BASE = {"errors", "presets", "core"}
MAY_IMPORT = {
    "errors": set(),
    "presets": {"errors"},
    "core": {"errors", "presets"},
    "data": _BASE | {"data"},
    "world": _BASE | {"data.segments", "world"},
    "training": _BASE | {"training"},
    "models": _BASE | {"data.segments", "models"},
    "widgets": _BASE,
    "ledger": _BASE,
    "puma": _BASE | {"data.segments", "models"},
}


def module_of(path):
    "puma_nb/models/mllm.py -> models.mllm"
    return path.relative_to(LIB).with_suffix("").as_posix().replace("/", ".")


def module_owners():
    "module -> the notebooks whose `default_exp` names it, in the order of their names"
    owners = {}
    for nb in notebooks():
        name = default_exp(nb)
        if name: owners.setdefault(name, []).append(nb)
    return owners


def additions():
    "Pairs of a notebook and a module that it adds to"
    for nb in notebooks():
        own, named = default_exp(nb), set()
        for cell in code_cells(read(nb)):
            named |= set(_export.findall(cell["source"]))
        yield from ((nb, module) for module in sorted(named - {own}))


def check_owners(owners):
    problems = []
    for module, nbs in owners.items():
        if len(nbs) > 1:
            problems.append(f"{' and '.join(nb.name for nb in nbs)} both own {module}")
        if not (LIB / (module.replace(".", "/") + ".py")).exists():
            problems.append(
                f"{nbs[0].name} exports to {module}, which does not exist: run nbdev_export")
    for path in sorted(LIB.rglob("*.py")):
        if path.name not in GENERATED and module_of(path) not in owners:
            problems.append(f"{path.relative_to(LIB.parent)} belongs to no notebook: delete it")
    for nb, module in additions():
        if module not in owners:
            problems.append(f"{nb.name} adds to {module}, which no notebook owns")
        elif nb.name < owners[module][0].name:
            problems.append(f"{nb.name} adds to {module}, but sorts before its owner "
                            f"{owners[module][0].name}, whose export would wipe that out")
    return problems


def imported_modules(path):
    "The project's own modules that the module at `path` imports, and whether lazily"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    here = module_of(path).split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                name = ".".join([*here[:-node.level], *filter(None, [node.module])])
            elif (node.module or "").startswith("puma_nb"):
                name = node.module.removeprefix("puma_nb").lstrip(".")
            else: continue
            lazy = id(node) not in top
            for alias in node.names:  # `from ..models import mllm` names a module
                inner = f"{name}.{alias.name}".lstrip(".")
                is_module = (LIB / (inner.replace(".", "/") + ".py")).exists()
                yield (inner if is_module else name), lazy
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("puma_nb."):
                    yield alias.name.removeprefix("puma_nb."), id(node) not in top


def rule_of(module):
    "What a module may import, or None for anything"
    return MAY_IMPORT.get(module, MAY_IMPORT.get(module.split(".")[0]))


def check_arrows():
    "Imports against `MAY_IMPORT`, and circles among imports that run when a module is loaded"
    problems, arrows = [], {}
    for path in sorted(LIB.rglob("*.py")):
        if path.name in GENERATED: continue
        module = module_of(path)
        found = {(name, lazy) for name, lazy in imported_modules(path) if name != module}
        arrows[module] = {name for name, lazy in found if not lazy}
        allowed = rule_of(module)
        for name in sorted({name for name, _ in found}):
            if allowed is None or name in allowed or name.split(".")[0] in allowed:
                continue
            problems.append(f"{module} imports {name}, which it may not know")
    return problems + circles(arrows)


def circles(arrows):
    "Modules that import themselves by way of others"
    def reached(start):
        seen, ahead = set(), [start]
        while ahead:
            for other in arrows.get(ahead.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    ahead.append(other)
        return seen
    return [f"{m} imports itself by way of others" for m in sorted(arrows) if m in reached(m)]


def sidebar_entries(contents):
    "The file names and globs of a sidebar's contents, sections flattened"
    for entry in [contents] if isinstance(contents, str) else contents:
        if isinstance(entry, str): yield entry
        else:
            if entry.get("href"): yield entry["href"]
            if entry.get("contents"):
                yield from sidebar_entries(entry["contents"])


def check_sidebar():
    problems, listed = [], set()
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))
    present = {nb.relative_to(NBS).as_posix() for nb in notebooks()}
    for entry in sidebar_entries(sidebar["website"]["sidebar"]["contents"]):
        found = {p.relative_to(NBS).as_posix() for p in NBS.glob(entry)} & present
        if not found:
            problems.append(f"nbs/sidebar.yml lists {entry}, but there is no such notebook")
        for name in sorted(found & listed):
            problems.append(f"nbs/sidebar.yml lists {name} twice")
        listed |= found
    return problems + [f"nbs/{name} is not in nbs/sidebar.yml" for name in sorted(present - listed)]


def check():
    owners = module_owners()
    return check_owners(owners) + check_arrows() + check_sidebar(), owners


if __name__ == "__main__":
    problems, owners = check()
    fail(problems, "check_modules")
    print(f"check_modules: {len(notebooks())} notebooks, {len(owners)} modules, "
          f"{len(list(additions()))} additions, no import against the rules, sidebar complete")
