"""`scalellm up --foreground` with the programs that a test names: told the options, as JSON, on standard input."""

import json
import os
import sys
from pathlib import Path

from scalellm.launcher import Instance, LauncherError, UpOptions, run_in_foreground


def main() -> int:
    told = json.loads(sys.stdin.readline())
    options = UpOptions.from_message(told["options"])

    def write(line: str) -> None:
        print(line, flush=True)

    try:
        return run_in_foreground(Instance(Path(told["home"])), options, write, os.environ)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
