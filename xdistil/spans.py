"""Entities of tagged words: where they lie in the text, and how sure the model is."""

import re
import statistics


def entities(text: str, tags: list[str], scores: list[float]) -> list[dict]:
    """The entities of a text whose words are separated by white space: type, first character and the one after the
    last, text, mean probability (0..1) of its words' tags, first word and the one after the last. An I- that continues
    nothing starts an entity, as in conlleval."""
    places, found, last = [match.span() for match in re.finditer(r"\S+", text)], [], "O"
    for word, ((start, end), tag, score) in enumerate(zip(places, tags, scores, strict=True)):
        if tag != "O" and (tag[0] == "B" or last[2:] != tag[2:]):
            found.append({"type": tag[2:], "start": start, "words": [word], "scores": []})
        if tag != "O":
            found[-1] |= {"end": end, "words": [found[-1]["words"][0], word + 1]}
            found[-1]["scores"].append(score)
        last = tag
    return [{"type": x["type"], "start": x["start"], "end": x["end"], "text": text[x["start"] : x["end"]],
             "score": round(statistics.fmean(x["scores"]), 4), "words": x["words"]} for x in found]
