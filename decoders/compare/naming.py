"""What a difference is called: a known mistake, several that their stages tell apart, one with a number in
it, active dropout, two mistakes at once."""

from . import dropout, fit, mistakes, stagewise
from .kit import Kit
from .mistakes import Mistake
from .noise import BEYOND
from .report import Finding, Row
from .search import Search, Values


def named(kit: Kit, values: Values, rows: list[Row], dtype: str) -> list[Finding]:
    """The mistakes that bring the difference back to the noise: one, as many as their own stages tell apart,
    one with a number in it, several of both kinds by their own stages, two; nothing if none of them explains
    what was given.

    Inner values that hooks have caught may stand under a wrong name, as where a port takes the product with
    our q for its k. So what the port itself calls by name decides, where all together give no answer.
    """
    half = dtype in ("bfloat16", "float16")
    known = [m for m in mistakes.of(kit.family) if half or not m.half and not m.rounds]
    sure = [row for row in rows if not row.seen]
    every = Search(kit, values, rows, dtype)
    if len(sure) in (0, len(rows)):
        named_only = every
    else:
        names = {(row.case, row.stage) for row in sure}
        kept = {
            case: {name: value for name, value in found.items() if (case, name) in names}
            for case, found in values.items()
        }
        named_only = Search(kit, {case: found for case, found in kept.items() if found}, sure, dtype)
    ones = [(m,) for m in known]
    for search in [every] if named_only is every else [every, named_only]:
        if found := search.explaining(ones):
            return [finding(kit, rows, search, found)]
    if found := every.explaining(stagewise.told_apart(every, known)):
        return [finding(kit, rows, every, found)]
    for search in [every] if named_only is every else [every, named_only]:
        if found := search.explaining(fit.candidates(search), fall=10):
            return [finding(kit, rows, search, found)]
    if (active := dropout.active_dropout(every)) is not None:
        return [finding(kit, rows, every, [(0.0, (active,))])]
    if found := every.explaining(stagewise.told_apart(every, known, numbers=True), fall=10):
        return [finding(kit, rows, every, found)]
    pairs = list(named_only.pairs(known))
    if found := named_only.explaining(pairs):
        return [finding(kit, rows, named_only, found)]
    return in_part(kit, named_only, rows, known, ones + pairs)


def finding(kit: Kit, rows: list[Row], search: Search, found: list) -> Finding:
    """The best of what explains, and how much it explains."""
    (units, best), *others = found
    message = [row for row in rows if row.stage in search.values.get(row.case, {})]
    count = sum(int((~kit.expected[row.case][row.stage].isnan()).sum()) for row in message)
    before = max(row.units for row in message)
    return Finding(best, units, before, count, [other for _, other in others if len(other) == len(best)])


def in_part(
    kit: Kit, search: Search, rows: list[Row], known: list[Mistake], candidates: list
) -> list[Finding]:
    """Which of `candidates` explains the plain case, and with one more mistake more of the others."""
    if "plain" not in search.cases or len(search.cases) < 2 or not search.wrong["plain"]:
        return []
    if not (found := search.only(["plain"]).explaining(candidates)):
        return []

    def explained(given: tuple[Mistake, ...]) -> list[str]:
        return [case for case in search.cases if search.only([case]).precisely(given) <= BEYOND]

    given = found[0][1]
    cases = explained(given)
    rest = [search.only([case]) for case in search.cases if case not in cases]
    wider_ones = [(*given, m) for m in known if m not in given]
    for wider in [w for w in wider_ones if any(one.explaining([w]) for one in rest)]:
        if set(cases) < set(reached := explained(wider)):
            given, cases = wider, reached
    part = search.only(cases)
    answer = finding(kit, rows, part, part.explaining([given]))
    answer.cases = cases if len(cases) < len(search.cases) else []
    return [answer]
