"""The console program ``nt-hf``. Each of its verbs is a module of ``nt_hf.cli`` with a function ``main(argv=None)``.

It lies beside the package, not in it: whoever imports ``nt_hf`` loads PyTorch and Transformers and registers the models
there, which takes seconds, and a list of verbs needs nothing of that.
"""

import importlib
import sys
from collections.abc import Sequence

# The module of each verb, and what ``nt-hf --help`` says of it.
VERBS = {
    "train": ("train", "pretrain a multi-head model, or continue a run"),
    "train-images": ("train_images", "train an image classifier with several heads, or continue a run"),
    "finetune": ("finetune", "fine-tune a checkpoint on text, answers or conversations (needs nt_hf[finetune])"),
    "prepare": ("prepare", "tokenize text once, for runs that read prepared tokens"),
    "tokenizer": ("tokenizer", "train a small tokenizer on any text"),
    "evaluate perplexity": ("perplexity", "perplexity and bits per byte of a checkpoint on any text"),
    "evaluate diversity": ("diversity", "how the heads of a checkpoint differ, and what their ensemble gains by it"),
    "evaluate zero-shot": ("zero_shot", "accuracy on lm-eval's tasks (needs nt_hf[eval])"),
    "evaluate images": ("images", "accuracy, calibration and robustness of an image classifier"),
    "evaluate compare": ("compare", "which differences between zero-shot results are real"),
    "plan": ("plan", "parameters, memory and time of a run before it is started"),
    "report": ("report", "table and plot of a run, also while it is training"),
}
GROUP = "evaluate"  # verbs of two words begin with it


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the verb that the arguments begin with; its module, and what that needs, is imported only now."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview(list(VERBS)))
    elif arguments[0] == "--version":
        from nt_hf import __version__

        sys.stdout.write(f"{__version__}\n")
    elif arguments[0] == GROUP and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        sys.stdout.write(overview([verb for verb in VERBS if verb.startswith(GROUP)]))
    else:
        words = 2 if arguments[0] == GROUP else 1
        verb = " ".join(arguments[:words])
        if verb not in VERBS:
            sys.exit(f"error: nt-hf {verb}: unknown; accepted are {', '.join(VERBS)}")
        from nt_hf.cli.program import run

        run(lambda: importlib.import_module(f"nt_hf.cli.{VERBS[verb][0]}").main(arguments[words:]))


def overview(verbs: Sequence[str]) -> str:
    """The help text that lists ``verbs``, one a line."""
    lines = [f"  {verb:<21}{VERBS[verb][1]}\n" for verb in verbs]
    return f"usage: nt-hf VERB [OPTIONS]\n\n{''.join(lines)}\nnt-hf VERB --help shows the options of a verb.\n"
