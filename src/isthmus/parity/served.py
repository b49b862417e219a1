"""Whether a bundle has what a server reads beside the weights: a check of layer "files", asked before sealing."""

from __future__ import annotations

from pathlib import Path

from isthmus.data.tokenizer import Tokenizer, has_tokenizer
from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import read_object
from isthmus.formats.files.published import CONFIG
from isthmus.recipe.architecture import text_config
from isthmus.records import Check, CheckOutcome

NAME = "the tokenizer can be served"


def check_served(bundle_folder: Path, *, elsewhere: bool = False) -> Check:
    """What is wrong with the tokenizer. Of a bundle that is verified as it is served `elsewhere`, it is a caution.

    So it is where no tokenizer was ever there: token ids are all that it can be sent.
    """
    if not has_tokenizer(bundle_folder):
        return _check("caution", "there is none: only an engine that is sent token ids can use this bundle")
    try:
        tokenizer = Tokenizer.load(bundle_folder)
    except IsthmusError as error:
        return _check("caution" if elsewhere else "fail", f"`isthmus serve` cannot use it: {error}")
    size = text_config(read_object(bundle_folder / CONFIG)).get("vocab_size")
    outside = [token for token in tokenizer.ends if size is not None and token >= size]
    if outside:
        return _check("fail", f"it ends answers with the token {outside[0]}, and the model has {size} tokens")
    return _check("pass", f"{tokenizer.vocab_size} tokens, a chat template, {len(tokenizer.ends)} ends of an answer")


def _check(outcome: CheckOutcome, detail: str) -> Check:
    return Check(layer="files", name=NAME, outcome=outcome, detail=detail)
