"""What lies between a prompt and an image, for all families.

A family's class keeps its own `generate_image`, which reads from top to bottom; nothing here calls it. What stands
here is the same for all: settings, encoded prompts, the denoising loop, decoding.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mflux.backend import mx, nn
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.errors import MfluxError, NotBuiltError, UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.encoded_on_disk import EncodedOnDisk, encoded, key_of
from mflux.models.common.fewer_passes import LEAST_STEPS, left_out
from mflux.models.common.latent_creator.latent_creator import LatentCreator
from mflux.models.common.memory import Encoded, LazyComponent, is_loaded, keeping_memory, timed
from mflux.models.common.model import Model
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.networks.interiors import watched
from mflux.models.common.networks.modulation import Known, ahead_of
from mflux.models.common.noise import check_seed
from mflux.models.common.replaced import called
from mflux.models.common.room import check_room, check_weights
from mflux.models.common.tokenizers.checks import check_prompt
from mflux.text import count, shown, written
from mflux.utils.exceptions import StopImageGenerationException
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

log = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K")

# Predicts the velocity noise - image of latents at a noise level: (latents, sigma) → an array of the latents' shape. A
# batch, which is what training has, may have a noise level for each of its images.
Velocity = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Step:
    """One denoising step that was taken.

    Attributes:
        number: counted from 0 among all steps of the schedule.
        latents: what it left, computed.
        denoised: the clean latents that the model predicts at this step; computed if somebody looks at them.
    """

    number: int
    latents: mx.array
    denoised: mx.array


class Pipeline(Model):
    """Base of the classes that generate images; see `Model` for the arguments.

    For one thread: MLX computes in the thread that made an array's stream, so that a second one could not generate with
    the same model in any case, and nothing here, `prompt_cache` neither, is locked. A server has a queue before it.

    Attributes:
        latent_creator: has `create_noise`, `pack_latents` and `unpack_latents`, see `FluxLatentCreator`.
        sees_image: whether the model sees the image in every step and starts from noise, so that a strength has no use.
        schedule: the scheduler that follows the checkpoint's `scheduler_config.json`, which is used unless another one
            is passed.
        tiling_config: how the autoencoder divides an image; None: not at all.
        shares_guidance: this process and another one, which generate the same image together; None: this one alone.
        prompts_on_disk: keeps encoded prompts for other processes, as commands do; None: nobody does.
        tokenizers: by the names that mflux 0.24 has for them.
        callbacks: what programs have called before, in and after the denoising loop.
        negative_above: above which guidance a negative prompt counts; None: the family has none.
        shows_progress: whether the loop draws a bar on stderr.
    """

    # Which classes they are a subclass says.
    transformer: LazyComponent[Any]
    vae: LazyComponent[Any]
    latent_creator: ClassVar[Any]
    sees_image: ClassVar[bool] = False
    schedule: ClassVar[str] = "linear"
    tiling_config: tiling.TilingConfig | None = None
    shares_guidance: Any = None
    prompts_on_disk: EncodedOnDisk | None = None
    tokenizers: Mapping[str, Any] = {}
    shows_progress = False
    negative_above: ClassVar[float | None] = None
    _has_room = False

    if TYPE_CHECKING:
        # Each class has its own, with other arguments; a program that knows a model by its name alone calls it.
        def generate_image(self, *args: Any, **kwargs: Any) -> GeneratedImage: ...

    @cached_property
    def callbacks(self) -> CallbackRegistry:
        return CallbackRegistry()

    def settings(
        self, *, seed: int, prompt: str, scheduler: str | None = None, side_by_side: int = 1, **settings: Any
    ) -> Config:
        """How one image is to be made, from `generate_image`'s arguments, all of them checked before any work.

        Args:
            scheduler: None for the checkpoint's schedule.
            side_by_side: how many images of the given size are denoised as one, beside each other.
            settings: further arguments of `Config`; of these `step_cache_ratio` says in which part of the steps (above
                0, below 1) the prediction of the step before is used again, see `fewer_passes`, and `cfg_end` in which
                part of them (above 0, at most 1) a second pass guides, where there is one.

        Raises:
            UsageError: one is of the wrong type, or makes no sense, or there is no memory for such a size.
        """
        check_seed(seed)
        check_prompt(prompt)
        self._started = time.perf_counter()
        scheduler = self.schedule if scheduler is None else scheduler
        config = Config(model_config=self.model_config, scheduler=scheduler, seed=seed, **settings)
        config.width *= side_by_side
        check_room(self.configuration("transformer"), config.width, config.height)
        self._check_weights()
        return config

    def _check_weights(self) -> None:
        """Once for a model, and not for one that is loaded already."""
        # Which part of it has room here, nobody has counted.
        if self.folder_root is None or self.divided_among or self._has_room or is_loaded(self, "transformer"):
            return
        kind = self.component("transformer").module_class()
        is_stored = self.bits is not None and self._quantize is None
        check_weights(kind, self.configuration("transformer"), self.bits, is_stored=is_stored)
        self._has_room = True

    def is_guided(self, guidance: float | None) -> bool:
        """Whether each step has a second pass for guidance."""
        return self.negative_above is not None and guidance is not None and guidance > self.negative_above

    # ---- 1. prompts

    @property
    def longest_prompt(self) -> int:
        """How many tokens of a prompt the model reads."""
        return self.model_config.max_sequence_length or 512

    def remembered(self, keys: Sequence[K], encode: Callable[[list[K]], Iterable[T]], *encoders: str) -> list[T]:
        """What encoders make of each key, from `prompt_cache` where it is there.

        The keys that are missing are encoded in one visit, so that each encoder is loaded at most once; then the
        encoders are released, unless `keep` holds them.

        Args:
            keys: prompts, or whatever identifies what is encoded; an image by its digest, see `digest_of`.
            encode: yields a value for each of the keys it is called with.
            encoders: names of the components that it uses.
        """
        cache = getattr(self, "prompt_cache", None)
        if not isinstance(cache, Encoded):
            # A program's own begins empty.
            cache = self.prompt_cache = Encoded()
        missing = [key for key in dict.fromkeys(keys) if key not in cache]
        disk = self.prompts_on_disk if encoders and self.folder_root is not None else None
        names = {} if disk is None else self._names_on_disk(missing, encode)
        if disk is not None:
            cache.update((key, found[0]) for key, name in names.items() if (found := disk.get(name)) is not None)
            missing = [key for key in missing if key not in cache]
        if missing:
            self.make_room_for("encode")
            values, may_be_kept = encoded(lambda: list(encode(missing)))
            cache.update(zip(missing, values, strict=True))
            self.release_encoders(*encoders)
            for key in missing:
                if disk is not None and may_be_kept and key in names:
                    disk.put(names[key], cache[key])
        values = [cache.used(key) for key in keys]
        cache.shrink(least=len(values))
        return values

    def _names_on_disk(self, keys: Sequence[K], encode: Callable[..., Any]) -> dict[K, str]:
        """Under which name on disk each key's value is, or will be; without those that have none."""
        if not keys:
            return {}
        places, loras = self.encoded_from(), self._adapters()
        facts: list[Any] = [type(self).__module__, type(self).__qualname__, getattr(encode, "__qualname__", "")]
        facts += [self.key, self.longest_prompt, self._quantize, self.bits, str(self.root)]
        if any(loras.get(one.name) for one in self.components if one.stage == "encode"):
            places += self._lora_files
            facts += [self.lora_scales, self.bake_lora]
        names = {key: key_of(places, *facts, key) for key in keys}
        return {key: name for key, name in names.items() if name is not None}

    # ---- 2. latents

    def start(self, config: Config, noise: mx.array) -> mx.array:
        """The latents to start from: noise, or the source image with as much noise over it as its step has."""
        if config.image_path is None or config.init_time_step == 0:
            return noise
        sigma = config.scheduler.sigmas[config.init_time_step]
        clean = self.encode_image(config.image_path, config.height, config.width)
        return LatentCreator.add_noise_by_interpolation(clean, noise, sigma)

    def encode_image(self, image: Any, height: int, width: int) -> mx.array:
        """An image, resized, as latents like those that denoising works on, float32."""
        resized = ImageUtil.scale_to_dimensions(ImageUtil.load_image(image), width, height)
        return self.encode_pixels(ImageUtil.to_array(resized))

    def encode_pixels(self, pixels: mx.array) -> mx.array:
        """The same of pixels (1, 3, H, W), -1 to 1, whose sides are multiples of 16."""
        latents = tiling.encode(self.vae, pixels, self.tiling_config).astype(mx.float32)
        packed: mx.array = self.latent_creator.pack_latents(latents, *pixels.shape[-2:])
        mx.eval(packed)
        return packed

    # ---- 3. denoising

    def predicting(self, config: Config) -> Any:
        """The transformer; or what a program put in its place, called as mflux 0.24 called it, to be used like ours.

        Raises:
            UsageError: nothing else can stand there.
        """
        ours = self.component("transformer").module_class()
        if isinstance(self.transformer, ours) or not hasattr(ours, "asked_as_024"):
            return self.own_transformer()
        return partial(called("the transformer", ours.asked_as_024), self.transformer, config)

    def own_transformer(self) -> Any:
        """The transformer, where more of it is needed than its prediction.

        Raises:
            UsageError: a program put something else in its place.
        """
        ours = self.component("transformer").module_class()
        if not isinstance(self.transformer, ours):
            raise UsageError(
                f"a {type(self.transformer).__name__} stands in the place of the transformer, and nothing else than a "
                f"{ours.__name__} can where {type(self).__name__} is used: put it back"
            )
        return self.transformer

    def sigmas_ahead(self, config: Config) -> list[mx.array]:
        """The noise levels of the steps that will be taken, as the schedule has them before the first one."""
        sigmas = config.scheduler.sigmas
        return [sigmas[number] for number in range(config.init_time_step, config.num_inference_steps)]

    def ahead(
        self,
        config: Config,
        name: str,
        condition: Callable[[Any, mx.array], mx.array],
        *beside: nn.Module,
        of: Hashable = (),
        zero: bool = False,
    ) -> Callable[[mx.array], Known | None]:
        """Work out the modulation of all steps; the next image with the same schedule finds it there.

        Args:
            name: of the component that is modulated.
            condition: gives its condition (1, features), called with it and a noise level.
            beside: further modules with the same condition.
            of: what the condition follows from besides the noise level.
            zero: whether something without noise is modulated as well.

        Returns:
            What gives the condition at a noise level, or None where it was not known ahead: the schedule turned out
            otherwise, a program put something else in the component's place, or the model is trained.
        """
        module = getattr(self, name)
        if not self.works_ahead or not isinstance(module, self.component(name).module_class()):
            return lambda sigma: None
        sigmas = self.sigmas_ahead(config) + [mx.array(0.0)] * zero
        with timed(f"work out the modulation of {count(len(sigmas), 'noise level')}"):
            found = weakref.ref(ahead_of(module, sigmas, partial(condition, module), *beside, of=of))

        def known(sigma: mx.array) -> Known | None:
            # The module has it, and takes it along when it goes.
            ahead = found()
            return None if ahead is None else ahead.at(sigma)

        return known

    def both(
        self, first: Callable[[], mx.array], second: Callable[[], mx.array], *, apart: bool = False
    ) -> tuple[mx.array, mx.array]:
        """The two predictions that guidance is made of, arrays of one shape; with another process each computes one.

        Args:
            apart: one after the other, so that what they need for themselves is needed once.
        """
        if self.shares_guidance is not None:
            group = self.shares_guidance
            own = (second if group.rank() else first)()
            found = mx.distributed.all_gather(own[None], group=group)
            return found[0], found[1]
        found = first()
        if apart:
            mx.eval(found)
        return found, second()

    def left_out(self, config: Config) -> frozenset[int]:
        """The steps that use the prediction of the one before, where a step cache is asked for."""
        if config.step_cache_ratio is None:
            return frozenset()
        found = left_out([float(sigma) for sigma in self.sigmas_ahead(config)], config.step_cache_ratio)
        return frozenset(config.init_time_step + number for number in found)

    def steps(
        self,
        config: Config,
        latents: mx.array,
        velocity: Velocity,
        after_step: Callable[[mx.array, int], mx.array] | None = None,
    ) -> Generator[Step]:
        """Take the steps from noise to image, one each time that the next is asked for, without the passes that
        `left_out` has.

        Args:
            config: with the schedule and its steps.
            latents: what to start from, float32.
            velocity: the model; its prediction is taken as float32.
            after_step: changes the latents after a step: called with them and the step's number.

        Raises:
            MfluxError: the latents are no longer finite.
        """
        scheduler, again = config.scheduler, self.left_out(config)
        if config.step_cache_ratio is not None and not again:
            log.warning(
                "step_cache_ratio is ignored: of %s it leaves none out (of fewer than %d never)",
                count(len(config.time_steps), "step"),
                LEAST_STEPS,
            )
        prediction = mx.array(0.0)
        # What is computed already, nobody has to wait for a GPU to tell.
        sigmas = scheduler.sigmas
        levels = [sigmas[number] for number in range(config.num_inference_steps)]
        mx.eval(levels)
        with ExitStack() as kept:
            for number in range(config.init_time_step, config.num_inference_steps):
                if number == config.init_time_step + 1:  # what the first step loads stays where it is
                    kept.enter_context(keeping_memory())
                sigma = levels[number] if scheduler.sigmas is sigmas else scheduler.sigmas[number]
                before = latents
                if number not in again:
                    predict = partial(self._first, velocity) if number == config.init_time_step else velocity
                    prediction = predict(scheduler.scale_model_input(before, number), sigma).astype(mx.float32)
                latents = scheduler.step(noise=prediction, timestep=number, latents=before)
                if after_step is not None:
                    latents = after_step(latents, number)
                # Together: each is a wait for a GPU.
                finite = mx.isfinite(latents).all()
                mx.eval(latents, finite)
                if not finite.item():
                    raise not_finite(f"the latents after step {number + 1} of {config.num_inference_steps}")
                yield Step(number, latents, denoised=before - sigma * prediction)

    def _first(self, velocity: Velocity, latents: mx.array, sigma: mx.array) -> mx.array:
        """An image's first prediction; once more in the weights' own dtype, where float16 was too narrow for it."""
        if not self.computes_in_float16():
            return velocity(latents, sigma)
        with watched() as too_large:
            prediction = velocity(latents, sigma)
            mx.eval(prediction, too_large)
        if not any(one.item() for one in too_large):
            return prediction
        if self.compute_precision is not None:
            log.warning(
                "compute_precision (--compute-precision): some values are too large for float16 and become its largest "
                "number; if the image is wrong, leave it out"
            )
            return prediction
        log.warning("%s computes in bfloat16: some of its values are too large for float16", self.family.title)
        self._too_narrow = True
        self.release_stages("denoise")
        return velocity(latents, sigma)

    def denoise(
        self,
        config: Config,
        latents: mx.array,
        velocity: Velocity,
        *,
        seed: int,
        prompt: str,
        after_step: Callable[[mx.array, int], mx.array] | None = None,
        **images: Any,
    ) -> mx.array:
        """Take all `steps`, with the callbacks.

        Args:
            config, latents, velocity, after_step: see `steps`.
            seed, prompt: for the callbacks.
            images: for the callbacks: `canny_image`, `depth_image`, `control_images`.

        Returns:
            The latents of the image.

        Raises:
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
            MfluxError: the latents are no longer finite.
        """
        number = config.init_time_step
        if not hasattr(self.callbacks, "start"):
            raise UsageError(
                f"the model's callbacks are {shown(written(self.callbacks), 60)}, and have to be a CallbackRegistry: "
                "leave them as they are, and register what is to be called"
            )
        with (
            self.callbacks.start(seed, prompt, config, shows_progress=self.shows_progress) as context,
            closing(self.steps(config, latents, velocity, after_step)) as steps,
        ):
            context.before_loop(latents, **images)
            try:
                for step in steps:
                    number, latents = step.number, step.latents
                    context.in_loop(number, latents, denoised=step.denoised)
                    number += 1
            except KeyboardInterrupt as interrupt:
                context.interruption(number, latents)
                raise StopImageGenerationException(
                    f"stopped at step {number + 1} of {config.num_inference_steps}",
                    # A command's process is ended by other signals as well, see `cli.process.Ended`.
                    exit_code=getattr(interrupt, "status", 130),
                ) from None
            context.after_loop(latents)
        return latents

    # ---- 4. decoding

    def decode(self, latents: mx.array, config: Config) -> mx.array:
        """Latents as an image (1, 3, H, W), about -1 to 1.

        Raises:
            MfluxError: it holds numbers that are not finite.
        """
        unpacked = self.latent_creator.unpack_latents(latents, config.height, config.width)
        decoded = tiling.decode(self.vae, unpacked, None if self.vae_full_precision else self.tiling_config)
        mx.eval(decoded)
        if not mx.isfinite(decoded).all().item():
            raise not_finite("what the autoencoder makes of the latents")
        return decoded

    def make_image(
        self,
        config: Config,
        latents: mx.array,
        *,
        seed: int,
        prompt: str,
        parameters: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> GeneratedImage:
        """Decode, and note how the image was made.

        Args:
            parameters: settings beyond those that all images have; None and False are left out.
            about: further arguments of `GeneratedImage`, in place of the configuration's.
        """
        self.make_room_for("decode")
        with timed("decode"):
            decoded = self.decode(latents, config)
        return self.finished(config, decoded, seed=seed, prompt=prompt, parameters=parameters, **about)

    def finished(
        self,
        config: Config,
        decoded: mx.array,
        *,
        seed: int,
        prompt: str,
        parameters: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> GeneratedImage:
        """What has been decoded, (1, 3, H, W), as an image that knows how it was made; see `make_image`."""
        fewer = {"step_cache_ratio": config.step_cache_ratio, "cfg_end": config.cfg_end}
        if self.compute_precision is not None:
            fewer["compute_precision"] = "float16" if self.compute_precision == mx.float16 else "bfloat16"
        parameters = {"vae_full_precision": self.vae_full_precision} | fewer | dict(parameters or {})
        unusual = {name: value for name, value in parameters.items() if value not in (None, False)}
        if config.scheduler_name not in ("linear", "LinearScheduler"):
            unusual.setdefault("scheduler", config.scheduler_name)
        if self.lora_paths and not self.bake_lora:
            unusual["bake_lora"] = False
        settings: dict[str, Any] = {
            "steps": config.num_inference_steps,
            "guidance": config.guidance,
            "precision": config.precision,
            "quantization": self.bits,
            "height": config.height,
            "width": config.width,
            "image_path": config.image_path,
            "image_strength": config.image_strength,
            "controlnet_strength": config.controlnet_strength,
            "lora_paths": self.lora_paths,
            "lora_scales": self.lora_scales,
        }
        image = GeneratedImage(
            image=ImageUtil.to_pil(decoded),
            model_config=config.model_config,
            seed=seed,
            prompt=prompt,
            generation_time=time.perf_counter() - self._started,
            generation_parameters=unusual,
            **settings | about,
        )
        image.model_path = self.model_path
        image.text_encoder_paths, image.vae_path = self.text_encoder_paths, self.vae_path
        return image


def refuse_pid(decode: bool, degrade_sigma: float) -> None:
    """
    Raises:
        NotBuiltError: PiD was asked for.
    """
    if decode or degrade_sigma:
        raise NotBuiltError("PiD decoding is not built yet in this version: leave pid_decode (--pid-decode) out")


def not_finite(what: str) -> MfluxError:
    """The error that what was computed is no image, and what may help."""
    return MfluxError(
        f"{what} hold numbers that are not finite, so there is no picture: take another copy of the weights, or "
        "--quantize with more bits, or another LoRA scale"
    )
