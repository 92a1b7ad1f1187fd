"""The numbers of the DELLA paper (arXiv 2406.11617v1, tables 1 to 7), in percent."""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS = ("alpaca_eval", "gsm8k", "mbpp", "average")
NAMES = {"alpaca_eval": "AlpacaEval", "gsm8k": "GSM8K", "mbpp": "MBPP", "average": "average"}
# By kind of expert, the benchmark that it is scored on.
BENCHMARKS = {"lm": "alpaca_eval", "math": "gsm8k", "code": "mbpp"}
# The merges, by the experts that are in them.
MERGES: dict[str, tuple[str, ...]] = {
    "LM+Math": ("lm", "math"),
    "LM+Code": ("lm", "code"),
    "Math+Code": ("math", "code"),
    "all three": ("lm", "math", "code"),
}
_TASKS = {name: tuple(BENCHMARKS[expert] for expert in experts) for name, experts in MERGES.items()}
_ALONE = {
    "lm": {"alpaca_eval": 80.8, "gsm8k": 45.9, "mbpp": 31.4},
    "math": {"gsm8k": 63.5},
    "code": {"mbpp": 27.0},
}
# Of each merge the scores on its tasks, then the average.
_TABLE1 = {
    "TA": ((79.1, 60.6, 69.9), (73.3, 0, 36.7), (63.2, 15.6, 39.4), (72.1, 48.3, 0, 40.1)),
    "DARE": ((81.3, 63.3, 72.3), (79.4, 32.8, 56.1), (61.9, 20.0, 41.0), (77.5, 62.7, 29.4, 56.5)),
    "TIES": ((77.6, 66.8, 72.2), (77.4, 9.6, 43.5), (65.9, 20.8, 43.4), (77.5, 66.9, 27.2, 57.2)),
    "DELLA": ((81.8, 64.1, 72.9), (79.7, 35.2, 57.5), (64.9, 20.0, 42.4), (80.4, 61.8, 31.4, 57.9)),
}
_TABLE4 = {
    "TA": ((73.7, 65.2, 69.5), (67.2, 33.2, 50.2), (51.2, 7.8, 29.6), (62.2, 55.8, 0, 40.1)),
    "DARE": ((72.7, 64.8, 68.9), (67.6, 33.0, 50.3), (48.8, 7.0, 27.9), (63.1, 55.0, 30.2, 49.4)),
    "TIES": ((72.1, 65.7, 68.9), (64.9, 34.6, 49.8), (52.9, 5.6, 29.3), (63.6, 57.7, 32.2, 51.2)),
    "DELLA": ((75.0, 65.5, 70.2), (65.7, 34.8, 50.2), (48.7, 8.6, 28.6), (77.5, 66.8, 29.8, 58.0)),
}
_TABLE5 = {
    "WANDA, top-K": ((78.2, 63.4, 70.8), (54.8, 5, 29.9), (58.6, 24, 41.3), (67.6, 57.8, 28, 51.2)),
    "WANDA, p by rank": (
        (81.3, 62.5, 71.9), (80.7, 30.6, 55.6), (63.8, 17.8, 40.8), (75.4, 60.9, 28.6, 55.0),
    ),
    "DELLA": _TABLE1["DELLA"],
}  # fmt: skip
_TABLE2 = {"without rescale": (42.2, 25.6, 33.9), "with rescale": (63.8, 19.2, 41.5)}
# DARE without and with rescale, DELLA without and with.  The paper does not name the expert or its task.
_TABLE3 = {
    0.3: (39.7, 48.5, 42.1, 47.3),
    0.5: (33.7, 47.3, 34.9, 48.5),
    0.7: (13.0, 43.3, 19.7, 48.8),
    0.8: (2.4, 45.5, 2.4, 49.1),
    0.9: (0, 46.4, 0.3, 49.1),
}
# DARE, MAGPRUNE by row and by layer, random ranks by row and by layer.
_TABLE6 = {
    0.3: (63.6, 65.2, 64.2, 63.0, 64.2),
    0.5: (62.7, 64.8, 63.3, 65.5, 62.1),
    0.7: (61.5, 64.2, 61.2, 63.6, 61.5),
    0.8: (65.8, 64.5, 62.4, 65.5, 62.1),
    0.9: (61.8, 63.9, 62.1, 62.1, 61.8),
    0.91: (63.3, 61.8, 63.9, 63.3, 60.9),
    0.92: (61.5, 63.0, 61.8, 58.8, 65.2),
    0.93: (65.2, 64.8, 64.2, 59.1, 64.2),
    0.94: (59.7, 64.5, 64.2, 55.5, 60.0),
}
_TABLE7 = {
    0.1: ((80.5, 59.9, 70.2), (74.1, 0, 37.0), (61.9, 16.6, 39.3), (73.2, 54.5, 11.4, 46.4)),
    0.3: ((81.2, 62.9, 72.1), (77.0, 0, 38.5), (61.8, 18.4, 40.1), (76.6, 62.3, 30.2, 56.4)),
    0.5: ((80.4, 64.5, 72.4), (80.2, 15.2, 47.7), (62.6, 20.6, 41.6), (79.4, 63.0, 30.0, 57.5)),
    0.7: ((78.7, 61.1, 69.9), (79.8, 34.0, 56.9), (63.3, 19.0, 41.2), (77.0, 62.2, 23.0, 54.1)),
    0.9: ((68.3, 45.5, 57.0), (73.7, 26.2, 50.0), (62.2, 12.8, 37.5), (68.8, 44.6, 12.8, 42.1)),
}


def published(table: int, models: str, label: str) -> Mapping[str, float]:
    """The paper's scores of a row by task, and their "average"; {} where it has no such row."""
    return _PUBLISHED.get((table, models, label), {})


def _merges(table: int, label: str, values: tuple[tuple[float, ...], ...]) -> dict[_Key, dict[str, float]]:
    return {
        (table, models, label): dict(zip((*_TASKS[models], "average"), scores, strict=True))
        for models, scores in zip(MERGES, values, strict=True)
    }


_Key = tuple[int, str, str]
_PUBLISHED: dict[_Key, dict[str, float]] = {(1, role, "alone"): scores for role, scores in _ALONE.items()}
for _number, _table in ((1, _TABLE1), (4, _TABLE4), (5, _TABLE5)):
    for _label, _values in _table.items():
        _PUBLISHED |= _merges(_number, _label, _values)
for _label, _scores in _TABLE2.items():
    _PUBLISHED[2, "Math+Code", _label] = dict(zip((*_TASKS["Math+Code"], "average"), _scores, strict=True))
for _p, _row in _TABLE3.items():
    for _label, _value in zip(
        (f"{name} {how} rescale" for name in ("DARE", "DELLA") for how in ("without", "with")),
        _row,
        strict=True,
    ):
        _PUBLISHED[3, f"p={_p:g}", _label] = {"mbpp": _value}
for _p, _row6 in _TABLE6.items():
    for _label, _value in zip(("DARE", "row", "layer", "random row", "random layer"), _row6, strict=True):
        _PUBLISHED[6, f"p={_p:g}", _label] = {"gsm8k": _value}
for _p, _values in _TABLE7.items():
    _PUBLISHED |= _merges(7, f"p={_p:g}", _values)
