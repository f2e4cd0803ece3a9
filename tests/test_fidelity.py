"""The paper's numbers and its released code's, written down again and compared with preset `paper`.

PAPER: number -> (value, where it is stated). Read off the paper by hand, not from the presets.
The ledger (nbs/00u_ledger.ipynb) links each number of the system to this file, or says that
nothing enforces it.
"""

import pytest
from puma_nb.presets import PRESETS, get_preset

PAPER = {
    "encoder.image_size": (224, "4.1"),
    "encoder.patch_size": (14, "CLIP-L/14"),
    "encoder.hidden_size": (1024, "CLIP-L/14"),
    "encoder.layers": (24, "CLIP-L/14"),
    "encoder.heads": (16, "CLIP-L/14"),
    "encoder.mlp_size": (4096, "CLIP-L/14"),
    "encoder.projection_size": (768, "CLIP-L/14"),
    "autoencoder.channels": ((128, 256, 512, 512), "SDXL"),
    "autoencoder.layers_per_block": (2, "SDXL"),
    "autoencoder.latent_channels": (4, "SDXL"),
    "autoencoder.attention": (True, "SDXL"),
    "autoencoder.image_size": (1024, "SDXL"),
    "autoencoder.unshuffle": (1, "SDXL"),
    "autoencoder.norm_groups": (32, "SDXL"),
    "decoder.norm_groups": (32, "SDXL"),
    "decoder.channels": ((320, 640, 1280), "SDXL"),
    "decoder.layers_per_block": (2, "SDXL"),
    "decoder.heads": ((5, 10, 20), "SDXL"),
    "decoder.transformers": ((0, 2, 10), "SDXL"),
    "decoder.linear_projection": (True, "SDXL"),
    "decoder.cross_size": (2048, "[code]"),
    "decoder.position_scales": ((0,), "[code]"),
    "decoder.normalize": (False, "[code]"),
    "decoder.coordinates": (0, "[code]"),
    "decoder.overlay": (0, "[code]"),
    "decoder.guess": (0, "[code]"),
    "decoder.prediction": ("epsilon", "SDXL"),
    "decoder.noise_offset": (0.1, "A.1"),
    "decoder.blank": (0.1, "A.1"),
    "decoder.min_side": (512, "A.1"),
    "decoder.resize": ("crop", "A.1"),
    "decoder.sampler": ("DDPMScheduler", "[code]"),
    "decoder.sampling_steps": (50, "[code]"),
    "decoder.guidance": (2.0, "[code]"),
    "mllm.vocab_size": (128256, "LLaMA-3 8B"),
    "mllm.hidden_size": (4096, "LLaMA-3 8B"),
    "mllm.layers": (32, "LLaMA-3 8B"),
    "mllm.heads": (32, "LLaMA-3 8B"),
    "mllm.kv_heads": (8, "LLaMA-3 8B"),
    "mllm.mlp_size": (14336, "LLaMA-3 8B"),
    "mllm.rope_theta": (500000.0, "LLaMA-3 8B"),
    "mllm.text_weight": (0.02, "A.2.1"),
    "mllm.scale_weights": ((1, 8, 64, 512, 1024), "A.2.1"),
    "mllm.first_scale": (4, "3.3"),
    "mllm.source_scale": (0, "3.3"),
    "mllm.depth_shares": ((1, 0, 0, 0, 0), "3.3"),
    "mllm.tune_depth_shares": ((1, 0, 0, 0, 0), "3.3"),
    "mllm.thin": (0, "A.2"),
    "mllm.tied": (False, "LLaMA-3 8B"),
    "mllm.text_mean": ("token", "Eq. 2"),
    "mllm.head": ("regression", "Eq. 2"),
    **{f"stage.{s}.steps": (0, "4.1") for s in ("encoder", "autoencoder", "base")},
    **{f"stage.f{i}.steps": (n, "A.1") for i, n in enumerate((40000, 30000, 20000, 15000, 10000))},
    **{
        f"stage.f{i}.{k}": (v, "A.1")
        for i in range(5)
        for k, v in dict(batch=1024, lr=8e-5, schedule="linear", clip=1.0).items()
    },
    **{
        f"stage.pretrain.{k}": (v, "A.2")
        for k, v in dict(
            steps=100000,
            batch=2048,
            lr=3e-5,
            lr_projector=1e-4,
            warmup=2000,
            schedule="cosine",
            clip=5.0,
        ).items()
    },
    **{
        f"stage.instruct-{family}.{k}": (v, "A.2.4")
        for family, numbers in dict(
            t2i=dict(steps=20000, batch=2048, warmup=1000),
            edit=dict(steps=10000, batch=1024, warmup=500),
            condition=dict(steps=20000, batch=1024, warmup=500),
            understand=dict(batch=512, warmup=500),
        ).items()
        for k, v in dict(numbers, lr=1e-5, schedule="cosine").items()
    },
}


def value(preset, name):
    *path, field = name.split(".")
    return getattr(
        preset.stages[path[1]] if path[0] == "stage" else getattr(preset, path[0]), field
    )


@pytest.mark.parametrize("name", sorted(PAPER))
def test_preset_paper_says_what_the_paper_says(name):
    preset, (wanted, where) = get_preset("paper"), PAPER[name]
    assert value(preset, name) == wanted
    assert where in preset.sources[name] and not preset.sources[name].startswith("ours")


def test_whatever_claims_the_paper_is_enforced():
    "A number whose source names a section or the released code must be in the table above."
    ours = ("ours", "inferred", "the paper")
    claims = {k for k, s in get_preset("paper").sources.items() if not s.startswith(ours)}
    assert claims <= set(PAPER), claims - set(PAPER)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_smaller_presets_name_their_differences(name):
    "Where a preset departs from `paper`, its source is not the bare section of that number."
    paper, preset = get_preset("paper"), get_preset(name)
    for k in PAPER:
        if value(preset, k) != value(paper, k):
            assert preset.sources[k] not in ("A.1", "A.2", "A.2.1", "[code]", "3.3"), k
