"""Words that are split, and the pieces that they were split into: what the tests of token splitting share."""

from hf_backdoor.defenses.mbtsad.splitting import TokenSplit


EVERYTHING = TokenSplit(rate=1.0, copies=2)


def pieces_of(text, split):
    """The two pieces of each word that was cut. Written for texts of single spaces, without punctuation."""
    after, cut = split.split(" "), []
    for word in text.split(" "):
        first = after.pop(0)
        if first != word:
            cut.append((first, after.pop(0)))
            assert "".join(cut[-1]) == word
    assert not after
    return cut
