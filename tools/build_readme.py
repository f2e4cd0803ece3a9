"""Make README.md from nbs/index.ipynb, as nbdev processes it for the site.

nbdev_readme needs Quarto, which is no registry package; this script needs only nbdev, so everyone
gets the same README. `--check` writes nothing and exits 1 if README.md is out of date.
"""
import argparse
import base64
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from project import NBS, ROOT, read, settings

README = ROOT / "README.md"
IMAGES = ROOT / "index_files"  # pictures among the index notebook's outputs
NOTE = "<!-- Made from nbs/index.ipynb by tools/build_readme.py: edit the notebook. -->"
EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
_link = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))")
_html_link = re.compile(r"(<(?:img|a)\b[^>]*?\b(?:src|href)=\")([^\"]+)(\")")
_option = re.compile(r"^#\|\s*([\w-]+)\s*:\s*(\S.*?)\s*$")


def processed_index():
    "The index notebook after nbdev's own processing"
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import exec_nb

    class ReadmeFilter(FilterDefaults):
        "Without links from `name` to the site: they depend on which other libraries are installed"
        def base_procs(self):
            return [p for p in super().base_procs() if p.__name__ != "add_links"]

    os.chdir(ROOT)  # nbdev looks for settings.ini from the working directory upwards
    before = os.environ.get("IN_TEST")
    os.environ["IN_TEST"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "index.ipynb"
            exec_nb(NBS / settings()["readme_nb"], out, ReadmeFilter)
            return read(out)
    finally:
        if before is None: del os.environ["IN_TEST"]
        else: os.environ["IN_TEST"] = before


def fix_links(text):
    "Point relative links at nbs/: README.md is one level above it"
    def fix(m):
        target, sep, anchor = m.group(2).partition("#")
        if target and "://" not in target and not target.startswith(("mailto:", "/")):
            if not (NBS / target).exists():
                raise SystemExit(f"build_readme: the index links to {target}, which does not exist")
            target = os.path.relpath(NBS / target, ROOT).replace(os.sep, "/")
        return m.group(1) + target + sep + anchor + m.group(3)
    return _html_link.sub(fix, _link.sub(fix, text))


def fix_callouts(text):
    "Quarto's callouts as block quotations, other divs without their fences"
    lines, kind = [], None
    for line in text.splitlines():
        if line.startswith(":::"):
            m = re.search(r"\.callout-(\w+)", line)
            if m:
                lines += [f"> [!{m.group(1).upper()}]"]
                kind = m.group(1)
            elif not line.strip(": "): kind = None
        else: lines.append(f"> {line}".rstrip() if kind else line)
    return "\n".join(lines)


def split_options(source):
    "Quarto's cell options, and the source without them"
    options, lines = {}, []
    for line in source.splitlines():
        m = _option.match(line)
        if m: options[m.group(1)] = m.group(2)
        else: lines.append(line)
    return options, "\n".join(lines).strip("\n")


def indented(text):
    "`text` as a code block of Markdown"
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def output_blocks(outputs, images, asis):
    "Markdown for a cell's outputs; pictures are collected in `images`"
    for out in outputs:
        kind = out["output_type"]
        if kind == "error":
            error = out.get("ename")
            raise SystemExit(f"build_readme: the index notebook stores an error: {error}")
        if kind == "stream":
            text = "".join(out["text"]).rstrip()
            if out["name"] == "stdout" and text:
                yield text if asis else indented(text)
            continue
        data = {k: "".join(v) if isinstance(v, list) else v for k, v in out["data"].items()}
        picture = next((mime for mime in EXTENSIONS if mime in data), None)
        if picture:
            name = f"output-{len(images) + 1}.{EXTENSIONS[picture]}"
            decode = str.encode if picture == "image/svg+xml" else base64.b64decode
            images[name] = decode(data[picture])
            yield f"![](index_files/{name})"
        elif "text/markdown" in data: yield data["text/markdown"].strip()
        elif "text/plain" in data:
            yield indented(data["text/plain"])


def build():
    "README.md's text, and its pictures as {name: bytes}"
    blocks, images = [NOTE], {}
    for cell in processed_index()["cells"]:
        source = cell["source"].strip()
        if cell["cell_type"] == "raw" and source.startswith("---"):
            front = yaml.safe_load(source.strip("-\n "))
            blocks.append(f"# {front['title']}")
            if front.get("description"):
                blocks.append(f"> {front['description']}")
        elif cell["cell_type"] == "markdown":
            if cell.get("attachments"):
                raise SystemExit(
                    "build_readme: the index has an attached picture: put it in a file under nbs/"
                )
            if "AUTOGENERATED" not in source:
                blocks.append(fix_links(fix_callouts(source)))
        elif cell["cell_type"] == "code":
            options, code = split_options(cell["source"])
            if options.get("include") == "false": continue
            if code and options.get("echo") != "false":
                language = cell.get("metadata", {}).get("language", "python")
                code = re.sub(r"\A%%\w+\n", "", code)
                blocks.append(f"``` {language}\n{code}\n```")
            if options.get("output") != "false":
                blocks += output_blocks(cell["outputs"], images, options.get("output") == "asis")
    return "\n\n".join(block for block in blocks if block) + "\n", images


def in_sync(text, images):
    "Is what is on disk what `build` made?"
    stored = {p.name: p.read_bytes() for p in IMAGES.iterdir()} if IMAGES.exists() else {}
    return README.exists() and README.read_text(encoding="utf-8") == text and stored == images


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if README.md is out of date"
    )
    args = parser.parse_args()
    text, images = build()
    if in_sync(text, images):
        return print("README.md is in sync with nbs/index.ipynb")
    if args.check:
        sys.exit("README.md is out of date: run python tools/build_readme.py")
    if IMAGES.exists(): shutil.rmtree(IMAGES)
    if images: IMAGES.mkdir()
    for name, content in images.items(): (IMAGES / name).write_bytes(content)
    README.write_text(text, encoding="utf-8")
    print(f"README.md written: {len(text.splitlines())} lines, {len(images)} pictures")


if __name__ == "__main__": main()
