"""Loss bands of pretraining from one run, or from several that differ by their seed.

    python tools/make_bands.py TARGET SEED=LOG [SEED=LOG ...]
"""
import sys
from puma_nb.core import save_json
from puma_nb.presets import get_preset
from puma_nb.recipes.pretrain import make_bands
from puma_nb.training.log import read_log

if len(sys.argv) < 3: raise SystemExit(__doc__)
logs = {a.split("=", 1)[0]: read_log(a.split("=", 1)[1]) for a in sys.argv[2:]}
made = make_bands(get_preset("nano"), logs)
save_json(made, sys.argv[1])
for seed, ends in made["left_out"].items():
    print(seed, {t: r["end"] for t, r in ends.items()})
