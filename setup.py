"""Package metadata for puma-nb, read from settings.ini.

nbdev's own setup.py cannot be used: its list of Python versions has no 3.11.
"""
import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STATUSES = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature", "7 - Inactive"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
WEIGHT_FILES = ["safetensors", "json", "toml", "jsonl", "md", "txt"]


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


class BuildPyWithCards(build_py):
    """Put data_cards/ inside the built package, where puma_nb looks first.

    An editable install copies nothing: there the code reads the checkout's own data_cards/.
    """

    def _cards(self):
        folder = Path(self.build_lib) / "puma_nb" / "data_cards"
        return {folder / card.name: card for card in sorted((ROOT / "data_cards").glob("*.md"))}

    def run(self):
        super().run()
        if self.editable_mode: return
        for target, card in self._cards().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(card, target)

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else outputs + [str(target) for target in self._cards()]


cfg = settings()
extras = {key.removesuffix("_requirements").replace("_", "-"): value.split()
          for key, value in cfg.items() if key.endswith("_requirements")}
min_python = cfg["min_python"]
readme = ROOT / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUSES[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *[f"Programming Language :: Python :: {v}" for v in PYTHONS[PYTHONS.index(min_python):]],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={min_python}",
    packages=find_packages(include=["puma_nb", "puma_nb.*"]),
    package_data={"puma_nb": ["accelerate_configs/*.yaml", *[f"weights/**/*.{suffix}" for suffix in WEIGHT_FILES]]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        # With this entry nbdev finds the index of names, and `name` in Markdown links to its page.
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildPyWithCards},
    zip_safe=False,
)
