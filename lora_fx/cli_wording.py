"""Messages of the Python interface in the words of the command line: `check=False` is `--no-check` there."""

from __future__ import annotations

import re

# What a message says, and what to say here; the first that fits takes it.
_WORDS = (
    (r"\bexport_onnx\(\.\.\., check=False\)", "--no-check"),
    (r"\bcheck=False\b", "--no-check"),
    (r"\bread_adapter\(directory, integrity='ignored'\)", "--integrity ignored"),
    (r"\bleave opset=None", "leave --opset out"),
    (r"\bopset=(\d+)", r"--opset \1"),
    (r"\bexport_onnx\(\.\.\., quantize='(int\d)'\)", r"--quantize \1"),
    (r"\b(dtype|provider|integrity)=(['\"])([a-z0-9]+)\2", r"--\1 \3"),
    (r"\boverwrite=True \(--overwrite\)", "--overwrite"),
    (r"\bin_place=True", "--in-place"),
    (r"\bpartial=True", "--partial"),
    (r"\bstrength=(\S+)", r"--strength \1"),
    (r"\brank= that, or with rank=None", "--rank that, or without --rank"),
    (r"\bunfold_onnx\('([^']+)'\)", r"lora-fx onnx unfold \1"),
    (r"\bunfold_onnx\b(?!\()", "lora-fx onnx unfold"),
    (r"\badd_adapter_inputs\b(?!\()", "lora-fx onnx inputs"),
    (r"\bfold_into_onnx\b(?!\()", "lora-fx onnx fold"),
    (r"(?<!in Python, )\bmapping=\{", "in Python, mapping={"),
    (r"\bexport_onnx\(gm, '([^']+)'\) writes", r"lora-fx export MODEL_DIR [ADAPTER_DIR] \1 writes"),
    (r"\bfind_sites\(gm\)", "lora-fx inspect MODEL_DIR"),
    (r"\bmake_plan\(gm, config\)", "lora-fx inspect MODEL_DIR ADAPTER_DIR"),
)
_PATTERNS = tuple((re.compile(pattern), words) for pattern, words in _WORDS)


def as_options(message: str) -> str:
    """`message`, with options where it names arguments that they stand for."""
    for pattern, words in _PATTERNS:
        message = pattern.sub(words, message)
    return message
