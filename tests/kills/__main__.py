"""``python -m tests.kills --kills 1000``: kill daemons, and tell what came of it.

Exit status 1 if anything was not as promised; the directories to look into are told and kept.
"""

import argparse
import json
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import trio

from tests.kills import grounds
from tests.kills.campaign import Campaign
from tests.kills.report import figures, summary


def tell(line: str) -> None:
    """Print *line* at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, help="how many (as many as every step takes)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9), help="of all that is random")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures for programs")
    parser.add_argument("--grounds", default=",".join(grounds.NAMES), help="where: %(default)s")
    parser.add_argument("--no-guard", action="store_true", help="have recover settle everything")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="hypemand-kills-"))
    campaign = Campaign(options.seed, directory, tell, guard=not options.no_guard)
    tell(f"seed {options.seed}")
    trio.run(campaign.run, options.kills, options.grounds.split(","))
    tell(summary(campaign))
    if options.json:
        options.json.write_text(json.dumps(figures(campaign), indent=2) + "\n")
    if campaign.failures:
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
