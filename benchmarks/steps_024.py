"""mflux 0.24's side of steps.py, run by the Python that has it: builds a part, then runs it twice for each line.

A line is a number of pixels; the answer is the seconds that the second time took. Weights are random and float32, as
are ours: in bfloat16, which 0.24 would load, MLX is some forty times slower on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time

if sys.argv[2]:
    # The same BLAS as ours, before MLX is loaded.
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)

import mlx.core as mx
from mlx.utils import tree_map


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def settings(model: str, pixels: int):
    from mflux.models.common.config.config import Config
    from mflux.models.common.config.model_config import ModelConfig

    return Config(ModelConfig.from_name(model), num_inference_steps=4, height=pixels, width=pixels)


def flux(double: int, single: int):
    from mflux.models.flux.model.flux_transformer.transformer import Transformer

    from mflux.models.common.config.model_config import ModelConfig

    module = Transformer(
        ModelConfig.from_name("dev"), num_transformer_blocks=double, num_single_transformer_blocks=single
    )

    def run(pixels: int):
        tokens = (pixels // 16) ** 2
        return module(0, settings("dev", pixels), normal(1, tokens, 64), normal(1, 512, 4096), normal(1, 768))

    return module, run


def flux2(double: int, single: int):
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer

    module = Flux2Transformer(num_layers=double, num_single_layers=single)

    def run(pixels: int):
        tokens = (pixels // 16) ** 2
        places = [mx.zeros((1, count, 4), mx.int32) for count in (tokens, 512)]
        return module(normal(1, tokens, 128), normal(1, 512, 7680), mx.array(0.5), *places)

    return module, run


def z_image(blocks: int, refiners: int):
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer

    module = ZImageTransformer(n_layers=blocks, n_refiner_layers=refiners)

    def run(pixels: int):
        x = normal(16, 1, pixels // 8, pixels // 8)
        return module(x, mx.array([0.5]), mx.array([0.5, 0.0]), normal(512, 2560))

    return module, run


def qwen(blocks: int, _: int):
    from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer

    module = QwenTransformer(num_layers=blocks)

    def run(pixels: int):
        text = normal(1, 512, 3584)
        tokens = (pixels // 16) ** 2
        return module(0, settings("qwen-image", pixels), normal(1, tokens, 64), text, mx.ones((1, 512), mx.int32))

    return module, run


def fibo(double: int, single: int):
    from mflux.models.fibo.model.fibo_transformer.transformer import FiboTransformer

    module = FiboTransformer(num_layers=double, num_single_layers=single)

    def run(pixels: int):
        layers = [normal(1, 512, 2048) for _ in range(double + single)]
        tokens = (pixels // 16) ** 2
        return module(0, settings("fibo", pixels), normal(1, tokens, 48), normal(1, 512, 4096), layers)

    return module, run


def vae(module, channels: int, scale: int):
    return module, lambda pixels: module.decode(normal(1, channels, pixels // scale, pixels // scale))


def flux_vae(*_: int):
    from mflux.models.flux.model.flux_vae.vae import VAE

    return vae(VAE(), 16, 8)


def flux2_vae(*_: int):
    from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE

    return vae(Flux2VAE(), 32, 8)


def qwen_vae(*_: int):
    from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE

    return vae(QwenVAE(), 16, 8)


def fibo_vae(*_: int):
    from mflux.models.fibo.model.fibo_vae.wan_2_2_vae import Wan2_2_VAE

    return vae(Wan2_2_VAE(), 48, 16)


BUILDERS = {
    "flux": flux, "flux2": flux2, "z_image": z_image, "qwen": qwen, "fibo": fibo,
    "flux vae": flux_vae, "flux2 vae": flux2_vae, "qwen vae": qwen_vae, "fibo vae": fibo_vae,
}  # fmt: skip


def main() -> None:
    # What 0.24 prints is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        module, run = BUILDERS[sys.argv[1]](int(sys.argv[3]), int(sys.argv[4]))
        module.update(tree_map(lambda value: mx.random.normal(value.shape) * 0.02, module.parameters()))
        mx.eval(module.parameters())
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            mx.eval(run(int(line)))
            start = time.perf_counter()
            mx.eval(run(int(line)))
            print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
