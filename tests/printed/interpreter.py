"""The interpreter of a page's Python blocks: reads a block a line (JSON) and answers with {"error": null or a traceback}."""

import json
import linecache
import os
import sys
import traceback


def run(question: dict, names: dict) -> str | None:
    """Execute a block; its traceback, or None."""
    name, source = question["name"], question["source"]
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec"), names)
    except BaseException:
        return traceback.format_exc()
    return None


def main() -> None:
    names = {"__name__": "__main__"}
    # what a block prints, or a process that it starts, is nobody's answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps({"error": run(json.loads(line), names)}) + "\n")
        answers.flush()


# a process that one of the blocks starts imports this file once more
if __name__ == "__main__":
    main()
