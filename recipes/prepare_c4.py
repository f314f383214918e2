"""Tokenises C4, or any text, once, for runs that read ``--data.train prepared:<directory>``.

    python recipes/prepare_c4.py --data hub:allenai/c4:en:train --tokenizer sample --output data/c4-tokens

A killed preparation goes on with the files that are left when it is started again in the same way.
"""

# First: it says how threads wait, which is read when torch is loaded.
import nt_hf  # noqa: F401  # isort: skip

import argparse
import logging
import os
import sys
import time

from tqdm import tqdm

from nt_hf.cli.program import run
from nt_hf.data.prepared import Shard, prepare
from nt_hf.data.streams import load_tokenizer

logger = logging.getLogger("nt_hf.prepare")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="text sources: hub:…, files, globs, sample:train")
    parser.add_argument("--tokenizer", default="sample", help="sample, a directory or a hub name (%(default)s)")
    parser.add_argument("--output", required=True, help="directory for the tokens")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="files at a time (%(default)s)")
    parser.add_argument("--text_field", default="text", help="field that holds the text (%(default)s)")
    parser.add_argument("--on_bad_line", default="error", choices=["error", "skip"], help="%(default)s")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.tokenizer)

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
        options.data,
        tokenizer,
        options.output,
        processes=options.processes,
        text_field=options.text_field,
        on_bad_line=options.on_bad_line,
        progress=progress,
    )
    bar.close()
    rate = f"{tokens / (time.perf_counter() - start):,.0f} tokens/s" if tokens else "nothing was left to do"
    logger.info(
        "%s: %d documents, %d tokens in %d shards, %d bad lines left out; %s",
        options.output, index["documents"], index["tokens"], len(index["shards"]), index["bad_lines"], rate,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
