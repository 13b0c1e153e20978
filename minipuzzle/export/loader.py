"""Loads an exported folder as any user would and compares what it computes. Started by verify.py.

A script, not a module: it must not import minipuzzle, so that nothing of it can help the folder.

    python -I loader.py FOLDER WORK     reads WORK/expected.safetensors, writes WORK/report.json
"""

import json
import sys
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main(folder: str, work: Path) -> None:
    """Compare and report."""
    expected = load_file(work / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    logits = model(input_ids=expected["ids"].to(model.device), use_cache=False).logits
    difference = (logits.float().cpu() - expected["logits"]).abs().max()
    start, tokens = expected["start"].to(model.device), expected["tokens"]
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=tokens.shape[1],
        min_new_tokens=tokens.shape[1],
        do_sample=False,
    )[:, start.shape[1] :].cpu()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer.decode(written[0]), str)
    assert not any(name.split(".")[0] == "minipuzzle" for name in sys.modules)
    report = {
        "max_logit_difference": float(difference),
        "logits_compared": logits.numel(),
        "tokens": written[0].tolist(),
        "tokens_agree": int((written == tokens).cumprod(1).sum()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    (work / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
