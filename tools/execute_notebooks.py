"""Execute notebooks top to bottom, each from a clean kernel in its own folder; store the outputs.

    python tools/execute_notebooks.py 01_pyramid 02_decoders
    python tools/execute_notebooks.py --all

Cells marked `#| eval: false` are left as they are, and so are cells with one of --skip's flags.
Widgets and progress bars are removed from the outputs, pictures get a palette, then nbdev_clean
runs. A notebook that fails is not written: the error is printed and the exit code is 1.
"""
import argparse
import base64
import io
import os
import re
import sys
import time

from project import NBS, ROOT, notebooks

SKIP_TAG = "not-executed"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
SIZE_LIMIT = 600_000  # bytes of stored outputs that a notebook should stay under
_bar = re.compile(r"\d+%\|.*\||\d+(\.\d+)?(it/s|s/it)|\[\d\d:\d\d[,<?\]]")
_eval_false = re.compile(r"^\s*#\|\s*eval\s*:\s*false\b", re.MULTILINE)
_ansi = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def find(name):
    "The notebook that `name` means: a path, or a file name with or without .ipynb"
    found = [nb for nb in notebooks() if name in (nb.stem, nb.name, nb.relative_to(NBS).as_posix(),
             nb.relative_to(NBS).with_suffix("").as_posix(), nb.relative_to(ROOT).as_posix())]
    exact = [nb for nb in found if nb.parent == NBS]
    if len(exact or found) != 1:
        known = ", ".join(nb.stem for nb in notebooks())
        sys.exit(f"no single notebook is called {name}: there are {known}")
    return (exact or found)[0]


def is_skipped(source, flags):
    "Is a cell with this source left as it is?"
    if _eval_false.search(source): return True
    return any(
        re.search(rf"^\s*#\|\s*{re.escape(flag)}\s*$", source, re.MULTILINE) for flag in flags
    )


def without_bars(text):
    "`text` without the lines that a progress bar wrote"
    lines = re.split(r"[\r\n]", text)
    return "\n".join(line for line in lines if line.strip() and not _bar.search(line))


def with_palette(png):
    "A picture with at most 256 colours, a third of its size; as base64, like the one that came in"
    from PIL import Image
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def kept_outputs(outputs):
    "Outputs that may be stored: no widgets, no progress bars, small pictures"
    for out in outputs:
        data = out.get("data", {})
        if WIDGET_VIEW in data: continue
        if "image/png" in data:
            data["image/png"] = with_palette(data["image/png"])
        if out["output_type"] == "stream" and out["name"] == "stderr":
            text = without_bars(out["text"])
            if not text: continue
            out["text"] = text + "\n"
        yield out


def execute(path, flags, timeout):
    "Execute the notebook at `path` and store it; returns seconds and bytes of outputs"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    skipped = [c for c in nb.cells if c.cell_type == "code" and is_skipped(c.source, flags)]
    for cell in skipped: cell.metadata["tags"] = [SKIP_TAG]
    # pictures go into the notebook, whatever the shell says
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    client = NotebookClient(
        nb, timeout=timeout, kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        skip_cells_with_tag=SKIP_TAG, store_widget_state=False, coalesce_streams=True,
        record_timing=False,
    )
    start = time.time()
    client.execute()
    seconds = time.time() - start
    for cell in skipped: del cell.metadata["tags"]
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = list(kept_outputs(cell.outputs))
    size = sum(len(str(cell.outputs)) for cell in nb.cells if cell.cell_type == "code")
    nbformat.write(nb, path)
    clean(path)
    return seconds, size


def clean(path):
    from nbdev.clean import nbdev_clean
    nbdev_clean(str(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, e.g. 01_pyramid")
    parser.add_argument("--all", action="store_true", help="every notebook, in order of its name")
    parser.add_argument(
        "--skip", default="gpu",
        help="space-separated flags whose cells are not executed (default: gpu)",
    )
    parser.add_argument(
        "--timeout", type=int, help="seconds that one cell may take (default: no limit)"
    )
    args = parser.parse_args()
    if not args.names and not args.all:
        parser.error("name at least one notebook, or --all")
    os.chdir(ROOT)
    # stored outputs come from the full budget, never from the tests' one
    os.environ.pop("IN_TEST", None)
    total = 0
    for path in notebooks() if args.all else [find(name) for name in args.names]:
        print(f"{path.relative_to(ROOT)} ...", end=" ", flush=True)
        try: seconds, size = execute(path, args.skip.split(), args.timeout)
        except Exception as error:
            print("FAILED, not written", flush=True)
            sys.exit(_ansi.sub("", f"{type(error).__name__} in {path.relative_to(ROOT)}:\n{error}"))
        total += seconds
        over = " (over the limit)" if size > SIZE_LIMIT else ""
        print(f"{seconds:.0f} s, {size / 1e3:.0f} KB of outputs{over}", flush=True)
    print(f"{total:.0f} s in all")


if __name__ == "__main__": main()
