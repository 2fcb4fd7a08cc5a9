"""An audio encoder tells sounds apart: trained on clear ones, adapted to those of a bad telephone line.

    python examples/classify_audio.py

Whisper's encoder with a classifying head, made from a configuration, over log-mel spectrograms of sounds that are
synthesised here: a steady tone, one that rises, one that falls, one that trembles, and noise. The adapter is for the
attention and for the two convolutions in front of it; the head is trained in full. Printed: held-out accuracy on the
line before, after, and in ONNX Runtime; and the check of the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from classification import accuracy, fit
from to_onnx import to_session

import lora_fx

RATE, SECONDS, BINS = 4000, 0.32, 16  # samples a second, length of a sound, mel bins
FRAMES = 32  # of 10 ms
KINDS = ("steady", "rising", "falling", "trembling", "noise")


def sounds(rows: int, *, on_the_line: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms, float32 (rows, bins, frames), and kinds (rows,)."""
    random = np.random.default_rng(seed)
    kinds = random.integers(len(KINDS), size=rows)
    time = np.arange(int(RATE * SECONDS)) / RATE
    waves = np.stack([_wave(KINDS[kind], time, random) for kind in kinds])
    if on_the_line:
        waves = np.tanh(4 * waves) / 2 + random.normal(0, 0.3, waves.shape)  # clipped, and it hisses
        waves = np.diff(waves, prepend=0)  # no low notes
    return torch.tensor(_log_mel(waves), dtype=torch.float32), torch.tensor(kinds)


def _wave(kind: str, time: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if kind == "noise":
        return random.normal(0, 0.5, time.shape)
    start, phase = random.uniform(500, 900), random.uniform(0, 2 * np.pi)
    slope = {"rising": 1, "falling": -1}.get(kind, 0) * random.uniform(800, 1200)
    tremble = 15 * np.sin(2 * np.pi * 8 * time) if kind == "trembling" else 0
    return np.sin(2 * np.pi * (start * time + slope * time**2 / 2) + tremble + phase)


def _log_mel(waves: np.ndarray) -> np.ndarray:
    """Triangles on the mel scale over the spectra of frames of 20 ms, each 10 ms later: (rows, bins, frames)."""
    hop, size = RATE // 100, RATE // 50
    padded = np.pad(waves, ((0, 0), (0, size - hop)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size, axis=1)[:, ::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2  # (rows, frames, frequencies)
    edges = 700 * (np.exp(np.linspace(0, np.log1p(RATE / 2 / 700), BINS + 2)) - 1)
    frequencies = np.fft.rfftfreq(size, 1 / RATE)
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.clip(np.minimum(rise, fall), 0, None)  # (bins, frequencies)
    return np.log(power @ filters.T + 1e-3).swapaxes(1, 2) / 4


def tiny_whisper() -> transformers.WhisperForAudioClassification:
    """Two layers. A model of yours: `from_pretrained`."""
    config = transformers.WhisperConfig(
        num_mel_bins=BINS,
        max_source_positions=FRAMES // 2,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        classifier_proj_size=32,
        num_labels=len(KINDS),
        init_std=0.1,
    )
    torch.manual_seed(0)
    return transformers.WhisperForAudioClassification(config)


def main(steps: int = 100) -> dict[str, float]:
    """Train the base, adapt it, deploy it; what was measured."""
    model = tiny_whisper()
    fit(lambda x: model(x).logits, list(model.parameters()), *sounds(600, on_the_line=False, seed=0), 150, lr=3e-3)

    features, kinds = sounds(300, on_the_line=True, seed=1)
    held_out, answers = sounds(300, on_the_line=True, seed=2)
    example = {"input_features": features[:4]}
    traced = lora_fx.trace(model.eval(), (), example, dynamic_shapes={"input_features": {0: "batch"}})
    config = lora_fx.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["conv1", "conv2", "q_proj", "v_proj"],
        modules_to_save=["projector", "classifier"],
    )
    gm = lora_fx.inject(traced, config)
    lora_fx.print_trainable_parameters(gm)

    with torch.no_grad():
        before = accuracy(gm.eval()(input_features=held_out).logits, answers)
    gm.train()
    losses = fit(lambda x: gm(input_features=x).logits, lora_fx.lora_parameters(gm), features, kinds, steps)
    with torch.no_grad():
        after = accuracy(gm.eval()(input_features=held_out).logits, answers)
    with tempfile.TemporaryDirectory() as directory:
        session, checked = to_session(traced, gm, Path(directory), example)
        (logits, *_) = session.run(["logits"], {"input_features": held_out.numpy()})
    found = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "before": before,
        "after": after,
        "in ONNX Runtime": accuracy(torch.from_numpy(logits), answers),
        **checked,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
