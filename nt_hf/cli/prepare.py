"""Tokenises C4, or any text, once, for runs that read ``--data.train prepared:<directory>``.

    nt-hf prepare --data hub:allenai/c4:en:train --tokenizer sample --output data/c4-tokens

A killed preparation continues with the remaining files when the same command is started again.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from ..data.prepare import Shard, prepare
from ..data.tokenizers import load_tokenizer
from .program import verb_parser

logger = logging.getLogger("nt_hf.prepare")


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("prepare", __doc__)
    parser.add_argument("--data", nargs="+", required=True, help="text sources: hub:…, files, globs, sample:train")
    parser.add_argument("--tokenizer", default="sample", help="sample, a directory or a hub name (%(default)s)")
    parser.add_argument("--output", required=True, help="directory for the tokens")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="files at a time (%(default)s)")
    parser.add_argument("--text_field", default="text", help="field that holds the text (%(default)s)")
    parser.add_argument("--on_bad_line", default="error", choices=["error", "skip"], help="%(default)s")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)

    start, done, tokens = time.perf_counter(), 0, 0  # the tokens made here, without those that were there
    bar = tqdm(disable=not sys.stderr.isatty(), unit="file", dynamic_ncols=True)

    def progress(shard: Shard, total: int, new: bool) -> None:
        nonlocal done, tokens
        done, tokens = done + 1, tokens + shard.tokens * new
        rate = tokens / (time.perf_counter() - start)
        bar.total = total
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update()
        if bar.disable and new:
            logger.info("%d of %d files: %s, %d tokens, %.0f tokens/s", done, total, shard.file, shard.tokens, rate)

    index = prepare(
        args.data,
        tokenizer,
        args.output,
        processes=args.processes,
        text_field=args.text_field,
        on_bad_line=args.on_bad_line,
        progress=progress,
    )
    bar.close()
    rate = f"{tokens / (time.perf_counter() - start):,.0f} tokens/s" if tokens else "nothing was left to do"
    logger.info(
        "%s: %d documents, %d tokens in %d shards, %d bad lines left out; %s",
        args.output, index["documents"], index["tokens"], len(index["shards"]), index["bad_lines"], rate,
    )  # fmt: skip
