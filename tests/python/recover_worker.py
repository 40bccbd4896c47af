"""One process of several that recover, for test_recover_ranks.py: ``python recover_worker.py CASE FOLDER``.

It prints one line of JSON: the steps taken, or the error's class and sentence.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint_models import build
from folders import TEXT, tokenizer

from llmprune.errors import LlmpruneError
from llmprune.recovery.recover import recover

WORDS = TEXT.split()
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]


def main() -> None:
    """Recover a tiny model, with the second process unlike or unlucky as the case says."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    odd = os.environ["RANK"] == "1"
    model: Any = build("llama_gqa")
    if odd and case == "weights":
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
    if odd and case == "dies":
        calls = 0

        def leave(*_: Any) -> None:
            nonlocal calls
            calls += model.training
            if calls == 6:  # the second half of the third step: a checkpoint of the second one is there
                os._exit(9)

        model.register_forward_pre_hook(leave)
    begin = time.monotonic()
    try:
        result = recover(
            model,
            tokenizer(),
            TEXTS[::-1] if odd and case == "data" else TEXTS,
            steps=8,
            learning_rate=2e-3 if odd and case == "settings" else 1e-3,
            output=folder / "out",
            cutoff=24,
            batch_size=8,
            micro_batch_size=2,
            validation=8,
            validate_every=2,
            quiet=True,
        )
    except LlmpruneError as error:
        said = {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - begin}
    else:
        said = {"kind": None, "steps": result.steps}
    print(json.dumps(said))
    sys.stdout.flush()
    # Without a peer the connections' own clean-up waits for it.
    os._exit(0)


if __name__ == "__main__":
    main()
