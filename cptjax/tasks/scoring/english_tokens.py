"""Split English text into sentences and words, close to nltk's punkt and Treebank tokenizers.

IFEval counts sentences and capital words with nltk, whose sentence model is a separate download.
Sentences here differ from punkt's after abbreviations that are not in the list below.
"""

import re

ABBREVIATIONS = set(
    "mr mrs ms dr prof st sr jr gen col sen rep gov lt sgt capt rev hon vs etc e.g i.e cf al inc "
    "ltd co corp fig no vol ed eds approx dept est jan feb mar apr jun jul aug sep sept oct nov "
    "dec mon tue wed thu fri sat sun a.m p.m u.s u.k u.n d.c n.y l.a ph.d b.a m.a".split()
)
# A capitalised word after an abbreviation begins a sentence only if it is common in lower case.
SENTENCE_STARTERS = set(
    "a an and are as at but by can did do does each even every first for from has have he her "
    "here his how however i if in is it its many more most my no not now of on one or our she so "
    "some such that the their then there these they this those to two until was we were what when "
    "where which while who why will with would yes you your".split()
)
CLOSERS = "\"')]}‘’“”«»"
# A mark that may end a sentence, with what closes it; then space and the next word, or the end, or
# a mark that begins the next sentence without a space.
BOUNDARY = re.compile(
    rf"(?P<mark>(?<![.!?])[.!?]+)(?:[{re.escape(CLOSERS)}]*(?:\s+(?P<next>\S)|(?P<end>\s*\Z))"
    r"|(?=[\"'*@({\[‘“]|(?<=[!?])[:;])(?P<joined>\S))"
)
MARK_INSIDE = re.compile(rf"[^.][.!?][*!?:;{re.escape(CLOSERS)}]")
LAST_WORD = re.compile(r"\S+\Z")
# Longest word that can matter before a period; bounds the search backwards.
WORD_WINDOW = 40

TREEBANK_STEPS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\"“”«»„‘’`]|''", r" \g<0> "),
        (r"([:,])(?=\D|\Z)", r" \1 "),
        (r"\.{2,}|[;@#$%&?!*]|--|[\u2012-\u2015]", r" \g<0> "),
        (r"[\]\[(){}<>]", r" \g<0> "),
        (r"(?i)(?<=\S)('s|'m|'d|'ll|'re|'ve)(?=\.?(?:\s|\Z))", r" \1"),
        (r"(?i)(?<=\S)(n't)(?=\.?(?:\s|\Z))", r" \1"),
        (r"(?i)\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b", r" \g<0> "),
    )
)
JOINED_WORDS = re.compile(r"(?i)\A(can|gim|lem|gon|wan|got)(not|me|na|ta)\Z")


def count_sentences(text: str) -> int:
    """Return the number of sentences."""
    count, start = 0, 0
    for boundary in BOUNDARY.finditer(text):
        if not _ends_sentence(text, boundary):
            continue
        stop = boundary.start("next") if boundary["next"] else boundary.end()
        stop = boundary.start("joined") if boundary["joined"] else stop
        count += _has_words(text[start:stop])
        start = stop
    return count + _has_words(text[start:]) + bool(re.search(r"[!?]{2}\s*\Z", text))


def _has_words(piece: str) -> bool:
    """Return whether a piece is a sentence, not the quotes and brackets that close another."""
    return bool(piece.strip().strip(CLOSERS))


def _ends_sentence(text: str, boundary: re.Match) -> bool:
    mark = boundary["mark"]
    if "!" in mark or "?" in mark or boundary["end"] is not None:
        return True
    if boundary["joined"]:
        return len(mark) == 1
    ahead = text[boundary.start("next") :][:WORD_WINDOW].split(maxsplit=1)[0]
    if MARK_INSIDE.search(ahead):  # a quirk of punkt: it sees the end of the next sentence
        return True
    following = re.match(r"[\w']*", ahead)[0]
    window = text[max(0, boundary.start() - WORD_WINDOW) : boundary.start()]
    word = (LAST_WORD.search(window) or [""])[0].lstrip("\"'([{*")
    if word.isdigit() or (len(word) == 1 and word.islower()):
        return not following[:1].islower()
    is_initial = len(word) == 1 and word.isupper()
    if len(mark) > 1 or is_initial or word.lower() in ABBREVIATIONS:
        return following[:1].isupper() and following.lower() in SENTENCE_STARTERS
    return True


def treebank_words(text: str) -> list[str]:
    """Return the tokens of a text: words with their hyphens, and marks, "it's" as "it" "'s"."""
    for pattern, replacement in TREEBANK_STEPS:
        text = pattern.sub(replacement, text)
    words = []
    for word in text.split():
        parts = JOINED_WORDS.match(word)
        words += parts.groups() if parts else [word]
    return words
