"""Parts of the Markdown of a results file, as the pages of docs show them."""

from lib.common import RESULTS


def body(name: str) -> str:
    """Returns the Markdown of a results file from its first table on, without the title and the question."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    return text[text.index("\n|") + 1 :]


def sections(name: str) -> str:
    """Returns the Markdown of a results file from its first section on, with smaller headings, without the question."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    return text[text.index("\n## ") + 1 :].replace("## ", "### ")


def first_table(name: str) -> str:
    """Returns the first table of a results file."""
    return body(name).partition("\n\n")[0] + "\n"


def int8_products() -> str:
    """Returns the medians over the layers of ViT-B, a table for each processor under its name."""
    parts = (RESULTS / "cpu_int8_gemm.md").read_text(encoding="utf-8").split("\n\n")
    names = [part.partition(";")[0] for part in parts if ", measured " in part]
    tables = [parts[n + 1] for n, part in enumerate(parts) if part == "Medians over the layers of ViT-B:"]
    return "\n".join(f"{name}:\n\n{table}\n" for name, table in zip(names, tables, strict=True))
