"""Trades speed for memory: a small cache, tiled decoding, and no component kept past its stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mflux.backend import mx
from mflux.models.common.networks.autoencoders.tiling import TilingConfig

if TYPE_CHECKING:
    import PIL.Image
    from tqdm import tqdm

    from mflux.models.common.config.config import Config
    from mflux.models.common.pipeline import Pipeline


class MemorySaver:
    """Registered with a pipeline by `--low-ram`, or by a program.

    Args:
        model: a `Pipeline`.
        keep_transformer: keep it between pictures; without, it is gone before the picture is decoded.
        cache_limit_bytes: how much freed memory MLX may keep for later, where its own limit is not lower, as on a CPU;
            None leaves that limit and no tiling.
        args: taken for compatibility with mflux 0.24, which passes the parsed command line.
        num_seeds: taken for compatibility; prompts are encoded once each whatever it is.
        keep_text_encoder: keep the text encoders past their stage.
    """

    def __init__(
        self,
        model: Pipeline,
        keep_transformer: bool = True,
        cache_limit_bytes: int | None = 1000**3,
        args: Any = None,
        num_seeds: int = 1,
        keep_text_encoder: bool = False,
    ):
        self.model = model
        self.keep_transformer = keep_transformer
        self.keep_text_encoder = keep_text_encoder
        if cache_limit_bytes is not None:
            if model.tiling_config is None:
                model.tiling_config = TilingConfig()
            own = limit_cache(cache_limit_bytes)
            if own < cache_limit_bytes:
                limit_cache(own)

    def call_before_loop(
        self,
        seed: int,
        prompt: str,
        latents: mx.array,
        config: Config,
        canny_image: PIL.Image.Image | None = None,
        depth_image: PIL.Image.Image | None = None,
        control_images: list[PIL.Image.Image] | None = None,
    ) -> None:
        if not self.keep_text_encoder:
            self.model.release_stages("encode")

    def call_in_loop(self, t: int, seed: int, prompt: str, latents: mx.array, config: Config, time_steps: tqdm) -> None:
        mx.clear_cache()

    def call_after_loop(self, seed: int, prompt: str, latents: mx.array, config: Config) -> None:
        mx.eval(latents)
        if not self.keep_transformer:
            self.model.release_stages("denoise")
        mx.clear_cache()

    def memory_stats(self) -> str:
        """The most memory that MLX has held, as a sentence."""
        return f"peak MLX memory: {mx.get_peak_memory() / 1e9:.2f} GB"


def limit_cache(limit: int) -> int:
    """Let MLX keep at most `limit` bytes of freed memory. Returns what it was until now."""
    before = mx.set_cache_limit(limit)
    mx.clear_cache()
    mx.reset_peak_memory()
    return before
