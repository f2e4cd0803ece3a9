"""How fast are a decoder's training step and its sampling, against the plain way of doing the same?

    python tests/benchmarks/decoders.py [--rounds 5] [--json FILE]

A and B alternate in one process; the figures are medians. Not a test: nothing here can fail.
decoders.json beside this file holds the figures of the last run that was written down.
Run it on a machine that does nothing else.
"""
import argparse, json, os, time
from dataclasses import replace
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from puma_nb.core import has_bf16
from puma_nb.evaluation.metrics import lpips_distance, psnr
from puma_nb.models.autoencoder import load_latents
from puma_nb.models.decoders import Decoders, build_decoder
from puma_nb.models.pyramid import encode_images, load_encoder, load_stats, pyramid
from puma_nb.presets import get_preset
from puma_nb.recipes.decoders import DecoderTask, decoder_data
from puma_nb.training.launch import make_accelerator
from puma_nb.training.log import matmul_ceiling
from puma_nb.training.report import step_flops
from puma_nb.training.task import Losses, train_step
from puma_nb.world.drawing import world_images


def stepper(preset, data, scale, plain, compiled=False):
    "A function that does one training step: ours, or float32 with fused attention and an ordinary optimiser."
    torch.manual_seed(0)
    model = build_decoder(preset, scale)
    if plain: model.unet.set_attn_processor(AttnProcessor2_0())
    if compiled: model.compile()
    task, accelerator = DecoderTask(preset, model, data, (scale,)), make_accelerator("cpu", bf16=not plain)
    losses = Losses(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not plain, foreach=False if not plain else None)
    model.train()
    batch = preset.stages[f"f{scale}"].batch

    def step(k):
        train_step(accelerator, task, losses, np.arange(k * batch, (k + 1) * batch), k)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
    return step, task, batch


def interleaved(functions, rounds, inner):
    "Median seconds of each function, called in turn."
    times = [[] for _ in functions]
    for r in range(rounds + 1):
        for f, t in zip(functions, times):
            begun = time.perf_counter()
            for k in range(inner): f(r * inner + k)
            t.append((time.perf_counter() - begun) / inner)
    return [float(np.median(t[1:])) for t in times]  # the first round warms up


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=5); p.add_argument("--json")
    p.add_argument("--compile", action="store_true", help="time the compiled step too (takes minutes to compile)")
    args = p.parse_args()
    nano, out = get_preset("nano"), dict(machine=dict(cores=os.cpu_count(), bf16=has_bf16(), torch=torch.__version__, ceiling_gflops=round(matmul_ceiling() / 1e9)))
    few = world_images(replace(nano, world=replace(nano.world, train=1000)))[0]
    online = replace(nano, decoder=replace(nano.decoder, features="online"))
    kept, anew = (decoder_data(p, load_encoder(), load_latents(), few, load_stats()) for p in (nano, online))
    read = lambda data: lambda k: data.rows(np.arange(k * 64, k * 64 + 64) % 1000)
    a, b = interleaved([read(kept), read(anew)], args.rounds, 4)
    out["data"] = dict(cached_ms=round(a * 1e3, 2), online_ms=round(b * 1e3, 2), ratio=round(b / a, 1))
    print(f"64 images' features and latents: cached {a * 1e3:.1f} ms, encoded anew {b * 1e3:.1f} ms: {b / a:.0f}x")
    for scale in (0, 2):
        (ours, task, batch), (plain, *_), (naive, *_) = (stepper(nano, d, scale, p) for d, p in ((kept, False), (kept, True), (anew, True)))
        extra = [stepper(nano, kept, scale, False, True)[0]] if args.compile else []
        a, b, c, *d = interleaved([ours, plain, naive, *extra], args.rounds, 4)
        share = step_flops(task, nano.stages[f"f{scale}"]) / a / matmul_ceiling()
        out[f"step_f{scale}"] = dict(ours=round(batch / a, 1), plain=round(batch / b, 1), plain_online=round(batch / c, 1), ratio=round(b / a, 2), ratio_online=round(c / a, 2), share_of_matmul_ceiling=round(share, 3),
                                     **({"compiled": round(batch / d[0], 1), "ratio_compiled": round(b / d[0], 2)} if d else {}))
        print(f"training step f{scale}: ours {batch / a:6.1f} samples/s ({'bf16' if has_bf16() else 'float32'}, {share:.1%} of the matmul ceiling); float32 eager {batch / b:6.1f}: {b / a:.2f}x; "
              f"the same without a cache {batch / c:6.1f}: {c / a:.2f}x" + (f"; compiled {batch / d[0]:6.1f}: {b / d[0]:.2f}x" if d else ""), flush=True)
    decoders, images = Decoders(nano), world_images(nano, "val", 50)[0]
    x, f2 = images.float() / 255, pyramid(encode_images(decoders.encoder, images), 2)[2]
    kinds = {"ours": dict(), "ddpm50": dict(steps=50, sampler="DDPMScheduler", bf16=False)}
    pictures = {}
    def sample(name): return lambda k: pictures.update({name: decoders.decode(f2, 2, seeds=list(range(50)), **kinds[name])})
    a, b = interleaved([sample(k) for k in kinds], args.rounds, 1)
    quality = {k: dict(psnr=round(float(psnr(v, x).mean()), 2), lpips=round(float(lpips_distance(v, x).mean()), 4)) for k, v in pictures.items()}
    out["sampling"] = dict(ours_seconds=round(a, 3), ddpm50_seconds=round(b, 3), ratio=round(b / a, 2), **quality)
    print(f"50 images at f2: ours {a:.2f} s {quality['ours']}, DDPM 50 in float32 {b:.2f} s {quality['ddpm50']}: {b / a:.1f}x")
    if args.json:
        with open(args.json, "w") as f: json.dump(out, f, indent=1)


if __name__ == "__main__": main()
