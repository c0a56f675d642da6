"""Whether lm-evaluation-harness finds the same with the model ``venturi`` as with its own ``hf``.

    make lm-eval-check

Serves a model's own weights, and runs both in lm_eval's environment (``bench/peers/lm-eval.txt``).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from server.config import EMBEDDED_MODEL
from server.testing import ServerProcess

SCRIPT = Path(__file__).parent / "peers" / "run_lm_eval.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of lm_eval's environment")
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    given = parser.parse_args()
    flags = (str(given.model), "--recipe", "none", "--kv-dtype", "fp32")
    with ServerProcess(*flags, timeout_s=600.0) as server:
        arguments = [given.python, str(SCRIPT), "--model", str(given.model)]
        done = subprocess.run([*arguments, "--target", server.target], check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
