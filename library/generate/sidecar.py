"""What made a picture as JSON beside it: everything that its request says, in numbers and words of this program."""

from __future__ import annotations

import dataclasses
import json

from library.generate.model_names import ModelNames
from library.generate.request import GenerationRequest


def sidecar(request: GenerationRequest, names: ModelNames) -> str:
    """A JSON object: the request's fields (those of a first stage inside), and `weights` with names and hashes."""
    weights = dataclasses.asdict(dataclasses.replace(names, networks=names.tags(request.multipliers), networks_at=None))
    del weights["networks_at"]
    fields = {**dataclasses.asdict(request), "weights": weights}
    return json.dumps(fields, ensure_ascii=False, indent=2) + "\n"
