"""Check that notebooks, modules and the sidebar belong together.

nbdev does not notice when two notebooks export to one module (the last one wins), when a renamed
notebook leaves its old module behind, or when a notebook is missing from the sidebar.
"""
import ast

import yaml

from project import LIB, NBS, default_exp, fail, notebooks

GENERATED = {"__init__.py", "_modidx.py"}


def module_owners():
    "module file name -> the notebooks that export to it, in the order of the notebooks' names"
    owners = {}
    for nb in notebooks():
        name = default_exp(nb)
        if name:
            owners.setdefault(name.replace(".", "/") + ".py", []).append(nb)
    return owners


def check_pairs(owners):
    problems = []
    for module, nbs in owners.items():
        if len(nbs) > 1:
            problems.append(f"{' and '.join(nb.name for nb in nbs)} all export to {module}")
        if not (LIB / module).exists():
            problems.append(
                f"{nbs[0].name} exports to {module}, which does not exist: run nbdev_export"
            )
    for path in sorted(LIB.rglob("*.py")):
        module = path.relative_to(LIB).as_posix()
        if path.name not in GENERATED and module not in owners:
            problems.append(f"puma_nb/{module} belongs to no notebook: delete it")
    return problems


def imported_modules(path):
    "Names of the project's own modules that the module at `path` imports, anywhere in its code"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                yield from [name] if name else [alias.name for alias in node.names]
            elif name == "puma_nb":
                yield from (alias.name for alias in node.names)
            elif name.startswith("puma_nb."):
                yield name.removeprefix("puma_nb.")
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("puma_nb.") for a in node.names if a.name.startswith("puma_nb.")
            )


def check_order(owners):
    "A module imports only from modules whose notebooks come before its own"
    problems = []
    ordered = sorted(owners, key=lambda m: owners[m][0].name)
    order = {module: i for i, module in enumerate(ordered)}
    for module in order:
        if not (LIB / module).exists(): continue
        for name in sorted(set(imported_modules(LIB / module))):
            other = name.replace(".", "/") + ".py"
            if other in order and order[other] >= order[module]:
                problems.append(
                    f"puma_nb/{module} imports puma_nb.{name}, "
                    f"whose notebook does not come before {owners[module][0].name}"
                )
    return problems


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
    return check_pairs(owners) + check_order(owners) + check_sidebar(), owners


if __name__ == "__main__":
    problems, owners = check()
    fail(problems, "check_modules")
    print(f"check_modules: {len(notebooks())} notebooks, {len(owners)} modules, sidebar complete")
