"""tritale doctor: what is wrong with a run, and what to do."""

import argparse

from . import options

HELP = "look at a run's own data: what is wrong with it, the evidence, and the config line that mends it"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "run_dir", "folder of a running or finished run, such as out/quickstart")
    p.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from ..evaluation.doctor import RULES, diagnose
    from ..evaluation.run_facts import RunFacts

    facts = RunFacts.read(args.run_dir)
    found = diagnose(facts)
    if args.json:
        print(json.dumps([asdict(d) for d in found], indent=2, ensure_ascii=False))
        return
    for d in found:
        print(f"{d.text}\n  evidence: {d.evidence}\n  → {d.remedy}\n")
    if not found:
        print(f"Nothing found by {len(RULES)} rules in {len(facts.lines):,} lines of metrics ({facts.state}, step {facts.step:,}).")
