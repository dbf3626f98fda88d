"""Markdown that GitHub shows as it is meant: one line a paragraph, and folded sections.

GitHub shows a line break inside a paragraph of a pull request as a line break, so that wrapped text falls apart.
"""

import re
from collections.abc import Iterator

KEPT = re.compile(r"[|>#<`]|[-*] |\d+\. ")  # the first letters of lines that are no part of a paragraph


def unwrapped(text: str) -> str:
    """The text with each paragraph and each item of a list on one line; code and tables are not changed."""
    return "\n".join(_joined(text.split("\n"))) + "\n" * text.endswith("\n\n")


def _joined(lines: list[str]) -> Iterator[str]:
    held: str | None = None  # the paragraph so far
    in_code = False
    for line in lines:
        fence = line.startswith("```")
        if in_code or fence or not line or KEPT.match(line):
            if held is not None:
                yield held
            held = None
            in_code ^= fence
            if in_code or fence or not line or not re.match(r"[-*] ", line):
                yield line
            else:
                held = line  # an item, which the next line may continue
        else:
            held = line.strip() if held is None else f"{held} {line.strip()}"
    if held is not None:
        yield held


def folded(text: str) -> str:
    """The text with every section of the second level inside a <details>, whose summary is the section's heading."""
    first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    blocks = [first.rstrip("\n")]
    for section in sections:
        heading, _, body = section.partition("\n")
        blocks.append(f"<details>\n<summary>{heading}</summary>\n\n{body.strip(chr(10))}\n\n</details>")
    return "\n\n".join(blocks) + "\n"
