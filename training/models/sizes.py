"""How large an active-mind is: by name, with its parameters and FLOPs counted. Needs no torch."""

from pydantic import Field, model_validator

from data_manifests.strict import Strict, nearest

NEAREST = 5  # audio tokens, and text tokens, that a visual latent frame attends to (active-mind appendix B)
PSEUDO_LAST = 30  # latent frames that the pseudo last frame stands beyond the last one (appendix B, figure 9)
FRAMES_PER_LATENT = 4  # the codec's stride in time, and so the pixel frames of one audio token
TIME_FEATURES = 256  # sines and cosines that tell the noise level, as Wan's freq_dim


class Shape(Strict):
    """width: numbers a token. depth: blocks. heads: of attention. mlp: width inside each MLP. patch: latents each way
    that make one visual token."""

    width: int = Field(ge=8)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp: int = Field(ge=8)
    patch: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> "Shape":
        if self.width % self.heads or self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(
                f"width {self.width} over {self.heads} heads: each head needs an even number of at least 6"
            )
        return self


# 1.3b has the width and depth of Wan2.1's 1.3B, so that the video branch alone is about that size. The paper gives no
# size; 7b is a base (video and text branch) of 7.2 G parameters, after Seaweed-7B, which it builds on.
SIZES = {
    "debug": Shape(width=128, depth=4, heads=4, mlp=512, patch=1),
    "small": Shape(width=512, depth=12, heads=8, mlp=2048, patch=2),
    "1.3b": Shape(width=1536, depth=30, heads=12, mlp=8960, patch=2),
    "7b": Shape(width=3072, depth=32, heads=24, mlp=12288, patch=2),
}


class ActiveMindSettings(Strict):
    """An active-mind's shape, and what it reads.

    channels: of a latent. latent_scale: what each channel is divided by before noise is added and the network sees it,
    so that all are about as large as the noise; () where the codec's own are. text_dim: numbers a text token.
    audio_window, audio_features: what a pixel frame has of
    sound: columns and numbers a column (4 x 80 log-mel, or 2 x 1280 of Whisper's states at 25 frames a second).
    """

    shape: Shape
    channels: int = Field(ge=1)
    latent_scale: tuple[float, ...] = ()
    text_dim: int = Field(ge=1)
    audio_window: int = Field(default=4, ge=1)
    audio_features: int = Field(default=80, ge=1)

    @property
    def audio_dim(self) -> int:
        """Numbers of sound that make one audio token."""
        return FRAMES_PER_LATENT * self.audio_window * self.audio_features

    @property
    def patch_dim(self) -> int:
        """Numbers of latent that make one visual token."""
        return self.channels * self.shape.patch**2

    @model_validator(mode="after")
    def _scale_fits(self) -> "ActiveMindSettings":
        if self.latent_scale and (len(self.latent_scale) != self.channels or min(self.latent_scale) <= 0):
            raise ValueError(f"latent_scale: {self.channels} numbers above 0, or none")
        return self

    def parameter_count(self) -> int:
        """Numbers that are learnt, all branches."""
        return sum(self.parameters_of_parts().values())

    def parameters_of_parts(self) -> dict[str, int]:
        """Numbers that are learnt in each part: video (with what is shared), text, audio."""
        shape = self.shape
        d, inner = shape.width, shape.mlp
        head = d // shape.heads
        branch = (3 * d * d + 3 * d) + (d * d + d) + (2 * d * inner + inner + d) + 2 * head + 6 * d
        reader = (2 * d * d + 2 * d) + head + 2 * d  # text and audio of the last block are only read
        time = (TIME_FEATURES * d + d) + (d * d + d) + (6 * d * d + 6 * d)
        ends = (self.patch_dim * d + d) + (d * self.patch_dim + self.patch_dim) + 2 * d
        context = (shape.depth - 1) * branch + reader + (d * d + d) + d
        return {
            "video": shape.depth * branch + time + ends,
            "text": context + self.text_dim * d + d,
            "audio": context + self.audio_dim * d + d,
        }

    def flops(
        self, frames: int, height: int, width: int, text_tokens: int, speakers: int = 1, batch: int = 1
    ) -> dict[str, int]:
        """FLOPs of one forward pass by what they are spent on; a training step takes three times as many.

        frames, height, width: of the latents. text_tokens: with padding. A multiplication and an addition are two;
        what is no matrix product is not counted.

        Returns: video (its branch, attention within it, and the noise level's embedding), text, audio (their branches,
        and the attention from and to their tokens).
        """
        shape = self.shape
        d, patch = shape.width, shape.patch
        video = frames * (height // patch) * (width // patch)
        audio = speakers * frames
        branch = 4 * d * d + 2 * d * shape.mlp
        near_text, near_audio = min(NEAREST, text_tokens), speakers * min(NEAREST, frames)
        everything = video + audio + text_tokens
        time = (TIME_FEATURES + d + 6 * d) * d

        def context(tokens: int, near: int, read: int) -> int:
            block = tokens * branch + 2 * d * (video * near + tokens * everything)
            last = tokens * 2 * d * d + 2 * d * video * near
            return (shape.depth - 1) * block + last + tokens * (read * d + d * d)

        multiplications = {
            "video": shape.depth * (video * branch + 2 * d * video * video) + 2 * video * self.patch_dim * d,
            "text": context(text_tokens, near_text, self.text_dim),
            "audio": context(audio, near_audio, self.audio_dim),
        }
        counted = {part: 2 * batch * count for part, count in multiplications.items()}
        counted["video"] += 2 * (batch + 1) * time  # a sample's noise level each, and the clean frames' one for all
        return counted


def active_mind_settings(
    size: str, channels: int, text_dim: int, audio_window: int = 4, audio_features: int = 80
) -> ActiveMindSettings:
    """The settings of a size by its name. Raises ValueError for a name that is none, with the nearest one."""
    if size not in SIZES:
        raise ValueError(f"no size {size!r} of active-mind{nearest(size, list(SIZES))}")
    return ActiveMindSettings(
        shape=SIZES[size],
        channels=channels,
        text_dim=text_dim,
        audio_window=audio_window,
        audio_features=audio_features,
    )
