"""A concept's heatmap: a picture of where it is, and how that was found."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mflux.models.common.pipeline import not_finite
from mflux.utils.picture_files import save_picture

# The colours of matplotlib's plasma (Smith and van der Walt 2015, CC0) from cold to hot: 256 times red, green, blue.
_PLASMA = np.frombuffer(
    base64.b64decode(
        "DAeGEAeHEwaJFQaKGAaLGwaMHQaNHwWOIQWPIwWQJQWRJwWSKQWTKwWULQSULwSVMQSWMwSXNASYNgSYOASZOgSaOwOaPQObPwOcQAOcQgOdRAOe"
        "RQOeRwKfSQKfSgKgTAKhTgKhTwKiUQGiUgGjVAGjVgGjVwGkWQGkWgClXAClXgClXwCmYQCmYgCmZACnZQCnZwCnaACnagCnbACobQCobwCocACo"
        "cgCocwCodQCodgGoeAGoeQGoewKofAKnfgOnfwOngQSnggSnhAWmhQamhgemiAeliQiliwmkjAqkjgykjw2jkA6jkg+ikxChlRGhlhKglxOgmRSf"
        "mhWemxeenRidnhmcnxqboBubohyaox2ZpB6YpR+XpyGXqCKWqSOVqiSUrCWTrSaSrieRryiQsCqPsSuPsiyOtC2NtS6Mti+LtzCKuDKJuTOIujSH"
        "uzWGvDaFvTeEvjiDvzmCwDuBwTyAwj2Awz5/xD9+xUB9xkF8x0J7yER6yUV5ykZ4y0d3zEh2zUl1zkp1z0t00E1z0U5y0U9x0lBw01Fv1FJu1VNt"
        "1lVt11Zs11dr2Fhq2Vlp2lpo21tn3F1m3F5m3V9l3mBk32Fj32Ji4GRh4WVg4mZg42df42he5Gpd5Wtc5Wxb5m1a525a6HBZ6HFY6XJX6nNW6nRV"
        "63ZU7HdU7HhT7XlS7XtR7nxQ731P735O8IBN8IFN8YJM8oRL8oVK84ZJ84dI9IlH9IpH9YtG9Y1F9o5E9o9D9pFC95JB95NB+JVA+JY/+Jg++Zk9"
        "+Zo8+pw7+p06+p86+qA5+6I4+6M3+6Q2/KY1/Kc1/Kk0/Koz/Kwy/K0x/a8x/bAw/bIv/bMu/bUt/bYt/bgs/bkr/bsr/bwq/b4p/cAp/cEo/cMo"
        "/cQn/cYm/Mcm/Mkm/Msl/Mwl/M4l+9Ak+9Ek+9Mk+tUk+tYk+tgk+dkk+dsk+N0k+N8k9+Ak9+Il9uQl9uUl9ecm9ekm9Oom8+wm8+4m8vAm8vEm"
        "8fMm8PUl8PYj7/gh"
    ),
    np.uint8,
).reshape(256, 3)
_PATCH = 16


@dataclass
class ConceptHeatmap:
    """Where a picture shows a concept.

    Attributes:
        concept: what was looked for.
        image: as large as the picture; dark where there is little of it.
        layer_indices: which of the transformer's double blocks were looked at, from 0.
        timesteps: in which of the steps that were taken, from 0.
        height, width: in pixels.
    """

    concept: str
    image: PIL.Image.Image
    layer_indices: list[int]
    timesteps: list[int]
    height: int
    width: int

    @classmethod
    def of(
        cls, heat: np.ndarray, concept: str, layers: list[int], timesteps: list[int], height: int, width: int
    ) -> ConceptHeatmap:
        """What was found, as an image; see `heat_picture`.

        Raises:
            MfluxError: it holds numbers that are not finite.
        """
        if not np.isfinite(heat).all():
            raise not_finite("the heatmap's sums")
        return cls(concept, heat_picture(heat, height, width), layers, timesteps, height, width)

    def save(
        self,
        path: str | Path,
        export_json_metadata: bool = False,
        overwrite: bool = False,
        embed_metadata: bool = True,
    ) -> Path:
        """Write it with how it was made; see `ImageUtil.save_image`.

        Returns:
            Where it went.
        """
        return save_picture(
            self.image,
            path,
            self.get_metadata(),
            export_json_metadata=export_json_metadata,
            overwrite=overwrite,
            embed_metadata=embed_metadata,
        )

    def get_metadata(self) -> dict[str, Any]:
        return {
            "concept_prompt": self.concept,
            "layer_indices": self.layer_indices,
            "timesteps": self.timesteps,
            "height": self.height,
            "width": self.width,
        }


def heat_picture(heat: np.ndarray, height: int, width: int) -> PIL.Image.Image:
    """The heat of a concept's first token as colours, each token of the picture 16 x 16 pixels.

    Args:
        heat: (concept's tokens, picture's tokens); the least and the most of all of it are the coldest and the hottest
            colour.
        height, width: of the picture in pixels.
    """
    least, most = heat.min(), heat.max()
    shares = (heat[0] - least) / (most - least + 1e-8)
    colours = _PLASMA[np.minimum((shares * 256).astype(int), 255)].reshape(height // _PATCH, width // _PATCH, 3)
    return PIL.Image.fromarray(colours.repeat(_PATCH, axis=0).repeat(_PATCH, axis=1))
