"""MetaFormer in notebooks: the package that `nbs/` exports. Its front door, each name loaded when first used:

- `create_model(name)`: a published model or one of the small ones; `list_models()`: their names
- `MetaFormer(…)`: the architecture itself; `MIXERS`: the five token mixers by name
- `load_data(name)`: training and held-out images, of a named data set or a folder
- `Trainer(…)`: the training loop; `fit(model, loaders, optimizer)`: train in one call
- `evaluate(model, loader)`: loss and accuracy; `predict(model, loader)`: the answer for every image
- `explain(model, images)`: where a model looks; `influence(module, x)`: which token changes which
- `fast(model, example)`: the same answers sooner, measured on this machine
- `explore_activation()`, `explore_model()`, `explore_mixing()`, `explore_cam()`, `explore_training()`: widgets
- `explore_page(runs)`: models that answer, explain themselves and learn in the browser, in a cell of a notebook

Where timm is already imported, its `create_model` knows our models as `edu_<name>`; else say
`import metaformer_edu.models.registry`.
"""
import importlib
import sys

__version__ = "0.2.0"

_HOME = {
    "create_model": "models.registry",
    "list_models": "models.registry",
    "MetaFormer": "models.metaformer",
    "MIXERS": "models.mixers",
    "load_data": "data.datasets",
    "Trainer": "training.trainer",
    "fit": "training.trainer",
    "evaluate": "training.evaluate",
    "predict": "training.evaluate",
    "explain": "interpret.cam",
    "influence": "interpret.influence",
    "fast": "speed.fast",
    "explore_activation": "widgets.activation_explorer",
    "explore_model": "widgets.model_explorer",
    "explore_mixing": "widgets.mixing_explorer",
    "explore_cam": "widgets.cam_explorer",
    "explore_training": "widgets.training_explorer",
    "explore_page": "widgets.page",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})


if "timm" in sys.modules:
    importlib.import_module(f"{__name__}.models.registry")  # which registers the models
