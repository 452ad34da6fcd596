"""Several mistakes of a port, told apart by their own stages.

Each stage is computed out of what the port itself had before it: there a mistake shows in its own stage only,
whatever is wrong elsewhere.
"""

from collections.abc import Iterable

from . import fit
from .arithmetic import Arithmetic
from .fit import Place
from .formula import stage_order
from .mistakes import Mistake
from .noise import BEYOND, spread
from .rows import in_units
from .search import NOT_COMPUTED, Search

LIMIT = 4  # mistakes of a port
TRIED = 3  # places at which the next mistake is looked for


def told_apart(search: Search, known: list[Mistake], numbers: bool = False) -> Iterable[tuple[Mistake, ...]]:
    """The mistakes without which some stage does not follow from what the port had before it, in the order of
    their stages. With `numbers` those too that have a number to be fitted."""
    given: tuple[Mistake, ...] = ()
    stages: list[str] = []  # in which each of them shows
    wrong = off(search, ())
    while wrong and len(given) < LIMIT:
        found = next_mistake(search, known, given, wrong, numbers)
        if found is None:
            return
        m, stage, wrong = found
        given, stages = (*given, m), [*stages, stage]
    if wrong or not given:
        return
    order = sorted(range(len(given)), key=lambda i: stage_order(stages[i]))
    given = tuple(given[i] for i in order)
    fitted = fit.together(search, given) if any(m.number is not None for m in given) else given
    if fitted is not None:
        yield fitted


def next_mistake(
    search: Search, known: list[Mistake], given: tuple[Mistake, ...], wrong: set[Place], numbers: bool
) -> tuple[Mistake, str, set[Place]] | None:
    """A mistake that explains a wrong stage and leaves the fewest wrong, that stage, and what it leaves."""
    for place in places(search, wrong):
        others = fit.at_stage(search, given, place, wrong) if numbers else []
        unused = [m for m in known if m not in given]
        found = [m for m in unused + others if not off(search, (*given, m), place)]
        if best := fewest(search, given, found, wrong):
            return best[0], place[1], best[1]
    return None


def fewest(
    search: Search, given: tuple[Mistake, ...], found: list[Mistake], wrong: set[Place]
) -> tuple[Mistake, set[Place]] | None:
    """The first of the mistakes that leave the fewest stages wrong, and these; None if none helps."""
    left = [off(search, (*given, m)) for m in found]
    best = min(range(len(found)), key=lambda i: len(left[i]), default=None)
    return None if best is None or len(left[best]) >= len(wrong) else (found[best], left[best])


def places(search: Search, wrong: set[Place]) -> list[Place]:
    """The first wrong stage; if nothing explains it, as where two mistakes meet in it, others of another
    kind. Cases with a cache come last: nobody knows the keys that the port has in it."""

    def order(place: Place) -> tuple:
        case, stage = place
        return "past_ids" in search.kit.inputs[case], search.cases.index(case), stage_order(stage)

    found: dict[str, Place] = {}
    for case, stage in sorted(wrong, key=order):
        if stage:
            found.setdefault(stage.rpartition(".")[2], (case, stage))
    return list(found.values())[:TRIED]


def off(search: Search, given: tuple[Mistake, ...], only: Place | None = None) -> set[Place]:
    """(case, stage) that do not follow, with these mistakes, from what the port had before them; of all, or
    `only` of one. The stage is "" where the mistakes cannot be computed."""
    found: set[Place] = set()
    where = search.given_stages() if only is None else {only[0]: [only[1]]}
    for case, names in where.items():
        if not names:
            continue
        try:
            found |= {(case, name) for name in off_in_case(search, case, given, names)}
        except NOT_COMPUTED:
            found.add((case, ""))
    return found


def off_in_case(search: Search, case: str, given: tuple[Mistake, ...], names: list[str]) -> set[str]:
    """What is a little beyond the kit's noise is measured once more: where a mistake makes large values, more
    is rounded."""
    ours = search.some_stages(case, given, names, own_inputs=True)
    units = {name: search.far(case, name, value) for name, value in ours.items()}
    wrong = {name for name in ours if units[name] > BEYOND}
    doubtful = [name for name in wrong if units[name] <= search.coarse]
    if doubtful:
        rounded = search.some_stages(case, given, doubtful, own_inputs=True, do=Arithmetic(1))
        for name in doubtful:
            noise = spread(ours[name], rounded[name])
            if in_units(spread(ours[name], search.values[case][name]), noise) <= BEYOND:
                wrong.remove(name)
    return wrong
