"""Where words end: at white space and marks, but for scripts that are written without spaces between words."""

import re
import unicodedata


# Thai, Lao; Myanmar; Khmer; kana; Han.
_UNSPACED = (
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Vowel signs and accents are no `\w`, and words of many scripts would end at each of them.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
_SPACED = rf"(?:(?!{_UNSPACED})[\w{_MARKS}])"
_INSIDE = re.compile(_SPACED + _SPACED)
_RUNS = re.compile(rf"({_UNSPACED}+)|{_SPACED}+")


def normalized(text: str) -> str:
    """Lower case, typographic apostrophes made plain, runs of white space made one space, accents put on their letters."""
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    return re.sub(r"\s+", " ", text).strip().lower()


def cuts_word(text: str, position: int) -> bool:
    """Whether a cut before this character would go through a word. Where none is set apart it is taken not to."""
    return position > 0 and _INSIDE.match(text, position - 1) is not None


def words_of(text: str) -> set[str]:
    """The words of a normalized text; where none is set apart, pairs of neighbouring characters in their place."""
    if text.isascii():
        return set(re.findall(r"\w+", text))
    found = set()
    for match in _RUNS.finditer(text):
        run = match[0]
        found.update((run[at : at + 2] for at in range(len(run) - 1)) if match[1] and len(run) > 2 else (run,))
    return found
