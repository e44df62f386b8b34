"""FLUX.1: text to image and image to image."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mflux.backend import mx
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.checkpoints.loading import load_component
from mflux.checkpoints.quantization import Quantization
from mflux.checkpoints.saving import copy_beside, estimated_bytes, new_folder, save_component, size_of, write_json
from mflux.errors import CheckpointError, DownloadError, NotBuiltError
from mflux.hub import resolve_model
from mflux.models.common.autoencoders import tiling
from mflux.models.common.autoencoders.kl import AutoencoderKL
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig, key_of
from mflux.models.common.config.saved_model import FILE_NAME, record
from mflux.models.common.lora.library import find_lora, settle_scales
from mflux.models.common.lora.reading import Loras
from mflux.models.common.stages import Part, give_back_memory, release, timed
from mflux.models.common.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.text_encoders.t5 import T5Encoder
from mflux.models.common.tokenizers import PromptTokenizer, clip_tokenizer, t5_tokenizer
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.lora_names import FLUX_LORA_LAYOUTS, FLUX_LORA_NAMES
from mflux.models.flux.model.transformer import FluxTransformer, latent_image_ids
from mflux.models.flux.weights_024 import open_folder
from mflux.utils.exceptions import StopImageGenerationException
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

log = logging.getLogger(__name__)

# What is needed of a repository in the diffusers layout. Most also hold the transformer as one file in another layout.
_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "tokenizer_2/*",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "text_encoder_2/*.json",
    "text_encoder_2/*.safetensors",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
)
_REQUIRED = tuple(
    f"{part}/{file}"
    for part in ("text_encoder", "text_encoder_2", "transformer", "vae")
    for file in ("config.json", "*.safetensors")
)
# A repository that holds what mflux 0.24 saved has no configurations.
_REQUIRED_OF_024 = tuple(
    f"{part}/{file}"
    for part in ("text_encoder", "text_encoder_2", "transformer", "vae")
    for file in ("model.safetensors.index.json", "*.safetensors")
)


class Flux1:
    """FLUX.1 schnell, dev and krea-dev, and anything of that architecture in the diffusers layout.

    Components are loaded when their stage begins. The text encoders are let go of as soon as the prompt is encoded
    (encoded prompts are kept in `prompt_cache`); transformer and autoencoder stay for the next picture.

    Args:
        quantize: 3, 4, 5, 6 or 8 bits for the weights of linear layers and embeddings, quantized while they load.
        model_path: a folder or Hugging Face repository to take the weights from instead of the model's own.
        lora_paths: LoRAs to apply one after the other: files, names from LORA_LIBRARY_PATH, or files on Hugging Face,
            see `find_lora`.
        lora_scales: how much of each: 0 is nothing, 1 (where none is given) as it was trained.
        bake_lora: add them to the weights while these load; weights that are stored quantized stay as they are, and
            LoRAs are computed beside them in each step.
        model_config: which model, `ModelConfig.schnell()` by default.

    Raises:
        DownloadError: the weights cannot be had.
        CheckpointError: the folder is not a FLUX.1 model in the diffusers layout, or a LoRA is not for this model.
        UsageError: no such number of bits, or more scales than LoRAs.
    """

    vae = Part(lambda self: self._load(AutoencoderKL, "vae"))
    transformer = Part(lambda self: self._load(FluxTransformer, "transformer"))
    t5_text_encoder = Part(lambda self: self._load(T5Encoder, "text_encoder_2"))
    clip_text_encoder = Part(lambda self: self._load(CLIPTextEncoder, "text_encoder"))

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
    ):
        wanted = Quantization.asked(quantize)
        scales = settle_scales(lora_scales, len(lora_paths or ()))
        # Found before the model is, which may be a long download.
        self._lora_files = [find_lora(str(path)) for path in lora_paths or ()]
        model_config = model_config or ModelConfig.schnell()
        self.root = resolve_flux_folder(model_path, model_config)
        self.folder = open_folder(self.root)
        self.model_path = model_path
        self.model_config = model_config.with_scheduler(self.folder.scheduler())
        # A name may mislead; the transformer itself knows whether it takes guidance.
        self.model_config.supports_guidance = bool(self.folder.config("transformer").get("guidance_embeds", True))
        stored = self.folder.stored("transformer")
        # What the pictures say: a folder that is quantized stays as it is, whatever is asked for.
        self.bits = stored.bits if stored else wanted.bits if wanted else None
        self._quantize = quantize
        # As they were asked for: what a picture says of them means the same on another machine.
        self.lora_paths = [str(path) for path in lora_paths or ()] or None
        self.lora_scales = scales or None
        self.bake_lora = bake_lora
        self._loras = self._match_loras(self._lora_files, scales) if self._lora_files else None
        self.tiling_config: tiling.TilingConfig | None = None
        self.callbacks = CallbackRegistry()
        self.prompt_cache: dict[str, tuple[mx.array, mx.array]] = {}
        # A program that changes its prompt often may keep the encoders: 10 GB more, and no loading between prompts.
        self.keep_text_encoders = False
        # With little memory the transformer makes room when another prompt is to be encoded.
        self.keep_transformer = True
        self.tokenizers: Mapping[str, PromptTokenizer] = {
            "clip": clip_tokenizer(self.root / "tokenizer"),
            "t5": t5_tokenizer(self.root / "tokenizer_2"),
        }

    def _load(self, module_class: type, part: str, *, keep_dtypes: bool = False):
        load = partial(
            load_component,
            module_class,
            self.root / part,
            quantize=self._quantize,
            keep_dtypes=keep_dtypes,
            config=self.folder.config(part),
            tensors=self.folder.tensors(part),
        )
        if self._loras is None:
            return load()
        return self._loras.apply(part, lambda adjust: load(adjust=adjust), bake=self.bake_lora, to_save=keep_dtypes)

    def _match_loras(self, files: list[Path], scales: list[float]) -> Loras:
        modules = {}
        for part, module_class in (("transformer", FluxTransformer), ("text_encoder", CLIPTextEncoder)):
            # Its arrays are never computed: only the layers' names and shapes are wanted.
            config = module_class.config_class.from_dict(self.folder.config(part), source=self.root / part)
            modules[part] = module_class(config)
        return Loras(files, scales, spellings=FLUX_LORA_NAMES, layouts=FLUX_LORA_LAYOUTS, modules=modules)

    @staticmethod
    def from_name(model_name: str, quantize: int | None = None) -> Flux1:
        """A built-in model by its name or alias: "schnell", "dev", "krea-dev", "demo"."""
        return Flux1(model_config=ModelConfig.from_name(model_name), quantize=quantize)

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str = "linear",
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the source picture's or the model's own.
            guidance: how closely to follow the prompt; models without guidance (schnell) have no use for it.
            image_path: a picture to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".
            negative_prompt: FLUX.1 has no use for it; a warning says so.
            pid_decode, pid_degrade_sigma: not built in this version.

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        if pid_decode or pid_degrade_sigma:
            raise NotBuiltError("PiD decoding is not built yet in this version: leave pid_decode (--pid-decode) out")
        if negative_prompt:
            log.warning("--negative-prompt is ignored: FLUX.1 has no negative branch")
        config = Config(
            model_config=self.model_config,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
        )
        start = time.perf_counter()

        # 1. Encode the prompt
        prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt)

        # 2. Make the latents to start from: noise, or a picture with noise over it
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)
        sigmas = config.scheduler.sigmas
        if config.image_path is not None:
            sigma = sigmas[config.init_time_step]
            latents = (1 - sigma) * self.encode_image(config.image_path, config.height, config.width) + sigma * latents

        # 3. Denoise
        ids = latent_image_ids(config.height // 16, config.width // 16)
        guidance_array = mx.array([config.guidance]) if self.transformer.config.guidance_embeds else None
        context = self.callbacks.start(seed=seed, prompt=prompt, config=config)
        context.before_loop(latents)
        for step in config.time_steps:
            try:
                noise = self.transformer(
                    config.scheduler.scale_model_input(latents, step).astype(prompt_embeds.dtype),
                    sigma=sigmas[step][None],
                    prompt_embeds=prompt_embeds,
                    pooled_prompt_embeds=pooled_prompt_embeds,
                    image_ids=ids,
                    guidance=guidance_array,
                )
                latents = config.scheduler.step(noise=noise.astype(mx.float32), timestep=step, latents=latents)
                mx.eval(latents)
                context.in_loop(step, latents)
            except KeyboardInterrupt:
                context.interruption(step, latents)
                raise StopImageGenerationException(
                    f"stopped at step {step + 1} of {config.num_inference_steps}", exit_code=130
                ) from None
        context.after_loop(latents)

        # 4. Decode
        with timed("decode"):
            unpacked = FluxLatentCreator.unpack_latents(latents, config.height, config.width)
            decoded = tiling.decode(self.vae, unpacked, self.tiling_config)
            mx.eval(decoded)
        image = ImageUtil.to_image(
            decoded_latents=decoded,
            config=config,
            seed=seed,
            prompt=prompt,
            quantization=self.bits,
            generation_time=time.perf_counter() - start,
            image_path=config.image_path,
            image_strength=config.image_strength,
            generation_parameters=self._unusual_settings(scheduler),
            lora_paths=self.lora_paths,
            lora_scales=self.lora_scales,
        )
        image.model_path = self.model_path
        return image

    def _unusual_settings(self, scheduler: str) -> dict[str, str | bool]:
        """Only what differs from the usual, so that the settings read as mflux 0.24 wrote them."""
        settings: dict[str, str | bool] = {}
        if scheduler not in ("linear", "LinearScheduler"):
            settings["scheduler"] = scheduler
        if self.lora_paths and not self.bake_lora:
            settings["bake_lora"] = False
        return settings

    def encode_prompt(self, prompt: str) -> tuple[mx.array, mx.array]:
        """T5's embeddings (1, T, D) and CLIP's pooled embedding (1, P) of a prompt, from the cache if it was seen."""
        if prompt not in self.prompt_cache:
            if not self.keep_transformer:
                release(self, "transformer", "vae")
            length = self.model_config.max_sequence_length
            if self.tokenizers["t5"].is_cut(prompt, max_length=length):
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", length)
            prompt_embeds = self.t5_text_encoder(self.tokenizers["t5"](prompt, max_length=length))
            mx.eval(prompt_embeds)
            if not self.keep_text_encoders:
                release(self, "t5_text_encoder")
            clip = self.clip_text_encoder
            ids = self.tokenizers["clip"](prompt, max_length=clip.config.max_position_embeddings)
            _, pooled_prompt_embeds = clip(ids)
            mx.eval(pooled_prompt_embeds)
            del clip
            if not self.keep_text_encoders:
                release(self, "clip_text_encoder")
            self.prompt_cache[prompt] = prompt_embeds, pooled_prompt_embeds
        return self.prompt_cache[prompt]

    def encode_image(self, image_path: Path | str, height: int, width: int) -> mx.array:
        """A picture, resized, as packed latents (1, L, 64)."""
        image = ImageUtil.scale_to_dimensions(ImageUtil.load_image(image_path), width, height)
        latents = self.vae.encode(ImageUtil.to_array(image))
        packed = FluxLatentCreator.pack_latents(latents.astype(mx.float32), height, width)
        mx.eval(packed)
        return packed

    def save_model(self, base_path: str) -> None:
        """Write the model, quantized as it was asked for, to a folder that loads by itself.

        Components are released, then loaded, written and released one after the other. Floats keep the dtype that
        they were stored in. The folder takes its name when all is written; otherwise there is none.

        Args:
            base_path: the folder, which must not exist.

        Raises:
            OutputError: it exists, cannot be written, or the disk has too little room.
            CheckpointError: there are LoRAs, and the weights are stored quantized.
        """
        parts = {
            "text_encoder": CLIPTextEncoder,
            "text_encoder_2": T5Encoder,
            "transformer": FluxTransformer,
            "vae": AutoencoderKL,
        }
        release(self, "clip_text_encoder", "t5_text_encoder", "transformer", "vae")
        wanted = Quantization.asked(self._quantize)
        needed = sum(estimated_bytes(self.folder.tensors(part), wanted) for part in parts)
        with new_folder(Path(base_path).expanduser(), needed=needed) as target:
            for part, module_class in parts.items():
                with timed(f"save {part}") as note:
                    component = self._load(module_class, part, keep_dtypes=True)
                    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
                    config = self.folder.config(part)
                    note.append(f"{save_component(component, target / part, config, stem=stem) / 1e9:.2f} GB")
                    del component
                    give_back_memory()
            copy_beside(self.root, target, ("model_index.json", "scheduler", "tokenizer", "tokenizer_2"))
            for path, content in self.folder.lacking().items():
                write_json(target / path, content)
            key = key_of(self.model_config.model_name, self.model_config.base_model)
            size = size_of(target)
            content = record(
                key=key,
                source=self.model_path,
                root=self.root,
                bits=self.bits,
                size=size,
                loras=list(zip(self.lora_paths or (), self.lora_scales or (), self._lora_files, strict=True)),
            )
            write_json(target / FILE_NAME, content)


def resolve_flux_folder(model_path: str | None, model_config: ModelConfig) -> Path:
    """The folder with a FLUX.1 model's components, downloaded if need be.

    Raises:
        DownloadError: it cannot be had.
        CheckpointError: it is a model of another kind.
    """
    if model_path is None and model_config.model_name == "demo":
        from mflux.demo import checkpoint_folder

        return checkpoint_folder()
    name = model_path or model_config.model_name
    try:
        folder = resolve_model(name, _FILES, required=_REQUIRED)
    except DownloadError:
        try:
            folder = resolve_model(name, _FILES, required=_REQUIRED_OF_024)
        except DownloadError:
            folder = None
        if folder is None:
            raise
    opened = open_folder(folder)
    transformer = opened.config("transformer")
    kind = transformer.get("_class_name", "FluxTransformer2DModel")
    if kind != "FluxTransformer2DModel":
        raise CheckpointError(f"{folder} holds a {kind}, not a FLUX.1 transformer: another command draws with it")
    channels = transformer.get("in_channels", 64)
    if channels != 64:
        # Fill takes 384, Depth and Canny take 128: what they add to the picture's own would be missing.
        raise CheckpointError(
            f"{folder} holds a FLUX.1 transformer that takes {channels} channels a token, not 64: "
            "it draws from more than a prompt, and another command draws with it"
        )
    vae = AutoencoderKL.config_class.from_dict(opened.config("vae"), source=folder / "vae" / "config.json")
    pixels = 2 ** (len(vae.block_out_channels) - 1)
    if (vae.latent_channels, pixels) != (16, 8):
        raise CheckpointError(
            f"{folder} holds an autoencoder with {vae.latent_channels} latent channels for every {pixels} pixels of a "
            "side; FLUX.1's has 16 for every 8: put FLUX.1's vae folder there"
        )
    return folder
