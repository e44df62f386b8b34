"""What a model is called, where its weights are, and how one picture is to be made."""

from mflux.models.common.config.model_config import ModelConfig

__all__ = ["ModelConfig"]
