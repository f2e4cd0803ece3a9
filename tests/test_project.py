"""What holds for the project as a whole: pins, packaging, and what no file may contain."""
import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import build_readme
import build_site
import build_wheel
import check_modules
import execute_notebooks
from project import ROOT, code_cells, notebooks, read, settings, tree_files

CFG = settings()


def requirements(key):
    return {r.name: r for r in map(Requirement, CFG[key].split())}


# ---- settings and versions

def test_settings_of_nbdev():
    assert CFG["tst_flags"].split() == ["notest", "slow", "gpu"]
    assert CFG["update_pyproject"] == "False", "True rewrites every name in pyproject.toml"
    assert "custom_quarto_yml" not in CFG, "False deletes nbs/_quarto.yml"
    for key in ("jupyter_hooks", "clean_ids", "custom_sidebar"):
        assert CFG[key] == "True", key


def test_pins():
    "nbdev 2.4 works with these and breaks with newer ones"
    dev, runtime = requirements("dev_requirements"), requirements("requirements")
    assert str(dev["nbdev"].specifier) == "==2.4.14"
    assert "2.0" not in dev["fastcore"].specifier
    assert {"1.12.3", "2.2"} <= set(runtime["fastcore"].specifier.filter(["1.12.3", "2.2"]))
    assert "0.2" not in dev["execnb"].specifier and "2.0" not in dev["ghapi"].specifier


@pytest.mark.parametrize("key", ["requirements", "dev_requirements"])
def test_installed_versions_satisfy_settings(key):
    for name, req in requirements(key).items():
        assert req.specifier.contains(importlib.metadata.version(name), prereleases=True), name


def test_one_version():
    import puma_nb
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert puma_nb.__version__ == CFG["version"] == str(citation["version"])
    assert CFG["version"] == importlib.metadata.version("puma-nb")


def test_citation_is_the_paper():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["url"].endswith("2410.13861") and len(paper["authors"]) == 10


# ---- notebooks, modules, README

def test_modules_belong_to_notebooks(): assert check_modules.check()[0] == []


@pytest.mark.parametrize("line, lazy", [("from ..world.drawing import *", False),
                                        ("def f(): from ..world import drawing", True)])
def test_imports_against_the_rules_are_found(line, lazy, tmp_path, monkeypatch):
    monkeypatch.setattr(check_modules, "LIB", tmp_path)
    for name in ("models/mllm.py", "models/pyramid.py", "world/drawing.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert check_modules.check_arrows() == []
    (tmp_path / "models" / "mllm.py").write_text(f"from .pyramid import *\n{line}\n")
    found = set(check_modules.imported_modules(tmp_path / "models" / "mllm.py"))
    assert found == {("models.pyramid", False), ("world.drawing", lazy)}
    wrong = "models.mllm imports world.drawing, which it may not know"
    assert check_modules.check_arrows() == [wrong]
    assert check_modules.circles(dict(a={"b"}, b={"c"}, c={"b"})) == [
        f"{m} imports itself by way of others" for m in "bc"]


def test_notebooks_as_stored_suit_the_site():
    assert build_site.check_sources() == []


def test_readme_in_sync():
    "In a process of its own: nbdev keeps what it has read about the project"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "build_readme.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_site_settings_come_from_the_root():
    stub = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text())
    assert stub["metadata-files"] == ["../_quarto.yml", "nbdev.yml", "sidebar.yml"]
    root = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    owned = {"title", "site-url", "description", "repo-url", "repo-branch"}  # nbdev.yml's
    assert not owned & set(root["website"]) and "output-dir" not in root.get("project", {})


# ---- the wheel

def test_wheel_carries_cards_and_weights(tmp_path):
    assert build_wheel.check(build_wheel.build(tmp_path)) == []


# ---- what no file may contain

SHARED_DIRS = "home|Users|root|opt|work|mnt|srv|media|private|workspace|builds"
MACHINE_PATH = re.compile(
    rf"(?<![\w./:$}}>~-])(?:/(?:{SHARED_DIRS})/[\w.]|/tmp/\w+/|[A-Z]:\\\\?Users\\)"
)
HOSTS = [
    ".".join(parts)
    for parts in (  # in parts, so that this file does not contain them
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("registry", "yarnpkg", "com"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("conda", "anaconda", "org"),
        ("download", "pytorch", "org"),
        ("proxy", "golang", "org"),
        ("crates", "io"),
        ("ghcr", "io"),
        ("docker", "io"),
    )
]
INDEX_OPTION = re.compile("--(?:extra-)?" + "-".join(["index", "url"]))
TEXT_SUFFIXES = {
    ".py", ".ipynb", ".md", ".toml", ".ini", ".yml", ".yaml", ".cff", ".in", ".css", ".json",
    ".jsonl", ".txt", ".sh", "",
}


def readable(path):
    "The file's text; of a notebook everything but encoded pictures, in which any letters may occur"
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb": return text
    nb = json.loads(text)
    for cell in nb["cells"]:
        for out in cell.get("outputs", []):
            for mime in list(out.get("data", {})):
                if mime.startswith("image/") and "svg" not in mime:
                    del out["data"][mime]
    parts = [cell["source"] for cell in nb["cells"]]
    parts += [json.dumps(cell.get("outputs", []), ensure_ascii=False) for cell in nb["cells"]]
    return "\n".join("".join(part) for part in parts)


def text_files():
    return [p for p in tree_files() if p.suffix in TEXT_SUFFIXES and p.name != "LICENSE"]


def test_no_machine_paths():
    "No file names a folder of the machine it was written on"
    own = {str(p) for p in (ROOT, Path(sys.prefix), Path.home()) if len(p.parts) > 2}
    found = []
    for path in text_files():
        for number, line in enumerate(readable(path).splitlines(), 1):
            m = MACHINE_PATH.search(line)
            hit = m.group(0) if m else next((o for o in own if o in line), None)
            if hit: found.append(f"{path.relative_to(ROOT)}:{number}: {hit}")
    assert found == []


def test_the_path_check_finds_paths():
    for bad in (
        "'/" + "home/ann/x'", "File /" + "opt/venv/lib/a.py", "(/" + "root/.cache)",
        '"C:' + '\\\\Users\\\\ann"',
    ):
        assert MACHINE_PATH.search(bad), bad
    for good in (
        "https://example.org/home/x", "nbs/work/x", "$HOME/work/x", "/usr/bin/chromium", "a/b",
        "</root>",
    ):
        assert not MACHINE_PATH.search(good), good


def test_no_registry_hosts():
    "Which registry serves a package is the reader's own setting"
    found = []
    for path in text_files():
        text = readable(path)
        found += [f"{path.relative_to(ROOT)}: {host}" for host in HOSTS if host in text]
        if INDEX_OPTION.search(text):
            found.append(f"{path.relative_to(ROOT)}: an index address")
    assert found == []


def python_sources():
    "(where, source) of every module, script and test, and of every notebook's code"
    for path in tree_files():
        if path.suffix == ".py":
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for nb in notebooks():
        for i, cell in enumerate(code_cells(read(nb))):
            yield f"{nb.name} code cell {i}", cell["source"]


def unsafe_calls(source):
    "Calls that can execute code from a file of weights"
    try: tree = ast.parse(source)
    except SyntaxError:
        tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))  # a cell with magics
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name in ("pickle.load", "pickle.loads", "joblib.load"): yield name
        if keywords.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"


def test_weights_are_loaded_safely():
    found = []
    for where, source in python_sources():
        found += [f"{where}: {what}" for what in unsafe_calls(source)]
    assert found == []


def test_the_load_check_finds_calls():
    assert list(unsafe_calls("torch.load(f)"))
    assert list(unsafe_calls("!ls\ntorch.load(f, weights_only=False)"))
    assert list(unsafe_calls("AutoModel.from_pretrained(n, trust_remote_code=True)"))
    assert not list(unsafe_calls("torch.load(f, weights_only=True)"))


# ---- the scripts in tools/

def test_executed_notebooks_keep_no_widgets_or_bars():
    outputs = [
        {
            "output_type": "display_data",
            "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "  0%|"},
        },
        {
            "output_type": "stream",
            "name": "stderr",
            "text": "\r  0%|    | 0/3 [00:00<?, ?it/s]\r100%|####| 3/3 [00:00<00:00, 9.9it/s]\n",
        },
        {
            "output_type": "stream",
            "name": "stderr",
            "text": "\r100%|####| 3/3 [00:00<00:00, 9.9it/s]\na warning\n",
        },
        {"output_type": "stream", "name": "stdout", "text": "50% of it\n"},
    ]
    kept = list(execute_notebooks.kept_outputs(outputs))
    assert [o["text"] for o in kept] == ["a warning\n", "50% of it\n"]


def test_cells_not_executed():
    assert execute_notebooks.is_skipped("#| eval: false\nx", [])
    assert execute_notebooks.is_skipped("#| gpu\nx", ["gpu"])
    assert not execute_notebooks.is_skipped("#| slow\nx", ["gpu"])
    assert not execute_notebooks.is_skipped("x = 'eval: false'", ["gpu"])


def test_readme_links_and_callouts():
    note = build_readme.fix_callouts("::: {.callout-note}\nHello\n:::\nafter")
    assert note == "> [!NOTE]\n> Hello\nafter"
    links = build_readme.fix_links("[a](sidebar.yml#x) [b](https://example.org/c)")
    assert links == "[a](nbs/sidebar.yml#x) [b](https://example.org/c)"
    with pytest.raises(SystemExit):
        build_readme.fix_links("[a](no-such-file.ipynb)")


def test_title_cell_check():
    cell = lambda source: {"cells": [{"cell_type": "markdown", "source": source}]}
    assert not list(build_site.check_title_cell(cell("# T\n\n> sub\n\n- author: x")))
    assert list(build_site.check_title_cell(cell("# T\n\nProse that vanishes.")))


def test_import_cell_check():
    def cells(*sources):
        sources = ("#| exports\ndef f(): pass", *sources)
        return {"cells": [{"cell_type": "code", "source": s} for s in sources]}
    assert list(build_site.check_imports(cells("import math\nmath.pi")))
    export = "#| hide\nimport nbdev; nbdev.nbdev_export()"
    assert not list(build_site.check_imports(cells("import math", "math.pi", export)))


# ---- the workflows

def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_workflows_run_every_python_and_pinned_actions():
    matrix = workflow("test.yaml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert matrix == ["3.11", "3.12", "3.13"] and matrix[0] == CFG["min_python"]
    for name in ("test.yaml", "site.yaml"):
        for job in workflow(name)["jobs"].values():
            used = [step["uses"] for step in job["steps"] if "uses" in step]
            assert all(re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", u) for u in used), used
