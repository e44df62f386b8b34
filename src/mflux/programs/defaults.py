"""mflux 0.24's constants and small functions: what its options default to, its models' names, its In-Context LoRAs."""

from __future__ import annotations

import platform
import subprocess
from functools import cache

from mflux.errors import ModelConfigError, UsageError
from mflux.models.common.lora.styles import STYLE_REPOSITORY, STYLES, style_path
from mflux.models.common.registry import MODELS
from mflux.text import shown, written
from mflux.utils.paths import cache_folder
from mflux.utils.scale_factor import GRID

BATTERY_PERCENTAGE_STOP_LIMIT = 5
CONTROLNET_STRENGTH = 0.4
UNION_CONTROLNET_STRENGTH = 1.0
DEFAULT_DEV_FILL_GUIDANCE = 30
DEFAULT_DEPTH_GUIDANCE = 10
GUIDANCE_SCALE = 3.5
GUIDANCE_SCALE_KONTEXT = 2.5
DIMENSION_STEP_PIXELS = GRID
HEIGHT = WIDTH = 1024
IMAGE_STRENGTH = 0.4
QUANTIZE_CHOICES = [3, 5, 4, 6, 8]
DEFAULT_INFERENCE_STEPS = 25
MODEL_INFERENCE_STEPS = {key: model["steps"] for key, model in MODELS.items() if model.get("steps")}

MFLUX_CACHE_DIR = cache_folder()
MFLUX_LORA_CACHE_DIR = MFLUX_CACHE_DIR / "loras"


def canonical_model_choices() -> tuple[str, ...]:
    """Every model of the registry, by its key."""
    return tuple(MODELS)


def model_choices() -> tuple[str, ...]:
    """Every name that a model of the registry has."""
    return tuple(sorted({name for key, model in MODELS.items() for name in (key, *model["aliases"])}))


def model_inference_steps(
    model_name: str | None, base_model: str | None = None, fallback_model: str | None = None
) -> int:
    """How many steps a model takes where nobody says it: 25 of one whose name tells nothing."""
    from mflux.models.common.config.model_config import key_of

    for name, base in ((model_name or base_model, base_model), (fallback_model, None)):
        if name is not None:
            try:
                return MODEL_INFERENCE_STEPS.get(key_of(name, base), DEFAULT_INFERENCE_STEPS)
            except ModelConfigError:
                continue
    return DEFAULT_INFERENCE_STEPS


# ---- In-Context LoRAs

LORA_REPO_ID = STYLE_REPOSITORY
LORA_NAME_MAP = dict(STYLES)
IC_EDIT_LORA_REPO_ID = "RiverZ/normal-lora"
IC_EDIT_LORA_FILENAME = "pytorch_lora_weights.safetensors"
IC_EDIT_LORA_SCALE = 1.0


class UnknownStyleError(UsageError, ValueError):
    """No In-Context LoRA has that name."""


def get_lora_path(simple_name: str) -> str:
    """The LoRA of a style, as "repository:file".

    Raises:
        UnknownStyleError: there is none of that name.
    """
    if not isinstance(simple_name, str) or simple_name not in STYLES:
        known = ", ".join(sorted(STYLES))
        raise UnknownStyleError(f"there is no style {shown(written(simple_name))}: there are {known}")
    return style_path(simple_name)


def get_ic_edit_lora_path() -> str:
    """IC-Edit's LoRA, likewise."""
    return f"{IC_EDIT_LORA_REPO_ID}:{IC_EDIT_LORA_FILENAME}"


# ---- the machine


class AppleSiliconUtil:
    @staticmethod
    @cache
    def is_m1_or_m2() -> bool:
        """Whether this is an M1 or M2, or their Pro: mflux 0.24 did without MLX's compiler there."""
        if platform.system() != "Darwin" or platform.machine() not in ("arm64", "aarch64"):
            return False
        try:
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            chip = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.lower()
        except (OSError, subprocess.SubprocessError):
            return False
        return any(name in chip for name in ("apple m1", "apple m2")) and not ("max" in chip or "ultra" in chip)
