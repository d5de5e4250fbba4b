"""The table, the verdict and the picture of examples/recall.py."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from recall_task import CHANCE
from recall_training import FILLERS, GIVEN, PAIRS, TRAINING

INK, FAINT, PALE = "#1f2430", "#8a90a0", "#e8eaf0"
RULES = {"standard": "#1f7a6d", "lambda_outside": "#d08a3e", "no_lambda": "#3f4fa8"}
STATES = {(8, 1): "R = 8", (16, 1): "R = 16", (8, 4): "R = 8, four heads"}  # rank, state heads
CONTEXT, ALONE = "backbone, with context", "backbone, without"

# heading -> where a run's figures hold it
COLUMNS = {str(pairs): ("recall", str(pairs)) for pairs in PAIRS} | {
    "new": ("rewritten", "new"),
    "old": ("rewritten", "old"),
    "others": ("rewritten", "others"),
    "fillers": ("fillers",),
    "zeroed": ("zeroed",),
    "swapped": ("swapped",),
}
FOUR = ("recall", str(GIVEN))
NEAR = 0.03  # of chance: three standard deviations of a mean over the episodes of one seed, and more
LEGEND = (
    f"1 to {PAIRS[-1]}: recall of that many pairs (trained: up to {TRAINING['pairs']}), in %, mean over seeds. "
    f"worst: the worst seed's of {GIVEN}.\n"
    f"new, old, others: after {GIVEN} pairs a key is written again: its new value, its old one, those of the others.\n"
    f"fillers: {GIVEN} pairs, then {FILLERS} filler tokens. zeroed, swapped: {GIVEN} pairs, asked of an empty state,\n"
    "and of that of another episode. These two and the backbone without context are on any combinations of key and\n"
    "value, where a guess is at chance; all others are on combinations that no training has seen."
)


Rows = dict[str, list[dict]]  # name of a row -> the figures of each seed


def row_name(rule: str, rank: int, heads: int) -> str:
    return f"{rule}, {STATES[rank, heads]}"


def values(figures: list[dict], *path: str) -> list[float]:
    """One figure of each seed, none where it is not measured."""
    for key in path:
        figures = [x[key] for x in figures if key in x]
    return figures


def mean(figures: list[dict], *path: str) -> float:
    return statistics.mean(values(figures, *path))


def table(rows: Rows) -> str:
    """In %, means over seeds; as Markdown reads it."""
    headings = list(COLUMNS)
    lines = [["", "seeds", *headings[: len(PAIRS)], "worst", *headings[len(PAIRS) :]]]
    for name, figures in rows.items():
        found = [values(figures, *path) for path in COLUMNS.values()]
        cells = [f"{100 * statistics.mean(x):.1f}" if x else "" for x in found]
        cells.insert(len(PAIRS), f"{100 * min(values(figures, *FOUR)):.1f}")
        lines.append([name, str(len(figures)), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {line[0].ljust(widths[0])} | {' | '.join(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))} |"
        for line in lines
    )


def verdict(rows: Rows) -> tuple[list[str], bool]:
    """What the published rule is to reach -> one line each, and whether all is reached."""
    published = {state: rows[row_name("standard", *state)] for state in STATES}
    one, *larger = published
    reached = [
        (f"{STATES[one]}: {GIVEN} pairs", mean(published[one], *FOUR), 0.90),
        (f"{STATES[one]}: {GIVEN} pairs, worst seed", min(values(published[one], *FOUR)), 0.80),
        *((f"{STATES[state]}: {GIVEN} pairs", mean(published[state], *FOUR), 0.97) for state in larger),
        *((f"{STATES[state]}: new value", mean(published[state], "rewritten", "new"), 0.80) for state in STATES),
        *((f"{STATES[state]}: after fillers", mean(published[state], "fillers"), 0.80) for state in STATES),
    ]
    lines = [(f"{name:<34} {100 * x:5.1f} %, at least {100 * least:.0f}", x >= least) for name, x, least in reached]
    blind = [
        (f"{name}, {control}", mean(figures, *path))
        for name, figures in [(ALONE, rows[ALONE]), *((STATES[state], published[state]) for state in STATES)]
        for control, path in {"4 pairs": FOUR, "zeroed": ("zeroed",), "swapped": ("swapped",)}.items()
        if (control == "4 pairs") == (name == ALONE)
    ]
    lines += [
        (f"{name:<34} {100 * x:5.1f} %, chance {100 * CHANCE:.2f} +- {100 * NEAR:.0f}", abs(x - CHANCE) <= NEAR)
        for name, x in blind
    ]
    return [f"{text:<64} {'reached' if ok else 'MISSED'}" for text, ok in lines], all(ok for _, ok in lines)


# ---------------------------------------------------------------- picture


def picture(path, rows: Rows, footnote: str) -> None:
    """One panel for each size of the state, its rules as lines; one for what is written again, and for fillers."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.2), sharey=True)
    for state, axis in zip(STATES, axes.flat, strict=False):
        _recall_panel(axis, rows, state)
    _bars_panel(axes.flat[3], rows)
    axes.flat[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 0.08))
    for axis in axes.flat:
        axis.axhline(100 * CHANCE, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_ylim(0, 104)
        axis.tick_params(length=0, labelcolor=INK, labelsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(FAINT)
        axis.grid(axis="y", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in axes[:, 0]:
        axis.set_ylabel("values recalled, %", color=FAINT, fontsize=9)
    title = "Pairs are fed, the context is dropped, values are asked for"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK, fontweight="bold")
    figure.text(0.012, 0.008, footnote, fontsize=7.5, color=FAINT)
    figure.tight_layout(rect=(0, 0.02, 1, 0.99))
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def _recall_panel(axis, rows: Rows, state: tuple[int, int]) -> None:
    def line(figures, **style):
        axis.plot(PAIRS, [100 * mean(figures, "recall", str(n)) for n in PAIRS], markersize=4, **style)

    line(rows[CONTEXT], color=INK, linewidth=1.2, label=CONTEXT)
    for rule, colour in RULES.items():
        figures = rows[row_name(rule, *state)]
        seeds = f", {len(figures)} seeds" if len(figures) > 1 else ", 1 seed"
        line(figures, color=colour, linewidth=1.8, marker="o", label=rule + seeds)
        if len(figures) > 1:
            found = [[100 * x for x in values(figures, "recall", str(n))] for n in PAIRS]
            axis.fill_between(PAIRS, [min(x) for x in found], [max(x) for x in found], color=colour, alpha=0.15, lw=0)
    line(rows[ALONE], color=FAINT, linewidth=1.2, label=f"{ALONE}: chance")
    axis.set_title(f"δ-mem, {STATES[state]}", loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xticks(PAIRS, PAIRS)
    axis.set_xlabel("pairs", color=FAINT, fontsize=9)


def _bars_panel(axis, rows: Rows) -> None:
    bars = {
        "new\nvalue": ("rewritten", "new"),
        "other\nkeys": ("rewritten", "others"),
        "after\nfillers": ("fillers",),
        "old\nvalue": ("rewritten", "old"),
        "swapped\nstate": ("swapped",),
    }
    shades = ("#a9d1c9", "#1f7a6d", "#0d3b35")
    for index, (state, shade) in enumerate(zip(STATES, shades, strict=True)):
        for place, where in enumerate(bars.values()):
            height = 100 * mean(rows[row_name("standard", *state)], *where)
            at = place + 0.27 * (index - 1)
            axis.bar(at, height, 0.25, color=shade, label=STATES[state] if place == 0 else None)
            axis.annotate(f"{height:.0f}", (at, height), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    axis.set_xticks(range(len(bars)), bars)
    title = f"standard: {GIVEN} pairs, then a key again, or {FILLERS} fillers"
    axis.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right", bbox_to_anchor=(1, 0.9))
