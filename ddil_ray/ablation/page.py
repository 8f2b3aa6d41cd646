"""The page of a comparison, from report.json alone (and the sample pictures)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddil_ray.ablation.summary import TEACHER
from ddil_ray.report import (
    Cell,
    Figure,
    Line,
    Note,
    Part,
    Strip,
    Table,
    bar_chart,
    curve_chart,
    point_chart,
    stacked_chart,
)
from ddil_ray.results import SCORES

__all__ = ["TERMINAL_HEADER", "Pictures", "group_name", "sections", "shown", "summary_lines", "terminal_rows"]

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Pictures = Mapping[tuple[str, str], Mapping[str, bytes]]
"""(group, arm) -> first samples as PNG by name, of one seed; the group as `group_name` writes it."""

_CURVES = ("frechet_teacher", "frechet_data", "paired_error", "coverage")
_QUARTERS = ("0 to .25", ".25 to .5", ".5 to .75", ".75 to 1")


def shown(value: float | None) -> str:
    """A number as the page writes it."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _range(found: Mapping[str, Any] | None) -> str:
    """mean [low, high], or the mean alone where there is one seed."""
    return "" if found is None else f"{shown(found['mean'])} {_bounds(found)}".strip()


def _bounds(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f"[{shown(found['low'])}, {shown(found['high'])}]"


def group_name(group: Mapping[str, str]) -> str:
    """How a group is named; nothing where there is one without a name."""
    return ", ".join(group.values())


def summary_lines(report: Report) -> list[str]:
    """What stands on top of the page."""
    about, seeds = report["about"], report["seeds"]
    paired = f"{len(seeds)} paired seeds; [95 % confidence intervals by Student's t over seeds]."
    return [
        f"Every arm against \u201c{report['baseline']}\u201d. "
        + (paired if len(seeds) > 1 else "One seed: no interval can be given, and a difference may be chance."),
        f"{about.get('num_samples', '?')} samples each; features: {about.get('features', 'unknown')}. "
        "Frechet distances and the paired error are better lower, the rest higher.",
        "Coloured: the interval of the difference leaves out 0, green for better and red for worse. One in twenty does "
        "so by chance.",
        "All numbers stand in report.json beside this page, under the key that each caption names.",
    ]


def sections(report: Report, pictures: Pictures) -> list[tuple[str, list[Part]]]:
    """The page's sections; those without content are left out."""
    made: dict[str, list[Part]] = {
        "Warnings": list(_warnings(report)),
        "Comparisons": list(_comparison_tables(report)),
        "Quality against steps": list(_quality_figures(report)),
        "Coverage against fidelity": list(_fidelity_figures(report)),
        "Shift between forward and visited states": list(_shift_figures(report)),
        "Student's error on the states it meets": list(_error_figures(report)),
        "Times t that each arm was trained on": list(_time_parts(report)),
        "Cost": list(_cost_figures(report)),
        "Samples from the same noises": list(_sample_strips(report, pictures)),
    }
    return [(title, parts) for title, parts in made.items() if parts]


def _warnings(report: Report) -> Iterator[Part]:
    for text in report["notes"]:
        yield Note(text, warning=True)
    for row in report["laws"]:
        if row["differs"]:
            yield Note(
                f"{_where(row)}{row['arm']} and {report['baseline']} were trained on different times t (total "
                f"variation {shown(row['total_variation'])}, p = {shown(row['p_value'])}). Their scores may differ "
                "for that reason alone. report.json: laws",
                warning=True,
            )
    for failure in report["failures"]:
        name = f"{_where(failure)}{failure['arm']}, seed {failure['seed']}"
        yield Note(f"{name} failed twice and is left out: {failure['error']}", warning=True)


def _where(row: Row) -> str:
    name = group_name(row["group"])
    return f"{name}: " if name else ""


def _by_group(report: Report, key: str) -> Iterator[tuple[str, list[Row]]]:
    """Name and rows of every group that has any under `key`."""
    for group in report["groups"]:
        rows = [row for row in report[key] if row["group"] == group]
        if rows:
            yield group_name(group), rows


def _of_group(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def _comparison_tables(report: Report) -> Iterator[Part]:
    several = len(report["seeds"]) > 1
    for name, rows in _by_group(report, "comparisons"):
        found = {(r["arm"], r["steps"], r["score"]): r for r in rows}
        scores = [score for score in SCORES if any(r["score"] == score for r in rows)]
        caption = f"ratio to {report['baseline']}" + (" [95 % interval], seeds better of all" if several else "")
        yield Table(
            _of_group(name, caption),
            ("arm", "steps", *(SCORES[score] for score in scores)),
            [
                (arm, shown(steps), *(_ratio_cell(found.get((arm, steps, score))) for score in scores))
                for arm, steps in dict.fromkeys((r["arm"], r["steps"]) for r in rows)
            ],
            source="report.json: comparisons",
        )
    if report["comparisons"]:
        header = ("group", "arm", "score", "steps", "baseline", "this arm", "difference", "ratio", "better", "seeds")
        caption, every = "Every score: means, paired differences and ratios", _comparison_rows(report)
        yield Table(caption, header, every, source="report.json: comparisons", names=3, folded=True)


def _comparison_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            group_name(r["group"]),
            r["arm"],
            r["score"],
            shown(r["steps"]),
            *(_range(r[key]) for key in ("of_baseline", "of_arm", "difference", "ratio")),
            shown(r["better"]),
            shown(r["seeds"]),
        )
        for r in report["comparisons"]
    ]


TERMINAL_HEADER = ("group", "arm", "score", "steps", "baseline", "arm's", "ratio", "better")


def terminal_rows(report: Report) -> list[tuple[str, ...]]:
    """The main scores for a terminal, under `TERMINAL_HEADER`."""
    return [
        (
            group_name(r["group"]),
            r["arm"],
            SCORES[r["score"]],
            shown(r["steps"]),
            shown(r["of_baseline"]["mean"]),
            shown(r["of_arm"]["mean"]),
            _range(r["ratio"]),
            f"{r['better']}/{r['seeds']}",
        )
        for r in report["comparisons"]
        if r["score"] in _CURVES
    ]


def _ratio_cell(row: Row | None) -> Cell:
    """The ratio, and whether the interval leaves no doubt about the better side."""
    if row is None:
        return Cell("")
    difference = row["difference"]
    found = row["ratio"] or difference
    if difference["low"] is None:
        return Cell(shown(found["mean"]))
    gain = {"lower": -1, "higher": 1, "neither": 0}[row["better_is"]]
    ends = difference["low"] * gain, difference["high"] * gain
    mood = "better" if min(ends) > 0 else "worse" if max(ends) < 0 else ""
    return Cell(shown(found["mean"]), f"{_bounds(found)} {row['better']}/{row['seeds']}", mood)


def _arm_names(report: Report) -> list[str]:
    return [*report["arms"], TEACHER]


def _quality_figures(report: Report) -> Iterator[Part]:
    for name, rows in _by_group(report, "quality"):
        students = {r["steps"] for r in rows if r["arm"] != TEACHER}
        for score in _CURVES:
            lines = list(_quality_lines(report, [r for r in rows if r["score"] == score and r["steps"] in students]))
            if lines:
                low = min(min(line.y) for line in lines)
                log = low > 0 and max(max(line.y) for line in lines) > 10 * low
                svg = curve_chart(lines, x="sampling steps", y=SCORES[score], log_y=log, whole_x=True)
                yield Figure(_of_group(name, SCORES[score]), svg, "report.json: quality")


def _quality_lines(report: Report, rows: Sequence[Row]) -> Iterator[Line]:
    for i, arm in enumerate(_arm_names(report)):
        own = [r for r in rows if r["arm"] == arm]
        if own:
            sure = all(r["low"] is not None for r in own)
            yield Line(
                arm,
                [r["steps"] for r in own],
                [r["mean"] for r in own],
                low=[r["low"] for r in own] if sure else None,
                high=[r["high"] for r in own] if sure else None,
                colour=i,
                dashed=arm == TEACHER,
                plain=arm == TEACHER,
            )


def _fidelity_figures(report: Report) -> Iterator[Part]:
    for name, rows in _by_group(report, "quality"):
        students = {r["steps"] for r in rows if r["arm"] != TEACHER}
        means = {(r["arm"], r["steps"], r["score"]): r["mean"] for r in rows if r["steps"] in students}
        lines, labels = [], []
        for i, arm in enumerate(_arm_names(report)):
            steps = [n for a, n, score in means if a == arm and score == "coverage"]
            steps = [n for n in steps if (arm, n, "frechet_teacher") in means]
            if steps:
                xs, ys = ([means[arm, n, score] for n in steps] for score in ("frechet_teacher", "coverage"))
                lines.append(Line(arm, xs, ys, colour=i, plain=arm == TEACHER))
                labels.append([str(n) for n in steps])
        if lines:
            xs = [x for line in lines for x in line.x]
            log = min(xs) > 0 and max(xs) > 10 * min(xs)
            x, y = f"{SCORES['frechet_teacher']} (left is closer)", f"{SCORES['coverage']} (up is better)"
            svg = point_chart(lines, labels, x=x, y=y, log_x=log)
            yield Figure(_of_group(name, "means; numbers are sampling steps"), svg, "report.json: quality")


def _by_phase(report: Report) -> Iterator[tuple[str, list[Row]]]:
    for name, rows in _by_group(report, "shift"):
        phases = sorted({r["phase"] for r in rows})
        for phase in phases:
            own = [r for r in rows if r["phase"] == phase]
            round_ = f"round of {own[0]['student_steps']} steps" if len(phases) > 1 else ""
            yield ", ".join(part for part in (name, round_) if part), own


def _step_lines(report: Report, rows: Sequence[Row], key: str, **look: Any) -> Iterator[Line]:
    """One line per arm over the student's own steps."""
    for i, arm in enumerate(report["arms"]):
        own = [r for r in rows if r["arm"] == arm and key in r]
        if own:
            found = [r[key] for r in own]
            sure = all(f["low"] is not None for f in found)
            suffix = look.get("suffix", "")
            yield Line(
                arm + suffix,
                [r["step"] for r in own],
                [f["mean"] for f in found],
                low=[f["low"] for f in found] if sure else None,
                high=[f["high"] for f in found] if sure else None,
                colour=i,
                dashed=bool(suffix),
            )


def _shift_figures(report: Report) -> Iterator[Part]:
    for name, rows in _by_phase(report):
        lines = list(_step_lines(report, rows, "energy"))
        floor = next(_step_lines(report, rows, "floor"), None)
        if floor is not None:
            lines.append(Line("no shift (95 % of chance)", floor.x, floor.y, dashed=True, plain=True))
        svg = curve_chart(lines, x="the student's own step", y="energy distance", whole_x=True)
        text = "distance between forward-noised data and the states the student visits, late in training"
        yield Figure(_of_group(name, text), svg, "report.json: shift")


def _error_figures(report: Report) -> Iterator[Part]:
    for name, rows in _by_phase(report):
        lines = [
            *_step_lines(report, rows, "error_visited"),
            *_step_lines(report, rows, "error_forward", suffix=", forward states"),
        ]
        if lines:
            svg = curve_chart(lines, x="the student's own step", y="error", log_y=True, whole_x=True)
            text = "against the teacher, on visited states (full) and on forward states (dashed)"
            yield Figure(_of_group(name, text), svg, "report.json: shift")


def _time_parts(report: Report) -> Iterator[Part]:
    for name, rows in _by_group(report, "times"):
        svg = bar_chart({r["arm"]: r["shares"] for r in rows}, groups=_QUARTERS, x="t", y="share of rows")
        yield Figure(_of_group(name, "all sources of an arm together; arms should agree"), svg, "report.json: times")
    if report["laws"]:
        yield Table(
            f"against {report['baseline']}; chi-square test of equal laws of t",
            ("group", "arm", "total variation", "p"),
            [
                (
                    group_name(r["group"]),
                    r["arm"],
                    Cell(shown(r["total_variation"]), mood=_alarm(r)),
                    shown(r["p_value"]),
                )
                for r in report["laws"]
            ],
            source="report.json: laws",
            names=2,
        )


def _alarm(row: Row) -> str:
    return "worse" if row["differs"] else ""


def _cost_figures(report: Report) -> Iterator[Part]:
    for name, rows in _by_group(report, "cost"):
        parts = {part: [r["seconds"][part]["mean"] for r in rows] for part in rows[0]["seconds"]}
        svg = stacked_chart(parts, rows=[r["arm"] for r in rows], x="seconds per run")
        yield Figure(_of_group(name, "mean time of a run by what it was spent on"), svg, "report.json: cost")
    for name, rows in _by_group(report, "cost"):
        spent = list(rows[0]["seconds"])
        cells = [(r["arm"], *(_range(r["seconds"][part]) for part in spent), _range(r["total"])) for r in rows]
        yield Table(_of_group(name, "seconds per run"), ("arm", *spent, "all"), cells, "report.json: cost", folded=True)


def _sample_strips(report: Report, pictures: Pictures) -> Iterator[Part]:
    for group in report["groups"]:
        name = group_name(group)
        arms = [arm for arm in report["arms"] if (name, arm) in pictures]
        if not arms:
            continue
        first = pictures[name, arms[0]]
        for steps in sorted({r["steps"] for r in report["quality"] if r["group"] == group and r["arm"] in arms}):
            of_steps = [("teacher", first.get("teacher-reference"))]
            of_steps += [(arm, pictures[name, arm].get(f"student-{steps}-steps")) for arm in arms]
            figures = [Figure(caption, content) for caption, content in of_steps if content is not None]
            if len(figures) > 1:
                yield Strip(_of_group(name, f"{steps} steps" if steps > 1 else "1 step"), figures)
