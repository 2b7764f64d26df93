"""predict and evaluate on a model whose answers are known; metaformer-validate alone and in several processes."""
import csv
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metaformer_edu import validate
from metaformer_edu.core.errors import WeightsError
from metaformer_edu.core.cli import Parser, cli_errors, error_sentence, number
from metaformer_edu.data.datasets import load_digits
from metaformer_edu.data.loaders import make_loaders
from metaformer_edu.models import registry
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.training.processes import launch
from metaformer_edu.training.evaluate import by_class, evaluate, metrics, predict, wilson
from metaformer_edu.training.mistakes import (
    MirrorAverage, calibration_error, confusion_matrix, fit_temperature, most_confused, show_mistakes)
from metaformer_edu.validate import main, parse

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "tiny_poolformerv2", "--img-size", "32", "--threads", "1", "-b", "23"]
pytestmark = pytest.mark.usefixtures("one_thread", "no_bar")


@pytest.fixture
def no_bar(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


class Echo(nn.Module):
    "Answers with its input; in training mode with noise."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x + (torch.randn_like(x) if self.training else 0)


def loader(logits, labels, batch_size):
    return DataLoader(TensorDataset(logits, labels), batch_size=batch_size)


@pytest.fixture
def answers():
    torch.manual_seed(0)
    return torch.randn(23, 7), torch.randint(7, (23,))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 22, 23])
def test_batches_do_not_matter(answers, batch_size):
    logits, labels = answers
    metrics = evaluate(Echo(), loader(logits, labels, batch_size))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics["top1"] == pytest.approx(100 * (ranks == 0).double().mean().item(), abs=1e-12)
    assert metrics["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item(), abs=1e-12)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_mode_is_left_as_it_was(answers, mode):
    model = Echo().train(mode)
    said = predict(model, loader(*answers, 5))
    assert model.training is mode and torch.equal(said["guess"], answers[0].argmax(1))  # no noise: evaluation mode
    assert not said["loss"].requires_grad and said["index"].tolist() == list(range(23))


def test_mode_is_left_as_it_was_after_an_error(answers):
    model = Echo().train()
    with pytest.raises(ValueError, match="batch_size"):
        predict(model, [(answers[0], answers[1][:3])])
    assert model.training


def test_top5_is_there_even_if_all_are_right_and_absent_for_few_classes():
    labels = torch.arange(6)
    assert evaluate(Echo(), loader(torch.eye(6), labels, 4))["top5"] == 100
    assert "top5" not in evaluate(Echo(), loader(torch.eye(5), labels[:5], 4))


def test_images_that_could_not_be_read_do_not_count(answers):
    logits, labels = answers
    marked = labels.clone()
    marked[[3, 11, 22]] = -1
    keep = marked >= 0
    said = predict(Echo(), loader(logits, marked, 4))
    assert said["index"].tolist() == torch.arange(23)[keep].tolist() and len(said["loss"]) == 20
    assert metrics(said) == pytest.approx(evaluate(Echo(), loader(logits[keep], labels[keep], 4)))


def test_amp_computes_in_low_precision_and_answers_in_full():
    torch.manual_seed(0)
    model, x, y = nn.Linear(64, 10), torch.randn(8, 64), torch.arange(8)
    kinds = []
    model.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    said = predict(model, [(x, y)], torch.bfloat16)
    assert kinds == [torch.bfloat16] and said["loss"].dtype == torch.float32
    torch.testing.assert_close(said["loss"], predict(model, [(x, y)])["loss"], atol=0.05, rtol=0.05)


def test_by_class_counts_each_class(answers):
    said = predict(Echo(), loader(*answers, 5))
    rows = by_class(said, "abcdefg")
    assert sum(r["images"] for r in rows) == 23 and [r["top1"] for r in rows] == sorted(r["top1"] for r in rows)
    for row in rows:
        mine = answers[1] == "abcdefg".index(row["class"])
        right = int((answers[0][mine].argmax(1) == answers[1][mine]).sum())
        assert (row["images"], row["right"]) == (int(mine.sum()), right)
        assert row["top1"] == round(100 * right / int(mine.sum()), 3)


# --- what goes wrong, in words ---

@pytest.mark.parametrize("error, words", [
    (FileNotFoundError(2, "No such file or directory", "a/b"), "Cannot use a/b: No such file or directory."),
    (RuntimeError("CUDA out of memory. Tried 2 GiB\nand more"), "CUDA out of memory. Tried 2 GiB. Try a smaller"),
    (torch.OutOfMemoryError("no room"), "no room. Try a smaller --batch-size"),
    (MemoryError(), "MemoryError. Try a smaller"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
     "Try a smaller --batch-size"),
    (ValueError("It is so.\nAnd more"), "It is so."), (RuntimeError(), "RuntimeError.")])
def test_an_error_is_one_sentence(error, words):
    assert words in error_sentence(error) and "\n" not in error_sentence(error) and ".." not in error_sentence(error)


@pytest.mark.parametrize("error, status", [(ValueError("bad"), 2), (OSError("bad"), 2), (RuntimeError("bad"), 1),
                                           (MemoryError("bad"), 1), (KeyboardInterrupt(), 130)])
def test_the_status_says_whose_fault_it_is(error, status, capsys):
    with pytest.raises(SystemExit) as caught, cli_errors("me", left=lambda: "All is kept."):
        raise error
    text = capsys.readouterr().err
    assert caught.value.code == status and text.count("\n") == 1
    assert text.startswith("me: ") and text.endswith("All is kept.\n")


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for once in (True, False):
        with pytest.raises(SystemExit), cli_errors("me", once=once):
            raise ValueError("bad")
        assert bool(capsys.readouterr().err) is not once
    with pytest.raises(SystemExit):
        Parser("me").parse_args(["--what"])
    assert capsys.readouterr().err == ""


def test_numbers_have_limits():
    assert number(int, 2)("2") == 2 and number(float, 0, 1)("1") == 1.0
    bad = (number(int, 2), "1"), (number(float, 0, 1), "1.1"), (number(float, 0), "nan"), (number(int, 0), "1.5")
    for convert, text in bad:
        with pytest.raises((ValueError, validate.argparse.ArgumentTypeError)):
            convert(text)


# --- the command ---

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Weights for ten classes that know a little of digits: the last layer is fitted to the features."
    torch.manual_seed(0)
    model = create_model("tiny_poolformerv2", num_classes=10, img_size=32).eval()
    images, labels = next(iter(DataLoader(load_digits(32, augment=False)[0], 600)))
    with torch.no_grad():
        x = model.forward_head(model.forward_features(images), pre_logits=True)
        x1 = torch.cat([x, torch.ones(len(x), 1)], 1)
        wanted = 10.0 * nn.functional.one_hot(labels, 10)
        fit = torch.linalg.solve(x1.T @ x1 + 1e-3 * torch.eye(x1.shape[1]), x1.T @ wanted)
        last = model.head.fc2 if hasattr(model.head, "fc2") else model.head
        last.weight.copy_(fit[:-1].T)
        last.bias.copy_(fit[-1])
    return str(save_weights(model, tmp_path_factory.mktemp("weights") / "ten.safetensors"))


def measured(*args):
    "Run the command here; the row of its results file."
    path = Path(args[-1])
    main([*map(str, args[:-1]), "--results-file", str(path)])
    if path.suffix == ".json":
        row, = json.loads(path.read_text())
        return row
    with open(path, newline="") as file:
        row, = csv.DictReader(file)
    return row


def refused(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, args)))
    text = capsys.readouterr().err
    assert caught.value.code == 2, text
    assert text.startswith("metaformer-validate: ") and text.count("\n") == 1 and "Traceback" not in text, text
    return text


def test_it_prints_and_writes_what_it_found(weights, tmp_path, capsys):
    args = ["digits", *TINY, "--checkpoint", weights, "-b", "64"]
    as_json, as_csv = (measured(*args, tmp_path / f"result.{kind}") for kind in ("json", "csv"))
    assert {k: str(v) for k, v in as_json.items()} == as_csv
    model = create_model("tiny_poolformerv2", checkpoint=weights, num_classes=10, img_size=32)
    expected = evaluate(model, make_loaders(*load_digits(32)[:2], 64)[1])
    assert {k: as_json[k] for k in expected} == expected and 30 < expected["top1"] < 100
    assert (as_json["images"], as_json["skipped"], as_json["img_size"], as_json["checkpoint"]) == (450, 0, 32, weights)
    assert as_json["param_count"] == sum(p.numel() for p in model.parameters())
    line = capsys.readouterr().out.splitlines()[-1]
    low, high = (100 * bound for bound in wilson(expected["top1"] / 100, 450))
    assert low < expected["top1"] < high and high - low < 10
    assert line == (
        f"tiny_poolformerv2 on digits: top-1 {expected['top1']:.3f} % ({low:.1f} to {high:.1f}), top-5 "
        f"{expected['top5']:.3f} %, "
        f"loss {expected['loss']:.4f} of 450 images"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.csv", "result.json"]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_results_of_each_class(kind, weights, tmp_path):
    path = tmp_path / f"classes.{kind}"
    row = measured("digits", *TINY, "--checkpoint", weights, "--class-results", path, tmp_path / "r.json")
    rows = json.loads(path.read_text()) if kind == "json" else list(csv.DictReader(path.read_text().splitlines()))
    assert {r["class"] for r in rows} == set("0123456789") and sum(int(r["images"]) for r in rows) == 450
    assert sum(int(r["right"]) for r in rows) / 4.5 == pytest.approx(row["top1"])


def test_the_training_part_can_be_measured_too(weights, tmp_path):
    row = measured("digits", *TINY, "--checkpoint", weights, "--split", "train", tmp_path / "r.json")
    assert row["images"] == 1347


@pytest.mark.parametrize("flags", [["--amp"], ["--channels-last"], ["-j", "1"], ["-m", "tiny_poolformerv2"],
                                   ["--num-classes", "10"], ["--amp", "--amp-dtype", "bfloat16", "--device", "cpu"]])
def test_published_flags(flags, weights, tmp_path):
    args = ["digits", *TINY, "--checkpoint", weights]
    plain, other = measured(*args, tmp_path / "a.json"), measured(*args, *flags, tmp_path / "b.json")
    assert other["top1"] == pytest.approx(plain["top1"], abs=2) and other["loss"] == pytest.approx(
        plain["loss"], rel=0.02
    )
    assert (other["loss"] != plain["loss"]) is ("--amp" in flags) or "--channels-last" in flags


def test_weights_in_the_formats_of_the_published_script(weights, tmp_path):
    "A training checkpoint with an average, whose average is what is measured."
    state = load_file(weights)
    spoilt = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save(dict(state_dict=spoilt, state_dict_ema=state, epoch=3), tmp_path / "checkpoint.pth.tar")
    args = ["digits", *TINY, "--checkpoint"]
    assert measured(*args, tmp_path / "checkpoint.pth.tar", tmp_path / "a.json")["loss"] == \
        measured(*args, weights, tmp_path / "b.json")["loss"]


def test_a_batch_may_be_larger_than_the_data(colours, tmp_path):
    path = head_of(tmp_path / "four.safetensors", 4)
    assert measured(colours, *TINY, "--checkpoint", path, "-b", "24", tmp_path / "r.json")["images"] == 23


# --- folders ---

WORDNET = ["n02123045", "n01440764", "n03063599", "n07873807"]  # some of the 1,000


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    "Twenty-three images of four classes whose names are WordNet ids, in val/, and 24 in test/."
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "colours"
    for part, n in (("val", 23), ("test", 24)):
        for i in range(n):
            path = root / part / WORDNET[i % 4] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return root


def head_of(path, classes, right=()):
    "Weights of tiny_poolformerv2 whose answer is always right[0], then right[1], …"
    torch.manual_seed(1)
    model = create_model("tiny_poolformerv2", num_classes=classes, img_size=32)
    state = model.state_dict()
    last = next(k for k in ("head.fc2.bias", "head.bias") if k in state)
    state[last].zero_()
    state[last.replace("bias", "weight")].zero_()
    for n, label in enumerate(right):
        state[last][label] = 20 - n
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def test_labels_of_some_of_imagenets_classes(colours, tmp_path, capsys):
    labels = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    path = head_of(tmp_path / "k.safetensors", 1000, [labels["n03063599"]])
    args = [colours, *TINY, "--checkpoint", path, "-b", "5", "--class-results", tmp_path / "c.csv"]
    row = measured(*args, tmp_path / "r.json")
    mine = len(list((colours / "val" / "n03063599").iterdir()))
    assert row["images"] == 23 and row["top1"] == pytest.approx(100 * mine / 23)
    found = {r["class"]: float(r["top1"]) for r in csv.DictReader((tmp_path / "c.csv").read_text().splitlines())}
    assert found == {name: 100.0 * (name == "n03063599") for name in WORDNET}


@pytest.mark.filterwarnings("ignore:The weights know 21841")
def test_weights_of_imagenet_21k(colours, tmp_path):
    labels = {name: i for i, name in enumerate(ImageNetInfo("imagenet-22k").label_names())}
    path = head_of(tmp_path / "k21.safetensors", 21841, [labels["n07873807"]])
    row = measured(colours, *TINY, "--checkpoint", path, tmp_path / "r.json")
    mine = len(list((colours / "val" / "n07873807").iterdir()))
    assert row["top1"] == pytest.approx(100 * mine / 23)


def test_classes_in_the_order_of_their_folders(colours, tmp_path):
    path = head_of(tmp_path / "four.safetensors", 4, [sorted(WORDNET).index("n02123045")])
    row = measured(colours, *TINY, "--checkpoint", path, tmp_path / "r.json")
    mine = len(list((colours / "val" / "n02123045").iterdir()))
    assert row["top1"] == pytest.approx(100 * mine / 23) and "top5" not in row


def test_split_and_crop(colours, tmp_path):
    torch.manual_seed(0)
    model = create_model("tiny_poolformerv2", num_classes=4, img_size=32)
    path = save_weights(model, tmp_path / "w.safetensors")
    args = [colours, *TINY, "--checkpoint", path]
    plain, test, crop, same = (measured(*args, *more, tmp_path / "r.json") for more in
                               ([], ["--split", "test"], ["--crop-pct", "0.6"], ["--split", "val", "--crop-pct", "1"]))
    assert (plain["images"], test["images"], crop["images"]) == (23, 24, 23)
    assert len({plain["loss"], test["loss"], crop["loss"]}) == 3 and same["loss"] == plain["loss"]


def test_the_number_of_classes_must_fit(weights, colours, capsys, tmp_path):
    four = head_of(tmp_path / "four.safetensors", 4)
    assert "weights know 4 classes and the data have 10" in refused(capsys, "digits", *TINY, "--checkpoint", four)
    text = refused(capsys, colours, *TINY, "--checkpoint", weights)
    assert "weights know 10 classes and the data have 4" in text and "--num-classes 10" in text
    row = measured(colours, *TINY, "--checkpoint", weights, "--num-classes", "10", tmp_path / "r.json")
    assert row["images"] == 23


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_cannot_be_read(workers, colours, capfd, tmp_path):
    root, path = tmp_path / "copy", head_of(tmp_path / "four.safetensors", 4, [0])
    shutil.copytree(colours, root)
    bad = sorted((root / "val" / sorted(WORDNET)[0]).iterdir())[2]
    bad.write_text("no image")
    args = [root, *TINY, "--checkpoint", path, "-b", "4", "-j", workers]
    assert f"Cannot read the image {bad}: " in refused(capfd, *args) and not (tmp_path / "r.json").exists()
    row = measured(*args, "--skip-unreadable", tmp_path / "r.json")
    assert (row["images"], row["skipped"]) == (22, 1) and row["top1"] == pytest.approx(100 * 5 / 22)
    said = capfd.readouterr()
    assert "(1 could not be read)" in said.out and f"{bad}" in said.err


BAD = {
    "missing weights": (["--checkpoint", "gone.pth"], "no weight file gone.pth"),
    "no published weights": ([], "no published weights: pass --checkpoint PATH"),
    "misspelt model": (["-m", "tiny_poolfromerv2"], "'tiny_poolformerv2'"),
    "two sets of weights": (["--pretrained", "--checkpoint", "a"], "choose one"),
    "results in words": (["--results-file", "result.txt"], "result.txt must end in .csv or .json"),
    "classes in words": (["--class-results", "result"], "result must end in .csv or .json"),
    "batch of nothing": (["-b", "0"], "--batch-size"),
    "crop of all": (["--crop-pct", "1.5"], "--crop-pct"),
    "device that is none": (["--device", "toaster"], "no device 'toaster'"),
    "unknown split": (["--split", "holdout"], "no split 'holdout'"),
    "unknown flag": (["--batchsize", "3"], "--batch-size"),
    "half a flag": (["--batch", "3"], "unrecognized arguments: --batch 3"),
    "two data sets": (["more"], "unrecognized arguments: more"),
    "crop of digits": (["--crop-pct", "0.9"], "digits takes no option 'crop_pct'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, capsys, tmp_path, monkeypatch):
    args, words = BAD[what]
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "digits", *TINY, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", validate.GONE)
def test_a_flag_of_the_old_script_is_explained(flag, capsys):
    with pytest.raises(SystemExit):
        parse(["digits", flag])
    assert f"{flag} of the published script has no place here: {validate.GONE[flag]}." in capsys.readouterr().err


def test_weights_of_another_model(weights, capsys):
    assert "do not fit" in refused(capsys, "digits", "-m", "tiny_convformer", "--img-size", "32", "--checkpoint",
                                   weights)


def test_results_that_cannot_be_written(weights, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["digits", *TINY, "--checkpoint", weights, "--results-file", str(tmp_path / "gone" / "r.csv")])
    said = capsys.readouterr()  # before anything is measured
    assert caught.value.code == 2 and not said.out and said.err.endswith("must lie in a folder that is there.\n")


def test_a_full_disk_leaves_the_old_results(weights, tmp_path, capsys):
    (tmp_path / "r.csv").write_text("old")
    (tmp_path / "r.csv.unfinished").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as caught:
        main(["digits", *TINY, "--checkpoint", weights, "--results-file", str(tmp_path / "r.csv")])
    err = capsys.readouterr().err
    assert caught.value.code == 1 and err.count("\n") == 1 and "No space left on device" in err and "r.csv" in err, err
    assert (tmp_path / "r.csv").read_text() == "old" and not (tmp_path / "r.csv.unfinished").is_symlink()


# --- several processes ---

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["metaformer_edu.validate", "metaformer_edu.training.setup"])


def part(rank, size, port, args, errors):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TQDM_DISABLE="1", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    main(args)


def together(size, errors, *args):
    "The command in several processes; their statuses."
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun holds it, too
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        started = [FORK.Process(target=part, args=(r, size, store.port, list(map(str, args)), errors))
                   for r in range(size)]
        for process in started:
            process.start()
    for process in started:
        process.join(100)
        process.kill()
    return [p.exitcode for p in started]


@pytest.mark.parametrize("size, batch", [(2, 64), (3, 32), (4, 200)])
def test_several_processes_find_what_one_finds(size, batch, weights, tmp_path):
    args = ["digits", *TINY, "--checkpoint", weights, "-b", batch, "--class-results"]
    alone = measured(*args, tmp_path / "c1.csv", tmp_path / "one.json")
    status = together(size, tmp_path / "err", *args, tmp_path / "c2.csv", "--results-file", tmp_path / "more.json")
    assert status == [0] * size
    assert json.loads((tmp_path / "more.json").read_text()) == [alone]  # to the last bit
    assert (tmp_path / "c1.csv").read_bytes() == (tmp_path / "c2.csv").read_bytes()
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize("size, batch", [(2, 5), (3, 20)])  # 5 batches for two, 2 batches for three
def test_several_processes_and_a_folder(size, batch, colours, tmp_path):
    torch.manual_seed(0)
    path = save_weights(create_model("tiny_poolformerv2", num_classes=4, img_size=32), tmp_path / "w.safetensors")
    args = [colours, *TINY, "--checkpoint", path, "-b", batch, "-j", "0"]
    alone = measured(*args, tmp_path / "one.json")
    assert together(size, tmp_path / "err", *args, "--results-file", tmp_path / "more.json") == [0] * size
    assert json.loads((tmp_path / "more.json").read_text()) == [alone] and alone["images"] == 23


def test_several_processes_none_of_whose_images_can_be_read(colours, tmp_path):
    path = head_of(tmp_path / "four.safetensors", 4)
    for n in range(12):
        image = tmp_path / "bad" / "val" / WORDNET[n % 4] / f"{n}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text("no image")
    args = [tmp_path / "bad", *TINY, "--checkpoint", path, "-b", "3", "-j", "0", "--skip-unreadable"]
    status = together(2, tmp_path / "err", *args, "--class-results", tmp_path / "c.csv")
    err = (tmp_path / "err").read_text()
    assert status[0] == 2 and "None of the 12 images can be read" in err and "Traceback" not in err, err
    assert not (tmp_path / "c.csv").exists()


def test_several_processes_say_once_what_is_wrong(tmp_path):
    gone = ["digits", *TINY, "--checkpoint", "gone.pth"]
    for args, words in ((gone, "no weight file gone.pth"), (["digits", "--nope"], "--nope")):
        errors = tmp_path / f"{words}.err"
        status = together(2, errors, *args)
        assert status == [2, 2] and errors.read_text().count("\n") == 1 and words in errors.read_text()


# --- a pattern of models, mirrors, reassessed labels ---

@pytest.fixture
def published(tmp_path, monkeypatch):
    "Tiny models that have published weights: a folder of them."
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("tiny_identityformer", "tiny_poolformerv2"):
        torch.manual_seed(0)
        save_weights(create_model(name), folder / f"{name}.safetensors")
    url = lambda name: str(folder / f"{name}.safetensors") if name.startswith("tiny") else None
    monkeypatch.setattr(registry, "published_url", url)
    return folder


MANY = ["digits", "-m", "tiny_[ip]*", "--img-size", "32", "--threads", "1", "--device", "cpu"]


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_pattern_measures_all_that_match_and_goes_on_where_it_was(published, tmp_path, capsys, monkeypatch, ending):
    file, away = tmp_path / f"all.{ending}", tmp_path / "away"
    args = [*MANY, "--results-file", str(file)]
    (published / "tiny_poolformerv2.safetensors").rename(away)
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("metaformer-validate: tiny_poolformerv2: ") and err.count("\n") == 1
    assert "tiny_identityformer on digits: top-1 " in out and "difference" in out
    away.rename(published / "tiny_poolformerv2.safetensors")
    asked, open_all = [], validate.open_all
    monkeypatch.setattr(validate, "open_all", lambda args: asked.append(args.model) or open_all(args))
    main(args)
    rows = json.loads(file.read_text()) if ending == "json" else list(csv.DictReader(file.open()))
    assert asked == ["tiny_poolformerv2"]
    assert [r["model"] for r in rows] == ["tiny_identityformer", "tiny_poolformerv2"]
    alone, weights = tmp_path / "alone.json", published / "tiny_poolformerv2.safetensors"
    main(["digits", *TINY, "--checkpoint", str(weights), "--results-file", str(alone)])
    assert float(rows[1]["top1"]) == json.loads(alone.read_text())[0]["top1"]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "tiny_identityformer" for line in lines), lines  # not measured now


def test_a_pattern_without_a_match_and_files_of_something_else(published, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "others.csv").write_text("model,settings,top1\nx,data=shapes,1\n")
    for args, says in (([*MANY[:2], "nothing*"], "No published model matches nothing*."),
                       ([*MANY, "--results-file", str(tmp_path / "other.csv")], "than results of data=digits"),
                       ([*MANY, "--results-file", str(tmp_path / "others.csv")], "holds something else"),
                       ([*MANY, "--results-file", str(tmp_path / "no" / "r.csv")], "must lie in a folder"),
                       ([*MANY, "--checkpoint", "x.pth"], "goes with neither")):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2 and says in capsys.readouterr().err
    assert (tmp_path / "others.csv").read_text().count("\n") == 2


def test_rows_of_other_settings_are_not_taken_for_these(published, tmp_path, capsys):
    args = [*MANY, "--results-file", str(tmp_path / "all.csv")]
    main(args)
    for other in (["--tta"], ["--crop-pct", "0.9"]):
        with pytest.raises(SystemExit) as stop:
            main([*args, *other])
        assert stop.value.code == 2 and "holds something else" in capsys.readouterr().err


def fail_once(folder):
    "In a process of two: the weights of the first model cannot be had in process 1."
    from metaformer_edu.training.processes import rank
    url = lambda name: str(folder / f"{name}.safetensors") if name.startswith("tiny") else None
    registry.published_url = url
    open_all = validate.open_all

    def broken(args):
        if rank() == 1 and args.model == "tiny_identityformer":
            raise WeightsError("not here")
        return open_all(args)
    validate.open_all = broken
    main([*MANY, "-b", "64", "--results-file", str(folder / "all.json")])


def test_a_model_that_one_process_cannot_open_is_left_out_by_all(published, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom pathlib import Path\n"
                      f"from test_validate import fail_once\nfail_once(Path({str(published)!r}))\n")
    with pytest.raises(RuntimeError):
        launch(script, show=False)
    rows = json.loads((published / "all.json").read_text())
    assert [r["model"] for r in rows] == ["tiny_poolformerv2"]


@pytest.mark.parametrize("text, says", [("no JSON", "Cannot read labels from"), ("{}", "must hold a list")])
def test_a_file_of_reassessed_labels_that_is_none(published, tmp_path, capsys, text, says):
    (tmp_path / "real.json").write_text(text)
    weights = ["--checkpoint", str(published / "tiny_poolformerv2.safetensors")]
    with pytest.raises(SystemExit) as stop:
        main(["digits", *TINY, *weights, "--real-labels", str(tmp_path / "real.json")])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_published_figures_stand_beside_measured_ones():
    rows = [dict(model="caformer_s18", top1=83.25, published=83.6),
            dict(model="caformer_s18_in21k", top1=1., published="")]
    assert [r["difference"] for r in validate.published_table(rows)] == ["-0.35", ""]


def test_an_image_and_its_mirror(answers):
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(4.))

        def forward(self, x):
            return self.weight * torch.stack([part.mean((1, 2, 3)) for part in x.chunk(2, -1)], -1)
    x = torch.rand(5, 3, 4, 8)
    twice, one = MirrorAverage(Sides())(x).exp(), Sides()(x).softmax(-1)
    assert torch.allclose(twice, (one + one.flip(-1)) / 2, atol=1e-6) and not torch.allclose(twice, one)


def test_tta_changes_the_answer_and_nothing_else(published, tmp_path):
    args = ["digits", *TINY, "--checkpoint", str(published / "tiny_poolformerv2.safetensors"), "--results-file"]
    main([*args, str(tmp_path / "one.json")])
    main([*args, str(tmp_path / "two.json"), "--tta"])
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())[0] for n in ("one", "two"))
    assert one.pop("loss") != two.pop("loss") and {k: one[k] for k in ("images", "param_count")} == {
        k: two[k] for k in ("images", "param_count")}


def test_reassessed_labels(tmp_path, monkeypatch, capsys):
    ids = ImageNetInfo().label_names()[:2]
    for i, wnid in enumerate([ids[0], ids[0], ids[1], ids[1]], 1):
        (tmp_path / "val" / wnid).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(tmp_path / "val" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG")
    torch.manual_seed(0)
    save_weights(create_model("tiny_poolformerv2", num_classes=1000), tmp_path / "w.safetensors")
    weights = ["--checkpoint", str(tmp_path / "w.safetensors")]
    args = [str(tmp_path), *TINY, *weights, "--results-file", str(tmp_path / "r.json")]
    seen, report = [], validate.report
    monkeypatch.setattr(validate, "report", lambda args, said, *rest: seen.append(said) or report(args, said, *rest))
    main(args)
    guess = seen[0]["guess"].tolist()
    good = [[5, guess[0]], [], [guess[2] + 1], [guess[3]]]  # two of the three that have labels
    (tmp_path / "real.json").write_text(json.dumps(good))
    main([*args, "--real-labels", str(tmp_path / "real.json")])
    assert json.loads((tmp_path / "r.json").read_text())[0]["real_top1"] == pytest.approx(200 / 3)
    assert "66.667 % by the reassessed labels" in capsys.readouterr().out
    main([*args, "--real-labels"])  # those of timm: 50,000 images
    assert "real_top1" in json.loads((tmp_path / "r.json").read_text())[0]
    with pytest.raises(SystemExit) as stop:
        main(["digits", *TINY, *weights, "--num-classes", "1000", "--real-labels"])
    assert stop.value.code == 2 and "is for ImageNet's validation images" in capsys.readouterr().err


# --- mistakes ---

def said_of(logits, labels):
    return predict(Echo(), loader(logits, labels, 50), keep_logits=True)


def test_logits_are_kept_if_asked_for(answers):
    said = said_of(*answers)
    assert torch.equal(said["logits"], answers[0]) and "logits" not in predict(Echo(), loader(*answers, 5))


def test_a_temperature_is_found_again():
    torch.manual_seed(0)
    logits = 3 * torch.randn(20000, 5)
    labels = logits.softmax(-1).multinomial(1)[:, 0]  # the logits say the truth
    assert calibration_error(said_of(logits, labels)) < 0.02
    too_sure = said_of(2.5 * logits, labels)
    assert calibration_error(too_sure) > 0.05
    assert fit_temperature(too_sure["logits"], labels) == pytest.approx(2.5, rel=0.05)


def test_guesses_of_classes_that_the_data_do_not_have():
    logits = F.one_hot(torch.tensor([0, 1, 3, 3]), 4).float()
    said = said_of(logits, torch.tensor([0, 1, 0, 1]))
    assert [r["taken for"] for r in most_confused(said, ["a", "b"])] == ["class 3", "class 3"]
    assert confusion_matrix(said, 2).tolist() == [[1, 0], [0, 1]]
    show_mistakes(said, ["a", "b"])


def test_of_many_classes_those_with_the_most_mistakes_are_drawn():
    torch.manual_seed(0)
    labels = torch.arange(400) % 40
    guess = labels.clone()
    guess[labels == 7] = 31
    figure = show_mistakes(said_of(5 * F.one_hot(guess, 40).float(), labels), [f"name {i}" for i in range(40)], n=3)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 3 and {"name 7", "name 31"} < set(names)
    assert figure.axes[0].get_title() == "10 of 400 images are taken for something else"


def test_no_answers_and_answers_that_are_no_numbers(answers):
    said = said_of(*answers)
    for broken, says in (({key: values[:0] for key, values in said.items()}, "no answers"),
                         ({**said, "probability": said["probability"] * float("nan")}, "no number")):
        with pytest.raises(ValueError, match=says):
            calibration_error(broken)
