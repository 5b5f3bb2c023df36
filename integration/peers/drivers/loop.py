"""Answer questions about checkpoints: one JSON line in, one out. Runs in a tool's environment.

    python loop.py DRIVER.py

A question is [function, argument...], names of the driver's functions and strings. The answer is
{"value": ...} or {"error": "..."}. Whatever the tool prints goes to stderr.
"""

import contextlib
import json
import os
import runpy
import sys
import traceback

import torch


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        torch.set_num_threads(2)
        driver = None
        for line in sys.stdin:
            function, *arguments = json.loads(line)
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    driver = driver or runpy.run_path(sys.argv[1])
                    found = {"value": driver[function](*arguments)}
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(found) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
