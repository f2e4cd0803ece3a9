"""Process the notebooks for the site, check what came out, and render it where Quarto is installed.

nbdev's own commands nbdev_proc_nbs and nbdev_docs try to install Quarto when it is missing, so this
calls the processing underneath them. The processed notebooks are in _proc/, the site in _docs/.
"""
import argparse
import ast
import os
import re
import shutil
import subprocess
import time

import yaml

from project import NBS, ROOT, code_cells, fail, notebooks, read

PROC, DOCS = ROOT / "_proc", ROOT / "_docs"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
NBDEV_DIRECTIVES = (
    "default_exp|export|exports|exporti|hide|hide_line|filter_stream|exec_doc|notest|slow|gpu"
)
_directive = re.compile(rf"^\s*#\|\s*({NBDEV_DIRECTIVES})\b(?!:)", re.MULTILINE)
_link = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_fence = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_inline_code = re.compile(r"`[^`\n]*`")


def check_title_cell(nb):
    "Only the title, `>` lines and `- key: value` lines of the H1 cell reach the site"
    for cell in nb["cells"]:
        if cell["cell_type"] != "markdown" or not re.match(r"#\s", cell["source"]):
            continue
        for line in cell["source"].splitlines():
            if line.strip() and not re.match(r"#\s+\S|>\s+\S|-\s+[^\s:]+:", line):
                yield (f"the line {line[:60]!r} of the title cell vanishes from the site: "
                       "move it to a cell of its own")
        return
    yield "there is no title (a Markdown cell that begins with '# ')"


def check_imports(nb):
    "nbdev executes every cell that has an import while it makes the page: it may hold nothing else"
    shown = re.compile(
        r"^\s*#\|\s*(exports?|exporti|exec_doc)\b|^\s*#\|\s*eval\s*:\s*false", re.MULTILINE
    )
    documented = re.compile(r"^\s*#\|\s*exports?\b|^show_doc\(", re.MULTILINE)
    skips = any(
        re.search(r"^-\s+skip_showdoc:\s*true", cell["source"], re.MULTILINE)
        for cell in nb["cells"][:1]
    )
    if skips or not any(documented.search(cell["source"]) for cell in code_cells(nb)):
        return
    for cell in code_cells(nb):
        source = cell["source"].strip()
        if shown.search(source) or "nbdev_export()" in source: continue
        try: nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError: continue  # a cell with magics
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes) and any(
            isinstance(n, (ast.Expr, ast.Assign)) for n in nodes
        ):
            yield (f"the cell {source.splitlines()[-1][:60]!r} mixes an import with other code: "
                   "give the import a cell of its own")


def check_source(nb, folder):
    "Problems of a notebook as it is stored"
    yield from check_title_cell(nb)
    yield from check_imports(nb)
    if "widgets" in nb["metadata"]:
        yield "widget state is stored in the metadata: run nbdev_clean after removing it"
    for cell in code_cells(nb):
        first = cell["source"].strip().split("\n")[0][:60]
        for out in cell["outputs"]:
            if out["output_type"] == "error":
                yield f"the cell {first!r} stores an error ({out.get('ename')})"
            if WIDGET_VIEW in out.get("data", {}):
                yield f"the cell {first!r} stores a widget, which is dead on the site"
    for cell in nb["cells"]:
        if cell["cell_type"] != "markdown": continue
        text = _inline_code.sub("", _fence.sub("", cell["source"]))
        for target in _link.findall(text):
            path = target.partition("#")[0]
            if not path or "://" in path or path.startswith(("mailto:", "attachment:", "data:")):
                continue
            if not (folder / path).exists():
                yield f"the link to {path} leads nowhere"


def check_processed(nb):
    "Problems of a notebook after nbdev's processing"
    cells = nb["cells"]
    front = {}
    if cells and cells[0]["cell_type"] == "raw":
        front = yaml.safe_load(cells[0]["source"].strip("-\n "))
    for key in ("title", "output-file"):
        if not (front or {}).get(key): yield f"the front matter has no {key}"
    for cell in code_cells(nb):
        for name in _directive.findall(cell["source"]):
            yield f"the directive #| {name} shows on the page"
        for out in cell["outputs"]:
            if out["output_type"] == "error":
                error = f"{out.get('ename')}: {out.get('evalue')}"
                yield f"a cell fails while the page is made: {error}"


def process(n_workers):
    "Run nbdev's processing; returns seconds"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(ROOT)
    refresh_quarto_yml()
    start = time.time()
    # A relative path: nbdev skips every file that has a hidden folder anywhere in its path.
    proc_nbs("nbs", n_workers=n_workers, force=True)
    return time.time() - start


def check_sources():
    return [
        f"nbs/{path.relative_to(NBS)}: {p}"
        for path in notebooks()
        for p in check_source(read(path), path.parent)
    ]


def check_pages():
    problems, outputs = [], {}
    for path in notebooks():
        rel = path.relative_to(NBS)
        if not (PROC / rel).exists():
            problems.append(f"nbs/{rel}: was not processed")
            continue
        nb = read(PROC / rel)
        problems += [f"_proc/{rel}: {p}" for p in check_processed(nb)]
        front = nb["cells"][0]["source"] if nb["cells"] else ""
        page = re.search(r"^output-file: (\S+)", front, re.MULTILINE)
        if page: outputs.setdefault(rel.parent / page.group(1), []).append(rel)
    for page, rels in outputs.items():
        if len(rels) > 1:
            problems.append(f"{' and '.join(map(str, rels))} both become {page}")
    for name in ("_quarto.yml", "nbdev.yml", "sidebar.yml", "styles.css"):
        if not (PROC / name).exists():
            problems.append(f"_proc/{name} is missing")
    return problems, sorted(outputs)


def render(pages):
    "Let Quarto make the pages, move them to _docs/, and check that each one is there"
    subprocess.run(["quarto", "render", "--no-cache"], cwd=PROC, check=True)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    missing = [page for page in pages if not (DOCS / page).exists()]
    return [f"_docs/{page} was not rendered" for page in missing]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--n_workers", type=int, default=1, help="processes; each one imports the whole library"
    )
    parser.add_argument("--no_render", action="store_true", help="stop before Quarto")
    args = parser.parse_args()
    fail(check_sources(), "build_site")
    seconds = process(args.n_workers)
    problems, pages = check_pages()
    fail(problems, "build_site")
    print(f"build_site: {len(pages)} pages processed and checked in {seconds:.0f} s")
    if args.no_render: return
    if not shutil.which("quarto"):
        return print("build_site: Quarto is not on the PATH: the pages are processed, not rendered")
    fail(render(pages), "build_site")
    print(f"build_site: {len(pages)} pages rendered in _docs/")


if __name__ == "__main__": main()
