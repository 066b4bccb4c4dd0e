"""What the trade's cleaning tool does to tags and captions: rules in a fixed order, on plain text."""

from __future__ import annotations

import re

SEPARATOR = ", "
FACE = "^_^"  # the one tag whose underscore is no blank
RATING = ", rating"  # the tagger's judgement and all behind it
SEVERAL_PEOPLE = ("girls", "boys")  # of whom one can't tell whose hair a tag is about

HAIR_LENGTH = re.compile(r"(?:long|short|medium) hair")
HAIR_COLOUR = re.compile(r"[\w-]+ hair")
# of several people: where more than one tag of a group occurs, all of that group are removed
GROUPS = (
    HAIR_LENGTH,
    re.compile(r"(?:bob|hime) cut"),
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(
        r"ponytail|braid|ahoge|twintails|[\w-]+ bun|single hair bun|single side bun|two side up|two tails"
        r"|[\w-]+ braid|sidelocks"
    ),
)
GENERAL_TAG = "hair ornament"  # besides tags of one word: goes where a longer one says the same and more

CAPTION_RULES = (  # from, to: each until nothing changes, in this order
    ("anime anime", "anime"),
    ("young ", ""),
    ("anime girl", "girl"),
    ("cartoon female", "girl"),
    ("cartoon lady", "girl"),
    ("cartoon character", "girl"),
    ("cartoon woman", "girl"),
    ("cartoon women", "girls"),
    ("cartoon girl", "girl"),
    ("anime female", "girl"),
    ("anime lady", "girl"),
    ("anime character", "girl"),
    ("anime woman", "girl"),
    ("anime women", "girls"),
    ("lady", "girl"),
    ("female", "girl"),
    ("woman", "girl"),
    ("women", "girls"),
    ("people", "girls"),
    ("person", "girl"),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"),
    ("a cartoon anime drawing", "a drawing"),
    ("a cartoon drawing", "a drawing"),
    ("girl girl", "girl"),
)


def clean_tags(tags: str) -> str:
    """Tags without underscores, ratings, what can't be told of several people, and tags that others imply.

    Cleaning twice changes nothing more.
    """
    tags = FACE.join(part.replace("_", " ") for part in tags.split(FACE))
    tags = tags.partition(RATING)[0]
    several_people = any(word in tags for word in SEVERAL_PEOPLE)
    separate = tags.split(SEPARATOR)
    if several_people:
        for group in GROUPS:
            separate = _without_rivals(separate, group)
        separate = _without_rivals(separate, HAIR_COLOUR, spared=HAIR_LENGTH)
    return SEPARATOR.join(tag for tag in separate if not _is_implied(tag, separate))


def _without_rivals(tags: list[str], group: re.Pattern[str], spared: re.Pattern[str] | None = None) -> list[str]:
    """The tags less those of the group, if there is more than one; tags that are `spared` are none of it."""
    is_rival = [bool(group.fullmatch(tag)) and not (spared and spared.fullmatch(tag)) for tag in tags]
    if sum(is_rival) <= 1:
        return tags
    return [tag for tag, rival in zip(tags, is_rival, strict=True) if not rival]


def _is_implied(tag: str, tags: list[str]) -> bool:
    """Whether it is a general tag of which a longer one is a special case: "shirt" beside "white shirt"."""
    is_general = " " not in tag or tag == GENERAL_TAG
    return is_general and any(len(other) > len(tag) and other.endswith(tag) for other in tags)


def clean_caption(caption: str) -> str:
    """The caption in the words that the trade uses for drawings.

    Cleaning twice may change more: "a cartoon person" becomes "a cartoon girl", then "a girl".
    """
    for words, replacement in CAPTION_RULES:
        while words in caption:
            caption = caption.replace(words, replacement)
    return caption
