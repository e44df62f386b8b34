"""The Union ControlNets of Z-Image-Turbo (Alibaba PAI 2025): hints from a control picture to the transformer's layers.

Reference class: diffusers' `ZImageControlNetModel`. Its blocks are the transformer's own with a projection before the
first and one after each, whose result is the hint. Embedders, refiners and filling tokens are the transformer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.models.common.networks.layers import Linear, Rotary
from mflux.models.common.networks.modulation import Condition, Known
from mflux.models.common.networks.once import Once, kept
from mflux.models.z_image.model.transformer import (
    BlockConfig,
    TransformerBlock,
    ZImageTransformer,
    fill_up,
    joined_rotary,
    patchify,
)

# Which blocks see the picture's tokens alone, beside the transformer's refiner: those of 2.1, those of 2.0, or (1.0)
# plain ones that give no hints.
_REFINERS = ("control_noise_refiner", "control_layers", None)


@dataclass(frozen=True)
class ZImageControlNetConfig(BlockConfig):
    """Values of a ControlNet; defaults are those of Z-Image-Turbo-Fun-Controlnet-Union-2.1."""

    control_layers_places: tuple[int, ...] = tuple(range(0, 30, 2))
    control_refiner_layers_places: tuple[int, ...] | None = (0, 1)
    control_in_dim: int = 33
    add_control_noise_refiner: str | None = "control_noise_refiner"

    def check(self) -> str | None:
        if problem := super().check():
            return problem
        places = self.control_layers_places
        if not places or places[0] != 0 or sorted(set(places)) != list(places):
            return f"control_layers_places {list(places)} does not count upwards from 0"
        if self.add_control_noise_refiner not in _REFINERS:
            return f"add_control_noise_refiner {self.add_control_noise_refiner!r} is not known"
        available = {"control_noise_refiner": self.n_refiner_layers, "control_layers": len(places)}
        if self.add_control_noise_refiner is not None:
            hinted = self.control_refiner_layers_places or ()
            if not 0 < len(hinted) <= available[self.add_control_noise_refiner]:
                return f"control_refiner_layers_places {list(hinted)} does not fit its blocks"
        return None


class ControlBlock(TransformerBlock):
    """A block whose result, projected, is a hint; the first takes in the picture that is being made."""

    def __init__(self, config: BlockConfig, *, first: bool):
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)

    def hint(self, control: mx.array, x: mx.array, rotary: Rotary, condition: Condition) -> tuple[mx.array, mx.array]:
        """The control tokens for the next block, and the hint."""
        if "before_proj" in self:
            control = self.before_proj(control) + x
        control = self(control, rotary, condition)
        return control, self.after_proj(control)


class ZImageControlNet(nn.Module):
    config_class = ZImageControlNetConfig

    def __init__(self, config: ZImageControlNetConfig):
        super().__init__()
        self.config = config
        self.control_layers = [ControlBlock(config, first=place == 0) for place in config.control_layers_places]
        self.control_all_x_embedder = {config.patch_name: Linear(config.patch**2 * config.control_in_dim, config.dim)}
        self.control_noise_refiner: list[TransformerBlock]
        if config.add_control_noise_refiner == "control_noise_refiner":
            self.control_noise_refiner = [
                ControlBlock(config, first=number == 0) for number in range(config.n_refiner_layers)
            ]
        elif config.add_control_noise_refiner is None:
            self.control_noise_refiner = [TransformerBlock(config) for _ in range(config.n_refiner_layers)]
        else:
            # Files of 2.0 hold a refiner as well, which was never trained and which nothing goes through.
            self.differences = FileDifferences(ignored=(r"^control_noise_refiner\.",))

    def __call__(
        self,
        base: ZImageTransformer,
        latents: mx.array,
        *,
        control: mx.array,
        timestep: mx.array,
        prompt_embeds: mx.array,
        strength: float = 1.0,
        known: Known | None = None,
        once: Once | None = None,
    ) -> dict[int, mx.array]:
        """The hints for one evaluation of the transformer.

        Args:
            base: the transformer, whose embedders and refiners are used.
            latents, timestep, prompt_embeds: what it is given.
            control: the control picture's latents (B, 16, H, W), scaled as the autoencoder's are. Where the ControlNet
                takes more channels (a mask and a picture to fill in), these are zeros.
            strength: of the hints, also of those that its own copy of the refiner gets.
            known, once: as the transformer is given them.

        Returns:
            What to add after each layer, by its number: (B, L, dim).
        """
        config, dtype = self.config, latents.dtype
        condition: Condition = known or base.embed_time(timestep, dtype)
        refined = kept(once, "caption", prompt_embeds, lambda: base.embed_caption(prompt_embeds.astype(dtype)))
        caption, caption_rotary = refined
        picture = base.embed_picture(latents)
        where = latents.shape[2:], picture.shape[1], caption.shape[1]
        rotary = kept(once, "picture", prompt_embeds, lambda: base.picture_rotary(*where))
        batch, channels, height, width = control.shape
        rest = mx.zeros((batch, config.control_in_dim - channels, height, width), dtype=dtype)
        control = mx.concatenate([control.astype(dtype), rest], axis=1)
        control = self.control_all_x_embedder[config.patch_name](patchify(control, config.patch))
        control = fill_up(control, base.x_pad_token)

        hints: Mapping[int, mx.array] = {}
        if config.add_control_noise_refiner is None:
            for layer in self.control_noise_refiner:
                control = layer(control, rotary, condition)
        else:
            control, found = run(getattr(self, config.add_control_noise_refiner), control, picture, rotary, condition)
            hints = dict(zip(config.control_refiner_layers_places or (), found, strict=False))
        for number, layer in enumerate(base.noise_refiner):
            picture = layer(picture, rotary, condition)
            if number in hints:
                picture = picture + strength * hints[number]

        x = mx.concatenate([picture, caption], axis=1)
        both = kept(once, "rotary", prompt_embeds, lambda: joined_rotary(rotary, caption_rotary))
        control = mx.concatenate([control, caption], axis=1)
        _, found = run(self.control_layers, control, x, both, condition)
        return {place: strength * hint for place, hint in zip(config.control_layers_places, found, strict=True)}


def run(
    layers: list[ControlBlock], control: mx.array, x: mx.array, rotary: Rotary, condition: Condition
) -> tuple[mx.array, list[mx.array]]:
    """All blocks one after the other: the control tokens at the end, and the hints."""
    hints = []
    for layer in layers:
        control, hint = layer.hint(control, x, rotary, condition)
        hints.append(hint)
    return control, hints
