"""How fast samples come from disk, alone, beside what a training step of nano takes up.

python tests/benchmarks/loader.py --out tests/benchmarks/loader.json
"""
import argparse, io, json, tarfile, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from puma_nb.core import to_pil
from puma_nb.data.cards import load_cards
from puma_nb.data.loaders import CardSet
from puma_nb.errors import package_dir
from puma_nb.presets import get_preset
from puma_nb.training.log import read_log
from puma_nb.world.drawing import draw_scene, sample_scene
from puma_nb.world.language import caption


def shards(folder, side, kind, count=8, rows=256):
    "Web-dataset shards of world scenes, as `img2dataset` leaves a set."
    for k in range(count):
        with tarfile.open(folder / f"{k:05d}.tar", "w") as tar:
            for j in range(rows):
                scene, f = sample_scene(0, k * rows + j), io.BytesIO()
                to_pil(draw_scene(scene, side).float() / 255).save(f, kind)
                for name, data in ((f"{j:05d}.{kind.lower()}", f.getvalue()), (f"{j:05d}.txt", caption(scene).encode())):
                    info = tarfile.TarInfo(name); info.size = len(data); tar.addfile(info, io.BytesIO(data))


def rate(ds, threads, n):
    "Samples a second."
    pool, begun = ThreadPoolExecutor(threads), time.perf_counter()
    list(pool.map(ds.__getitem__, range(n)))
    return n / (time.perf_counter() - begun)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument("--out"); p.add_argument("--rounds", type=int, default=5); p.add_argument("--n", type=int, default=1000); a = p.parse_args()
    rows, needed = [], float(np.median([r["samples_per_second"] for r in read_log(package_dir("weights") / "pretrain" / "log.jsonl")]))
    for side, kind, target in ((64, "PNG", get_preset("nano").encoder.image_size), (384, "JPEG", get_preset("paper").encoder.image_size)):
        with tempfile.TemporaryDirectory() as folder:
            shards(Path(folder), side, kind)
            ds = CardSet(load_cards()["laion-2b"], folder, "pretrain", target)
            found = {k: [] for k in (1, 2, 4)}
            for _ in range(a.rounds):
                for k in found: found[k].append(rate(ds, k, a.n))
        for k, v in found.items(): rows.append(dict(pictures=f"{side} px {kind}", to=target, threads=k, samples_per_second=round(float(np.median(v)))))
    for r in rows:
        if r["to"] == 32: r["times_the_step"] = round(r["samples_per_second"] / needed, 2)
        print(r, flush=True)
    print(f"a step of nano takes up {needed:.0f} samples a second")
    if a.out: Path(a.out).write_text(json.dumps(dict(step_samples_per_second=needed, rows=rows), indent=1))


if __name__ == "__main__": main()
