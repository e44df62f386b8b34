"""SeedVR2 at full size with random weights: what tiles cost in memory and in likeness to the whole, and a 4K picture.

    python benchmarks/seedvr2.py tiles | transformer | colours

Each in a process of its own, so that the peaks are its own. Random weights draw noise, and their group norms and
attention differ more from tile to tile than a trained network's, so the differences are not those of real pictures.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mflux.backend import mx
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.seedvr2 import colour
from mflux.models.seedvr2.model.autoencoder import SeedVR2Autoencoder
from mflux.models.seedvr2.model.transformer import SeedVR2Transformer
from mflux.models.seedvr2.text import text_embeds

HEIGHT, WIDTH, TILE = 256, 448, 256


def photo(height: int, width: int) -> np.ndarray:
    """(3, height, width), -1 to 1: slow waves, edges and grain."""
    y, x = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 5, width), indexing="ij")
    waves = [np.sin(3 * x + y) * 0.5 + 0.3 * np.sign(np.sin(9 * y - 2 * x)) + 0.1 * channel for channel in range(3)]
    grain = np.random.default_rng(0).normal(0, 0.05, (3, height, width))
    return np.clip(np.stack(waves) + grain, -1, 1).astype(np.float32)


def measured(what: str, run) -> mx.array:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, started = mx.get_active_memory(), time.perf_counter()
    result = run()
    mx.eval(result)
    peak = (mx.get_peak_memory() - before) / 1e9
    print(f"{what}: {time.perf_counter() - started:.1f} s, {peak:.2f} GB above the weights", flush=True)
    return result


def compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    relative = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"{what}: relative difference {relative:.3f}, mean {np.abs(ours - theirs).mean():.4f}", flush=True)


def jump(picture: np.ndarray, columns: list[int]) -> float:
    """The step between neighbouring columns where tiles begin and end, by what it is elsewhere."""
    steps = np.abs(np.diff(picture, axis=-1)).mean(axis=(0, 1))
    return float(np.mean([steps[column - 1 : column + 1].max() for column in columns]) / np.median(steps))


def tiles() -> None:
    mx.random.seed(1)
    vae = SeedVR2Autoencoder(SeedVR2Autoencoder.config_class())
    mx.eval(vae.parameters())
    source = photo(HEIGHT, WIDTH)
    config = tiling.TilingConfig(vae_decode_tile_size=TILE, vae_encode_tile_size=TILE)
    pictures = {}
    pixels = mx.array(source)[None]
    whole = measured(f"encode {WIDTH}x{HEIGHT} whole", lambda: tiling.encode(vae, pixels, None))
    tiled = measured("the same in tiles", lambda: tiling.encode(vae, pixels, config))
    compare("latents", np.array(tiled), np.array(whole))
    for name, settings in {"whole": None, "in tiles": config}.items():
        pictures[name] = np.array(measured(f"decode {name}", lambda: tiling.decode(vae, whole, settings)))[0]  # noqa: B023
    compare("decoded", pictures["in tiles"], pictures["whole"])
    corrected = {name: colour.correct(picture, source) for name, picture in pictures.items()}
    compare("in the source's colours", corrected["in tiles"], corrected["whole"])
    side = TILE // 8
    starts = tiling._starts(WIDTH // 8, side, config.vae_decode_overlap)
    columns = sorted({8 * edge for start in starts for edge in (start, start + side) if 0 < edge < WIDTH // 8})
    for name in corrected:
        print(f"step at the tiles' borders by the median one, {name}: {jump(corrected[name], columns):.2f}")


def transformer() -> None:
    """Two of 32 blocks at 3840x2160: what passes between blocks is as large for all."""
    model = SeedVR2Transformer(SeedVR2Transformer.config_class(num_layers=2, mm_layers=1))
    mx.eval(model.parameters())
    latents = mx.random.normal((1, 270, 480, 33))
    measured("two blocks at 3840x2160", lambda: model(latents, text_embeds(), 1000.0))


def colours() -> None:
    started = time.perf_counter()
    colour.correct(photo(2160, 3840)[::-1].copy(), photo(2160, 3840))
    print(f"colours of 3840x2160: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    parts = {"tiles": tiles, "transformer": transformer, "colours": colours}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=sorted(parts))
    parts[parser.parse_args().part]()
