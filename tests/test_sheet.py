"""metaformer-explain: photographs as they are meant to be seen, what is written and said, what goes wrong; contact
sheets."""
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from matplotlib.colors import to_hex
from PIL import Image
from torch.utils.data import DataLoader, Subset

import metaformer_edu.interpret.cam as cam
from metaformer_edu.commands import explain as command
from metaformer_edu.commands.explain import PER_SHEET, find_images, main, parse
from metaformer_edu.core.errors import DataError
from metaformer_edu.data.datasets import SOURCES, load_data
from metaformer_edu.data.loaders import mistakes_first
from metaformer_edu.interpret import contact_sheet as sheet
from metaformer_edu.interpret.cam import METHODS, explain, imagenet_classes, map_title
from metaformer_edu.interpret.contact_sheet import contact_sheet, good_stage, read_photo, sheet_of_run
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.training.evaluate import predict

RANDOM = ["--model", "tiny_identityformer", "--img-size", "32", "--threads", "1"]
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]
pytestmark = pytest.mark.usefixtures("one_thread", "here")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder as metaformer-train leaves it, of six classes."
    folder = tmp_path_factory.mktemp("output") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    model = create_model("tiny_poolformerv2", num_classes=6, img_size=32)
    torch.nn.init.normal_(model.head.weight)
    save_weights(model, folder / "best.safetensors")
    about = dict(command="metaformer-train", settings=dict(model="tiny_poolformerv2"), img_size=32, class_names=CLASSES)
    (folder / "args.yaml").write_text(yaml.safe_dump(about))
    return folder


def photo(path, size=(40, 30), mode="RGB", seed=0, **options):
    "Write a colourful file."
    path = os.path.join(*path.split("/"))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def called(capsys, *args):
    "Run the command; (status, lines of stdout, lines of stderr)."
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, args)))
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "Warning" not in said.err, said.err
    return caught.value.code, said.out.splitlines(), said.err.splitlines()


def good(capsys, *args):
    status, out, err = called(capsys, *args)
    assert status == 0, err
    return out, err


def refused(capsys, *args):
    "The one sentence, of a command that wrote nothing."
    before = files()
    status, out, err = called(capsys, *args)
    err = [line for line in err if "are random" not in line]
    assert status == 2 and not out and len(err) == 1 and err[0].startswith("metaformer-explain: "), (status, out, err)
    assert files() == before
    return err[0]


def files(folder="."):
    return sorted(os.path.relpath(os.path.join(d, f), folder) for d, ds, fs in os.walk(folder) for f in (*fs, *ds))


def picture(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


# --- photographs ---

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_a_photograph_is_turned_as_its_exif_data_say(orientation, kind):
    seen = Image.new("RGB", (48, 32), "black")
    seen.paste("red", (0, 0, 16, 16))
    seen.paste("blue", (32, 16, 48, 32))
    # how a camera that is held otherwise stores this
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = seen.transpose(Image.Transpose[back[orientation]]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(f"a.{kind}", exif=exif, **({"quality": 95} if kind != "tif" else {}))
    found = read_photo(f"a.{kind}")
    assert found.mode == "RGB" and found.size == (48, 32)
    assert found.getpixel((8, 8))[0] > 150 and found.getpixel((40, 24))[2] > 150 and max(found.getpixel((8, 24))) < 60


@pytest.mark.parametrize("mode, kind",
                         [("1", "png"), ("L", "jpg"), ("L", "bmp"), ("LA", "png"), ("P", "png"), ("P", "gif"),
                          ("RGBA", "png"), ("RGBA", "webp"),
                                        ("RGB", "ppm"), ("RGB", "ico"), ("CMYK", "jpg"), ("CMYK", "tif"),
                          ("YCbCr", "jpg"), ("LAB", "tif"), ("RGB", "jp2")])
def test_any_mode_and_format(mode, kind):
    image = Image.new("RGB", (32, 32), (250, 250, 250))
    image.paste((10, 10, 10), (0, 0, 16, 32))
    (Image.new("LAB", (32, 32), (250, 128, 128)) if mode == "LAB" else image.convert(mode)).save(f"a.{kind}")
    found = read_photo(f"a.{kind}")
    assert found.mode == "RGB" and found.size == (32, 32) and min(found.getpixel((24, 16))) > 220
    assert mode == "LAB" or max(found.getpixel((8, 16))) < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(mode):
    image, options = Image.new("RGBA", (20, 10), (0, 0, 0, 255)), {}
    image.paste((90, 0, 0, 0), (0, 0, 10, 10))
    if mode in "PL":
        image = Image.new(mode, (20, 10), 1)
        image.paste(0, (0, 0, 10, 10))
        if mode == "P":
            image.putpalette([90, 0, 0, 0, 0, 0])
        options = dict(transparency=0)
    image.convert(mode).save("a.png", **options)
    found = read_photo("a.png")
    assert found.getpixel((5, 5)) == (255, 255, 255) and max(found.getpixel((15, 5))) <= 1


@pytest.mark.parametrize("values, expected", [
    (np.uint16([0, 32768, 65535]), [0, 128, 255]), (np.uint16([0, 100, 255]), [0, 100, 255]),
    (np.uint16([0, 128, 256]), [0, 0, 1]),
    (np.int32([-5, 128, 200]), [0, 128, 200]), (np.int32([0, 65536, 131072]), [0, 128, 255]),
    (np.int32([0, 0, 0]), [0, 0, 0]),
    (np.float32([0, 0.5, 1]), [0, 128, 255]), (np.float32([-1, 0.25, 0.5]), [0, 64, 128]),
    (np.float32([0, 1, 2]), [0, 128, 255]),
    (np.float32([np.nan, 0.5, 1]), [0, 128, 255])])
def test_deep_greys_are_scaled(values, expected):
    Image.fromarray(np.tile(values, (3, 1))).save("a.tif")
    found = read_photo("a.tif")
    assert found.mode == "RGB" and [found.getpixel((i, 1)) for i in range(3)] == [(v,) * 3 for v in expected]


def test_sixteen_bits_in_a_png():
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save("a.png")
    assert read_photo("a.png").getpixel((1, 1)) == (156,) * 3


def test_the_first_picture_of_an_animation():
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    first.save("a.gif", save_all=True, append_images=[second])
    assert read_photo("a.gif").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("what", ["text", "empty", "cut", "missing", "folder"])
def test_a_file_that_is_no_image_is_named(what):
    path = photo("a.jpg", (200, 200))
    if what == "text":
        open(path, "w").write("no image")
    if what == "empty":
        open(path, "w").close()
    if what == "cut":
        os.truncate(path, 2000)
    if what in ("missing", "folder"):
        os.remove(path)
    if what == "folder":
        os.mkdir(path)
    with pytest.raises(DataError, match=r"^Cannot read the image a\.jpg: [^\n]+\.$"):
        read_photo(path)


# --- what is written and said ---

def test_pictures_a_sheet_and_a_line_for_each_file(capsys, run):
    for i, name in enumerate(["one.jpg", "two.png", "three.gif"]):
        photo(name, (40 + 30 * i, 60), seed=i)
    out, err = good(capsys, "one.jpg", "two.png", "three.gif", "--checkpoint", run / "best.safetensors", "--out", "o/p",
                    "--threads", "1")
    assert not err and files("o/p") == ["one-gradcam.png", "sheet.png", "three-gradcam.png", "two-gradcam.png"]
    assert out[-1] == f"{os.path.join('o', 'p')}: 3 explained" and len(out) == 4
    model = create_model("tiny_poolformerv2", checkpoint=run / "best.safetensors", num_classes=6, img_size=32).eval()
    for line, name in zip(out, ["one.jpg", "two.png", "three.gif"]):
        logits = explain(model, read_photo(name), stage=1).logits[0]
        values, labels = logits.softmax(0).topk(5)
        assert line == f"{name}: " + ", ".join(f"{CLASSES[label]} {value:.1%}" for label, value in zip(labels, values))
    for name in files("o/p"):
        height, width, _ = picture(f"o/p/{name}").shape
        assert 150 < height < 1500 and 300 < width < 2500
        assert picture(f"o/p/{name}").std() > 10


def test_without_out_each_call_has_a_new_folder(capsys):
    photo("a.png")
    for folder in ("explained", "explained-2", "explained-3"):
        assert good(capsys, "a.png", *RANDOM)[0][-1] == f"{folder}: 1 explained"
        assert files(folder) == ["a-gradcam.png", "sheet.png"]


def test_random_weights_are_called_random(capsys, monkeypatch):
    notes = []
    monkeypatch.setattr(sheet, "contact_sheet",
                        lambda *args, **kwargs: notes.append(kwargs["note"]) or contact_sheet(*args, **kwargs))
    photo("a.png")
    (first, *_), err = good(capsys, "a.png", *RANDOM)
    assert (
        len(err) == 1
        and "weights of tiny_identityformer are random" in err[0]
        and "--checkpoint" in err[0]
        and "random weights" in notes[0]
    )
    assert good(capsys, "a.png", *RANDOM)[0][0] == first  # the same each time


def test_with_a_checkpoint_nothing_is_called_random(capsys, run, monkeypatch):
    notes = []
    monkeypatch.setattr(sheet, "contact_sheet",
                        lambda *args, **kwargs: notes.append(kwargs["note"]) or contact_sheet(*args, **kwargs))
    photo("a.png")
    assert good(capsys, "a.png", "--checkpoint", run / "best.safetensors")[1] == [] and notes == [""]


def test_other_files_in_the_folder_are_left_alone(capsys):
    photo("a.png")
    photo("o/mine.png")
    photo("o/b-gradcam.png", seed=2)
    before = open("o/mine.png", "rb").read(), open("o/b-gradcam.png", "rb").read()
    good(capsys, "a.png", *RANDOM, "--out", "o")
    assert files("o") == ["a-gradcam.png", "b-gradcam.png", "mine.png", "sheet.png"]
    assert before == (open("o/mine.png", "rb").read(), open("o/b-gradcam.png", "rb").read())


@pytest.mark.parametrize("names", [["sheet.png"], ["a.png", "a-gradcam.png"]])
def test_no_image_is_overwritten_by_what_is_said_of_it(capsys, names):
    for i, name in enumerate(names):
        photo(f"mine/{name}", seed=i)
    before = [open(f"mine/{name}", "rb").read() for name in names]
    called(capsys, "mine", *RANDOM, "--out", "mine")
    assert [open(f"mine/{name}", "rb").read() for name in names] == before


def test_files_of_one_name_have_pictures_of_their_own(capsys):
    paths = [photo(p, seed=i) for i, p in enumerate(["a/cat.jpg", "b/cat.jpg", "cat.png", "cat-2.png"])]
    good(capsys, *paths, *RANDOM, "--out", "o")
    assert len(files("o")) == 5 and all(name.startswith("cat") for name in files("o")[:-1])
    pictures = [picture(f"o/{name}") for name in files("o")[:-1]]
    assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_file_that_is_named_twice_is_explained_once(capsys):
    photo("a/b.png")
    out, _ = good(capsys, "a/b.png", "a", "./a/b.png", *RANDOM, "--out", "o")
    assert len(out) == 2 and files("o") == ["b-gradcam.png", "sheet.png"]


def test_more_files_than_a_sheet_holds(capsys, monkeypatch):
    monkeypatch.setattr(command, "PER_SHEET", 2)
    titles, draw = [], contact_sheet
    monkeypatch.setattr(sheet, "contact_sheet",
                        lambda shown, names, *args, **kwargs: titles.append(names)
                        or draw(shown, names, *args, **kwargs))
    for i in range(5):
        photo(f"in/{i}.png", seed=i)
    good(capsys, "in", *RANDOM, "--out", "o")
    assert PER_SHEET == 24 and files("o") == [
        *(f"{i}-gradcam.png" for i in range(5)),
        "sheet-1.png",
        "sheet-2.png",
        "sheet-3.png",
    ]
    assert titles == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]


def test_two_files_fit_on_a_sheet_of_two(capsys, monkeypatch):
    monkeypatch.setattr(command, "PER_SHEET", 2)
    photo("a.png")
    photo("b.png")
    good(capsys, "a.png", "b.png", *RANDOM, "--out", "o")
    assert "sheet.png" in files("o") and "sheet-1.png" not in files("o")


@pytest.mark.parametrize("name", ["with space.png", "été.png", "cost_$x_$.png", "100%.png", "猫.png", "{}.png",
                                  "#1.png",
                                  "n" * 240 + ".png",
                                  os.fsdecode(b"caf\xe9.png")])
@pytest.mark.filterwarnings("error:Glyph")
def test_any_file_name(capsys, name):
    try:
        photo("a.png")
        shutil.copy("a.png", name)
    except OSError:
        pytest.skip("not on this disk")
    out, _ = good(capsys, name, "a.png", *RANDOM, "--out", "o")
    assert len(out) == 3 and len(os.listdir("o")) == 3


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (5000, 10)])
def test_any_size_of_image(capsys, size):
    photo("a.png", size)
    assert good(capsys, "a.png", *RANDOM, "--out", "o")[0][-1] == "o: 1 explained"


def test_a_folder_stands_for_the_images_in_it(capsys):
    for name in ("f.png", "b.png", "d.webp", "a.JPG", "e.gif", "c.bmp", "deep/g.png"):
        photo(f"in/{name}", (32, 32))
    for name in ("notes.txt", "report.pdf", "film.mp4"):
        open(f"in/{name}", "w").write("no image")
    assert [f.name for f in find_images(["in"])[0]] == ["a.JPG", "b.png", "c.bmp", "d.webp", "e.gif", "f.png"]
    out, _ = good(capsys, "in", *RANDOM, "--out", "o")
    assert files("o") == [*(f"{name}-gradcam.png" for name in "abcdef"), "sheet.png"] and out[0].startswith(
        os.path.join("in", "a.JPG")
    )


def test_a_broken_file_is_named_and_the_others_go_on(capsys):
    photo("a.png")
    photo("c.png", seed=1)
    open("b.jpg", "w").write("no image")
    status, out, err = called(capsys, "a.png", "b.jpg", "gone.png", "c.png", *RANDOM, "--out", "o")
    assert status == 2 and out[-1] == "o: 2 explained, 2 not" and len(out) == 3
    assert (
        err[1].startswith("metaformer-explain: Cannot read the image b.jpg: ")
        and "gone.png: No such file" in err[2]
        and len(err) == 3
    )
    assert files("o") == ["a-gradcam.png", "c-gradcam.png", "sheet.png"]


@pytest.mark.parametrize("out", [[], ["--out", "o"]])
def test_without_one_image_that_can_be_read(capsys, out):
    open("b.jpg", "w").write("no image")
    status, said, err = called(capsys, "b.jpg", "gone.png", *RANDOM, *out)
    assert status == 2 and said == [] and len(err) == 3 and files() in (["b.jpg"], ["b.jpg", "o"])


def test_an_empty_folder_is_named(capsys):
    os.mkdir("none")
    photo("a.png")
    status, out, err = called(capsys, "none", *RANDOM)
    assert (
        status == 2 and not out and "There is no image in the folder none" in err[-1] and files() == ["a.png", "none"]
    )
    status, out, err = called(capsys, "none", "a.png", *RANDOM, "--out", "o")
    assert status == 2 and "There is no image in the folder none" in err[-1] and out[-1] == "o: 1 explained"


# --- flags ---

def explained(monkeypatch):
    "What `explain` was asked for."
    asked = []
    monkeypatch.setattr(cam, "explain", lambda *args: asked.append(args) or explain(*args))
    return asked


@pytest.mark.parametrize("method", METHODS)
def test_method_is_obeyed(capsys, monkeypatch, method):
    asked = explained(monkeypatch)
    photo("a.png")
    good(capsys, "a.png", *RANDOM, "--method", method, "--out", "o")
    assert files("o") == [f"a-{method}.png", "sheet.png"] and asked[0][4] == method


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage_is_obeyed(capsys, monkeypatch, stage):
    asked = explained(monkeypatch)
    photo("a.png")
    good(capsys, "a.png", *RANDOM, "--stage", stage, "--out", "o")
    assert asked[0][3] == stage


@pytest.mark.parametrize("size, stage", [(8, 1), (31, 1), (32, 2), (63, 2), (64, 3), (127, 3), (128, 4), (384, 4)])
def test_the_last_stage_with_four_by_four_tokens(size, stage):
    assert good_stage((size, size)) == good_stage((size, 500)) == good_stage((500, size)) == stage


@pytest.mark.parametrize("size", [32, 64, 100])
def test_size_is_obeyed_and_sets_the_stage(capsys, monkeypatch, size):
    asked = explained(monkeypatch)
    photo("a.png")
    good(capsys, "a.png", "-m", "tiny_randformer", "--img-size", size, "--out", "o")
    assert asked[0][0].img_size == size and asked[0][3] == good_stage((size, size))


def test_without_a_size_the_models_own(capsys, monkeypatch):
    asked = explained(monkeypatch)
    photo("a.png")
    good(capsys, "a.png", "-m", "tiny_caformer", "--out", "o")
    assert asked[0][0].img_size == 64 and asked[0][2] is None and not asked[0][0].training


@pytest.mark.parametrize("target, label", [("2", 2), ("cat", 2), ("CAT", 2), ("0", 0), ("fox", 5)])
def test_target_by_number_or_name(capsys, monkeypatch, run, target, label):
    asked = explained(monkeypatch)
    photo("a.png")
    good(capsys, "a.png", "--checkpoint", run / "best.safetensors", "--target", target, "--out", "o")
    assert asked[0][2] == label


@pytest.mark.parametrize("target, words",
                         [("6", "no class '6'"), ("-1", "no class '-1'"), ("bea", "'bee'"), ("", "no class ''")])
def test_a_target_that_is_not_there(capsys, run, target, words):
    photo("a.png")
    assert words in refused(capsys, "a.png", "--checkpoint", run / "best.safetensors", f"--target={target}", "--out",
                            "o")


def test_a_target_of_classes_without_names(capsys):
    photo("a.png")
    assert "no class 10: the model has 10, counted from 0" in refused(capsys, "a.png", *RANDOM, "--target", "10")
    assert good(capsys, "a.png", *RANDOM, "--target", "9")


@pytest.mark.parametrize("text", ["ant\nbat\ncow\ndoe\nelk\nfly\n", "\nant\r\n bat \r\ncow\r\ndoe\r\n\r\nelk\r\nfly",
                                  "\ufeffant\nbat\ncow\ndoe\nelk\nfly"])
def test_names_of_classes_from_a_file(capsys, run, text):
    photo("a.png")
    open("names.txt", "w", encoding="utf-8", newline="").write(text)
    out, _ = good(capsys, "a.png", "--checkpoint", run / "best.safetensors", "--class-names", "names.txt", "--target",
                  "ant", "--out", "o")
    assert {word.rsplit(" ", 1)[0] for word in out[0].split(": ")[1].split(", ")} < {
        "ant",
        "bat",
        "cow",
        "doe",
        "elk",
        "fly",
    }


def test_names_that_do_not_fit(capsys, run):
    photo("a.png")
    open("names.txt", "w").write("a\nb\n")
    open("latin.txt", "wb").write("é\n".encode("latin1") * 6)
    args = ["a.png", "--checkpoint", run / "best.safetensors", "--out", "o", "--class-names"]
    assert "names.txt names 2 classes, and the model has 6." in refused(capsys, *args, "names.txt")
    assert "gone.txt: No such file" in refused(capsys, *args, "gone.txt")
    assert "latin.txt" in refused(capsys, *args, "latin.txt")


def test_a_dollar_in_the_name_of_a_class(capsys, run):
    photo("a.png")
    open("names.txt", "w").write("$a_$\n" * 6)
    assert good(capsys, "a.png", "--checkpoint", run / "best.safetensors", "--class-names", "names.txt", "--out", "o")


def test_the_names_of_imagenet(capsys):
    photo("a.png")
    torch.manual_seed(0)
    path = save_weights(create_model("tiny_identityformer", num_classes=1000, img_size=32), "w.safetensors")
    out, err = good(capsys, "a.png", "-m", "tiny_identityformer", "--checkpoint", path, "--img-size", "32", "--target",
                    "tabby", "--out", "o")
    assert not err and {w.rsplit(" ", 1)[0] for w in out[0].split(": ")[1].split(", ")} <= {
        n[:22] for n in imagenet_classes(1000)
    }


def test_threads_and_device_are_obeyed(capsys, monkeypatch):
    photo("a.png")
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    good(capsys, "a.png", "-m", "tiny_identityformer", "--img-size", "32", "--threads", "2", "--device", "cpu", "--out",
         "o")
    assert seen == [2]


# --- weights ---

def test_a_run_says_what_was_not_typed(capsys, run, monkeypatch):
    asked = explained(monkeypatch)
    photo("a.png")
    good(capsys, "a.png", "--checkpoint", run / "best.safetensors", "--img-size", "48")
    assert asked[0][0].img_size == 48 and asked[0][0].num_classes == 6 and asked[0][3] == 2
    expected = create_model("tiny_poolformerv2", checkpoint=run / "best.safetensors", num_classes=6).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in asked[0][0].state_dict().items())


def test_a_path_may_begin_with_the_home(capsys, run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    photo("a.png")
    out, _ = good(capsys, "a.png", "--checkpoint", "~/run/best.safetensors", "--out", "~/run/pictures")
    assert files(run / "pictures") == ["a-gradcam.png", "sheet.png"] and any(name in out[0] for name in CLASSES)


ABOUT = {
    "half": "settings: {model: tiny_pool", "a list": "[]", "words": "hello", "bytes": b"\xff\xfe\x00", "nothing": "",
    "no settings": "settings:\n",
    "model": "settings: {model: [a]}",
    "number of names": "settings: {model: tiny_poolformerv2}\nimg_size: 32\nclass_names: 6",
    "size in words": "settings: {model: tiny_poolformerv2}\nimg_size: big",
    "broken size": "settings: {model: tiny_poolformerv2}\nimg_size: 32.5",
    "negative size": "settings: {model: tiny_poolformerv2}\nimg_size: -3",
    "names": "settings: {model: tiny_poolformerv2}\nimg_size: 32\nclass_names: [1, null, 3, 4, 5, 6]",
}


@pytest.mark.parametrize("what", ABOUT)
def test_a_damaged_description_of_a_run(capsys, run, what):
    shutil.copytree(run, "copy")
    photo("a.png")
    text = ABOUT[what]
    open("copy/args.yaml", "wb").write(text if isinstance(text, bytes) else text.encode())
    status, _, err = called(capsys, "a.png", "--checkpoint", "copy/best.safetensors", "--out", "o")
    assert (status == 0 and not err) or (status == 2 and len(err) == 1 and "o" not in files()), err
    if status:
        assert "--model" in err[0] or "args.yaml" in err[0] or "size" in err[0], err
    out, err = good(capsys, "a.png", "--checkpoint", "copy/best.safetensors", "--out", "o", "-m", "tiny_poolformerv2",
                    "--img-size", "32")
    assert not err and len(out) == 2


BAD = {
    "no image": ([], "required: IMAGE"), "no model": (["a.png"], "Say which model: --model NAME"),
    "misspelt model": (["a.png", "-m", "tiny_identityfromer"], "'tiny_identityformer'"),
    "unknown method": (["a.png", *RANDOM, "--method", "grad"], "--method"),
    "stage 5": (["a.png", *RANDOM, "--stage", "5"], "--stage: 5 is not from 1 to 4"),
    "stage 0": (["a.png", *RANDOM, "--stage", "0"], "--stage"),
    "small": (["a.png", *RANDOM, "--img-size", "31"], "--img-size: 31 is not 32 or more"),
    "threads": (["a.png", *RANDOM, "--threads", "0"], "--threads"),
    "unknown flag": (["a.png", *RANDOM, "--metod", "gradcam"], "'--method'"),
    "two sets of weights": (["a.png", *RANDOM, "--pretrained", "--checkpoint", "x"], "choose one"),
    "no published weights": (["a.png", *RANDOM, "--pretrained"], "tiny_identityformer has no published weights"),
    "no weights": (["a.png", *RANDOM, "--checkpoint", "gone.pth"], "no weight file gone.pth"),
    "device": (["a.png", *RANDOM, "--device", "toaster"], "no device 'toaster'"),
    "out is a file": (["a.png", *RANDOM, "--out", "a.png"], "a.png: File exists"),
    "out is in a file": (["a.png", *RANDOM, "--out", "a.png/b"], "Not a directory"),
    "other class": (["a.png", *RANDOM, "--target", "cat"], "no class cat"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(capsys, what):
    args, words = BAD[what]
    photo("a.png")
    assert words in refused(capsys, *args)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(capsys):
    photo("a.png")
    os.mkdir("o", 0o500)
    assert "Permission denied" in refused(capsys, "a.png", *RANDOM, "--out", "o")


def test_weights_of_another_model(capsys, run):
    photo("a.png")
    assert "do not fit the model" in refused(capsys, "a.png", "-m", "tiny_convformer", "--checkpoint",
                                             run / "best.safetensors", "--out", "o")


def test_weights_without_a_classifier(capsys):
    photo("a.png")
    path = save_weights(create_model("tiny_identityformer", num_classes=0), "w.safetensors")
    assert "no last layer" in refused(capsys, "a.png", *RANDOM, "--checkpoint", path)


def test_a_full_disk_is_one_sentence(capsys):
    photo("a.png")
    os.mkdir("o")
    os.symlink("/dev/full", "o/a-gradcam.png.unfinished")
    status, _, err = called(capsys, "a.png", *RANDOM, "--out", "o")
    assert status in (1, 2) and len(err) == 2 and "No space left on device" in err[1] and files("o") == []


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "IMAGE" in text
    for flag in vars(parse(["a.png"])):
        assert flag == "images" or f"--{flag.replace('_', '-')}" in text


# --- contact sheets ---

def tiny(**kwargs):
    torch.manual_seed(0)
    return create_model("tiny_identityformer", **{"img_size": 32, **kwargs}).eval()


def parts(fig):
    "For each image: (image, map, bars)."
    axes = fig.axes[:-1]
    return [axes[i:i + 3] for i in range(0, len(axes), 3)]


@pytest.mark.parametrize("n, ncols", [(1, 2), (2, 2), (5, 2), (4, 3)])
def test_a_sheet_shows_image_map_and_five_classes(n, ncols):
    images = torch.randn(n, 3, 32, 32)
    guess = tiny()(images).topk(2).indices.tolist()
    shown = explain(tiny(), images, [pair[i % 2] for i, pair in enumerate(guess)], 1)
    names = [f"name {i}" for i in range(10)]
    fig = contact_sheet(shown, [f"file {i}.png" for i in range(n)], names, ncols=ncols, note="a note")
    assert fig.get_suptitle() == "a note" and len(parts(fig)) == ncols * -(-n // ncols)
    for i, (left, middle, right) in enumerate(parts(fig)[:n]):
        assert left.get_title() == f"file {i}.png" and np.array_equal(left.images[0].get_array(), shown.pictures[i])
        assert middle.get_title() == map_title(shown, i, names) and middle.images
        values, labels = shown.probabilities[i].topk(5)
        assert [t.get_text() for t in right.texts] == [
            f"{v:4.0%} name {label}" for v, label in zip(values.tolist(), labels.tolist())
        ]
        assert [bar.get_width() for bar in right.patches] == pytest.approx(values.tolist())
        light = [sum(bar.get_facecolor()[:3]) for bar in right.patches]
        assert [v < max(light) for v in light] == (labels == guess[i][i % 2]).tolist()
        assert right.get_ylim()[0] > right.get_ylim()[1]  # the best above
    assert not any(ax.images for group in parts(fig)[n:] for ax in group)


def test_a_sheet_of_two_classes_and_of_long_names():
    shown = explain(tiny(num_classes=2), torch.randn(1, 3, 32, 32), 0, 1)
    (left, _, right), _ = parts(contact_sheet(shown, ["x" * 60], masks=torch.ones(1, 32, 32).triu()))
    assert len(right.texts) == 2 and left.get_title() == "x" * 24 and len(right.texts[0].get_text()) < 20
    assert contact_sheet(shown).axes


def test_masks_are_outlined():
    shown = explain(tiny(), torch.randn(2, 3, 32, 32), 0, 1)
    lines = lambda fig: [len(p[1].collections) for p in parts(fig)]
    plain = lines(contact_sheet(shown))
    assert lines(contact_sheet(shown, masks=torch.ones(2, 32, 32).triu())) == [n + 1 for n in plain]


@pytest.mark.parametrize("data", ["digits", "shapes-shape", "shapes-near"])
def test_the_sheet_of_a_run(data, monkeypatch):
    if data == "shapes-near":
        data = sorted(name for name in SOURCES if name.startswith("shapes-"))[-1]
    _, val, info = load_data(data, 32, augment=False)
    few = Subset(val, range(100, 130))
    model = tiny(num_classes=len(info.class_names)).train()
    said = predict(model, DataLoader(few, 8))
    fig = sheet_of_run(model, said, few, info, n=5)
    chosen = mistakes_first(said)[:5]
    shown = explain(model, torch.stack([few[i][0] for i in chosen]), stage=2)
    assert info.name in fig.get_suptitle() and model.training and len(parts(fig)) == 6
    for i, (left, middle, _) in zip(chosen, parts(fig)):
        k = chosen.index(i)
        assert left.get_title() == f"is {info.class_names[few[i][1]]}" and np.allclose(
            left.images[0].get_array(), info.picture(few[i][0]).permute(1, 2, 0), atol=1e-6
        )
        assert middle.get_title() == map_title(shown, k, info.class_names)
        outlines = [c for c in middle.collections if to_hex(c.get_edgecolor()) == "#ffffff"]
        assert len(outlines) == (data != "digits")
        if outlines:
            mask = val.images.mask(100 + i)
            ys, xs = np.nonzero(np.asarray(mask))
            box = outlines[0].get_paths()[0].get_extents()
            assert abs(box.x0 - xs.min()) < 1.5 and abs(box.y0 - ys.min()) < 1.5 and abs(box.x1 - xs.max()) < 1.5
