"""Detect the language of a response with the package langdetect (the extra `ifeval`)."""

import functools
import importlib.util
from collections.abc import Callable


def require_langdetect(reason: str) -> None:
    """Raise a ValueError unless langdetect is installed."""
    if importlib.util.find_spec("langdetect") is None:
        raise ValueError(
            f"{reason} need the package langdetect, which is not installed; "
            "run pip install 'cptjax[ifeval]'"
        )


@functools.cache
def _load_detector() -> tuple[Callable[[str], str], type[Exception]]:
    require_langdetect("constraints on the language of a response")
    import langdetect

    langdetect.DetectorFactory.seed = 0  # else the same text gets different languages
    return langdetect.detect, langdetect.LangDetectException


@functools.lru_cache(maxsize=1 << 12)  # the loose score checks a response several times
def detect_language(text: str) -> str | None:
    """Return the code of a text's language, such as "en", or None for a text without letters."""
    detect, no_language = _load_detector()
    try:
        return detect(text)
    except no_language:
        return None
