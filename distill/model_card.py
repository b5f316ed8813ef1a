"""A run's `README.md`: what the student is, what it was made of, what it is worth, and how to use it."""

import students
from distill.report import human_macs
from distill.run_folder import RunFolder, write_file
from distill.summary import describe_config, summary_table

USAGE = """\
```python
import students
from distill.predict import predict

detector = students.load("student")  # seen from this folder
found = predict(detector, "photo.jpg")
for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
    print(detector.class_names[label], f"{score:.2f}", [round(x) for x in box])  # xyxy in pixels of the photo
```
"""


def write_model_card(run: RunFolder) -> None:
    """Writes the card of a finished run, from what lies in its folder."""
    summary, config = run.summary, run.config
    class_names = list(summary["student"]["per_class"])
    height, width = students.read_info(run.student)["image_size"]
    name = run.path.resolve().name
    before = summary.get("student_before")
    of = f", {before['macs'] / summary['student']['macs']:.1f} times fewer MACs than before its cuts" if before else ""
    teacher = describe_config(config).get("Teacher")
    taught = f", taught by `{teacher}`" if teacher else ""
    columns, rows = summary_table(summary)
    lines = [
        f"# {name}",
        "",
        f"An object detector for {len(class_names)} classes ({', '.join(class_names)}), made by distill: "
        f"`{next(config['student'][key] for key in ('backbone', 'path', 'name') if config['student'].get(key))}`"
        f"{taught}{of}.",
        "",
        "## Recipe",
        "",
        *(f"- {key}: {value}" for key, value in describe_config(config).items()),
        "",
        "Every setting is in [`config.yaml`](config.yaml), the course of the training in [`report.html`](report.html).",
        "",
        "## Numbers",
        "",
        f"On the split `{summary['split']}` at {width}x{height} px, weights of the last epoch, nothing selected; "
        "latency of one image where it was trained.",
        "",
        _row(columns),
        _row(["---", *["---:"] * (len(columns) - 1)]),
        *map(_row, rows),
        "",
        "| AP by class | |",
        "| --- | ---: |",
        *(_row([key, "-" if ap is None else f"{ap:.3f}"]) for key, ap in summary["student"]["per_class"].items()),
        "",
        "## Use",
        "",
        f"The detector is the folder [`student`](student): a recipe, its cuts and safetensors, "
        f"{human_macs(summary['student']['macs'])} MACs. With the packages `students` and `distill` installed:",
        "",
        USAGE,
    ]
    write_file(run.card_file, "\n".join(lines))


def _row(cells: list[str | None] | tuple[str, ...]) -> str:
    return "| " + " | ".join("-" if cell is None else cell.replace("|", "\\|") for cell in cells) + " |"
