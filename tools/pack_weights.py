"""Copy a trained folder into the package as its shipped weights, with their card.

    python tools/pack_weights.py runs/nano "puma-nb train --preset nano --stage all"
"""
import json, subprocess, sys
from datetime import date
from pathlib import Path
from puma_nb.recipes.system import pack_weights

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("encoder", "autoencoder", "decoders", "pretrain", "instruct")


def card(about, reports):
    "The card's Markdown, from the stages' own reports."
    lines = [
        "# Shipped weights",
        "",
        f"Preset `{about['preset']}`, made by `{about['command']}` (data seed {about['seed']}, "
        f"commit {about['commit']}, {about['date']}).",
        "Rounded to bfloat16. Nothing else went into them: no pretrained weights, "
        "no data but the drawn world.",
        "", "| stage | steps | minutes | gates |", "|---|---|---|---|",
    ]
    for name, r in reports.items():
        gates = ", ".join(
            f"{k} {g['value']} (bar {g['wanted']}{'' if g['passed'] else ', missed'})"
            for k, g in r["gates"].items()
        )
        lines.append(f"| {name} | {r['settings']['steps']} | {r['seconds'] / 60:.1f} | {gates} |")
    if "instruct" in reports:
        lines += [
            "",
            "Text to image on 200 validation captions, read by the oracle:",
            "", "| scale | shape | colour | place | scenes |", "|---|---|---|---|---|",
        ]
        lines += [
            f"| {i} | {s['shape']:.3f} | {s['color']:.3f} | {s['place']:.3f} | {s['scenes']:.3f} |"
            for i, s in reports["instruct"]["t2i"].items()
        ]
    end = "Each stage's folder holds its `stage.json` (settings, gates, metrics) and `log.jsonl`."
    return "\n".join(lines + ["", end, ""])


def main(source, command="puma-nb train --preset nano --stage all", seed=0):
    target = ROOT / "puma_nb" / "weights"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    about = dict(
        preset="nano", command=command, seed=int(seed), commit=commit, date=str(date.today())
    )
    size = pack_weights(source, target, about)
    reports = {
        s: json.loads((target / s / "stage.json").read_text())
        for s in STAGES
        if (target / s / "stage.json").exists()
    }
    (target / "README.md").write_text(card(about, reports))
    print(f"{size / 1e6:.1f} MB in {target}")


if __name__ == "__main__": main(*sys.argv[1:])
