"""The oracle's own quality: clean renders, also of another side, and renders passed through the
shipped autoencoder."""
import pytest

from puma_nb.evaluation.metrics import psnr
from puma_nb.models.autoencoder import load_latents
from puma_nb.presets import get_preset
from puma_nb.world.drawing import world_images
from puma_nb.world.oracle import ATTRIBUTES, detect_scene, score_scenes

SHARES = (*ATTRIBUTES, "attributes", "count", "background", "background_texture")


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_clean_renders_are_read(name):
    images, scenes = world_images(get_preset(name), "val", 300)
    score = score_scenes(scenes, [detect_scene(x) for x in images])
    assert min(score[k] for k in SHARES) >= 0.97
    assert score["attributes"] >= 0.99 and score["scenes"] >= 0.97


def test_autoencoded_renders_are_read():
    images, scenes = world_images(get_preset("nano"), "val", 300)
    latents = load_latents(device="cpu")
    back = latents.decode(latents.encode(images))
    assert psnr(back, images.float() / 255).mean() >= 28
    assert score_scenes(scenes, [detect_scene(x) for x in back])["attributes"] >= 0.97
