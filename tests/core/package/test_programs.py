"""mflux used exactly as public programs use it, each in the way that was seen in one of them (docs/programs.md)."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from mflux.callbacks.callback_manager import CallbackManager
from mflux.callbacks.instances.canny_saver import CannyImageSaver
from mflux.callbacks.instances.depth_saver import DepthImageSaver
from mflux.cli.defaults import defaults
from mflux.models.common.weights.loading.weight_definition import ComponentDefinition
from mflux.models.common.weights.loading.weight_loader import WeightLoader
from mflux.models.flux.variants.controlnet.controlnet_util import ControlnetUtil
from mflux.models.flux.variants.in_context.utils.in_context_loras import LORA_NAME_MAP, LORA_REPO_ID, get_lora_path
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
from mflux.utils.apple_silicon import AppleSiliconUtil
from mflux.utils.prompt_util import PromptUtil

from mflux.backend import mx, tree_flatten
from mflux.callbacks.instances.memory_saver import MemorySaver
from mflux.checkpoints.loading import FolderTensors
from mflux.cli.parser.parsers import CommandLineParser
from mflux.errors import CheckpointError, NotBuiltError, UsageError
from mflux.models.common.config import Config, ModelConfig
from mflux.models.common.latent_creator.latent_creator import Img2Img, LatentCreator
from mflux.models.common.lora.styles import STYLES
from mflux.models.common.schedulers import (
    SCHEDULER_REGISTRY,
    FlowMatchEulerDiscreteScheduler,
    InvalidSchedulerType,
    SchedulerClassNotFound,
    SchedulerModuleNotFound,
    SeedVR2EulerScheduler,
    register_contrib,
    scheduler_class,
    try_import_external_scheduler,
)
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler
from mflux.models.common.vae import VAETiler
from mflux.models.common.vae.tiling_config import TilingConfig
from mflux.models.common.vae.vae_util import VAEUtil
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux2.latent_creator import Flux2LatentCreator
from mflux.models.z_image.cli import z_image_generate
from mflux.utils.box_values import BoxValueError, BoxValues
from mflux.utils.exceptions import StopImageGenerationException
from mflux.utils.image_util import ImageUtil
from mflux.utils.metadata_reader import MetadataReader

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


# ---- weights, as they are stored


def flat(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


@pytest.mark.parametrize("quantize", [None, 8])
def test_a_component_s_tensors_without_a_model(flux, tiny_schnell, tmp_path, quantize):
    """A server looks for names that old exports had before it loads; nothing is read for that."""
    root = tiny_schnell
    if quantize is not None:
        root = tmp_path / "saved"
        load(tiny_schnell, quantize=quantize).save_model(str(root))
    names = {part.name: part for part in FluxWeightDefinition.get_components()}
    assert list(names) == ["clip_encoder", "t5_encoder", "transformer", "vae"]
    assert (names["t5_encoder"].hf_subdir, names["t5_encoder"].model_attr) == ("text_encoder_2", "t5_text_encoder")
    loaded = WeightLoader.load_single_local(names["transformer"], Path(root))
    assert list(loaded.components) == ["transformer"] and loaded.transformer is loaded.components["transformer"]
    assert loaded.meta_data.quantization_level == quantize and loaded.vae is None
    stored = FolderTensors(root / "transformer")
    assert flat(loaded.transformer).keys() == set(stored)
    assert all(mx.array_equal(value, stored[name]) for name, value in flat(loaded.transformer).items())
    config = flux.transformer.config
    assert loaded.num_transformer_blocks() == config.num_layers
    assert loaded.num_single_transformer_blocks() == config.num_single_layers

    whole = WeightLoader.load(weight_definition=FluxWeightDefinition, model_path=str(root))
    assert whole.components.keys() == names.keys() and whole.meta_data.quantization_level == quantize
    assert flat(whole.vae).keys() == set(FolderTensors(root / "vae"))


def test_a_definition_of_a_program_s_own(tiny_schnell):
    class Own:
        @staticmethod
        def get_components():
            return [ComponentDefinition(name="decoder", hf_subdir="vae", precision=None)]

        @staticmethod
        def get_download_patterns():
            return ["vae/*.safetensors"]

    loaded = WeightLoader.load(Own, str(tiny_schnell))
    assert flat(loaded.decoder).keys() == set(FolderTensors(tiny_schnell / "vae"))
    renamed = ComponentDefinition(name="decoder", hf_subdir="vae", mapping_getter=list)
    with pytest.raises(UsageError, match="is defined with mapping_getter"):
        WeightLoader.load_single_local(renamed, tiny_schnell)


def test_weights_that_are_not_there(tmp_path):
    part = FluxWeightDefinition.get_components()[0]
    with pytest.raises(CheckpointError, match="holds no text_encoder"):
        WeightLoader.load_single_local(part, tmp_path)
    with pytest.raises(UsageError, match="needs model_path"):
        WeightLoader.load(FluxWeightDefinition)


@pytest.mark.parametrize(
    ("module", "name", "tokenizers"),
    [
        ("flux", "FluxWeightDefinition", {"clip": "tokenizer", "t5": "tokenizer_2"}),
        ("flux2", "Flux2KleinWeightDefinition", {"qwen3": "tokenizer"}),
        ("flux3", "Flux3KleinWeightDefinition", {"qwen3_vl": "text_encoder"}),
        ("qwen", "QwenWeightDefinition", {"qwen": "tokenizer"}),
        ("z_image", "ZImageWeightDefinition", {"z_image": "tokenizer"}),
        ("fibo", "FIBOWeightDefinition", {"fibo": "tokenizer"}),
        ("seedvr2", "SeedVR2WeightDefinition", {}),
    ],
)
def test_what_a_family_is_made_of(module, name, tokenizers):
    definition = getattr(importlib.import_module(f"mflux.models.{module}.weights.{module}_weight_definition"), name)
    names = {part.name for part in definition.get_components()}
    assert {"transformer", "vae"} <= names
    assert {one.name: one.hf_subdir for one in definition.get_tokenizers()} == tokenizers
    assert "vae/*.safetensors" in definition.get_download_patterns()


# ---- small things at their names


def test_in_context_loras():
    assert get_lora_path("storyboard") == "ali-vilab/In-Context-LoRA:film-storyboard.safetensors"
    assert {style: f"{LORA_REPO_ID}:{file}" for style, file in LORA_NAME_MAP.items()} == {
        style: get_lora_path(style) for style in STYLES
    }
    with pytest.raises(ValueError, match="there is no style 'comic': there are couple, font"):
        get_lora_path("comic")


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        (("schnell",), 4), (("klein-4b",), 4), (("black-forest-labs/FLUX.1-dev",), 25), (("a-name", "schnell"), 4),
        (("a-name", None, "z-image"), 50), (("a-name",), 25), ((None,), 25),
    ],
)  # fmt: skip
def test_steps_where_nobody_says_them(asked, steps):
    assert defaults.model_inference_steps(*asked) == steps


def test_defaults_are_those_of_the_options():
    parser = z_image_generate.build_parser()
    assert parser.get_default("image_strength") == defaults.IMAGE_STRENGTH
    assert parser.get_default("battery_percentage_stop_limit") == defaults.BATTERY_PERCENTAGE_STOP_LIMIT
    assert sorted(defaults.QUANTIZE_CHOICES) == sorted(parser._option_string_actions["--quantize"].choices)
    assert {"schnell", "flux2-klein-4b"} <= set(defaults.canonical_model_choices()) < set(defaults.model_choices())


@pytest.mark.parametrize(
    ("system", "machine", "chip", "is_old"),
    [
        ("Darwin", "arm64", "Apple M1", True), ("Darwin", "arm64", "Apple M2 Pro", True),
        ("Darwin", "arm64", "Apple M2 Max", False), ("Darwin", "arm64", "Apple M4", False),
        ("Darwin", "x86_64", "Intel", False), ("Linux", "aarch64", "Apple M1", False), ("Darwin", "arm64", None, False),
    ],
)  # fmt: skip
def test_whether_a_chip_is_an_old_one(monkeypatch, system, machine, chip, is_old):
    def sysctl(*_, **__):
        if chip is None:
            raise OSError("no sysctl")
        return subprocess.CompletedProcess([], 0, stdout=chip + "\n")

    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(subprocess, "run", sysctl)
    assert AppleSiliconUtil.is_m1_or_m2.__wrapped__() is is_old


def own_parser() -> CommandLineParser:
    """A command of a program's own, made of 0.24's groups of options."""
    parser = CommandLineParser(prog="mine", description="Generate as I like it.")
    parser.add_general_arguments()
    parser.add_model_arguments(require_model_arg=False, default_model="schnell")
    parser.add_compute_precision_arguments()
    parser.add_lora_arguments()
    parser.add_image_generator_arguments(supports_metadata_config=True)
    parser.add_image_to_image_arguments(required=False)
    parser.add_pid_decode_arguments()
    parser.add_output_arguments()
    parser.add_vae_full_precision_arguments()
    parser.add_argument("--mine", type=int, default=3)
    return parser


def test_a_command_of_a_program_s_own(flux, tiny_schnell, undisturbed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tiny_schnell), "--base-model", "schnell", "--prompt", PICTURE["prompt"], "--steps", "3"]
    monkeypatch.setattr(
        sys, "argv", ["mine", *words, "--height", "32", "--width", "48", "--seed", "3", "4", "--mine", "7"]
    )
    args = own_parser().parse_args()
    assert (args.mine, args.seed, args.steps, args.height, args.width) == (7, [3, 4], 3, 32, 48)
    assert args.model_path == args.model and args.output == "image_seed_{seed}.png" and args.lora_paths == []
    CallbackManager.register_callbacks(args=args, model=flux, latent_creator=FluxLatentCreator)
    image = flux.generate_image(
        seed=args.seed[0], prompt=PromptUtil.read_prompt(args), num_inference_steps=args.steps, height=args.height,
        width=args.width, guidance=4.0, image_path=args.image_path, image_strength=args.image_strength,
        scheduler=args.scheduler,
    )  # fmt: skip
    assert (pixels(image) == undisturbed).all()
    path = image.save(path=args.output.format(seed=3), export_json_metadata=args.metadata)
    monkeypatch.setattr(sys, "argv", ["mine", "-C", str(path), "--seed", "5"])
    again = own_parser().parse_args()
    assert (again.prompt, again.steps, again.seed, again.height) == (PICTURE["prompt"], 3, [5], 32)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "x", "--pid-decode"], "PiD decoding is not built yet"),
        (["--prompt", "x", "--seed", "1", "--auto-seeds", "2"], "--auto-seeds draws its seeds"),
        ([], "no prompt was given"),
        (["--prompt", "x", "--height", "2x"], "argument --height"),
        (["--prompt", "x", "--nothing"], "unrecognized arguments: --nothing (see mine --help)"),
    ],
)
def test_what_is_wrong_with_a_program_s_own_command_ends_it(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["mine", *words])
    with pytest.raises(SystemExit) as ended:
        own_parser().parse_args()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and told in error and error.count("\n") == 1


def test_groups_of_options_that_one_command_alone_has():
    parser = own_parser()
    assert not hasattr(parser, "add_fill_arguments") and not hasattr(parser, "something_else")
    with pytest.raises(NotBuiltError, match="CommandLineParser has no add_fill_arguments in this version: begin with"):
        parser.add_fill_arguments()


def test_images_for_a_controlnet(flux, tmp_path):
    image = PIL.Image.new("RGB", (60, 40), "white")
    image.paste("black", (20, 10, 40, 30))
    image.save(tmp_path / "a.png")
    edges = ControlnetUtil._preprocess_canny(ControlnetUtil._scale_image(32, 48, image))
    assert edges.size == (48, 32) and edges.mode == "RGB" and set(np.unique(np.asarray(edges))) == {0, 255}
    for is_canny in (False, True):
        latents, shown = ControlnetUtil.encode_image(flux.vae, 32, 48, tmp_path / "a.png", is_canny)
        assert latents.shape == (1, 6, 64) and shown.size == (48, 32)


def test_tiles_of_a_program_s_own_autoencoder():
    """One that sees each latent alone, so that tiles must not show at all."""
    image = mx.random.normal((1, 3, 96, 160), key=mx.random.key(0))
    sizes = []

    def encode(part):
        sizes.append(part.shape[2:])
        return part.reshape(1, 3, 1, part.shape[3] // 8, 8, part.shape[4] // 8, 8).mean(axis=(4, 6))

    def decode(part):
        sizes.append(part.shape[2:])
        return mx.repeat(mx.repeat(part, 8, axis=3), 8, axis=4)

    tiles = {"tile_size": (64, 64), "tile_overlap": (16, 16)}
    latents = VAETiler.encode_image_tiled(image=image, encode_fn=encode, latent_channels=3, **tiles)
    assert latents.shape == (1, 3, 1, 12, 20) and set(sizes) == {(1, 64, 64)}
    np.testing.assert_allclose(latents, encode(image[:, :, None]), atol=1e-5)
    sizes.clear()
    decoded = VAETiler.decode_image_tiled(latent=latents, decode_fn=decode, **tiles)
    assert decoded.shape == image.shape and set(sizes) == {(1, 8, 8)}
    np.testing.assert_allclose(decoded, decode(latents)[:, :, 0], atol=1e-5)


def test_flux2_s_latents_step_by_step():
    latents = mx.arange(2 * 32 * 4 * 6).reshape(2, 32, 4, 6)
    squares = Flux2LatentCreator.patchify_latents(latents)
    assert squares.shape == (2, 128, 2, 3)
    assert squares[0, :4, 0, 0].tolist() == [latents[0, 0, y, x].item() for y in (0, 1) for x in (0, 1)]
    assert mx.array_equal(squares, Flux2LatentCreator.patchify_latents(latents[:, :, None]))
    packed = Flux2LatentCreator.pack_latents(squares)
    unpacked = Flux2LatentCreator.unpack_latents(packed, height=32, width=48, vae_scale_factor=8)
    assert mx.array_equal(unpacked, squares) and mx.array_equal(
        Flux2LatentCreator.unpack_latents(squares, 32, 48), squares
    )
    noise, ids, rows, columns = Flux2LatentCreator.prepare_packed_latents(seed=3, height=32, width=48, batch_size=1)
    assert (rows, columns) == (2, 3) and mx.array_equal(noise, Flux2LatentCreator.create_noise(3, 32, 48))
    assert ids.tolist() == [[[0, y, x, 0] for y in range(2) for x in range(3)]]
    assert Flux2LatentCreator.prepare_grid_ids(squares, t_coord=10)[:, :, 0].tolist() == [[10] * 6] * 2


def test_schedules_by_0_24_s_names():
    config = Config(ModelConfig.from_name("flux2-klein-base-4b"), 5, 64, 96)
    flow = FlowMatchEulerDiscreteScheduler(config)
    timesteps, sigmas = FlowMatchEulerDiscreteScheduler.get_timesteps_and_sigmas(config.image_seq_len, 5)
    assert mx.array_equal(sigmas, flow.sigmas) and mx.array_equal(timesteps, flow.timesteps)
    flow.set_image_seq_len(4096)
    assert (flow.sigmas[1:-1] > sigmas[1:-1]).all()
    flow.set_mu(0.0)
    np.testing.assert_allclose(flow.sigmas, np.linspace(1, 0, 6), atol=1e-6)

    config = Config(ModelConfig.dev(), 4, 64, 96)
    plain = mx.linspace(1, 0.25, 4)
    assert mx.array_equal(LinearScheduler.shift_sigmas(plain, config), LinearScheduler(config).sigmas)
    np.testing.assert_allclose(SeedVR2EulerScheduler(config).sigmas, [1, 0.75, 0.5, 0.25, 0])
    assert scheduler_class("seedvr2_euler") is SeedVR2EulerScheduler
    wrong = {
        "nothing": SchedulerModuleNotFound, "no_such_package.Class": SchedulerModuleNotFound,
        "mflux.models.common.schedulers.Nothing": SchedulerClassNotFound, "json.JSONDecoder": InvalidSchedulerType,
    }  # fmt: skip
    for name, error in wrong.items():
        with pytest.raises(error) as told:
            try_import_external_scheduler(name)
        assert isinstance(told.value, UsageError)
        with pytest.raises(error):
            scheduler_class(name)


def test_a_program_that_wants_no_settings_in_images(flux, tmp_path, monkeypatch):
    image = flux.generate_image(**PICTURE)
    monkeypatch.setattr(ImageUtil, "embed_metadata_enabled", False)
    for number, save in enumerate((image.save, lambda path: ImageUtil.save_image(image.image, path, {"seed": 1}))):
        path = tmp_path / f"{number}.png"
        save(path)
        assert not MetadataReader.read_exif_metadata(path)


def test_paddings():
    assert BoxValues.parse(value="10,20%") == BoxValues(10, "20%", 10, "20%")
    with pytest.raises(BoxValueError, match="'x' is neither"):
        BoxValues.parse("x")


def test_savers_of_what_an_image_is_generated_after(tmp_path):
    image = PIL.Image.new("RGB", (8, 8))
    for saver, name in ((CannyImageSaver, "canny_image"), (DepthImageSaver, "depth_image")):
        saver(str(tmp_path / "a.png")).call_before_loop(seed=1, prompt="x", latents=None, config=None, **{name: image})
        saver(tmp_path / "a.png").call_before_loop(seed=1, prompt="x", latents=None, config=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_controlnet_canny.png", "a_depth_map.png"]


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
