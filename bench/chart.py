"""The decode benchmark's chart: bandwidth reached per context, one panel per geometry and batch."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, FAINT = "#1f2430", "#8a90a0"
COLOURS = ("#b8bdc9", "#d9a679", "#7fb5a8", "#1f7a6d", "#8e9bd6", "#3f4fa8")


def decode(path, env: dict, rows: list[dict]) -> None:
    panels = list(dict.fromkeys((row["geometry"], row["batch"]) for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    width, height = max(9.0, 6.2 * columns), 1.2 + 3.3 * lines  # inches
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, sharey=True)
    for (geometry, batch), axis in zip(panels, axes.flat, strict=False):
        _panel(axis, [row for row in rows if (row["geometry"], row["batch"]) == (geometry, batch)])
        title = f"{geometry} ({rows_shape(rows, geometry)}), batch {batch}"
        axis.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("KV cache read, GB/s", color=FAINT, fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.01, 1 - 0.38 / height),
        ncols=len(names),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1,
        columnspacing=1.4,
    )
    figure.suptitle(
        f"Decode, one attention layer, {env['dtype']}: bandwidth reached, and ms per step",
        x=0.012,
        y=1 - 0.12 / height,
        ha="left",
        va="top",
        fontsize=12,
        color=INK,
        fontweight="bold",
    )
    figure.text(
        0.012,
        0.008,
        f"{env['hardware']} · {env['threads']} threads · torch {env['torch']} · commit {env['commit']}",
        fontsize=7.5,
        color=FAINT,
    )
    figure.tight_layout(rect=(0, 0.2 / height, 1, 1 - 0.42 / height))
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
    print(f"chart: {path}")


def _panel(axis, rows: list[dict]) -> None:
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    names = list(dict.fromkeys(row["row"] for row in rows))
    width = 0.82 / len(names)
    for index, name in enumerate(names):
        for place, row in enumerate(row for row in rows if row["row"] == name):
            at = place + (index - (len(names) - 1) / 2) * width
            height = row["bytes_per_s"] / 1e9
            axis.bar(
                at,
                height,
                width * 0.92,
                color=COLOURS[index % len(COLOURS)],
                label=name if place == 0 else None,
            )
            axis.annotate(
                f"{row['us'] / 1000:.3g}",
                (at, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=INK,
            )
    for place, context in enumerate(contexts):
        ceiling = next(row["read_bandwidth"] for row in rows if row["context"] == context) / 1e9
        axis.plot([place - 0.45, place + 0.45], [ceiling] * 2, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if place == len(contexts) - 1:
            axis.annotate(
                "measured read bandwidth",
                (place + 0.45, ceiling),
                (0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
                color=INK,
            )
    axis.set_xticks(range(len(contexts)), [f"{context:,} keys" for context in contexts], color=INK, fontsize=9)
    axis.margins(y=0.12)
    axis.tick_params(length=0, labelcolor=INK, labelsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
    axis.grid(axis="y", color="#e8eaf0", linewidth=0.8)
    axis.set_axisbelow(True)


def rows_shape(rows: list[dict], geometry: str) -> str:
    row = next(row for row in rows if row["geometry"] == geometry)
    return f"{row['heads']}/{row['kv_heads']}/{row['dim']}"
