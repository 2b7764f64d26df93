"""export: files that answer as the model does, and a sentence for what cannot be."""
import pytest
import torch
from torch import nn

from metaformer_edu.models.registry import create_model
from metaformer_edu.speed import export as module
from metaformer_edu.speed.export import ExportError, export


def model_and_images(family="caformer", batch=4):
    torch.manual_seed(0)
    model = create_model(f"tiny_{family}")
    return model, torch.randn(batch, model.in_chans, 64, 64)


@pytest.mark.parametrize("format, needs, names", [
    ("torch.export", [], ["model.file"]), ("onnx", ["onnxscript", "onnxruntime"], ["model.file"]),
    ("openvino", ["openvino"], ["model.xml", "model.bin"])])
def test_an_exported_file_answers_as_the_model(format, needs, names, tmp_path):
    for name in needs:
        pytest.importorskip(name)
    model, images = model_and_images()
    path = tmp_path / names[0]
    report = export(model.train(), format, path)
    assert {p.name for p in tmp_path.iterdir()} == set(names)
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert model.training and report["distance"] <= 1e-4 and report["megabytes"] == size / 1e6
    answers = module._FORMATS[format][1](str(path))(torch.cat([images, images])[:7])
    torch.testing.assert_close(answers, model.eval()(torch.cat([images, images])[:7]), atol=1e-4, rtol=1e-3)


def test_export_of_half_precision_and_of_one_image(tmp_path):
    model, images = model_and_images("poolformerv2", batch=1)
    assert export(model.bfloat16(), "torch.export", tmp_path / "m.pt2", images)["distance"] <= 1e-4


@pytest.mark.parametrize("arguments, sentence", [
    (dict(format="onxx"), "Did you mean 'onnx'"),
    (dict(path="/no/such/folder/m.pt2"), "There is no folder /no/such/folder"),
    (dict(format="openvino"), "m.xml and m.bin: give the path of the first"),
    (dict(model=nn.Linear(3, 3)), "Give an example"),
])
def test_bad_input_of_export(arguments, sentence, tmp_path):
    model, _ = model_and_images()
    with pytest.raises(ValueError, match=sentence):
        export(**{**dict(model=model, format="torch.export", path=tmp_path / "m.pt2"), **arguments})


def test_a_file_that_answers_something_else_is_not_written(tmp_path, monkeypatch):
    model, _ = model_and_images()
    write, _, ending = module._FORMATS["torch.export"]
    monkeypatch.setitem(module._FORMATS, "torch.export", (write, lambda path: lambda x: torch.ones(len(x), 10), ending))
    (tmp_path / "m.pt2").write_text("the old file")
    with pytest.raises(ExportError, match="nothing was written"):
        export(model, "torch.export", tmp_path / "m.pt2")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.pt2", "the old file")]


def test_a_model_that_cannot_be_exported(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="cannot express this model"):
        export(Branches(), "torch.export", tmp_path / "m.pt2", torch.randn(2, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_format_without_its_packages(format, tmp_path, monkeypatch):
    import builtins
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("onnxscript", "onnxruntime", "openvino"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExportError, match=rf"pip install 'metaformer_edu\[{format}\]'"):
        export(model_and_images()[0], format, tmp_path / "m.xml")
