"""Write the word for what a catalogue holds: "item", or what `data.items.noun` says."""

from __future__ import annotations

import re

ENDS_LIKE_BUS = re.compile(r"(s|x|z|ch|sh)$")
ENDS_LIKE_STORY = re.compile(r"[^aeiou]y$")
ITEMS = re.compile(r"\b(items?)\b", re.IGNORECASE)


def plural(noun: str) -> str:
    """Return the regular English plural of a noun.

    Examples
    --------
    >>> plural("song"), plural("story"), plural("dish"), plural("day")
    ('songs', 'stories', 'dishes', 'days')
    """
    if ENDS_LIKE_STORY.search(noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if ENDS_LIKE_BUS.search(noun) else f"{noun}s"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Examples
    --------
    >>> counted(1, "event"), counted(2000, "story")
    ('1 event', '2,000 stories')
    """
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an".

    Examples
    --------
    >>> with_article("item"), with_article("song")
    ('an item', 'a song')
    """
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def spoken(text: str, noun: str) -> str:
    """Return a sentence about items as one about what the catalogue holds.

    Examples
    --------
    >>> spoken("most popular items", "dish"), spoken("item-kNN is better", "item")
    ('most popular dishes', 'item-kNN is better')
    """
    if noun == "item":
        return text
    return ITEMS.sub(lambda found: plural(noun) if found[1].lower() == "items" else noun, text)
