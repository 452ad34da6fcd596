"""Sequences of one length: truncation, windows and padding of a documented tokenizer."""

from operator import index
from typing import Any

from torch import Tensor

from .encodings import BatchEncoding, tensor_of

VERY_LARGE = int(1e30)  # the documented model_max_length of a tokenizer that has none
LONGEST = 2**31  # of a row that is padded


class Batching:
    """The part of a tokenizer that cuts and pads what it has encoded."""

    def limit_of(self, truncation: Any, max_length: int | None, padding: Any) -> int | None:
        """The longest row, or None. ValueError for what is no way to truncate."""
        ways = (True, "longest_first", "only_first", "only_second")
        if truncation not in (*ways, False, None, "do_not_truncate"):
            message = "must be True, False, 'longest_first', 'only_first', 'only_second' or 'do_not_truncate'"
            raise ValueError(f"truncation {message}, not {truncation!r}")
        if truncation is None and max_length is not None and padding is False:
            truncation = True  # as documented: a length alone asks for it
        if truncation not in ways:
            return None
        try:
            limit = self.model_max_length if max_length is None else index(max_length)
        except TypeError as error:
            message = f"max_length must be a number of tokens or None, not {type(max_length).__name__}"
            raise ValueError(message) from error
        return None if limit >= VERY_LARGE else limit

    def windows(self, a: list, b: list | None, limit: int, way: Any, stride: int | None) -> list[tuple]:
        """Both, shortened until they fit; with `stride` what was cut off of the one that is shortened too."""
        n, m = self.lengths(len(a), None if b is None else len(b), limit, way)
        left = self.truncation_side == "left"
        if stride is None or (n == len(a) and m == len(b or ())):
            cut = (lambda ids, n: ids[len(ids) - n :]) if left else (lambda ids, n: ids[:n])
            return [(cut(a, n), None if b is None else cut(b, m))]
        sequence, size = (b, m) if n == len(a) else (a, n)
        if b is not None and n < len(a) and m < len(b):
            message = "needs truncation='only_first' or 'only_second'"
            raise ValueError(f"return_overflowing_tokens of pairs {message}")
        if stride >= size:
            raise ValueError(f"stride {stride} is not less than the {size} tokens that a row may have")
        parts, end = [], len(sequence) if left else 0
        while not parts or (end > 0 if left else end < len(sequence)):
            start = max(0, end - size) if left else max(0, end - (stride if parts else 0))
            stop = end if left else min(len(sequence), start + size)
            parts.append(sequence[start:stop])
            end = (start + stride if start else 0) if left else stop
        return [(part, b) if sequence is a else (a, part) for part in parts]

    def lengths(self, n: int, m: int | None, limit: int, way: Any) -> tuple[int, int]:
        """How many tokens stay of each: by default the longer one is cut, down to as many as the other."""
        over, alone, m = n + (m or 0) - limit, m is None, m or 0
        if over <= 0:
            return n, m
        if way == "only_second" and alone:
            raise ValueError("truncation='only_second' needs a second text")
        if way == "only_second":
            m -= over
        elif way == "only_first" or alone:
            n -= over
        else:
            small, large = min(n, m), max(n, m)
            large = small if small > limit else max(small, limit - small)
            if small + large > limit:
                small = limit // 2
                large = small + limit % 2
            n, m = (small, large) if n <= m else (large, small)
        if min(n, m) < 0 or (way in ("only_first", "only_second") and (n if way == "only_first" else m) == 0):
            message = f"and truncation={way!r} has too few to remove"
            raise ValueError(f"{over} tokens are too many, {message}: give a larger max_length")
        return n, m

    def padded(
        self,
        found: dict[str, list],
        padding: Any,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> dict[str, list]:
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            message = "must be True, False, 'longest', 'max_length' or 'do_not_pad'"
            raise ValueError(f"padding {message}, not {padding!r}")
        if padding in (False, "do_not_pad"):
            return found
        if self.pad_token_id is None:
            raise ValueError(
                "padding needs a pad_token: set tokenizer.pad_token = tokenizer.eos_token, or "
                "add one with tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
            )
        side = side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {side!r}")
        longest = max(map(len, found["input_ids"]), default=0)
        if padding == "max_length":
            longest = self.model_max_length if max_length is None else max_length
            if longest >= VERY_LARGE:
                raise ValueError("padding='max_length' needs max_length: the tokenizer has none")
        longest = -(-longest // multiple) * multiple if multiple else longest
        if longest > LONGEST:
            raise ValueError(f"rows cannot be padded to {longest} tokens: give at most {LONGEST}")
        fillers = {
            "input_ids": self.pad_token_id,
            "token_type_ids": self.pad_token_type_id,
            "attention_mask": 0,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
            "word_ids": None,
        }

        def filled(row: list, filler: Any) -> list:
            more = [filler] * (longest - len(row))
            return [*more, *row] if side == "left" else [*row, *more]

        return {
            name: [filled(row, fillers[name]) for row in rows] if name in fillers else rows
            for name, rows in found.items()
        }

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Rows of one length, from encodings of different ones, as a data collator needs it."""
        if isinstance(encoded_inputs, list | tuple):
            encoded_inputs = {name: [one[name] for one in encoded_inputs] for name in encoded_inputs[0]}
        single = not isinstance(encoded_inputs["input_ids"][0], list | tuple | Tensor)
        batch = {name: [rows] if single else rows for name, rows in encoded_inputs.items()}
        found = {
            name: [[*map(int, row)] if hasattr(row, "__len__") else row for row in rows]
            for name, rows in batch.items()
        }
        if return_attention_mask is not False:
            found.setdefault("attention_mask", [[1] * len(row) for row in found["input_ids"]])
        done = self.padded(found, padding, max_length, pad_to_multiple_of, padding_side)
        if return_tensors is None and single:
            return BatchEncoding({name: rows[0] for name, rows in done.items()})
        return BatchEncoding({name: tensor_of(name, rows, return_tensors) for name, rows in done.items()})
