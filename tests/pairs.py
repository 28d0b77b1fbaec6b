"""Chooses cases of tests that run in an interpreter: every two values of parameters still meet."""

from itertools import combinations


def chosen(items: list, backend: str) -> set:
    """Return the items without the cases of this backend that add no pair of values to others."""
    kept, by_test = set(), {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") == backend and len(parameters) > 3:
            # By identity: values that are equal count as two rather than the other way round.
            values = [(name, id(value)) for name, value in sorted(parameters.items())]
            by_test.setdefault(item.nodeid.partition("[")[0], {})[item] = values
        else:
            kept.add(item)
    for cases in by_test.values():
        kept.update(cover(cases))
    return kept


def cover(cases: dict[object, list]) -> list:
    """Choose cases, the one with the most new pairs first, until the others have no new one."""
    pairs = {case: set(combinations(values, 2)) for case, values in cases.items()}
    covered, result = set(), []
    while pairs:
        best = max(pairs, key=lambda case: len(pairs[case] - covered))
        new = pairs.pop(best) - covered
        if not new:
            break
        covered |= new
        result.append(best)
    return result
