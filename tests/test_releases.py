"""The authors' released decoders, end to end.

A small random checkpoint in their layout must compute, bit by bit, what a short script of their
kind computes. The script uses diffusers' UNet, transformers' CLIP and torch, and nothing of ours.
What it states is what the released code does ([code] in preset paper): a linear map, a table in
the 256-token decoder that is off in the unconditional row, DDPM with SDXL's betas, guidance away
from a black image, and CLIP's last layer without its class token, read from an image that is
squashed to a square.
"""
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms
from transformers import CLIPVisionConfig, CLIPVisionModel

from puma_nb.core import LOADING, load_image, noise_for, torch_rng
from puma_nb.errors import UserError, package_dir
from puma_nb.evaluation.metrics import psnr
from puma_nb.models.decoders import (
    FITTING, Decoder, DecoderPipeline, Decoders, guided, make_scheduler)
from puma_nb.models.pyramid import encode, preprocess, pyramid
from puma_nb.models.releases import from_puma_checkpoint
from puma_nb.presets import get_preset
from puma_nb.puma import Puma
from puma_nb.world.drawing import world_images

FEATURES, CROSS = 12, 24
TOKENS = (256, 64, 16, 4, 1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_unet():
    "A UNet of SDXL's kind: no cross-attention at the first level, two transformers at the last."
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16),
        layers_per_block=1, transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CROSS, norm_num_groups=4, use_linear_projection=True).eval()


@pytest.fixture(autouse=True)
def one_thread(fixed_threads):
    "Networks as small as these are faster in one."
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "(folder with unet_1 ... unet_256, the parts that were written there)"
    torch.manual_seed(0)
    folder, parts = tmp_path_factory.mktemp("released"), {}
    for n in TOKENS:
        unet, mapping = small_unet(), nn.Linear(FEATURES, CROSS)
        table = torch.randn(1, n, CROSS) if n == 256 else None
        unet.save_pretrained(folder / f"unet_{n}")
        extra = {"mapping_layer.weight": mapping.weight, "mapping_layer.bias": mapping.bias}
        if n == 256: extra["embed_img_pos"] = table
        tensors = {k: v.detach().clone() for k, v in (unet.state_dict() | extra).items()}
        save_file(tensors, folder / f"unet_{n}" / WEIGHTS)
        parts[n] = unet, mapping, table
    return folder, parts


# The script: what the released code does, written down without anything of ours

def their_condition(parts, null, features):
    "Unconditional rows, then conditional ones; the table is added to the latter only."
    _, mapping, table = parts
    rows = mapping(torch.cat([null.expand_as(features), features]))
    if table is not None: rows[len(features):] += table
    return rows


def their_noise(parts, x, t, null, features, guidance):
    "The guided prediction of the noise."
    rows = their_condition(parts, null, features)
    both = parts[0](torch.cat([x, x]), t, encoder_hidden_states=rows).sample
    blank, told = both.chunk(2)
    return blank + guidance * (told - blank)


def their_betas(): return torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def their_times(steps):
    return [k * (1000 // steps) + 1 for k in range(steps)][::-1]


def their_step(noise, t, before, x, fresh):
    "One step of DDPM (Ho et al., equations 6, 7 and 15) from time t to `before`."
    a = torch.cumprod(1 - their_betas(), 0)
    a_t, a_before = a[t], a[before] if before >= 0 else torch.tensor(1.0)
    alpha = a_t / a_before
    x0 = (x - (1 - a_t) ** 0.5 * noise) / a_t**0.5
    of_x0 = (a_before**0.5 * (1 - alpha)) / (1 - a_t)
    of_x = alpha**0.5 * (1 - a_before) / (1 - a_t)
    mean = of_x0 * x0 + of_x * x
    variance = torch.clamp((1 - a_before) / (1 - a_t) * (1 - alpha), min=1e-20)
    return mean + variance**0.5 * fresh if t > 0 else mean


@torch.no_grad()
def their_latents(parts, null, features, start, guidance, steps, generators):
    "Fifty steps of DDPM, or as many."
    x = start
    for t in their_times(steps):
        noise = their_noise(parts, x, torch.tensor(t), null, features, guidance)
        fresh = torch.cat([torch.randn(1, *x.shape[1:], generator=g) for g in generators])
        x = their_step(noise, t, t - 1000 // steps, x, fresh)
    return x


def some_features(n, key):
    return torch.randn(2, n, FEATURES, generator=torch_rng(key))


# Denoiser, guidance, schedule, whole sampling

@pytest.mark.parametrize("scale", range(5))
@torch.no_grad()
def test_the_denoiser_is_theirs(released, scale):
    folder, parts = released
    n = TOKENS[scale]
    unet, mapping, table = parts[n]
    x, t, f = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), some_features(n, "denoiser")
    told = mapping(f) if table is None else mapping(f) + table
    ours = from_puma_checkpoint(folder, scale)
    assert torch.equal(ours(x, t, f), unet(x, t, encoder_hidden_states=told).sample)
    blank = unet(x, t, encoder_hidden_states=mapping(f)).sample
    assert torch.equal(ours(x, t, f, 0.0), blank)
    assert (scale == 0) == hasattr(ours, "embed_img_pos")


@pytest.mark.parametrize("scale, guidance", [(0, 2.0), (1, 2.0), (2, 1.5), (3, 7.5), (4, 2.0)])
@torch.no_grad()
def test_guidance_is_theirs(released, scale, guidance):
    folder, parts = released
    n = TOKENS[scale]
    f, null = some_features(n, "told"), some_features(n, "null")[:1]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(400)
    ours = guided(from_puma_checkpoint(folder, scale), x, t, f, null, guidance)
    assert torch.equal(ours, their_noise(parts[n], x, t, null, f, guidance))


@pytest.mark.parametrize("guidance", [-1.0, 0.0, 0.5, 1.0])
@torch.no_grad()
def test_guidance_up_to_one_is_conditional(released, guidance):
    folder, parts = released
    unet, mapping, table = parts[256]
    f, x, t = some_features(256, "told"), torch.randn(2, 4, 8, 8), torch.tensor(400)
    ours = guided(from_puma_checkpoint(folder, 0), x, t, f, None, guidance)  # needs no null row
    assert torch.equal(ours, unet(x, t, encoder_hidden_states=mapping(f) + table).sample)


def test_the_schedule_is_theirs():
    paper = get_preset("paper").decoder
    s = make_scheduler(paper.sampler, paper)
    assert type(s).__name__ == "DDPMScheduler" and s.config.prediction_type == "epsilon"
    assert s.config.steps_offset == 1 and s.config.timestep_spacing == "leading"
    assert torch.equal(s.betas, their_betas())
    assert torch.equal(s.alphas_cumprod, torch.cumprod(1 - their_betas(), 0))
    s.set_timesteps(paper.sampling_steps)
    assert s.timesteps.tolist() == their_times(50) and s.timesteps[0] == 981


def small_vae(**more):
    "An autoencoder of SDXL's kind, without statistics of its latents."
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=32, scaling_factor=0.13025, **more).eval()


@pytest.mark.parametrize("scale", [0, 2])
@torch.no_grad()
def test_sampling_is_theirs(released, scale):
    "Latents of the pipeline against the script's, from the same start and with the same noise."
    folder, parts = released
    n = TOKENS[scale]
    f, null = some_features(n, "told"), some_features(n, "null")[:1]
    pipe = DecoderPipeline(from_puma_checkpoint(folder, scale), small_vae(), null,
                           make_scheduler("DDPMScheduler", get_preset("paper").decoder))
    seeds, seen = [3, 4], []
    hook = pipe.decoder.register_forward_hook(lambda m, a, out: seen.append(a[0][:2]))
    ours = pipe(f, steps=10, guidance=2.0, seeds=seeds, bf16=False)
    hook.remove()
    start = noise_for(seeds, 4, 8, 8, keys=("sample",))
    assert torch.equal(seen[0], start)
    how = dict(features=f, start=start, guidance=2.0, steps=10)
    generators = [torch_rng("steps", s) for s in seeds]
    theirs = their_latents(parts[n], null, generators=generators, **how)
    pictures = pipe.vae.decode(theirs / 0.13025).sample  # the product with 1 / 0.13025 rounds
    assert (ours - (pictures / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    # every input of the denoiser, to the bit
    x, generators = start, [torch_rng("steps", s) for s in seeds]
    for k, t in enumerate(their_times(10)):
        assert torch.equal(seen[k], x), k
        noise = their_noise(parts[n], x, torch.tensor(t), null, f, 2.0)
        fresh = torch.cat([torch.randn(1, *x.shape[1:], generator=g) for g in generators])
        x = their_step(noise, t, t - 100, x, fresh)
    assert torch.equal(x, theirs)


# CLIP

@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(1)
    return CLIPVisionModel(CLIPVisionConfig(
        hidden_size=FEATURES, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=224, patch_size=14, projection_dim=8)).eval()


@torch.no_grad()
def test_features_are_theirs(clip, tmp_path):
    "A photo that is not square: squashed, normalised, last layer, no class token, pooled."
    pixels = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    their_pixels = transforms.Compose([
        transforms.Resize((224, 224), transforms.InterpolationMode.BILINEAR),
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073),
                             (0.26862954, 0.26130258, 0.27577711))])
    x = their_pixels(Image.open(tmp_path / "photo.png"))[None]
    image = load_image(tmp_path / "photo.png", 224, "squash")[None]
    assert torch.equal(preprocess(image, 224), x)
    grid = clip(x).last_hidden_state[:, 1:]
    ours = pyramid(encode(clip, image))
    assert torch.equal(ours[0], grid)
    for f in ours[1:]:
        side = int(grid.shape[1] ** 0.5)
        square = grid.transpose(1, 2).reshape(1, FEATURES, side, side)
        grid = F.avg_pool2d(square, 2, 2).flatten(2).transpose(1, 2)
        assert torch.equal(f, grid)


@torch.no_grad()
def test_tensors_are_squashed_alike(clip):
    "Pictures that are tensors already, as torchvision squashes tensors."
    x = torch.rand(2, 3, 180, 260, generator=torch_rng("pictures"))
    squashed = transforms.functional.resize(x, [224, 224], antialias=True)
    normal = transforms.functional.normalize(
        squashed, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert torch.equal(encode(clip, x), clip(normal).last_hidden_state[:, 1:])


# The pipeline as diffusers' users know it

@torch.no_grad()
def test_a_released_decoder_goes_through_a_folder(released, tmp_path):
    folder, _ = released
    f, null = some_features(256, "told"), some_features(256, "null")[:1]
    pipe = DecoderPipeline(from_puma_checkpoint(folder, 0), small_vae(), null,
                           make_scheduler("DDPMScheduler", get_preset("paper").decoder))
    how = dict(steps=4, guidance=2.0, seeds=[1, 2])
    pictures = pipe(f, **how)
    pipe.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "decoder", "vae", "null_condition", "scheduler", "model_index.json"}
    again = DecoderPipeline.from_pretrained(tmp_path, device="cpu").to("cpu")
    assert torch.equal(again(f, **how), pictures)
    assert torch.equal(again.null_condition.features, null)
    assert DecoderPipeline(**again.components)(f, **how).equal(pictures)
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(DecoderPipeline.from_pretrained, [tmp_path] * 4))
    for p in loaded: assert torch.equal(p.to("cpu")(f, **how), pictures)
    half = DecoderPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device="cpu")
    assert half.decoder.dtype == torch.bfloat16
    assert (half(f, **how) - pictures).abs().mean() < 0.1


@pytest.fixture(scope="module")
def nano():
    "(the shipped decoders, four validation pictures, their f0)"
    decoders = Decoders(get_preset("nano"), device="cpu")
    images = world_images(decoders.preset, "val", 4)[0]
    return decoders, images.float() / 255, decoders.encode(images)


@pytest.mark.parametrize("name", FITTING)
def test_a_scheduler_that_fits_paints_as_well_as_the_default(nano, name):
    decoders, images, f0 = nano
    seeds = list(range(len(f0)))
    pipe = decoders.pipeline(0)
    default = psnr(pipe(f0, seeds=seeds), images).mean()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert psnr(pipe(f0, seeds=seeds), images).mean() > default - 2


def test_the_spacing_of_edm_is_to_be_had(nano):
    decoders, images, f0 = nano
    seeds = list(range(len(f0)))
    pipe = decoders.pipeline(0)
    default = psnr(pipe(f0, seeds=seeds), images).mean()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True)
    assert psnr(pipe(f0, 20, seeds=seeds), images).mean() > default - 2


def test_edm_is_refused_for_a_reason(nano, monkeypatch):
    "Let through, it paints more than 5 dB worse."
    decoders, images, f0 = nano
    seeds = list(range(len(f0)))
    pipe = decoders.pipeline(0)
    default = psnr(pipe(f0, seeds=seeds), images).mean()
    pipe.scheduler = diffusers.EDMEulerScheduler.from_config(
        dict(prediction_type=pipe.scheduler.config.prediction_type))
    with pytest.raises(UserError, match="ignores the betas .* take one of DPMSolverMultistep"):
        pipe(f0, seeds=seeds)
    monkeypatch.setattr("puma_nb.models.decoders._check_scheduler", lambda *_: None)
    assert psnr(pipe(f0, seeds=seeds), images).mean() < default - 5


# A system whose decoders are absent or broken

def part_of_shipped(tmp_path, *leave_out):
    "The shipped weights without some folders."
    folder = tmp_path / "system"
    shutil.copytree(package_dir("weights"), folder, ignore=lambda at, names: leave_out)
    return folder


def test_asking_needs_no_decoders(nano, tmp_path):
    _, images, _ = nano
    puma = Puma(part_of_shipped(tmp_path, "decoders", "autoencoder", "clip"), device="cpu")
    assert puma.ask(images[:1], "what is this?")
    with pytest.raises(UserError, match="no decoder there"):
        puma.reconstruct(images[:1], (4,))


def test_four_threads_load_one_system(nano, tmp_path):
    decoders, images, _ = nano
    fresh = Decoders(decoders.preset, device="cpu")

    def painted(scale):
        return fresh.reconstruct(images[:1], (scale,), steps=2)[scale]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(painted, [0, 4, 0, 4]))
    wanted = decoders.reconstruct(images[:1], (0, 4), steps=2)
    for scale, x in zip([0, 4, 0, 4], found):
        assert torch.equal(x, wanted[scale])


def test_four_threads_read_one_decoder():
    folder = package_dir("weights") / "decoders" / "f2"
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(Decoder.from_pretrained, [folder] * 8))
    for d in read:
        assert not any(p.is_meta for p in d.parameters())


def test_a_thread_may_paint_while_another_loads(nano):
    "While diffusers loads, modules that are built in any thread would have no memory."
    decoders, images, _ = nano
    decoders.reconstruct(images[:1], (4,), steps=1)
    with ThreadPoolExecutor(1) as threads, LOADING, init_empty_weights():
        painting = threads.submit(decoders.reconstruct, images[:1], (4,), steps=1)
        time.sleep(0.5)
        assert not painting.done()
    assert painting.result()[4].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("change", ["null", "", "[]", '{"a":'])
def test_a_released_configuration_that_is_broken(released, tmp_path, change):
    folder = tmp_path / "r"
    shutil.copytree(released[0], folder)
    (folder / "unet_16" / "config.json").write_text(change)
    with pytest.raises(UserError, match="unet_16: the decoder there cannot be read"):
        from_puma_checkpoint(folder, 2)


@pytest.mark.parametrize("cut", [0, 2000])
def test_a_released_file_that_is_cut_off(released, tmp_path, cut):
    folder = tmp_path / "r"
    shutil.copytree(released[0], folder)
    file = folder / "unet_16" / WEIGHTS
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="unet_16: the decoder there cannot be read"):
        from_puma_checkpoint(folder, 2)


@pytest.mark.parametrize("part, file, content", [
    ("vae", "config.json", "null"),
    ("vae", WEIGHTS, ""),
    ("decoder", WEIGHTS, "x" * 100),
    ("null_condition", "config.json", '{"tokens": 4, "feature_size": 12}'),
    ("scheduler", "scheduler_config.json", "null"),
    ("scheduler", "scheduler_config.json", "{}"),
])
def test_a_pipeline_that_is_broken(nano, tmp_path, part, file, content):
    nano[0].pipeline(2).save_pretrained(tmp_path)
    (tmp_path / part / file).write_text(content)
    with pytest.raises(UserError, match=f"{part}.*(cannot be read|are not those)"):
        DecoderPipeline.from_pretrained(tmp_path)


def test_a_saved_scheduler_that_does_not_fit(nano, tmp_path):
    nano[0].pipeline(2).save_pretrained(tmp_path)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler does not fit"):
        DecoderPipeline.from_pretrained(tmp_path)
