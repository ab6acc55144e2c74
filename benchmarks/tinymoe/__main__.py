"""Command line: `python -m tinymoe corpus|train|export|card`, run from `benchmarks/`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .config import CONFIGS

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="tinymoe", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("tinymoe-work"), help="folder of intermediate files")
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="download texts, split them, train the tokenizer")
    corpus.add_argument("--vocabulary", type=int, default=4096)
    corpus.add_argument("--exclude", type=Path, help="folder of NAME.txt whose documents must not be trained on")
    corpus.add_argument("--tokenizer", type=Path, help="use this one, as going on from an exported model must")
    train = commands.add_parser("train", help="train a model, or go on from its checkpoint")
    train.add_argument("name", choices=sorted(CONFIGS))
    train.add_argument("--minutes", type=float, required=True, help="wall time in all, over every resumption")
    train.add_argument("--init", type=Path, help="exported GGUF to start from, where there is no checkpoint")
    train.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    train.add_argument("--set", nargs=2, action="append", default=[], metavar=("OPTION", "VALUE"))
    export = commands.add_parser("export", help="write a checkpoint as GGUF: F32, F16 and Q8_0")
    export.add_argument("name", choices=sorted(CONFIGS))
    export.add_argument("--checkpoint", type=Path, help="default: the last one of the training")
    card = commands.add_parser("card", help="measure exported models and write CARD.md")
    card.add_argument("names", nargs="+", choices=sorted(CONFIGS), help="the first is the one that ships")
    card.add_argument("--first", type=Path, help="GGUF of an earlier model to compare the first with")
    card.add_argument("--first-heldout", type=Path, help="folder of that model's own held-out texts")
    options = parser.parse_args()
    if options.command == "corpus":
        from .corpus import build

        build(options.work, options.vocabulary, options.exclude, options.tokenizer)
    elif options.command == "train":
        from .train import Options
        from .train import train as run

        extra: dict[str, Any] = {
            key: float(value) if "." in value or "e" in value else int(value) for key, value in options.set
        }
        out = options.work / options.name
        run(Options(options.name, options.work, out, options.minutes, options.init, workers=options.workers, **extra))
    elif options.command == "export":
        from .export import export as run_export

        checkpoint = options.checkpoint or options.work / options.name / "checkpoint.pt"
        for path in run_export(checkpoint, options.work / "tokenizer.json", options.work / "gguf", options.name):
            print(path)
    elif options.command == "card":
        from .card import write

        write(HERE, options.names, options.work, options.first, options.first_heldout)


if __name__ == "__main__":
    main()
