"""mflux used exactly as public programs use it, each in the way that was seen in one of them (docs/programs.md)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mflux.backend import mx
from mflux.callbacks.instances.memory_saver import MemorySaver
from mflux.models.common.config import ModelConfig
from mflux.models.common.latent_creator.latent_creator import Img2Img, LatentCreator
from mflux.models.common.schedulers import SCHEDULER_REGISTRY, register_contrib
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler
from mflux.models.common.vae.tiling_config import TilingConfig
from mflux.models.common.vae.vae_util import VAEUtil
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.exceptions import StopImageGenerationException
from mflux.utils.image_util import ImageUtil

PICTURE = {"seed": 3, "prompt": "a red circle", "num_inference_steps": 3, "height": 32, "width": 48}


def load(folder: Path, **settings) -> Flux1:
    return Flux1(model_config=ModelConfig.schnell(), model_path=str(folder), **settings)


@pytest.fixture(scope="module")
def flux(tiny_schnell) -> Flux1:
    return load(tiny_schnell)


@pytest.fixture(scope="module")
def undisturbed(flux) -> np.ndarray:
    return pixels(flux.generate_image(**PICTURE))


def pixels(result) -> np.ndarray:
    return np.asarray(result.image)


# ---- the picture, and the model's settings


def test_the_picture_is_a_pil_image(flux, undisturbed, tmp_path):
    result = flux.generate_image(**PICTURE)
    assert result.image.size == (48, 32) and result.image.mode == "RGB"
    result.image.save(tmp_path / "a.png")
    assert (np.asarray(ImageUtil.load_image(tmp_path / "a.png")) == undisturbed).all()


def test_what_from_name_and_the_factories_give_is_the_caller_s():
    for make in (ModelConfig.schnell, lambda: ModelConfig.from_name("schnell")):
        mine = make()
        mine.aliases.append("mine")
        mine.transformer_overrides["depth"] = 1
        mine.max_sequence_length = 7
        other = make()
        assert "mine" not in other.aliases and not other.transformer_overrides and other.max_sequence_length == 256


# ---- a schedule of one's own


class LateStart(LinearScheduler):
    """Moves one noise level, as mfluxible does; found by the dotted path of this class."""

    made = 0

    def __init__(self, config):
        type(self).made += 1
        self.half = config.num_inference_steps // 2
        super().__init__(config)

    def _get_sigmas(self) -> mx.array:
        sigmas = super()._get_sigmas()
        return mx.concatenate([sigmas[: self.half], sigmas[self.half : self.half + 1] * 0.9, sigmas[self.half + 1 :]])


def test_a_schedule_derived_from_the_linear_one(flux, undisturbed, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_program_of_its_own", sys.modules[__name__])
    LateStart.made = 0
    seen = []

    class Watch:
        def call_before_loop(self, config, **_):
            seen.append(np.array(config.scheduler.sigmas))

    watch = Watch()
    flux.callbacks.register(watch)
    try:
        moved = pixels(flux.generate_image(**PICTURE, scheduler="a_program_of_its_own.LateStart"))
        monkeypatch.setitem(SCHEDULER_REGISTRY, "late", None)
        register_contrib(LateStart, "late")
        registered = pixels(flux.generate_image(**PICTURE, scheduler="late"))
    finally:
        flux.callbacks.before_loop.remove(watch)
    assert LateStart.made == 2
    np.testing.assert_allclose(seen[0], [1, 2 / 3 * 0.9, 1 / 3, 0], rtol=1e-6)
    assert (moved == registered).all() and (moved != undisturbed).any()


# ---- saving


def test_saving_into_a_folder_that_a_program_made(flux, undisturbed, tmp_path):
    folder = tmp_path / "cache" / "schnell"
    folder.mkdir(parents=True)
    flux.save_model(str(folder))
    for component in Flux1.components:
        assert (folder / component.folder / "model.safetensors.index.json").is_file(), component.name
    assert (pixels(load(folder).generate_image(**PICTURE)) == undisturbed).all()


# ---- callbacks


def test_a_callback_that_wants_the_clean_latents(flux):
    steps = []

    class Watch:
        def call_before_loop(self, latents, **_):
            self.latents = latents

        def call_in_loop(self, t, seed, prompt, latents, config, time_steps, denoised):
            sigmas = config.scheduler.sigmas
            # The step went along the straight line to `denoised`, so its velocity can be had back from both ends.
            velocity = (latents - self.latents) / (sigmas[t + 1] - sigmas[t])
            expected = self.latents - sigmas[t] * velocity
            steps.append((np.array(denoised), np.array(expected), np.array(latents)))
            self.latents = latents

    watch = Watch()
    flux.callbacks.register(watch)
    try:
        flux.generate_image(**PICTURE)
    finally:
        flux.callbacks.before_loop.remove(watch)
        flux.callbacks.in_loop.remove(watch)
    assert len(steps) == 3
    for denoised, expected, _ in steps:
        np.testing.assert_allclose(denoised, expected, atol=1e-4)
    denoised, _, last = steps[-1]
    np.testing.assert_allclose(denoised, last, atol=1e-5)
    assert np.abs(steps[0][0] - steps[0][2]).max() > 0.01


@pytest.mark.parametrize("error", [StopImageGenerationException("enough"), RuntimeError("the client has gone")])
def test_progress_and_cancelling_in_a_worker_thread(flux, undisturbed, error):
    progress, ended = [], []

    class Reporter:
        """Has only what it needs, and an argument list of its own."""

        def call_in_loop(self, t, seed, prompt, latents, config, time_steps) -> None:
            progress.append((t + 1, config.num_inference_steps))
            if t == 1:
                raise error

    def work() -> None:
        try:
            flux.generate_image(**PICTURE)
        except Exception as stopped:
            ended.append(stopped)

    reporter = Reporter()
    flux.callbacks.register(reporter)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        flux.callbacks.in_loop.remove(reporter)
    assert progress == [(1, 3), (2, 3)] and ended == [error]
    assert (pixels(flux.generate_image(**PICTURE)) == undisturbed).all()


def test_a_program_that_saves_memory(tiny_schnell, undisturbed):
    """rapid-mlx's way: tiles that the program chose, and a saver with every argument named."""
    flux = load(tiny_schnell)
    limit = mx.set_cache_limit(10**9)
    try:
        flux.tiling_config = TilingConfig()
        flux.callbacks.register(
            MemorySaver(model=flux, keep_transformer=False, cache_limit_bytes=0, num_seeds=1, args=None)
        )
        assert (pixels(flux.generate_image(**PICTURE)) == undisturbed).all()
        assert list(flux.loaded()) == ["vae"]
        assert (pixels(flux.generate_image(**PICTURE)) == undisturbed).all()
    finally:
        mx.set_cache_limit(limit)


# ---- what is inside


def test_a_pipeline_s_modules_and_parameters(tiny_schnell):
    flux = load(tiny_schnell)
    assert flux.parameters() == {} and [path for path, _ in flux.named_modules()] == [""]
    flux.generate_image(**PICTURE)
    modules = dict(flux.named_modules())
    assert modules["transformer"] is flux.transformer and modules["vae.decoder"] is flux.vae.decoder
    weight = flux.transformer.x_embedder.weight
    assert dict(flux.named_parameters())["transformer.x_embedder.weight"] is weight
    assert flux.parameters()["transformer"]["x_embedder"]["weight"] is weight
    assert sum(value.nbytes for _, value in flux.named_parameters()) > 0


def test_previews_and_masks_from_the_pieces(flux, tmp_path):
    """mfluxible's way: a picture through the autoencoder and back, and noise over it, without a pipeline's help."""
    path = tmp_path / "a.png"
    flux.generate_image(**PICTURE).image.save(path)
    height, width = PICTURE["height"], PICTURE["width"]
    encoded = LatentCreator.encode_image(vae=flux.vae, image_path=path, width=width, height=height, tiling_config=None)
    assert encoded.shape == (1, 16, height // 8, width // 8)
    decoded = VAEUtil.decode(vae=flux.vae, latent=encoded[:, :, None], tiling_config=None)
    assert decoded.shape == (1, 3, height, width)
    assert mx.array_equal(decoded, flux.vae.decode(encoded))
    picture = ImageUtil.to_array(ImageUtil.load_image(path))
    assert mx.array_equal(VAEUtil.encode(flux.vae, picture), encoded)

    sigmas = mx.array([1.0, 0.75, 0.5, 0.0])
    source = Img2Img(
        vae=flux.vae, latent_creator=FluxLatentCreator, sigmas=sigmas, init_time_step=1, image_path=path,
        tiling_config=None,
    )  # fmt: skip
    latents = LatentCreator.create_for_txt2img_or_img2img(5, height, width, source)
    noise = FluxLatentCreator.create_noise(5, height, width)
    clean = FluxLatentCreator.pack_latents(encoded, height, width)
    np.testing.assert_allclose(np.array(latents), np.array(0.25 * clean + 0.75 * noise), atol=1e-5)
    source.image_path = None
    assert mx.array_equal(LatentCreator.create_for_txt2img_or_img2img(5, height, width, source), noise)


# ---- packages that add to mflux


def test_other_distributions_add_to_the_package(tmp_path):
    """With and without an `__init__.py` of their own; another copy of mflux is not mixed in."""
    plain, regular, copy = (tmp_path / name for name in ("plain", "regular", "copy"))
    for root, package in ((plain, "web"), (regular, "extras"), (copy, "models")):
        (root / "mflux" / package).mkdir(parents=True)
        (root / "mflux" / package / "__init__.py").write_text("")
        (root / "mflux" / package / "server.py").write_text(f"name = {package!r}")
    (regular / "mflux" / "__init__.py").write_text(
        "from pkgutil import extend_path\n__path__ = extend_path(__path__, __name__)\n"
    )
    (copy / "mflux" / "__init__.py").write_text("")
    (copy / "mflux" / "only_in_the_copy.py").write_text("")
    code = f"""
import sys
sys.path += {[str(plain), str(regular), str(copy)]!r}
import mflux
from mflux.web import server
assert server.name == "web"
import mflux.extras.server
assert mflux.extras.server.name == "extras"
assert mflux.__version__
try:
    import mflux.only_in_the_copy
except ModuleNotFoundError:
    print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_no_module_of_ours_takes_their_names():
    import mflux

    own = Path(mflux.__file__).parent
    assert not [name for name in ("web", "extras") if list(own.glob(f"{name}*"))]
