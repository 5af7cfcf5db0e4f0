"""The page of all model types of transformers, made from the table that bench/model_types.py writes."""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "results" / "model_types.csv"

INTRODUCTION = """# All model types

`attach` takes models of any type: where no [family](supported-models.md) has the couplings, it
[finds them by trials](howto/any-model.md). This table shows what it finds in a tiny random model of each of
the {count} model types that transformers maps for language, images with text, and speech. `python bench/model_types.py`
made it ({versions}).

Of these types, {attached} can be trained, {whole} of them with FFN and attention both in couplings.

- *Found*: *registered* couplings are those of a family; others are *discovered*.
- *FFN*, *attention*: *moves* and *confirmed*: the selected units are brought together, so that they are one slice of
  the weight; for discovered couplings, trials showed that this changes nothing. *in place*: the units are trained where
  they lie, through an index. The results are the same.
- *Others*: layers that share their units with no other and can be trained one by one (`l_ratio`).
- *Towers*: the parts of the model that have couplings. `towers=` chooses among them.
- *Checks*: attach changes no output, every slice that runs gets a gradient, a saved adapter loads again bit for bit,
  and the merged checkpoint loads again bit for bit and computes what was trained. A word stands for a check that fails.
  Where the plain model, too, is another one after transformers saved and loaded it, the note says so.
- Products may round differently where a weight lies at another address in memory. The merged checkpoint is therefore
  compared after its weights were copied to memory of their own; its outputs are then equal bit for bit.
- The column `made` of `{table}` says when each row was computed.
  {earlier} rows say *before*: an earlier state of the code made them. Those from before 19:48 compared the outputs of
  the merged checkpoint only to 1e-4.

| model type | mappings | found | FFN | attention | others | towers | checks | note |
|---|---|---|---|---|---|---|---|---|
"""
WORDS = {"output_unchanged": "output", "adapter_again": "adapter", "merged_again": "merge"}


def page(table: Path = TABLE) -> str:
    """The page, in Markdown."""
    head, *lines = table.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    attached = [row for row in rows if row["source"]]
    whole = [row for row in attached if row["ffn"] and row["attention"]]
    text = INTRODUCTION.format(
        count=len(rows),
        versions=head.removeprefix("# "),
        attached=len(attached),
        whole=len(whole),
        table=TABLE.relative_to(ROOT),
        earlier=sum("before" in row["made"] for row in rows),
    )
    return text + "\n".join(map(line, rows)) + "\n"


def line(row: dict[str, str]) -> str:
    """One line of the table."""
    cells = [
        f"`{row['type']}`",
        ", ".join(row["mappings"].split()),
        row["source"] or "refused",
        row["ffn"],
        row["attention"],
        "" if row["one_sided"] in ("", "0") else row["one_sided"],
        ", ".join(row["towers"].split()),
        checks(row) if row["source"] else "",
        row["note"].replace("|", "\\|").replace("<", "&lt;"),
    ]
    return f"| {' | '.join(cells)} |"


def checks(row: dict[str, str]) -> str:
    """The checks that fail, or that all pass."""
    reached, _, slices = row["gradients"].partition(" and ")[0].partition(" of ")
    failing = [word for check, word in WORDS.items() if row[check] not in ("yes", "plain differs too")]
    failing += [f"gradients: {row['gradients']}"] if reached != slices or not slices else []
    return ", ".join(failing) or "pass"
