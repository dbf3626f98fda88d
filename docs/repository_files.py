"""A mkdocs hook that adds the repository files that the pages link to.

In the repository, `../benchmarks/results/budget.md` is a valid link; the built site has no such file. This hook copies
every file that the pages link to, directly or through other files, into `repository/`, and rewrites the links. A link
to a folder becomes plain text.
"""

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

UNDER = "repository"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the linked repository files to the site's files."""
    pages = Path(config["docs_dir"])
    root = pages.parent
    todo = [(path.relative_to(root).as_posix(), path) for path in pages.glob("*.md")]
    seen: set[str] = set()
    while todo:
        name, path = todo.pop()
        for _, target, _ in LINK.findall(path.read_text(encoding="utf-8")):
            linked = normpath(f"{name}/../{target}")
            inside = linked.startswith((f"{pages.name}/", ".."))
            if linked in seen or inside or not (root / linked).is_file():
                continue
            seen.add(linked)
            files.append(File.generated(config, f"{UNDER}/{linked}", abs_src_path=str(root / linked)))
            if linked.endswith(".md"):
                todo.append((linked, root / linked))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns the page with its links rewritten to paths on the site."""
    pages = Path(config["docs_dir"])
    root = pages.parent
    here = page.file.src_uri
    name = here.removeprefix(f"{UNDER}/") if here.startswith(f"{UNDER}/") else f"{pages.name}/{here}"

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        linked = normpath(f"{name}/../{target}")
        if not (root / linked).is_file():
            return text.strip("![]") if (root / linked).exists() else match[0]  # mkdocs reports missing files
        inside = linked.startswith(f"{pages.name}/")
        site = linked.removeprefix(f"{pages.name}/") if inside else f"{UNDER}/{linked}"
        return f"{text}({relpath(site, here.rpartition('/')[0] or '.')}{anchor})"

    return LINK.sub(rewritten, markdown)
