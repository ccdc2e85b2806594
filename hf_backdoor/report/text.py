"""Making text that came from a model or a data set safe to show. It is hostile input."""

import re
import unicodedata


def plain(text: str, limit: int | None = None) -> str:
    """
    One line of text without control characters.

    Line breaks and tabs become spaces. Every other control or invisible character (terminal escapes, zero-width
    characters, direction overrides) becomes a visible escape such as `\\x1b`, because it may be the trigger itself.

    Args:
        text (`str`): Any text.
        limit (`int`, *optional*): Longest result, in characters. Longer ones end in an ellipsis.

    Returns:
        `str`: The text, on one line.
    """
    text = re.sub(r"[\t\n\v\f\r\u0085\u2028\u2029]+", " ", text)
    text = "".join(_visible(character) for character in text)
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return text


def _visible(character: str) -> str:
    if unicodedata.category(character).startswith("C"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def escape_markdown(text: str) -> str:
    """
    Text that Markdown, tables included, shows as it is: no markup, HTML, named link or image comes out of it.

    Args:
        text (`str`): Any text.

    Returns:
        `str`: Markdown on one line.
    """
    text = re.sub(r"([\\`*_\[\]<>|~$@&])", r"\\\1", plain(text))
    # What only counts where a line starts: headings, lists, rules.
    text = re.sub(r"^(\s*)([-+#=])", r"\1\\\2", text)
    text = re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    # GitHub makes a link of a bare address.
    return re.sub(r"(?i)(www)(?=\.)|:(?=//)", lambda found: f"{found[1]}\\" if found[1] else "\\:", text)


def fenced(text: str, language: str = "") -> str:
    """
    A Markdown code block that its content cannot close.

    Args:
        text (`str`): Content. Line breaks are kept.
        language (`str`, *optional*): Name for the syntax highlighter.

    Returns:
        `str`: The block, without a line break at its end.
    """
    lines = [plain(line) for line in text.splitlines()]
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])
