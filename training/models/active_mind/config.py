"""The sizes of active-mind by name, and their parameters and FLOPs. Needs no torch."""

from pydantic import Field, model_validator

from data_manifests.strict import Strict, nearest
from tasks.networks.latent_geometry import TEMPORAL_STRIDE

NEAREST = 5  # audio tokens, and text tokens, that a visual latent frame attends to (active-mind appendix B)
PSEUDO_LAST = 30  # latent frames from the last frame to the position of the pseudo last frame (appendix B, figure 9)
TIME_FEATURES = 256  # sines and cosines that encode the noise level, as Wan's freq_dim


class Shape(Strict):
    """The shape of the transformer."""

    width: int = Field(ge=8)
    """Numbers of a token."""
    depth: int = Field(ge=1)
    """Blocks."""
    heads: int = Field(ge=1)
    """Attention heads."""
    mlp: int = Field(ge=8)
    """Width of the hidden layer of each MLP."""
    patch: int = Field(ge=1)
    """Latent pixels each way of one visual token."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "Shape":
        if self.width % self.heads or self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(
                f"width {self.width} over {self.heads} heads: each head needs an even number of at least 6"
            )
        return self


# 1.3b has the width and depth of Wan2.1's 1.3B, so that the video branch alone is about that size. The paper gives no
# size. 7b has a base (video and text branch) of 7.2 G parameters, after Seaweed-7B, on which the paper builds.
SIZES = {
    "debug": Shape(width=128, depth=4, heads=4, mlp=512, patch=1),
    "small": Shape(width=512, depth=12, heads=8, mlp=2048, patch=2),
    "1.3b": Shape(width=1536, depth=30, heads=12, mlp=8960, patch=2),
    "7b": Shape(width=3072, depth=32, heads=24, mlp=12288, patch=2),
}


class ActiveMindSettings(Strict):
    """An active-mind's shape and the sizes of its inputs."""

    shape: Shape
    """Depth and width of the network."""
    channels: int = Field(ge=1)
    """Channels of a latent."""
    latent_scale: tuple[float, ...] = ()
    """Divisor of each latent channel, so that all channels are about as large as the noise. It is applied before noise
    is added and the network sees the latents. (): latents stay as the codec gives them."""
    text_dim: int = Field(ge=1)
    """Numbers of a text token."""
    audio_window: int = Field(default=4, ge=1)
    """Columns of sound of a pixel frame: 4 of log-mel, or 2 of Whisper's states, at 25 frames a second."""
    audio_features: int = Field(default=80, ge=1)
    """Numbers of a column: 80 of log-mel, 1280 of Whisper's states."""

    @property
    def audio_dim(self) -> int:
        """Sound features of one audio token."""
        return TEMPORAL_STRIDE * self.audio_window * self.audio_features

    @property
    def patch_dim(self) -> int:
        """Latent numbers of one visual token."""
        return self.channels * self.shape.patch**2

    @model_validator(mode="after")
    def _scale_fits(self) -> "ActiveMindSettings":
        if self.latent_scale and (len(self.latent_scale) != self.channels or min(self.latent_scale) <= 0):
            raise ValueError(f"latent_scale: give {self.channels} numbers above 0, one for each channel, or none")
        return self

    def parameter_count(self) -> int:
        """Trainable parameters of all branches."""
        return sum(self.parameters_of_parts().values())

    def parameters_of_parts(self) -> dict[str, int]:
        """Trainable parameters of each part: video (with the shared parameters), text, audio."""
        shape = self.shape
        d, inner = shape.width, shape.mlp
        head = d // shape.heads
        branch = (3 * d * d + 3 * d) + (d * d + d) + (2 * d * inner + inner + d) + 2 * head + 6 * d
        last_branch = (2 * d * d + 2 * d) + head + 2 * d  # text and audio of the last block have keys and values only
        time = (TIME_FEATURES * d + d) + (d * d + d) + (6 * d * d + 6 * d)
        ends = (self.patch_dim * d + d) + (d * self.patch_dim + self.patch_dim) + 2 * d
        context = (shape.depth - 1) * branch + last_branch + (d * d + d) + d
        return {
            "video": shape.depth * branch + time + ends,
            "text": context + self.text_dim * d + d,
            "audio": context + self.audio_dim * d + d,
        }

    def flops(
        self, frames: int, height: int, width: int, text_tokens: int, speakers: int = 1, batch: int = 1
    ) -> dict[str, int]:
        """FLOPs of one forward pass for each part. A training step takes three times as many.

        A multiplication and an addition count as two FLOPs. Only matrix products are counted.

        frames, height, width: of the latents. text_tokens: with padding.

        Returns: by part. video: its branch, the attention within it, and the timestep embedding. text, audio: their
        branch, and the attention from and to their tokens.
        """
        shape = self.shape
        d, patch = shape.width, shape.patch
        video = frames * (height // patch) * (width // patch)
        audio = speakers * frames
        branch = 4 * d * d + 2 * d * shape.mlp
        near_text, near_audio = min(NEAREST, text_tokens), speakers * min(NEAREST, frames)
        all_tokens = video + audio + text_tokens
        time = (TIME_FEATURES + d + 6 * d) * d

        def context(tokens: int, near: int, features: int) -> int:
            block = tokens * branch + 2 * d * (video * near + tokens * all_tokens)
            last = tokens * 2 * d * d + 2 * d * video * near
            return (shape.depth - 1) * block + last + tokens * (features * d + d * d)

        multiplications = {
            "video": shape.depth * (video * branch + 2 * d * video * video) + 2 * video * self.patch_dim * d,
            "text": context(text_tokens, near_text, self.text_dim),
            "audio": context(audio, near_audio, self.audio_dim),
        }
        flops = {part: 2 * batch * count for part, count in multiplications.items()}
        flops["video"] += 2 * (batch + 1) * time  # one noise level for each sample, and one for all clean frames
        return flops


def active_mind_settings(
    size: str, channels: int, text_dim: int, audio_window: int = 4, audio_features: int = 80
) -> ActiveMindSettings:
    """The settings of a size by its name. Raises ValueError for an unknown name and tells the nearest one."""
    if size not in SIZES:
        raise ValueError(f"no size {size!r} of active-mind{nearest(size, list(SIZES))}")
    return ActiveMindSettings(
        shape=SIZES[size],
        channels=channels,
        text_dim=text_dim,
        audio_window=audio_window,
        audio_features=audio_features,
    )
