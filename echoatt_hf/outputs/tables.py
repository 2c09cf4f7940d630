"""Tables that read well in Markdown and in a terminal."""

__all__ = ["format_markdown"]


def format_markdown(lines: list[list[str]], left: int = 0) -> str:
    """
    A Markdown table, which also reads well in a terminal.

    Args:
        lines (`list[list[str]]`): cells, the header first.
        left (`int`, *optional*, defaults to 0): the column that is aligned to the left; all others are to the right.

    Returns:
        `str`: lines of the table.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if column == left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    texts = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = enumerate(zip(line, widths, strict=True))
        padded = [cell.ljust(width) if column == left else cell.rjust(width) for column, (cell, width) in cells]
        texts.append(f"| {' | '.join(padded)} |")
    return "\n".join(texts)
