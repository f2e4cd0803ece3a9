"""Real sizes on one GPU: the SDXL-size decoder's training step, and preset mini trained with its samples and log.

    python tests/benchmarks/gpu.py --out DIR [--part step] [--part mini] [--stretch 1.0]

One call does everything and leaves DIR/gpu.json, and for mini the folder of the system without its checkpoints.
`--smoke` runs the same lines with preset nano's decoder on whatever device there is, to see that the script works.
Peak FLOP/s for the utilisation (MFU) are the dense bfloat16 figure of an H200, 989e12, unless --peak says otherwise.
Recomputation under gradient checkpointing is not counted.
"""
import argparse, json, time
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from puma_nb.core import get_preset, pick_device
from puma_nb.decoders import build_decoder, noise_schedule
from puma_nb.training import stretched


def one_step(model, optimizer, schedule, batch, device):
    "Noise, prediction, squared error, backward, AdamW: a decoder's training step on random latents and features."
    x0, noise, features = batch
    t = torch.randint(0, 1000, (len(x0),), device=device)
    xt = schedule.add_noise(x0, noise, t)
    with torch.autocast(device.type, torch.bfloat16): error = (model(xt, t, features).float() - noise) ** 2
    error.mean().backward()
    if optimizer: optimizer.step()
    model.zero_grad(set_to_none=True)


def step_speed(preset, pixels, size, compiled, channels_last, checkpointing, peak, device, rounds=8):
    "Images a second, peak memory and MFU of one setting."
    torch.manual_seed(0)
    a, side = preset.autoencoder, pixels // 2 ** (len(preset.autoencoder.channels) - 1)
    with device: model = build_decoder(preset, 0)
    model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    if checkpointing: model.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    schedule = noise_schedule(preset.decoder)
    batch = [torch.randn(size, a.latent_channels, side, side, device=device), torch.randn(size, a.latent_channels, side, side, device=device), torch.randn(size, 256, preset.encoder.hidden_size, device=device)]
    model.unet.set_default_attn_processor()
    with FlopCounterMode(display=False) as counter: one_step(model, None, schedule, [v[:1] for v in batch], device)
    flops = counter.get_total_flops() / (1 + (1 / 3 if checkpointing else 0))  # one of four passes is recomputation
    if compiled: model.unet.compile_repeated_blocks() if hasattr(model.unet, "compile_repeated_blocks") and getattr(model.unet, "_repeated_blocks", None) else model.unet.compile()
    sync = (lambda: torch.cuda.synchronize()) if device.type == "cuda" else (lambda: None)
    for _ in range(3): one_step(model, optimizer, schedule, batch, device)
    sync(); times = []
    for _ in range(rounds):
        begun = time.perf_counter(); one_step(model, optimizer, schedule, batch, device); sync()
        times.append(time.perf_counter() - begun)
    seconds = sorted(times)[len(times) // 2]
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    return dict(pixels=pixels, batch=size, compiled=compiled, channels_last=channels_last, checkpointing=checkpointing, images_per_second=round(size / seconds, 2),
                tflop_per_image=round(flops / 1e12, 3), mfu=round(flops * size / seconds / peak, 4), peak_gib=round(memory, 1))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True); p.add_argument("--part", action="append", choices=("step", "mini")); p.add_argument("--stretch", type=float, default=1.0)
    p.add_argument("--peak", type=float, default=989e12); p.add_argument("--smoke", action="store_true")
    args = p.parse_args()
    out, device = Path(args.out), pick_device()
    out.mkdir(parents=True, exist_ok=True)
    report = dict(device=torch.cuda.get_device_name() if device.type == "cuda" else device.type, torch=torch.__version__, step=[])
    preset = get_preset("nano" if args.smoke else "paper")
    settings = [(32, 4)] if args.smoke else [(512, 16), (1024, 4)]
    if "step" in (args.part or ("step", "mini")):
        for pixels, size in settings:
            for compiled, channels_last, checkpointing in ((False, False, False), (False, True, False), (True, False, False), (True, True, False), (False, False, True)):
                try: row = step_speed(preset, pixels, size, compiled and not args.smoke, channels_last, checkpointing, args.peak, device)
                except torch.OutOfMemoryError as e: row = dict(pixels=pixels, batch=size, compiled=compiled, channels_last=channels_last, checkpointing=checkpointing, error=str(e).split(".")[0])
                report["step"].append(row); print(row, flush=True)
                (out / "gpu.json").write_text(json.dumps(report, indent=1))
                if device.type == "cuda": torch.cuda.empty_cache()
    if "mini" in (args.part or ("step", "mini")):
        from puma_nb.instruct import train_system
        train_system(stretched(get_preset("pico" if args.smoke else "mini"), args.stretch), out / "mini", progress=False)
    print(f"results: {out / 'gpu.json'}")


if __name__ == "__main__": main()
