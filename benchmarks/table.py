"""From records to a page: medians with their spread, quotients of medians, and nothing left out."""

from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

Record = dict[str, Any]

TARGET, SOONER = 93.0, 5.0  # percent top-1 on Fashion-MNIST; times that ours should be sooner there


def order(names: Sequence[Any], round_: int) -> list[Any]:
    """Who runs when in a round: A B C, C B A, A B C, ... so that a machine that slows down does so for all."""
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def by_name(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs that ended well, by name, in the order in which the names came."""
    names: dict[str, list[Record]] = {}
    for each in records:
        found = names.setdefault(each["name"], [])
        if "failed" not in each:
            found.append(each)
    return names


def unequal(records: Sequence[Record], equal: Sequence[str], tolerance: float) -> list[str]:
    """Why the runs of a cell cannot be compared: their work differs, or what they learned from it does."""
    runs = {name: found for name, found in by_name(records).items() if found}
    wrong = []
    for what in equal:
        values = {name: sorted({each[what] for each in found}) for name, found in runs.items()}
        if len({value for found in values.values() for value in found}) > 1:
            wrong.append(f"{what} differ: {', '.join(f'{name} {found}' for name, found in values.items())}")
    ours = next((found for name, found in runs.items() if name.startswith("ours")), [])
    if tolerance and ours:
        expected = median(each["loss"] for each in ours)
        for name, found in runs.items():
            loss = median(each["loss"] for each in found)
            if not abs(loss - expected) <= tolerance * expected:
                wrong.append(
                    f"{name} ends with a training loss of {loss:.3f}, ours with {expected:.3f}: over {tolerance:.0%} off"
                )
    return wrong


def quotient(records: Sequence[Record], what: str, over: str) -> float | None:
    """The median value of `what` over that of `over`; None if one of them has none."""
    names = by_name(records)
    if not (names.get(what) and names.get(over)):
        return None
    top, bottom = (median(float(each["value"]) for each in names[name]) for name in (what, over))
    return top / bottom


def by_round(records: Sequence[Record], what: str, over: str) -> list[tuple[float, float]]:
    """The values of `what` and of `over` in each round that has both: they were taken within minutes of each other."""
    names = by_name(records)
    found = [{each["round"]: float(each["value"]) for each in names.get(name, [])} for name in (what, over)]
    return [(found[0][round_], found[1][round_]) for round_ in found[0] if round_ in found[1]]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def spread(values: Sequence[float]) -> str:
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def page(records: Sequence[Record]) -> str:
    """The whole table, in Markdown, from all records of a file."""
    cells = list(dict.fromkeys(each["cell"] for each in records))
    machine: list[str] = next((each["machine"] for each in reversed(records) if "title" in each), [])
    lines = ["# Side by side", "", "How each figure is taken, and how to read this: [README](../README.md).", ""]
    lines += [*(f"- {fact}" for fact in machine), ""]
    for cell in cells:
        mine = [each for each in records if each["cell"] == cell]
        about = [each for each in mine if "title" in each] or [{"title": f"{cell}: interrupted"}]
        runs = [each for each in mine if "title" not in each]
        if "date" not in about[-1]:
            lines += [f"## {about[-1]['title']} after {len(runs)} runs, which are in the file of records", ""]
        else:
            lines += accuracy(about, runs, machine) if cell == "accuracy" else section(about[-1], runs, machine)
    return "\n".join(lines)


def section(about: Record, runs: Sequence[Record], machine: list[str]) -> list[str]:
    names, unit = by_name(runs), about["unit"]
    head = ("who", f"{unit}, median (least to most)", "process: wall s", "CPU s", "peak MB", "last loss", "runs")
    lines = [f"## {about['title']}", "", *stamped(about, machine), "", row(*head), row(*("---" for _ in head))]
    for name, found in names.items():
        if found:
            wall, cpu, rss = (median(each[what] for each in found) for what in ("wall", "cpu", "rss_mb"))
            losses = [each["loss"] for each in found if each.get("loss") is not None]
            loss = f"{median(losses):.3f}" if losses else ""
            values = spread([each["value"] for each in found])
            lines.append(row(name, values, f"{wall:.1f}", f"{cpu:.1f}", number(rss), loss, str(len(found))))
        for why in dict.fromkeys(each["failed"] for each in runs if each["name"] == name and "failed" in each):
            lines.append(row(name, why, "", "", "", "", ""))
    setups = dict.fromkeys(f"- {each['name']}: {each['setup']}" for each in runs if each.get("setup"))
    lines += ["", *setups, "", *quotients(about, runs), *besides(runs)]
    return [*lines, *(f"**UNEQUAL WORK, so that these figures count for nothing:** {why}" for why in about["unequal"]), ""]


def quotients(about: Record, runs: Sequence[Record]) -> list[str]:
    medians = {name: median(each["value"] for each in found) for name, found in by_name(runs).items() if found}
    minus = [(what, over) for what, over in about["minus"] if what in medians and over in medians]
    lines = []
    for what, over in minus:
        differences = [top - bottom for top, bottom in by_round(runs, what, over)]
        within = f" (by round: {min(differences):+,.0f} to {max(differences):+,.0f})" if differences else ""
        lines.append(f"- {what}: {medians[what] - medians[over]:+,.0f} {about['unit']} over {over}{within}")
    lines += [""] * bool(lines)
    if not about["ratios"]:
        return lines
    lines += [row("quotient of medians", "is", "by round", "should be", ""), row(*["---"] * 5)]
    for what, over, low, high, note in about["ratios"]:
        found = quotient(runs, what, over)
        bounds = [f">= {low:g}"] * (low > 0) + [f"<= {high:g}"] * (high < 1e9)
        verdict = "not measured" if found is None else "" if not bounds else "yes" if low <= found <= high else "NO"
        title = f"{what} / {over}" + (f" ({note})" if note else "")
        rounds = [top / bottom for top, bottom in by_round(runs, what, over)]
        within = f"{min(rounds):.3f} to {max(rounds):.3f}" if rounds else ""
        lines.append(row(title, "" if found is None else f"{found:.3f}", within, ", ".join(bounds), verdict))
    return [*lines, ""]


def besides(runs: Sequence[Record]) -> list[str]:
    """Secondary figures of a cell."""
    lines = []
    for name, found in by_name(runs).items():
        for what in dict.fromkeys(what for each in found for what in each.get("also", {})):
            lines.append(f"- {name}: {what}: {spread([each['also'][what] for each in found])}")
    return [*lines, ""] if lines else []


def stamped(about: Record, machine: list[str]) -> list[str]:
    """When and how a cell was measured; and on what, if that is not what the page begins with."""
    return [
        f"{about['date']}, rounds: {about['rounds']}. `{' '.join(about['keys'])}`",
        "",
        *(f"- {fact}" for fact in about["machine"] if fact not in machine),
        f"- before: {about['before']}",
        f"- after: {about['after']}; the machine's host took at most {about['stolen']:.1%} of a run's time",
    ]


def accuracy(about: Sequence[Record], runs: Sequence[Record], machine: list[str]) -> list[str]:
    lines = [f"## {about[-1]['title']}", ""]
    for each in about:
        facts = "; ".join(fact for fact in each["machine"] if fact not in machine)
        lines.append(f"- {each['date']}: before: {each['before']}; after: {each['after']}{facts and f'; {facts}'}")
    lines.append("")
    head = (
        "recipe",
        "seeds",
        "top-1 %, mean and deviation",
        "least",
        "wall s, from start to exit",
        "CPU s",
        "updates",
        "weights",
    )
    lines += [row(*head), row(*("---" for _ in head))]
    names = {name: found for name, found in by_name(runs).items() if found}
    soonest: dict[bool, tuple[float, str]] = {}
    for name, found in sorted(names.items(), key=lambda pair: median(each["wall"] for each in pair[1])):
        tops, walls, cpus = ([each[what] for each in found] for what in ("top1", "wall", "cpu"))
        deviation = f" +- {stdev(tops):.2f}" if len(tops) > 1 else ""
        same = [f"{median(each[what] for each in found):,.0f}" for what in ("updates", "parameters")]
        shown = f"{mean(tops):.2f}{deviation}"
        lines.append(row(name, str(len(found)), shown, f"{min(tops):.2f}", spread(walls), spread(cpus), *same))
        if mean(tops) >= TARGET:
            soonest.setdefault("yaml" in name, (median(walls), name))
    lines += [row(each["name"], each["failed"], *[""] * 6) for each in runs if "failed" in each]
    if len(soonest) == 2:
        (ours, mine), (theirs, peer) = soonest[True], soonest[False]
        verdict = "yes" if theirs / ours >= SOONER else "NO"
        lines += [
            "",
            f"{TARGET} % on the mean: {mine} is {theirs / ours:.2f} times sooner than {peer}; should be >= {SOONER}: {verdict}",
        ]
    return [*lines, ""]
