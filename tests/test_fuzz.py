"""Whatever is wrong in an input is one line: no traceback, no hang, no unbounded memory.

Inputs are drawn at random, the same ones for the same seed. Most go to the function that reads
them (a card, a row, a shard, a file of a model's folder), some through the whole command line.
The test takes a minute; more inputs, by hand:

    python tests/test_fuzz.py --full          # at least 10,000 inputs
    python tests/test_fuzz.py --kind cards --inputs 500 --seed 7
"""
import argparse, contextlib, copy, faulthandler, io, json, os, random, resource, shutil, signal
import struct, sys, tarfile, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # else conftest.py has said so
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1",
                      HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from puma_nb import cli, puma
from puma_nb.core import pick_device, save_json, save_tensors
from puma_nb.data import cards, loaders, pictures
from puma_nb.errors import SCALES, UserError
from puma_nb.evaluation import tables
from puma_nb.models import autoencoder, decoders, mllm, processor, pyramid
from puma_nb.plan import make_plan
from puma_nb.presets import PRESET_FILE, get_preset, read_preset, write_preset
from puma_nb.recipes import pretrain, system
from puma_nb.training.loop import Run
from puma_nb.world.language import parse_caption
from puma_nb.world.samples import train_tokenizer

# Whether a broken folder of a model counts as a failure of the test, too: True as soon as the
# loaders of chapters 1 to 3 refuse each of them.
MODEL_FOLDERS_COUNT = True

PATIENCE = 30    # seconds for one input
ROOM = 3 * 2**30  # bytes that one input may take


# ---- one input under watch

class Hang(BaseException):
    "The alarm has rung."


class Enough(BaseException):
    "The input was taken, and the work that it asks for has begun."


def ring(*_): raise Hang


def virtual_bytes():
    "What this process has reserved."
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def watched(patience):
    "An alarm, and a limit of memory."
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + ROOM, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, patience, 1)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def ran_out(e):
    "Whether an error says that memory ran out."
    said = f"{type(e).__name__} {e}"
    return any(w in said for w in ("MemoryError", "alloc", "Cannot allocate memory"))


def one_line(text): return bool(text) and len(text.splitlines()) == 1


def outcome(call, patience=PATIENCE): # (one of OUTCOMES, what was said)
    "What becomes of an input."
    try:
        with watched(patience): call()
    except Enough: return "accepted", ""
    except UserError as e:
        if ran_out(e): return "memory", str(e)
        return ("refused" if one_line(str(e)) else "traceback"), f"{e}"
    except Hang: return "hang", traceback.format_exc()
    except BaseException as e:
        return ("memory" if ran_out(e) else "traceback"), traceback.format_exc()
    return "accepted", ""


OUTCOMES = ("accepted", "refused", "traceback", "hang", "memory")


def command(*argv): # A function without arguments
    "A whole command; what it says on stderr is its error."
    def call():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(list(argv))
        if code == 2: raise UserError(said.getvalue().removesuffix("\n"))
        assert code == 0, (code, said.getvalue())
    return call


# ---- what inputs are made of

NASTY = (
    "", " ", "0", "-1", "3", "1e308", "1e309", "inf", "-inf", "nan", str(10**30), "9" * 5000,
    "0x10", "1_0", "\u0663", "\u00b2", "[]", "[1, 2]", "{}", "null", "None", "true", "a,b", ",",
    "=", "a=", "f", "f5", "all", "meta", "xla", "cuda:99", "cuda:-1", "cpu:7", "mps:3", "cpu,cuda",
    "hpu", "cuda", "--", "-", "\0", "a\0b", "\udc80", "x" * 300, "y" * 100_000, "a\nb", "\r",
    "\x1b[31m", "\u2028", "/", "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "~", "..",
    "hf:", "hf:x/y", "hf:x/y:z", "$x$", "\\frac{", "%s", "\U0001f600", "\ufffe",
)
VALUES = (
    None, True, [], {}, "", "x", 0, -1, 2.5, float("nan"), float("inf"), 10**30, 4 * 10**18,
    [None], [[]], {"a": None}, [1, "a"], b"x", "x" * 5000, "\udc80", "\0", "-" * 70,
)


def deep(n, opened="[", closed="]"): return opened * n + closed * n


def changed(rng, value, values=VALUES):
    "A copy of nested data with one part that is another, gone, or doubled."
    value = copy.deepcopy(value)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys: return rng.choice(values)
        key = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < .7:
            at = inner
            continue
        if rng.random() < .2: del at[key]
        else: at[key] = rng.choice(values)
        return value


def other_file(rng, path, pipes=True):
    "Put something in the place of a file that no reader of files expects; what it was."
    path.unlink(missing_ok=True)
    makers = dict(
        fifo=lambda: os.mkfifo(path),
        folder=path.mkdir,
        empty=path.touch,
        missing=lambda: None,
        zeros=lambda: path.write_bytes(bytes(5000)),
        loop=lambda: path.symlink_to(path),
        no_link=lambda: path.symlink_to(path.parent / "nowhere"),
        text=lambda: path.write_text("no such thing\n" * 10))
    what = rng.choice([k for k in makers if pipes or k != "fifo"])
    makers[what]()
    return what


def cut(rng, path):
    "Cut a file somewhere, or change some of its bytes; what was done."
    data = bytearray(path.read_bytes())
    path.unlink()  # it may be a link to the original
    at = rng.randrange(len(data))
    if rng.random() < .5:
        path.write_bytes(data[:at])
        return f"cut at {at}"
    if rng.random() < .5: at = rng.randrange(min(len(data), 64))
    data[at:at + 8] = rng.randbytes(min(8, len(data) - at))
    path.write_bytes(data)
    return f"bytes changed at {at}"


# ---- a small system

def pico_system(out):
    "A system of preset pico with random weights."
    p = get_preset("pico")
    net = pyramid.CLIPVisionModel(pyramid.vision_config(p.encoder))
    net.save_pretrained(out / "encoder")
    width = p.encoder.hidden_size
    moments = dict(mean=torch.zeros(5, width), std=torch.ones(5, width))
    save_tensors(moments, out / "encoder" / "feature_stats.safetensors")
    vae = autoencoder.build_autoencoder(p.autoencoder)
    autoencoder.Latents(vae).save(out / "autoencoder")
    for i in SCALES:
        decoders.build_decoder(p, i).save_pretrained(out / "decoders" / f"f{i}")
    words = train_tokenizer(p.mllm.vocab_size)
    words.save_pretrained(out / "tokenizer")
    model = mllm.build_mllm(p, words, pyramid.load_stats(out))
    processor.save_mllm(model, processor.build_processor(p, words), out / "instruct")
    write_preset(p, out / PRESET_FILE)
    save_json(dict(stage="instruct", gates={}, seconds=1), out / "instruct" / "stage.json")
    return out


class Home:
    "What all inputs share: a system, pictures, sets."
    def __init__(self, folder):
        self.folder = Path(folder)
        self.system = pico_system(self.folder / "system")
        self.puma = puma.Puma(self.system, "cpu")
        self.picture = self.folder / "picture.png"
        noise = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self.picture)
        self.own = cards.load_cards()

    @contextlib.contextmanager
    def stand_ins(self, monkeypatch, rng):
        "The one system in the place of the shipped one; work ends soon after it has begun."
        real = puma.Puma
        def system_of(model=None, *args, **kwargs):
            if model is not None: return real(model, *args, **kwargs)
            return real(self.system, *args, **kwargs)
        def begun(preset, out, stages, seed, resume, device, *others, **options):
            pick_device(device)
            system.keep_preset(preset, out)
            raise Enough
        monkeypatch.setattr(puma, "Puma", system_of)
        monkeypatch.setattr(system, "train_system", begun)
        def measured(*args, **kwargs): raise Enough
        for table in tables.TABLES:
            monkeypatch.setitem(tables.TABLES, table, measured)
        for name in ("generate", "generate_auto", "edit", "condition", "reconstruct"):
            self._once(monkeypatch, real, name, rng.random() < .1)
        yield

    def _once(self, monkeypatch, cls, name, works):
        "Let a method of `Puma` work once, or not at all."
        method, calls = getattr(cls, name), []
        def limited(puma, *args, **kwargs):
            calls.append(name)
            if not works or len(calls) > 1: raise Enough
            return method(puma, *args, **kwargs)
        monkeypatch.setattr(cls, name, limited)


# ---- kinds of inputs: (home, rng, an empty folder) -> (what it is, a function without arguments)

def prompts(home, rng, box):
    "Texts for the language model."
    pieces = [*NASTY, "a red circle", " at the top left", "[IMG]", "<p3>", "</s>", [], [None], [5]]
    few = rng.choice((1, 3))
    text = rng.choice(pieces)
    if isinstance(text, str) and rng.random() < .7:
        others = [w for w in pieces if isinstance(w, str)]
        text = "".join(rng.choice(others) for _ in range(rng.randrange(1, 6)))
    ways = dict(
        generate=lambda: home.puma.generate(text, 4),
        several=lambda: puma.Asked([text, None, text][:few], what="prompt"),
        ask=lambda: puma.Asked([text], [home.picture], what="question"),
        scene=lambda: parse_caption(text))
    if not isinstance(text, str): del ways["scene"]
    way = rng.choice(list(ways))
    return f"{way} {text!r}"[:200], ways[way]


OPTIONS = {
    "demo": ("--prompt", "--out", "--seed", "--dtype", "--model", "--json", "--fast"),
    "generate": ("--scale", "--n", "--model", "--out", "--seed", "--dtype", "--json", "--plain"),
    "edit": ("--scale", "--n", "--model", "--out", "--seed", "--dtype", "--json", "--fast"),
    "condition": (
        "--kind", "--ready", "--scale", "--n", "--out", "--seed", "--dtype", "--json", "--fast"),
    "ask": ("--model", "--dtype", "--json"),
    "reconstruct": ("--scale", "--model", "--out", "--seed", "--resize", "--dtype", "--json"),
    "train": (
        "--preset", "--stage", "--out", "--scale-steps", "--parts", "--images", "--encoder",
        "--llama", "--data", "--cache", "--accumulate", "--ahead", "--bad-step", "--spike",
        "--save-every", "--norms", "--seed", "--device", "--resume", "--shard", "--family"),
    "eval": (
        "--table", "--n", "--model", "--images", "--prompts", "--lpips", "--resize", "--split",
        "--stage", "--seed", "--dtype", "--json"),
    "plan": ("--preset", "--gpu", "--gpus", "--mfu", "--per-gpu", "--side", "--json"),
}
LEGAL = {
    "--scale": "3", "--n": "2", "--out": "new", "--seed": "5", "--dtype": "float32", "--gpus": "2",
    "--json": "new.json", "--resize": "squash", "--table": "1", "--stage": "pretrain",
    "--mfu": "0.5", "--per-gpu": "1", "--side": "32", "--device": "cpu", "--accumulate": "2",
    "--kind": "canny",
}
FLAGS = ("--fast", "--plain", "--ready", "--resume", "--shard")
WORDS = {"generate": 1, "edit": 2, "condition": 2, "ask": 2, "reconstruct": 1}


def words_for(home, rng, box, name):
    "A command's own words and one to three options."
    fifo, locked = box / "fifo", box / "file"
    os.mkfifo(fifo)
    locked.write_text("a red circle\n")
    pool = [*NASTY, *map(str, (fifo, locked, box, home.picture, box / "new"))]
    said = [str(home.picture)] * WORDS.get(name, 0)
    if said and rng.random() < .3:
        said[rng.randrange(len(said))] = rng.choice(pool)
    if name == "train":
        said += ["--preset", rng.choice(("pico", "nano", "paper", "base"))]
    if name == "plan": said += ["--preset", "pico"]
    for k, option in enumerate(rng.sample(OPTIONS[name], rng.randrange(1, 4))):
        value = LEGAL.get(option) if k or rng.random() < .2 else rng.choice(pool)
        if option in FLAGS: said.append(option)
        elif value is not None: said += [option, value]
    return said


def options(home, rng, box):
    "Options of a command, checked by the whole command, which works little or not at all."
    name = rng.choice(list(OPTIONS))
    said = words_for(home, rng, box, name)
    def call():
        with pytest.MonkeyPatch.context() as patch, home.stand_ins(patch, rng):
            patch.chdir(box)
            command(name, *said)()
    return f"{name} {said}"[:300], call


ARGUMENTS = {
    "plan": (make_plan, dict(preset=get_preset("pico"), gpu="h200", gpus=8, mfu=.4, per_gpu=8,
                             side=None)),
    "run": (Run, dict(accumulate=1, ahead=0, bf16=True, shard=False, bad_step="stop", spike=0.0,
                      save_every=400, norms_every=0)),
}


def arguments(home, rng, box):
    "Arguments of the library's own checks."
    name = rng.choice(list(ARGUMENTS))
    function, given = ARGUMENTS[name]
    key = rng.choice([k for k in given if k != "preset"])
    value = rng.choice([*VALUES, *NASTY, ["h200"], [.4, .5], 1e-300, 10**400])
    given = dict(given) | {key: value}
    return f"{name} {key}={value!r}"[:200], lambda: function(**given)


FORMATS = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "tga", "ico", "pcx", "icns")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "F", "I;16", "LAB", "HSV")


def drawn(rng, path):
    "A picture of some format, mode and size; what it is."
    mode, kind = rng.choice(MODES), rng.choice(FORMATS)
    size = rng.choice(((24, 24), (1, 1), (1, 5000), (300, 7), (2, 2)))
    more = {}
    im = Image.new("L", size, 77)
    im = Image.new(mode, size, 999) if mode == "I;16" else im.convert(mode)
    if rng.random() < .2:
        more = dict(save_all=True, append_images=[im] * 3, duration=50)
    if rng.random() < .3:
        nonsense = b"Exif\0\0" + rng.choice((b"", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"x" * 500))
        more["exif"] = nonsense
    try: im.save(path, kind, **more)
    except Exception:  # not every format has every mode
        mode, kind = "RGB", "png"
        Image.new(mode, size).save(path, kind)
    return f"{kind} {mode} {size} {sorted(more)}"


def huge_header(rng, path):
    "A file whose header promises more than there is."
    side = rng.choice((2**31 - 1, 10**6, 40_000, 0))
    if rng.random() < .5:
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
        path.write_bytes(start + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0) + bytes(40))
    else:
        path.write_bytes(f"P6 {side} {side} 255\n".encode() + bytes(40))
    return f"header says {side}"


def bomb(rng, path):
    "Few bytes that become many pixels."
    Image.new("1", (rng.choice((7_900, 20_000)),) * 2).save(path, "png")
    return "bomb"


def picture_file(home, rng, path):
    "A picture, mostly broken; what it is."
    r = rng.random()
    if r < .2: return other_file(rng, path)
    if r < .3: return huge_header(rng, path)
    if r < .305: return bomb(rng, path)
    what = drawn(rng, path)
    return f"{what}, {cut(rng, path)}" if rng.random() < .6 else what


def picture(home, rng, box):
    "A file that should be a picture, alone, in a folder or in a row."
    path = box / rng.choice(("a.png", "a.jpg", "a.gif", "a.tif", "a\n.png", "\udc80.png"))
    what = picture_file(home, rng, path)
    data = path.read_bytes() if path.is_file() else b""
    places = [str(path), path, dict(path=str(path), bytes=None), dict(bytes=data, path=None),
              data, rng.choice(VALUES), dict(path=rng.choice(VALUES))]
    place = rng.choice(places)
    def row():
        try: pictures.open_picture(place, box)
        except pictures.Skip as e: raise UserError(str(e)) from None
    ways = dict(
        photo=lambda: home.puma.pictures(path),
        set=lambda: pictures.image_set(box, 16),
        row=row,
        ask=command("ask", str(path), "what is it?", "--model", str(home.system)))
    way = rng.choices(list(ways), (4, 3, 6, .3))[0]
    return f"{way} {what}", ways[way]


HEADER = dict(
    pretty_name="A set", license="mit", language=["en"],
    puma=dict(
        stage=["pretrain", "eval"], home="https://x.org", format="json", split="train",
        columns=dict(image="image", caption="caption", ref="boxes", conv=["question", "answer"]),
        filters=dict(pretrain=dict(min_side=8, min_box_side=.01, crop="center",
                                   nonempty=["caption"], dedup_with=["grit"], text_rows=True,
                                   drop_subsets=dict(column="id", match=["a*"]))),
        weight=dict(pretrain=dict(share=.5, source="ours")), standin="t2i", roots=dict(image="a")))


def card_text(rng):
    "A card's text, mostly with something wrong in its header."
    import yaml
    r = rng.random()
    if r < .15:
        words = ("- a", "a: [", "a: &x [*x]", "\t", "a:\n\tb: 1", "2024-13-45", "a: 2024-99-99",
                 "!!python/object:os.system x", deep(3000), "a: a", "a: b", "? x", "---", "...",
                 "pretty_name: 1\npretty_name: 2", "9" * 9000, "a: " + "9" * 9000, "%x", "\0",
                 "puma: *x", "<<: 5", "=: =", "1: 2\n'1': 3", "{}: {}", "? [a]\n: b")
        header = "\n".join(rng.choice(words) for _ in range(rng.randrange(1, 3)))
    else:
        value = HEADER
        safe = [v for v in VALUES if v != b"x"]
        for _ in range(rng.randrange(0, 4)):
            value = changed(rng, value, safe)
            if not isinstance(value, (dict, list)): break
        header = yaml.safe_dump(value)
    start = rng.choices(("---\n", "", "--- \n", "\ufeff---\n", "x\n---\n"), (20, 1, 1, 1, 1))[0]
    end = rng.choices(("\n---\nAbout it.\n", "\n", "\n---\n", "\r\n---\r\n"), (20, 1, 1, 1))[0]
    return start + header + end


ROW = dict(image=None, caption="a red circle and a cat", id="abc",
           ref=[[2, 12, .1, .1, .5, .5, .9]],
           conv=[{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a cat"}])


def read_by(card, box, line):
    "What a row becomes in each stage of a card."
    for stage in ("pretrain", "eval"):
        if stage not in card.stage: continue
        loader = loaders.Loader(card, box, stage, 8)
        try: loader.sample(json.loads(line), np.random.default_rng(0))
        except pictures.Skip: pass


def data_card(home, rng, box):
    "A card, and what reads a set by it."
    path, what = box / "my-set.md", None
    text = card_text(rng)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if rng.random() < .05: what = other_file(rng, path)
    whole = rng.random() < .2
    def call():
        read_by(cards.read_card(path), box, json.dumps(ROW | dict(image=str(home.picture))))
        if not whole: return
        (box / "set").mkdir()
        (box / "set" / "00000.png").write_bytes(home.picture.read_bytes())
        pretrain.card_sets({str(path): str(box / "set")}, "pretrain", 8)
    return f"{what or text!r}"[:600], call


def own_card():
    "The card of `HEADER`."
    return cards.Card("own", "own", HEADER["puma"]["stage"], "", "", HEADER)


def row(home, rng, box):
    "A row of a set."
    values = [*VALUES, [dict(ROW["conv"][0])] * 5000, ROW["conv"] * 2500, "z" * 60_000_000,
              [float("inf")] * 7, [[float("inf")] * 7], [[0, 3, -1e308, 1e308, 1, 2, 3]]]
    value = dict(ROW, image=dict(path=str(home.picture), bytes=None))
    for _ in range(rng.randrange(1, 3)):
        if isinstance(value, dict): value = changed(rng, value, values)
    name = rng.choice(("own", *home.own))
    card = home.own.get(name) or own_card()
    stage = rng.choice(card.stage)
    value = named_columns(rng, card, value)
    loader = loaders.Loader(card, box, stage, 8, least=0)
    def call():
        try: sample = loader.sample(value, np.random.default_rng(0))
        except pictures.Skip as e: raise UserError(str(e)) from None
        for g in sample["segments"]:
            pretrain.to_ids(home.puma.tokenizer, g.text[:pretrain.LETTERS])
    return f"{name} {stage} {value!r}"[:300], call


def named_columns(rng, card, value):
    "A row's values under the names of another card's columns."
    if not isinstance(value, dict) or card.name == "own": return value
    fields = dict(image="image", source="image", target="image", caption="caption", boxes="ref",
                  question="caption", answer="caption", instruction="caption")
    row = {}
    for column, field in card.meta["puma"]["columns"].items():
        v = value.get("conv" if isinstance(field, list) else fields[field])
        *path, last = column.split(".")
        at = row
        for part in path: at = at.setdefault(part, {})
        at[last] = v
    return row


def member(rng, t, name, data):
    "Add a file to a shard; its header may tell a lie."
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.type = rng.choice((tarfile.REGTYPE,) * 9 + (tarfile.SYMTYPE, tarfile.FIFOTYPE))
    if rng.random() < .85: return t.addfile(info, io.BytesIO(data))
    info.size = rng.choice((4 * 10**18, 2**63, 2**33, 10**12, 0, 2**60))
    if rng.random() < .2: info.type = tarfile.GNUTYPE_LONGNAME
    t.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + data)


def shard(rng, path, home):
    "A tar shard with something wrong; what."
    form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    texts = (b"a caption", json.dumps(changed(rng, ROW, VALUES[:11])).encode(),
             deep(100_000).encode(), b"9" * 9000, b"\xff\xfe", b"")
    with tarfile.open(path, "w", format=form) as t:
        for k in range(3):
            name = f"{rng.choice(('', 'a/', '../', '/'))}{k}"
            member(rng, t, f"{name}.png", home.picture.read_bytes())
            member(rng, t, f"{name}.{rng.choice(('json', 'txt'))}", rng.choice(texts))
    return cut(rng, path) if rng.random() < .3 else "members"


def other_bytes(rng, path):
    "Change a few bytes of a file; what was done."
    data = bytearray(path.read_bytes())
    n = rng.randrange(1, 6)
    for _ in range(n): data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    return f"{n} other bytes"


def table(rng, path, home):
    "A file of JSON lines or a parquet table with something wrong; what."
    rows = [dict(ROW, image=str(home.picture)) for _ in range(3)]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return cut(rng, path) if rng.random() < .5 else other_bytes(rng, path)
    lines = [json.dumps(r) for r in rows]
    bad = (deep(5000), "{", "null", "[]", "5", '{"image": 1}', '{"a": NaN}', "", "\0", "\ufeff{}",
           '{"caption": {"a": 1}}', '{"caption": 1e999}', '{"a": ' + "9" * 9000 + "}", "{}", "x")
    for _ in range(rng.randrange(1, 3)):
        lines.insert(rng.randrange(4), rng.choice(bad))
    path.write_text("\n".join(lines))
    return f"{lines}"[:200]


def data_set(home, rng, box):
    "A folder of a set, read by its card as training reads it."
    kind = rng.choices(("tar", "jsonl", "parquet", "png"), (10, 2, 2, 3))[0]
    path = box / "set" / f"a.{kind}"
    path.parent.mkdir()
    if rng.random() < .1:
        path.write_bytes(b"x")
        what = other_file(rng, path)
    elif kind == "tar": what = shard(rng, path, home)
    elif kind == "png": what = picture_file(home, rng, path)
    else: what = table(rng, path, home)
    card = own_card()
    way = rng.choice(("streamed", "by position", "pretrain"))
    def call():
        if way == "streamed":
            return list(loaders.Loader(card, box / "set", "eval", 8, least=0))
        if way == "pretrain":
            (box / "own.md").write_text("---\n" + json.dumps(HEADER) + "\n---\nx\n")
            return pretrain.card_sets({str(box / "own.md"): box / "set"}, "pretrain", 8)
        rows = loaders.CardSet(card, box / "set", "eval", 8, least=0)
        return [rows[k] for k in range(len(rows))]
    return f"{kind} {way} {what}", call


PARTS = {
    "encoder/config.json": pyramid.load_encoder,
    "encoder/model.safetensors": pyramid.load_encoder,
    "encoder/feature_stats.safetensors": pyramid.load_stats,
    "autoencoder/config.json": autoencoder.load_latents,
    "autoencoder/diffusion_pytorch_model.safetensors": autoencoder.load_latents,
    "decoders/f2/config.json": None,
    "decoders/f2/diffusion_pytorch_model.safetensors": None,
    "instruct/config.json": processor.load_mllm,
    "instruct/model.safetensors": processor.load_mllm,
    "instruct/tokenizer.json": processor.load_mllm,
    "instruct/tokenizer_config.json": processor.load_mllm,
    "instruct/processor_config.json": processor.load_mllm,
    PRESET_FILE: lambda folder: read_preset(folder / PRESET_FILE),
}


def broken_json(rng, path):
    "Change a file of JSON; what was done."
    value = json.loads(path.read_text())
    path.unlink()
    if rng.random() < .3:
        what = rng.choice(("null", "[]", "5", '"x"', "{}", deep(100_000), "{", "\ufeff{}",
                           deep(10_000, '{"a":', "}"), "9" * 9000, '{"a": 1e999}'))
        path.write_text(what)
        return what[:40]
    if rng.random() < .5:  # a number that is far too large
        numbers = [k for k, v in value.items() if type(v) in (int, float)]
        key = rng.choice(numbers or list(value))
        value[key] = rng.choice((100_000, 10**9, 10**30, -1, 0, 1e308))
        what = f"{key}: {value[key]}"
    else:
        before = value
        value = changed(rng, value, [v for v in VALUES if v not in (b"x", "\udc80")])
        what = difference(before, value)
    path.write_text(json.dumps(value))
    return what


def difference(one, other, at=""):
    "Where two nested values differ."
    if type(one) is not type(other): return f"{at}: {other!r}"[:150]
    for k in one if isinstance(one, dict) else ():
        if k not in other: return f"{at}.{k} is gone"
        if repr(one[k]) != repr(other[k]):
            return difference(one[k], other[k], f"{at}.{k}")
    return f"{at}: {other!r}"[:150]


def broken_tensors(rng, path):
    "Change a file of safetensors; what was done."
    data = path.read_bytes()
    path.unlink()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    name = rng.choice([k for k in header if k != "__metadata__"])
    key, values = rng.choice((
        ("shape", ([], [1], [10**12], [-1], None, "x")),
        ("dtype", ("I64", "F8_E4M3", "x", 5, "BOOL")),
        ("data_offsets", ([0, 10**15], [5, 1], [0], None)),
        ("text", ("cut", "deep", "gone")),
        ("size", (2**64 - 1, 10**9, 0))))
    value = rng.choice(values)
    if value == "gone": del header[name]
    else: header[name] |= {key: value}
    text = json.dumps(header).encode()
    if value == "cut": text = text[:-5]
    if value == "deep": text = deep(10_000).encode()
    size = value if key == "size" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + body)
    return f"{key} {value} of {name}"


def broken_toml(rng, path):
    "Change a line of a preset; what was done."
    lines = path.read_text().splitlines()
    path.unlink()
    k = rng.choice([k for k, line in enumerate(lines) if "=" in line])
    name = lines[k].partition("=")[0]
    value = rng.choice(("0", "-1", "1e400", "nan", '"x"', "[]", "[[1]]", "true", "1979-05-27",
                        "9" * 5000, "100_000", "{a = 1}", deep(5000), "", "10.5"))
    lines[k] = rng.choice((f"{name} = {value}", f"nothing = {value}", f"[{name}]", "\udc80"[:0]))
    path.write_text("\n".join(lines))
    return lines[k][:60]


def model_folder(home, rng, box):
    "The folder of a system with one file that is broken."
    folder = box / "system"
    shutil.copytree(home.system, folder, copy_function=os.link)
    name = rng.choice(list(PARTS))
    path = folder / name
    r = rng.random()
    # safetensors waits at a pipe and hears no alarm: only for loaders that look first
    pipes = MODEL_FOLDERS_COUNT or path.suffix == ".json"
    if r < .15: what = other_file(rng, path, pipes)
    elif r < .3: what = cut(rng, path)
    else:
        how = {".json": broken_json, ".toml": broken_toml, ".safetensors": broken_tensors}
        what = how[path.suffix](rng, path)
    def decoder():
        decoders.Decoders(get_preset("pico"), folder, "cpu").model(2)
    load = PARTS[name]
    call = decoder if load is None else lambda: load(folder)
    if rng.random() < .03:
        out = str(box / "out")
        call = command("generate", "a cat", "--model", str(folder), "--out", out)
    return f"{name}: {what}", call


def stage_report(home, rng, box):
    "The report of a stage."
    path = box / "encoder" / "stage.json"
    path.parent.mkdir()
    good = dict(stage="encoder", gates=dict(r2=dict(value=.5, wanted=.9, passed=False)), seconds=3)
    path.write_text(json.dumps(good))
    r = rng.random()
    if r < .2: what = other_file(rng, path)
    elif r < .3: what = cut(rng, path)
    else: what = broken_json(rng, path)
    def call():
        with contextlib.redirect_stdout(io.StringIO()):
            cli._say_done(box)
    return what, call


# Kind -> (function, its share of the inputs)
KINDS = dict(
    prompts=(prompts, 20), options=(options, 20), arguments=(arguments, 6),
    pictures=(picture, 20), cards=(data_card, 20), rows=(row, 20), sets=(data_set, 10),
    reports=(stage_report, 6), models=(model_folder, 8))


# ---- many inputs

def attempt(home, kind, seed, k, patience=PATIENCE): # (outcome, what it is, what was said)
    "Input number `k` of a kind."
    rng = random.Random(f"{seed} {kind} {k}")
    box = Path(tempfile.mkdtemp(dir=home.folder))
    np.random.seed(0)
    try:
        what, call = KINDS[kind][0](home, rng, box)
        return *outcome(call, patience), what
    finally: shutil.rmtree(box, ignore_errors=True)


def in_turn(counts): # Pairs of (kind, number)
    "All inputs, the kinds mixed."
    order = []
    for kind, n in counts.items(): order += [(k / n, kind, k) for k in range(n)]
    return [(kind, k) for _, kind, k in sorted(order)]


def sweep(home, counts, seed=0, seconds=None, patience=PATIENCE, found=print): # {kind: Counter}
    "Inputs of all kinds in turn, until all are tried or time is up."
    totals, begun = {k: Counter() for k in counts}, time.time()
    for kind, k in in_turn(counts):
        if seconds and time.time() - begun > seconds: break
        # the last resort, for code that hears no alarm: says where it is, and ends everything
        faulthandler.dump_traceback_later(10 * patience, exit=True)
        result, said, what = attempt(home, kind, seed, k, patience)
        totals[kind][result] += 1
        if result not in OUTCOMES[2:]: continue
        found(f"{result}: {kind} {k} (seed {seed}): {what}\n{said}")
    faulthandler.cancel_dump_traceback_later()
    return totals


def shares(inputs, kinds=None): # {kind: number}
    "How many inputs of each kind."
    kinds = kinds or list(KINDS)
    whole = sum(KINDS[k][1] for k in kinds)
    return {k: -(-inputs * KINDS[k][1] // whole) for k in kinds}


def show(totals):
    "The table of counts."
    rows = [("kind", "inputs", *OUTCOMES)]
    for kind, c in [*totals.items(), ("all", sum(totals.values(), Counter()))]:
        rows.append((kind, c.total(), *(c[o] for o in OUTCOMES)))
    return "\n".join("".join(f"{v:>10}" for v in row) for row in rows)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with silent(): return Home(tmp_path_factory.mktemp("fuzz"))


@contextlib.contextmanager
def silent():
    "Without the libraries' warnings and bars."
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
def test_every_broken_input_is_one_line(home):
    failures = []
    with silent():
        totals = sweep(home, shares(2000), seconds=60, found=failures.append)
    print(show(totals))
    if not MODEL_FOLDERS_COUNT:
        failures = [f for f in failures if f.split(": ")[1].split()[0] != "models"]
    assert not failures, "\n".join(failures)
    tried = sum(totals.values(), Counter())
    assert all(c["accepted"] for c in totals.values()) and tried.total() > 100


def main():
    faulthandler.enable()
    p = argparse.ArgumentParser(description="Broken inputs at random: what becomes of them.")
    p.add_argument("--full", action="store_true", help="10,000 inputs and a few more")
    p.add_argument("--inputs", type=int, default=1000)
    p.add_argument("--kind", choices=list(KINDS), help="one kind only")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one input")
    a = p.parse_args()
    torch.set_num_threads(1)
    counts = shares(10_000 if a.full else a.inputs, [a.kind] if a.kind else None)
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder, silent():
        os.environ["HF_DATASETS_CACHE"] = folder
        totals = sweep(Home(folder), counts, a.seed, patience=a.patience)
    print(show(totals))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.time() - begun:.0f} seconds, at most {used:.1f} GB")
    sys.exit(any(c[o] for c in totals.values() for o in OUTCOMES[2:]))


if __name__ == "__main__": main()
