"""What the scripts in this folder share: where the project is, and how its notebooks are read."""
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LIB = ROOT / "puma_nb"
_default_exp = re.compile(r"^\s*#\|\s*default_exp\s+(\S+)", re.MULTILINE)


def settings():
    "settings.ini as a dictionary"
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def notebooks():
    "Every notebook that nbdev sees: names and folders that begin with _ or . are left out"
    found = sorted(NBS.rglob("*.ipynb"))
    return [nb for nb in found if not any(part[0] in "_." for part in nb.relative_to(NBS).parts)]


def read(path):
    "The notebook at `path` as a dictionary, each cell's source as one string"
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in nb["cells"]: cell["source"] = "".join(cell["source"])
    return nb


def code_cells(nb):
    return [cell for cell in nb["cells"] if cell["cell_type"] == "code"]


def default_exp(path):
    "The module that the notebook exports to, or None"
    names = [
        m.group(1) for cell in code_cells(read(path)) for m in _default_exp.finditer(cell["source"])
    ]
    if len(names) > 1:
        raise ValueError(f"{path.name} has {len(names)} default_exp lines")
    return names[0] if names else None


def tree_files():
    "Every file of the work tree that git does not ignore, tracked or not"
    out = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                         cwd=ROOT, check=True, capture_output=True).stdout
    paths = sorted({ROOT / name for name in out.decode().split("\0") if name})
    return [p for p in paths if p.is_file()]


def fail(problems, what):
    "Print the problems and exit 1, or say that there are none"
    for problem in problems: print(f"{what}: {problem}", file=sys.stderr)
    if problems: sys.exit(1)
