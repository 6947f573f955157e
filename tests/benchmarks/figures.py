"""What `run.py` measured as figures, for notebooks/benchmark.ipynb."""

from xdistil.plots import CYCLE, _figure, _legend


def plot_rows(rows, stage, value, label):
    """Bars by setting, logarithmic; pale for later epochs. `rows`: dicts of "setting", "stage", "name", "part" and
    numbers, one of them `value` (None = not measured)."""
    rows = [row for row in rows if row["stage"] == stage and row[value]]
    settings, whose = (list(dict.fromkeys(row[key] for row in rows)) for key in ("setting", "name"))
    bars = list(dict.fromkeys((row["name"], row["part"]) for row in rows))
    fig, ax = _figure(f"{stage}: {label}", 4.6, yscale="log", ylabel=label, ymargin=0.12, xticks=range(len(settings)),
                      xticklabels=settings)
    for i, key in enumerate(bars):
        points = [(settings.index(row["setting"]) + 0.84 * ((i + 0.5) / len(bars) - 0.5), row[value]) for row in rows
                  if (row["name"], row["part"]) == key]
        drawn = ax.bar(*zip(*points, strict=True), 0.8 / len(bars), color=CYCLE[whose.index(key[0]) % len(CYCLE)],
                       alpha=0.5 if key[1] == "later" else 1, label=", ".join(key))
        ax.bar_label(drawn, fmt=lambda x: f"{x:,.0f}" if x > 99 else f"{x:.3g}", fontsize=8)
    return _legend(fig, 4)


def plot_epochs(rows, setting, sentences=10_000, epochs=10):
    """Minutes after each epoch of stage 1 in a setting. `rows` as in `plot_rows`, with "stage" and "seconds" (per
    sentence); whoever has no later epochs pays for the first again and again."""
    fig, ax = _figure(f"Stage 1 on {sentences:,} sentences, {setting}", 4.6, 8.5, xlabel="epochs", ylabel="minutes")
    seconds = {(r["name"], r["part"]): r["seconds"] for r in rows if (r["setting"], r["stage"]) == (setting, "stage1")}
    for (name, _), colour in zip((key for key in seconds if key[1] == "first"), CYCLE, strict=False):
        first = seconds[name, "first"]
        ax.plot(range(1, epochs + 1), [sentences / 60 * (first + n * seconds.get((name, "later"), first))
                                       for n in range(epochs)], "o-", color=colour, label=name)
    return _legend(fig, 3)
