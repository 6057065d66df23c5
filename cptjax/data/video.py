"""Choose and read frames of a video at a steady rate, as transformers does."""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from PIL import Image

from cptjax.common.images import find_file, image_size, open_image

DEFAULT_FPS = 2.0


@dataclasses.dataclass(frozen=True)
class VideoClip:
    """The frames of a video that the model gets."""

    size: tuple[int, int]  # width, height
    indices: tuple[int, ...]
    fps: float  # of the chosen frames
    native_fps: float  # of all frames

    def pair_times(self, temporal: int) -> tuple[float, ...]:
        """Return the second of each group of `temporal` frames: the mean of its first and last."""
        frames = [*self.indices, *self.indices[-1:] * (-len(self.indices) % temporal)]
        seconds = [i / self.native_fps for i in frames]
        pairs = zip(seconds[::temporal], seconds[temporal - 1 :: temporal], strict=True)
        return tuple((first + last) / 2 for first, last in pairs)


FrameChoice = Callable[[int, float, float, int], tuple[int, ...]]


def probe_video(source: Any, fps: float, temporal: int, choose: FrameChoice) -> VideoClip:
    """Choose the frames of a video from its header; of a list of frames, all are used, at `fps`."""
    if fps <= 0:
        raise ValueError(f"fps={fps}; expected frames per second > 0")
    if is_frame_list(source):
        if not source:
            raise ValueError("a video: expected a path or a list of frames, got an empty list")
        return VideoClip(image_size(source[0]), tuple(range(len(source))), fps, fps)
    av, path = _import_av(), find_file(source)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            native_fps = float(stream.average_rate)
            total = stream.frames or sum(1 for _ in container.decode(stream))
            size = (stream.codec_context.width, stream.codec_context.height)
    except (av.FFmpegError, IndexError, TypeError) as e:
        reason = " ".join(str(e).split())[:120]
        raise ValueError(f"{path}: not a video that can be read ({reason})") from e
    if not total:
        raise ValueError(f"{path}: a video without frames")
    indices = choose(total, native_fps, fps, temporal)
    return VideoClip(size, indices, len(indices) / total * native_fps, native_fps)


def read_frames(source: Any, clip: VideoClip) -> list[Image.Image]:
    """Decode the chosen frames of a video."""
    if is_frame_list(source):
        return [open_image(frame) for frame in source]
    av, path = _import_av(), find_file(source)
    chosen, frames = set(clip.indices), []
    try:
        with av.open(str(path)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in chosen:
                    frames.append(frame.to_image().convert("RGB"))
                if i >= clip.indices[-1]:
                    break
    except av.FFmpegError as e:
        raise ValueError(f"{path}: cut short or corrupt ({' '.join(str(e).split())[:120]})") from e
    if len(frames) != len(clip.indices):
        raise ValueError(
            f"{path}: cut short, {len(frames)} of {len(clip.indices)} frames could be read"
        )
    return frames


def is_frame_list(source: Any) -> bool:
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray))


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as e:
        raise ValueError(
            "reading video files needs the package av: pip install 'cptjax[video]'; "
            "a list of frames needs nothing"
        ) from e
    return av
