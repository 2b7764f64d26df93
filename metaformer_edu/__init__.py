"""MetaFormer in notebooks: the package that `nbs/` exports. Importing it also registers the models with timm as `edu_<name>`."""
__version__ = "0.1.0"

from .zoo import MODELS, create_model, list_models, load_weights, model_table, save_weights
from .model import MetaFormer
