"""Names that are asked for and not here."""

from typing import Any

from .arguments import nearest

OTHER_FRAMEWORKS = {"TF": "tf_model.h5", "Flax": "flax_model.msgpack"}


def missing(name: str, known: dict[str, Any]) -> Any:
    """ImportError with the way out for a class of another framework, else AttributeError."""
    for prefix, file in OTHER_FRAMEWORKS.items():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and isinstance(known.get(own), type):
            raise ImportError(
                f"{name} needs no other framework here: these two lines read {file} as well\n"
                f"    from decoders.hf import {own}\n"
                f"    model = {own}.from_pretrained(FOLDER)"
            )
    raise AttributeError(f"decoders.hf has no {name!r}{nearest(name, known)}")
