"""Build the wheel from a clean copy of the work tree and check that it carries what it must.

A copy, because setuptools reuses build/ in the tree, where files of an earlier build survive.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from project import ROOT, fail, tree_files


def build(out):
    "Build a wheel into the folder `out`; returns its path"
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        for path in tree_files():
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        # No build isolation: setuptools is among the dev requirements, so no network is needed.
        subprocess.run(
            [
                sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                "--no-build-isolation", "--wheel-dir", str(out), str(copy),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    return max(out.glob("puma_nb-*.whl"), key=lambda p: p.stat().st_mtime)


def expected():
    "Names inside the wheel of everything that it must carry"
    names = set()
    for path in tree_files():
        rel = path.relative_to(ROOT)
        if rel.parts[0] == "puma_nb" and rel.suffix == ".py":
            names.add(rel.as_posix())
        if rel.parts[:2] in (("puma_nb", "weights"), ("puma_nb", "accelerate_configs")):
            names.add(rel.as_posix())
        if rel.parts[0] == "data_cards" and rel.suffix == ".md":
            names.add("puma_nb/" + rel.as_posix())
    return names


def check(wheel):
    "What is wrong with the wheel's contents"
    with zipfile.ZipFile(wheel) as z:
        found = {name for name in z.namelist() if not name.endswith("/")}
    want = expected()
    problems = [f"{name} is missing" for name in sorted(want - found)]
    extra = {name for name in found - want if ".dist-info/" not in name}
    problems += [f"{name} should not be there" for name in sorted(extra)]
    if not any(name.endswith(".safetensors") for name in found):
        problems.append("there are no weights")
    if not any(name.startswith("puma_nb/data_cards/") for name in found):
        problems.append("there are no data cards")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="dist", help="folder for the wheel")
    args = parser.parse_args()
    wheel = build(args.out)
    fail(check(wheel), "build_wheel")
    print(wheel)


if __name__ == "__main__": main()
