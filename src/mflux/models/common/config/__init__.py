"""What a model is called, where its weights are, and how one picture is to be made."""

from typing import TYPE_CHECKING

from mflux.models.common.config.model_config import ModelConfig

if TYPE_CHECKING:
    # When it is asked for, see `import_paths`: it takes longer to load than a command may take to refuse a model.
    from mflux.models.common.config.config import Config

__all__ = ["Config", "ModelConfig"]
