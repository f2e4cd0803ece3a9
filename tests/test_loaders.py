"Every card loads a small set in its own layout, and what is broken is counted."
import copy, io, json, struct, tarfile, zlib
from collections import Counter
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image as ImageFeature, List, Value
from PIL import Image
from puma_nb.core import save_image
from puma_nb.data.cards import load_cards
from puma_nb.data.loaders import ASK, CardSet, Loader
from puma_nb.data.pictures import Skip, image_set, open_picture
from puma_nb.data.segments import boxes_in
from puma_nb.errors import UserError
from puma_nb.world.drawing import box, draw_scene, sample_scene
from puma_nb.world.language import article, caption
from puma_nb.world.samples import as_dataset

CARDS, N = load_cards(), 4
SCENES = [sample_scene(1, k) for k in range(N)]
TURNS = [
    {"from": "human", "value": "<image>\nwhat is it?"},
    {"from": "gpt", "value": "a drawing"},
    {"from": "human", "value": "sure?"},
    {"from": "gpt", "value": "yes"},
]


def png(scene, side=48):
    f = io.BytesIO()
    Image.fromarray(draw_scene(scene, side).permute(1, 2, 0).numpy()).save(f, "PNG")
    return f.getvalue()


def phrases(scene):
    words, rows = "", []
    for t in scene.things:
        p = f"{article(t.color)} {t.shape}"
        words += (" and " if words else "") + p
        rows.append([float(len(words) - len(p)), float(len(words)), *box(t), .9])
    return words, rows


def row_of(card, k, picture):
    "A row with the card's own columns; `picture` makes what stands in a column of pictures."
    row = {}
    words = {
        "caption": phrases(SCENES[k])[0],
        "question": "what is it?",
        "answer": "a drawing",
        "instruction": "make it blue",
        "boxes": phrases(SCENES[k])[1],
    }
    for column, field in card.meta["puma"]["columns"].items():
        if isinstance(field, list): value = TURNS
        elif field in ("image", "source", "target"): value = picture(k, column)
        else: value = words[field]
        if column.endswith("s") and field in ("question", "answer") and not isinstance(field, list):
            value = [value, value]  # OCR-VQA and VizWiz have lists
        *path, last = column.split(".")
        at = row
        for p in path: at = at.setdefault(p, {})
        at[last] = value
    return row


def write_set(card, folder):
    "A tiny set in the layout that the card names."
    # addresses: img2dataset makes shards of pictures and JSON
    if any(c in ("url", "URL") for c in card.meta["puma"]["columns"]):
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for k in range(N):
                row = row_of(card, k, lambda *_: "https://somewhere/x.png")
                for kind, data in (("png", png(SCENES[k])), ("json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(f"{k:05d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    elif card.meta["puma"]["format"] == "json":
        def picture(k, column):
            home = folder / card.meta["puma"].get("roots", {}).get(column, "")
            home.mkdir(exist_ok=True)
            (home / f"{k}_{column}.png").write_bytes(png(SCENES[k]))
            return f"{k}_{column}.png"
        rows = [json.dumps(row_of(card, k, picture)) for k in range(N)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
    else:  # parquet, as the hub stores it, with pictures inside
        picture = lambda k, _: dict(bytes=png(SCENES[k]), path=None)
        rows = Dataset.from_list([row_of(card, k, picture) for k in range(N)])
        for column, field in card.meta["puma"]["columns"].items():
            if field in ("image", "source", "target"):
                rows = rows.cast_column(column, ImageFeature())
        rows.to_parquet(folder / "part-0.parquet")


@pytest.mark.parametrize("name, stage", [(c.name, s) for c in CARDS.values() for s in c.stage])
def test_every_card_and_stage(name, stage, tmp_path):
    card = CARDS[name]
    write_set(card, tmp_path)
    samples = list(loader := Loader(card, tmp_path, stage, 32, least=0))
    assert len(samples) == N and not loader.skipped and loader.report() == f"{name}: {N} samples"
    fields = {
        f
        for v in card.meta["puma"]["columns"].values()
        for f in (v if isinstance(v, list) else [v])
    }
    for k, s in enumerate(samples):
        if "target" in fields: assert len(s["images"]) == 2
        elif "image" in fields: assert len(s["images"]) == 1
        elif fields == {"caption"}: assert not s["images"]
        assert all(x.shape == (3, 32, 32) and x.dtype == torch.uint8 for x in s["images"])
        assert any(g.supervised for g in s["segments"])
        if s["images"]:
            # it is the picture of its row
            assert (s["images"][-1].float() - draw_scene(SCENES[k], 32).float()).abs().mean() < 12
        if "boxes" in fields:
            said = " ".join(g.text for g in s["segments"])
            assert len(boxes_in(said)) == len(SCENES[k].things)
        if stage == "instruct-understand":
            # system, image, two turns: the loss is on answers
            assert [g.supervised for g in s["segments"]] == [
                False, False, False, True, False, True,
            ]
    assert len(as_dataset(samples)) == N  # the same form as the world's samples


def test_pretraining_goes_both_ways(tmp_path):
    card = CARDS["laion-aesthetics"]
    write_set(card, tmp_path)
    ends = Counter(
        s["segments"][-1].kind
        for seed in range(40)
        for s in Loader(card, tmp_path, "pretrain", 8, seed)
    )
    assert abs(ends["image"] / sum(ends.values()) - .5) < .12


def image_bytes(mode, fmt="PNG", exif=False):
    x = np.zeros((40, 60, 3), np.uint8)
    x[:, :30] = (200, 40, 40)
    im, f = Image.fromarray(x), io.BytesIO()
    if mode == "I;16":
        im = Image.fromarray((x[:, :, 0].astype(np.uint16) * 257))
    elif mode == "RGBA":
        im = im.convert("RGBA")
        im.putalpha(128)
    else: im = im.convert(mode)
    if exif:
        e = Image.Exif()
        e[0x0112] = 6
        im.save(f, fmt, exif=e)
    else: im.save(f, fmt)
    return dict(bytes=f.getvalue(), path=None)


@pytest.mark.parametrize(
    "mode, fmt",
    [("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("L", "PNG"), ("1", "PNG")],
)
def test_any_mode_becomes_rgb(mode, fmt):
    im = open_picture(image_bytes(mode, fmt))
    assert im.mode == "RGB" and im.size == (60, 40)
    if mode in ("CMYK", "P"):
        assert np.abs(np.asarray(im)[20, 10].astype(int) - (200, 40, 40)).max() < 60


def test_exif_rotation_is_undone():
    assert open_picture(image_bytes("RGB", "JPEG", exif=True)).size == (40, 60)


def bomb():
    "A PNG that says it has a hundred thousand pixels a side."
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100000, 100000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "readable"),
        (b"GIF89a", "readable"),
        (png(SCENES[0])[:150], "readable"),
        (bomb(), "too large|readable"),
    ],
)
def test_broken_pictures_are_skipped(data, why):
    with pytest.raises(Skip, match=why):
        open_picture(dict(bytes=data, path=None))


def test_what_is_broken_goes_around(tmp_path):
    "One row of each kind of trouble among good ones: counted by reason, the rest comes through."
    rows = [
        dict(image=dict(bytes=png(SCENES[k % N]), path=None), caption="fine", other=1)
        for k in range(60)
    ]
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:99]
    rows[7]["caption"] = "  "
    rows[11]["image"] = None
    rows[13]["caption"] = None
    features = Features(dict(image=ImageFeature(), caption=Value("string"), other=Value("int32")))
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    samples = list(loader := Loader(CARDS["coco-30k"], tmp_path, "eval", 16))
    assert loader.skipped["not a readable image"] == 1
    assert loader.skipped["no image"] == 1
    assert len(samples) == loader.kept >= 56
    assert "not a readable image 1" in loader.report()
    with pytest.raises(UserError, match="at most 1% may be broken"):
        list(Loader(CARDS["coco-30k"], tmp_path, "eval", 16, max_broken=.01))


def test_wrong_columns_and_empty_places(tmp_path):
    Dataset.from_list([dict(picture="x", words="y")] * 3).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="none of the card's columns|no image"):
        list(Loader(CARDS["coco-30k"], tmp_path, "eval", 16))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither parquet"):
        list(Loader(CARDS["coco-30k"], tmp_path / "empty", "eval", 16))
    with pytest.raises(UserError, match="no such file"):
        list(Loader(CARDS["coco-30k"], tmp_path / "none", "eval", 16))


def test_a_cut_shard_gives_what_it_has(tmp_path):
    card = CARDS["laion-2b"]
    write_set(card, tmp_path)
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[:len(whole) // 2])
    samples = list(loader := Loader(card, tmp_path, "pretrain", 8, least=0, max_broken=.9))
    assert 0 < len(samples) < N and loader.skipped["its shard ends too early"] == 1


def test_a_run_goes_past_broken_shards(tmp_path):
    """One shard is empty, one holds a damaged header: positions go on to the next usable row, and
    both are counted."""
    card = CARDS["laion-2b"]
    for k in range(4):
        write_set(card, tmp_path)
        (tmp_path / "00000.tar").rename(tmp_path / f"{k + 1:05d}.tar")
    (tmp_path / "00001.tar").write_bytes(b"")
    data = bytearray((tmp_path / "00002.tar").read_bytes())
    at = data.index(b"00002.png")
    data[at:at + 512] = b"x" * 512
    (tmp_path / "00002.tar").write_bytes(data)
    ds = CardSet(card, tmp_path, "pretrain", 8, least=0, max_broken=.9)
    said = [
        next(g.text for g in ds[k]["segments"] if g.kind == "text") for k in range(len(ds))
    ]
    assert len(ds) == 1 + 3 + N + N
    assert set(said) == {phrases(s)[0] for s in SCENES}
    assert ds.loader.skipped["its shard ends too early"] >= 2


def pack_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_folder_of_img2dataset(tmp_path):
    "Beside its shards it leaves a table of addresses and a file of statistics."
    pack_tar(
        tmp_path / "00000.tar",
        [
            (f"{k:05d}.{kind}", data)
            for k in range(N)
            for kind, data in (
                ("png", png(SCENES[k])),
                ("txt", b"a caption"),
                ("json", json.dumps(dict(url="https://x/y.jpg")).encode()),
            )
        ],
    )
    table = Dataset.from_list([dict(url="https://x/y.jpg", caption="a caption")] * N)
    table.to_parquet(tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert (
        len(list(Loader(CARDS["laion-2b"], tmp_path, "pretrain", 8)))
        == len(CardSet(CARDS["laion-2b"], tmp_path, "pretrain", 8))
        == N
    )


@pytest.mark.parametrize("place", ["./", "v1.0/", "a/b.c/"])
def test_folders_within_a_shard(place, tmp_path):
    pack_tar(
        tmp_path / "a.tar",
        [
            (f"{place}{k:05d}.{kind}", data)
            for k in range(N)
            for kind, data in (("png", png(SCENES[k])), ("txt", b"a caption"))
        ],
    )
    assert len(list(Loader(CARDS["laion-2b"], tmp_path, "pretrain", 8))) == N


@pytest.mark.parametrize(
    "card, row, why",
    [
        ("laion-2b", [1], "its JSON cannot be read"),
        ("laion-2b", dict(caption=2013), "malformed (TypeError)"),
        ("laion-2b", dict(caption=["a", "b"]), "malformed (TypeError)"),
        ("grit", dict(caption="a cat", ref_exps=[[0, 5, 0.1, 0.1]]), "malformed (IndexError)"),
        ("grit", dict(caption="a cat", ref_exps="[[0]]"), "malformed (IndexError)"),
    ],
)
def test_malformed_rows_are_counted(card, row, why, tmp_path):
    "One among fifty: the run goes on, from either reader."
    good = dict(caption="a cat", ref_exps=[[2, 5, .1, .1, .9, .9, .9]])
    pack_tar(
        tmp_path / "a.tar",
        [
            (f"{k:05d}.{kind}", data)
            for k in range(50)
            for kind, data in (
                ("png", png(SCENES[0], 16)),
                ("json", json.dumps(row if k == 7 else good).encode()),
            )
        ],
    )
    assert len(list(loader := Loader(CARDS[card], tmp_path, "pretrain", 8))) == 49
    assert loader.skipped == {why: 1}
    ds = CardSet(CARDS[card], tmp_path, "pretrain", 8)
    assert len([ds[k] for k in range(50)]) == 50 and ds.loader.skipped == {why: 1}


def test_a_sample_without_its_picture_is_no_reason_to_stop(tmp_path):
    words = json.dumps(dict(url="https://x/y.jpg", caption="a cat")).encode()
    pack_tar(
        tmp_path / "a.tar",
        [
            (f"{k:05d}.{kind}", data)
            for k in range(50)
            for kind, data in (("json", words), ("png", png(SCENES[0], 16)))
            if (k, kind) != (30, "png")
        ],
    )
    assert len(list(loader := Loader(CARDS["laion-2b"], tmp_path, "pretrain", 8))) == 49
    assert loader.skipped == {"an address, not a picture": 1}


def test_boxes_stay_with_their_words(tmp_path):
    row = json.dumps(dict(caption="  a cat sits", ref_exps=[[4, 7, 0, 0, 1, 1, .9]])).encode()
    pack_tar(tmp_path / "a.tar", [("0.png", png(SCENES[0])), ("0.json", row)])
    said = next(
        g.text
        for s in Loader(CARDS["grit"], tmp_path, "pretrain", 8)
        for g in s["segments"]
        if "cat" in g.text
    )
    assert said == "a cat <p0><p0><p223><p223> sits"


def test_subsets_are_told_by_names_not_by_pixels(tmp_path):
    "Among the bytes of a noisy picture there is any word of three letters."
    f = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 255, (448, 448, 3), dtype=np.uint8)
    Image.fromarray(noise).save(f, "PNG")
    assert b"geo" in (noisy := f.getvalue() + b"geo")
    pack_tar(
        tmp_path / "a.tar",
        [
            (f"{k}.{kind}", data)
            for k in range(N)
            for kind, data in (
                ("png", noisy),
                ("json", json.dumps(dict(conversations=TURNS)).encode()),
            )
        ],
    )
    assert len(list(loader := Loader(CARDS["cambrian"], tmp_path, "instruct-understand", 8))) == N
    assert not loader.skipped


def test_capital_suffixes_raw_bytes_and_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("1.PNG", "2.png", "3.Png"):
        (tmp_path / "a" / name).write_bytes(png(SCENES[0]))
    assert len(CardSet(CARDS["imagenet-val"], tmp_path / "a", "eval", 8)) == 3
    raw = Dataset.from_list([dict(image=png(SCENES[0]), caption="c")] * N)
    raw.to_parquet(tmp_path / "b" / "a.parquet")
    assert len(list(Loader(CARDS["coco-30k"], tmp_path / "b", "eval", 8))) == N
    rows = [dict(image=dict(bytes=png(SCENES[0]), path=None))] * 20 + [dict(image=None)]
    rows = Dataset.from_list(rows, features=Features(dict(image=ImageFeature())))
    rows.save_to_disk(tmp_path / "c")
    assert image_set(tmp_path / "c", 8)[1] == {"not a readable image": 1}


def test_all_subsets_of_a_set_on_the_hub(tmp_path):
    """A repository with a configuration for each subset, as LLaVA-OneVision's; a folder stands in
    for the hub."""
    for k, name in enumerate(("ai2d", "chartqa")):
        (tmp_path / name).mkdir()
        picture = dict(bytes=png(SCENES[k]), path=None)
        row = dict(image=picture, conversations=TURNS, data_source=name)
        rows = Dataset.from_list([row] * N)
        rows.cast_column("image", ImageFeature()).to_parquet(tmp_path / name / "train-0.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/*.parquet\n"
            for n in ("ai2d", "chartqa")
        )
        + "---\n"
    )
    card = copy.deepcopy(CARDS["llava-onevision"])
    card.meta["puma"]["home"] = str(tmp_path)
    assert (
        len(list(Loader(card, "hub", "instruct-understand", 8)))
        == len(CardSet(card, "hub", "instruct-understand", 8))
        == 2 * N
    )


@pytest.mark.parametrize(
    "mode, dtype, most",
    [
        ("F", np.float32, 1.0),
        ("F", np.float32, 255.0),
        ("I", np.int32, 255),
        ("I", np.int32, 65535),
    ],
)
def test_scientific_pictures_keep_their_brightness(mode, dtype, most):
    im = Image.fromarray((np.linspace(0, 1, 64 * 64).reshape(64, 64) * most).astype(dtype))
    f = io.BytesIO()
    im.save(f, "TIFF")
    assert im.mode == mode
    assert np.asarray(open_picture(f.getvalue())).mean() == pytest.approx(127.5, abs=2)


def test_files_of_other_splits_are_left_alone(tmp_path):
    "A set of the hub that was copied to a folder."
    for split in ("train", "validation", "test"):
        write_set(CARDS["ocr-vqa-200k"], tmp_path)
        (tmp_path / "part-0.parquet").rename(tmp_path / f"{split}-00000-of-00001.parquet")
    assert (
        len(CardSet(CARDS["ocr-vqa-200k"], tmp_path, "pretrain", 8))
        == len(list(Loader(CARDS["ocr-vqa-200k"], tmp_path, "pretrain", 8)))
        == N
    )


def test_a_file_in_a_folder_beside_its_pictures(tmp_path):
    (tmp_path / "jsons").mkdir()
    (tmp_path / "1.png").write_bytes(png(SCENES[0]))
    (tmp_path / "jsons" / "other.jsonl").write_text("{}")
    (tmp_path / "jsons" / "rows.jsonl").write_text(
        json.dumps(dict(image="1.png", conversations=TURNS))
    )
    file = tmp_path / "jsons" / "rows.jsonl"
    assert len(list(Loader(CARDS["cambrian"], file, "instruct-understand", 8))) == 1


def test_pictures_in_a_folder_that_is_named_from_here(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").write_bytes(png(SCENES[0]))
    monkeypatch.chdir(tmp_path)
    for card, stage in (("imagenet-val", "eval"), ("laion-2b", "decoders")):
        assert (
            len(list(CardSet(CARDS[card], "a/b", stage, 8, least=0)))
            == len(list(Loader(CARDS[card], "a/b", stage, 8, least=0)))
            == 1
        )


def test_a_set_is_known_by_its_files_not_by_its_place(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        write_set(CARDS["grit"], tmp_path / name)
    with open(tmp_path / "c" / "00000.tar", "ab") as f: f.write(bytes(512))
    a, b, c = (CardSet(CARDS["grit"], tmp_path / name, "pretrain", 8).mark for name in "abc")
    assert a == b != c


def test_rows_without_pictures_are_kept_where_the_card_says_so(tmp_path):
    (tmp_path / "1.png").write_bytes(png(SCENES[0]))
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    rows = [dict(image="1.png", conversations=TURNS), dict(conversations=talk)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = list(loader := Loader(CARDS["llava-1.5-finetune"], tmp_path, "eval", 8))
    assert [len(s["images"]) for s in samples] == [1, 0] and not loader.skipped
    assert [(g.kind, g.supervised) for g in samples[1]["segments"]] == [
        ("text", False),
        ("text", False),
        ("text", True),
    ]


@pytest.mark.parametrize("kind", ["control_canny", "control_inpainting", "control_grayscale"])
def test_half_of_the_conditions_say_their_task(kind, tmp_path):
    rows = [{kind: f"{k}.png", "source": f"{k}.png", "prompt": "a cross"} for k in range(N)]
    for home in ("images", "conditions", "json_files"):
        (tmp_path / home).mkdir()  # as UniControl lays them out
    for k in range(N):
        for home in ("images", "conditions"):
            (tmp_path / home / f"{k}.png").write_bytes(png(SCENES[k]))
    (tmp_path / "json_files" / "rows.json").write_text(json.dumps(rows))
    said = Counter(
        s["segments"][1].text
        for seed in range(20)
        for s in Loader(CARDS["multigen-20m"], tmp_path, "instruct-condition", 8, seed)
    )
    assert set(said) == {"a cross", f"{ASK[kind]}. a cross"} and abs(said["a cross"] / 80 - .5) < .2


def test_rules_subsets_and_duplicates(tmp_path):
    card, seen = CARDS["llava-onevision"], set()
    rows = [
        dict(
            image=dict(bytes=png(SCENES[k % 2]), path=None),
            conversations=TURNS,
            data_source="geometry3k(math)" if k == 4 else "vqa",
        )
        for k in range(5)
    ]
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "a.parquet")
    list(loader := Loader(card, tmp_path, "instruct-understand", 16, seen=seen))
    assert (loader.kept, loader.skipped) == (2, {"in another set": 2, "left out by a rule": 1})
    with pytest.raises(UserError, match="no usable rows"):
        list(Loader(card, tmp_path, "instruct-understand", 16, seen=seen))  # all are known by now


def test_small_pictures_are_left_out_for_decoders(tmp_path):
    card = CARDS["laion-2b"]
    write_set(card, tmp_path)
    with pytest.raises(UserError, match="too small"):
        list(Loader(card, tmp_path, "decoders", 8))


def test_addresses_are_not_fetched(tmp_path):
    rows = Dataset.from_list([dict(url="https://somewhere/x.png", caption="c")])
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="img2dataset"):
        list(Loader(CARDS["laion-2b"], tmp_path, "pretrain", 8))


READER = """
import json, os, sys
import torch.distributed as dist
from puma_nb.data.cards import load_cards
from puma_nb.data.loaders import ASK, CardSet
from puma_nb.data.order import draw
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
assert world == 2
folder, out, begin, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sets = {
    n: CardSet(load_cards()[n], folder + "/" + n, "pretrain", 8, least=0)
    for n in ("laion-2b", "laion-aesthetics")
}
said = []
for p in range(begin + rank, end, world):
    name, k = draw([p], {"laion-2b": 3, "laion-aesthetics": 1})[0]
    said.append(next(g.text for g in sets[name][k]["segments"] if g.kind == "text"))
json.dump(said, open(f"{out}/{begin}_{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_read_every_sample_once_also_when_resumed(tmp_path):
    """16 shards of one set and 4 of another, shares 3 to 1: a run of exactly one and a half
    thousand positions, cut in the middle."""
    import processes
    said = {"laion-2b": [], "laion-aesthetics": []}
    for name, shards, rows in (("laion-2b", 16, 60), ("laion-aesthetics", 4, 80)):
        (tmp_path / name).mkdir()
        for s in range(shards):
            with tarfile.open(tmp_path / name / f"{s:05d}.tar", "w") as tar:
                for k in range(rows):
                    words = f"{name} {s} {k}"
                    said[name].append(words)
                    for kind, data in (("png", png(SCENES[0], 8)), ("txt", words.encode())):
                        info = tarfile.TarInfo(f"{k:05d}.{kind}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    script = tmp_path / "reader.py"
    script.write_text(READER)
    # 1,280 positions draw 960 of the first set and 320 of the second: one epoch of each
    for begin, end in ((0, 503), (503, 1280)):
        done = processes.run(script, (tmp_path, tmp_path, begin, end), tmp_path / "said", 2)
        assert done.returncode == 0, done.stderr[-2000:]
    read = Counter(t for f in tmp_path.glob("*_?.json") for t in json.loads(f.read_text()))
    first = [t for t in read.elements() if t.startswith("laion-2b")]
    # the last block of a thousand is not full: shares are exact in whole blocks
    assert abs(len(first) - 960) <= 12 and sum(read.values()) == 1280
    assert max(read[t] for t in said["laion-2b"]) <= (1 if len(first) <= 960 else 2)
    assert len(set(first)) == min(960, len(first))
    assert set(read) <= {t for v in said.values() for t in v}


def test_a_set_from_the_hub_is_asked_for_by_its_card(tmp_path, monkeypatch):
    """Streamed or whole, the card says which repository and split; what the hub would send comes
    from a local file here."""
    import puma_nb.data.loaders as loaders
    from datasets import Dataset
    from datasets import Image as ImageFeature
    asked = []
    def load(home, name, split, streaming):
        asked.append((home, split, streaming))
        rows = Dataset.from_list(
            [
                dict(
                    image=dict(bytes=png(sample_scene(0, k)), path=None),
                    questions=["what?"], answers=["a scene"], title="t", authorName="a", genre="g",
                )
                for k in range(6)
            ]
        ).cast_column("image", ImageFeature())
        return rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(loaders, "load_dataset", load)
    monkeypatch.setattr(
        loaders, "get_dataset_config_names", lambda home: ["default", "all of it again"]
    )
    card = CARDS["ocr-vqa-200k"]
    streamed, ds = list(Loader(card, "hub", "pretrain", 16)), CardSet(card, "hub", "pretrain", 16)
    assert len(streamed) == len(ds) == 6
    assert {s["answer"] for s in streamed} == {ds[p]["answer"] for p in range(6)} == {"a scene"}
    assert asked == [
        (card.meta["puma"]["home"], card.meta["puma"]["split"], s) for s in (True, False)
    ]
    monkeypatch.setattr(
        loaders,
        "load_dataset",
        lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")),
    )
    with pytest.raises(UserError, match="no network"):
        CardSet(card, "hub", "pretrain", 16)
