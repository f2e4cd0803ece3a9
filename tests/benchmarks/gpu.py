"""Real sizes on one GPU: training steps of the SDXL-size decoder and of the LLaMA-3-8B-size language model, its generation, preset mini trained, and the configurations of accelerate tried.

    python tests/benchmarks/gpu.py --out DIR [--part step] [--part mllm] [--part mini] [--part shard] [--scale-steps 1.0]

One call does everything and leaves DIR/gpu.json, and for mini the folder of the system without its checkpoints.
`--smoke` runs the same lines with preset nano's decoder on whatever device there is, to see that the script works.
Peak FLOP/s for the utilisation (MFU) are the dense bfloat16 figure of an H200, 989e12, unless --peak says otherwise.
Recomputation under gradient checkpointing is not counted.
"""
import argparse, json, shutil, subprocess, sys, time
from pathlib import Path
from statistics import median
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode
from puma_nb.core import pick_device
from puma_nb.models.autoencoder import latent_side
from puma_nb.models.decoders import build_decoder, noise_schedule
from puma_nb.models.generation import generate_image
from puma_nb.models.sequence import Batch
from puma_nb.models.mllm import build_mllm, loss_terms, loss_weights, targets
from puma_nb.plan import get_device, mllm_flops, mllm_memory, peak_memory
from puma_nb.presets import get_preset, scaled_steps
from puma_nb.training.launch import accelerate_config
from puma_nb.training.log import read_log
from puma_nb.training.loop import Run
from puma_nb.training.task import recompute_activations

PARTS = ("step", "mllm", "mini", "shard")


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
    if device.type == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()  # a setting that ran out of memory leaves its peak behind
    a, side = preset.autoencoder, latent_side(preset.autoencoder, pixels)
    with device: model = build_decoder(preset, 0)
    model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    if checkpointing: model.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    schedule = noise_schedule(preset.decoder)
    batch = [torch.randn(size, a.latent_channels, side, side, device=device), torch.randn(size, a.latent_channels, side, side, device=device), torch.randn(size, 256, preset.encoder.hidden_size, device=device)]
    model.unet.set_attn_processor(AttnProcessor())  # operations are counted on plain attention, time is taken on the fused one
    with FlopCounterMode(display=False) as counter: one_step(model, None, schedule, [v[:1] for v in batch], device)
    flops = counter.get_total_flops() / (1 + (1 / 3 if checkpointing else 0))  # one of four passes is recomputation
    model.unet.set_attn_processor(AttnProcessor2_0() if preset.decoder.attention == "fused" else AttnProcessor())
    if compiled: model.unet.compile_repeated_blocks() if hasattr(model.unet, "compile_repeated_blocks") and getattr(model.unet, "_repeated_blocks", None) else model.unet.compile()
    sync = (lambda: torch.cuda.synchronize()) if device.type == "cuda" else (lambda: None)
    for _ in range(3): one_step(model, optimizer, schedule, batch, device)
    sync(); times = []
    for _ in range(rounds):
        begun = time.perf_counter(); one_step(model, optimizer, schedule, batch, device); sync()
        times.append(time.perf_counter() - begun)
    seconds = sorted(times)[len(times) // 2]
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return dict(pixels=pixels, batch=size, compiled=compiled, channels_last=channels_last, checkpointing=checkpointing, images_per_second=round(size / seconds, 2),
                tflop_per_image=round(flops / 1e12, 3), mfu=round(flops * size / seconds / peak, 4), peak_gib=round(memory, 1))


def random_batch(preset, rows, device, text=60):
    "Captions of random words, each with a whole pyramid of random features: 60 + 341 tokens."
    ids = torch.randint(5, preset.mllm.vocab_size, (rows, text + 341), device=device)
    slot = torch.full_like(ids, -1); slot[:, text:] = torch.arange(341, device=device)
    return Batch(ids, torch.ones_like(ids), slot, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids), torch.randn(*ids.shape, preset.encoder.hidden_size, device=device))


def language_model(preset, rows, masters, peak, device, rounds=6):
    "Tokens a second, peak memory and MFU of a training step with checkpointing, and milliseconds a token of generation, beside what the plan says."
    torch.manual_seed(0)
    with torch.device(device): model = build_mllm(preset).to(torch.float32 if masters else torch.bfloat16).train()
    recompute_activations(model.language_model)
    optimizer, b, weights = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type != "mps"), random_batch(preset, rows, device), loss_weights(preset.mllm)
    counts = {k: max(1, int(v.sum())) for k, v in targets(b).items()}
    sync = (lambda: torch.cuda.synchronize()) if device.type == "cuda" else (lambda: None)
    def step():
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False): terms = loss_terms(model, b)
        sum(weights[k] * v / counts[k] for k, v in terms.items()).backward()
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
    times = []
    for _ in range(rounds): sync(); t = time.perf_counter(); step(); sync(); times.append(time.perf_counter() - t)
    seconds, tokens = sorted(times)[len(times) // 2], b.ids.numel()
    plan = mllm_memory(preset, 1, False, tokens=tokens)
    if not masters: plan |= dict(states=plan["states"] / 2, gradients=plan["gradients"] / 2, copies=0)  # weights, gradients and moments of two bytes each
    out = dict(rows=rows, masters=masters, tokens_per_second=round(tokens / seconds), mfu=round(mllm_flops(preset) * rows / seconds / peak, 4),
               peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else 0.0, planned_gib=round(peak_memory(plan, accumulate=False) / 2**30, 1))
    del optimizer; model.eval().to(torch.bfloat16)
    prompt = b.map(lambda v: v[:1, :21]); prompt.slot = torch.full_like(prompt.slot, -1); prompt.ids[:, -1] = model.config.image_ids[0]
    for cache, compiled in (("dynamic", False), ("static", False), ("static", device.type == "cuda")):
        try:
            generate_image(model, prompt, 0, cache=cache, compile=compiled)  # compiles for the very shapes that are timed
            sync(); t = time.perf_counter(); generate_image(model, prompt, 0, cache=cache, compile=compiled); sync()
            out[f"ms_per_token_{cache}{'_compiled' if compiled else ''}"] = round(1000 * (time.perf_counter() - t) / 341, 2)
        except Exception as e: out[f"ms_per_token_{cache}{'_compiled' if compiled else ''}"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return dict(out, ms_per_token_bandwidth_limit=round(2000 * sum(q.numel() for q in model.parameters()) / (get_device("h200").bandwidth * 1e12), 3))


def divided(out, smoke):
    "A short pretraining of pico alone and under each configuration of `accelerate` on this machine's GPUs: the last losses beside one process's."
    home, found, gpus = out / "shard", {}, max(1, torch.cuda.device_count()); shutil.rmtree(home, ignore_errors=True)
    train = ["train", "--preset", "pico", "--quiet"]
    for stage in ("encoder", "autoencoder", "decoders"): subprocess.run([sys.executable, "-m", "puma_nb.cli", *train, "--stage", stage, "--out", str(home / "system")], check=True, stdout=subprocess.DEVNULL)
    for how in ("alone", *(() if smoke else ("ddp", "fsdp2", "zero3"))):
        shutil.copytree(home / "system", home / how)
        start = [sys.executable] if how == "alone" else ["accelerate", "launch", "--config_file", str(accelerate_config(how)), "--num_processes", str(gpus)]
        done = subprocess.run([*start, "-m", "puma_nb.cli", *train, "--stage", "pretrain", "--scale-steps", "50", "--out", str(home / how)], capture_output=True, text=True)
        said = [l for l in done.stderr.splitlines() if "Error" in l or l.startswith("puma-nb")]
        loss = read_log(home / how / "pretrain" / "log.jsonl")[-1]["loss"] if done.returncode == 0 else None
        found[how] = dict(error=said[:3] or done.stderr.strip().splitlines()[-3:]) if loss is None else dict(loss=loss, against_alone=loss / found["alone"]["loss"] if "loss" in found.get("alone", {}) else None)
        print(how, found[how], flush=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True); p.add_argument("--part", action="append", choices=PARTS); p.add_argument("--scale-steps", type=float, default=1.0)
    p.add_argument("--peak", type=float, default=989e12); p.add_argument("--smoke", action="store_true")
    args = p.parse_args()
    out, device = Path(args.out), pick_device()
    out.mkdir(parents=True, exist_ok=True)
    report = dict(device=torch.cuda.get_device_name() if device.type == "cuda" else device.type, torch=torch.__version__, step=[])
    preset = get_preset("nano" if args.smoke else "paper")
    settings = [(32, 4)] if args.smoke else [(512, 16), (1024, 4)]
    if "step" in (args.part or PARTS):
        for pixels, size in settings:
            for compiled, channels_last, checkpointing in ((False, False, False), (False, True, False), (True, False, False), (True, True, False), (False, False, True)):
                try: row = step_speed(preset, pixels, size, compiled and not args.smoke, channels_last, checkpointing, args.peak, device)
                except torch.OutOfMemoryError as e: row = dict(pixels=pixels, batch=size, compiled=compiled, channels_last=channels_last, checkpointing=checkpointing, error=str(e).split(".")[0])
                report["step"].append(row); print(row, flush=True)
                (out / "gpu.json").write_text(json.dumps(report, indent=1))
    if "mllm" in (args.part or PARTS):
        report["mllm"] = []
        for rows, masters in ((2, True), (2, False), (8, False), (32, False)):
            if device.type == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
            try: row = language_model(preset, rows, masters, args.peak, device)
            except torch.OutOfMemoryError as e: row = dict(rows=rows, masters=masters, error=str(e).split(".")[0])
            report["mllm"].append(row); print(row, flush=True)
            (out / "gpu.json").write_text(json.dumps(report, indent=1))
    if "mini" in (args.part or PARTS):
        from puma_nb.recipes.system import train_system
        train_system(scaled_steps(get_preset("pico" if args.smoke else "mini"), args.scale_steps), out / "mini", resume=True, progress=False, run=Run(ahead=2))  # resume: a second call goes on
        logs = {f.parent.name: read_log(f) for f in (out / "mini").rglob("log.jsonl")}
        report["mini"] = {s: dict(samples_per_second=median([r["samples_per_second"] for r in log]), data_share=median([r["data_share"] for r in log]), memory_gb=log[-1]["memory_gb"]) for s, log in logs.items()}
        print(report["mini"], flush=True); (out / "gpu.json").write_text(json.dumps(report, indent=1))
    if "shard" in (args.part or PARTS):
        report["shard"] = divided(out, args.smoke); (out / "gpu.json").write_text(json.dumps(report, indent=1))
    print(f"results: {out / 'gpu.json'}")


if __name__ == "__main__": main()
